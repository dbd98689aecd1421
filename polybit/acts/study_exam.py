"""What a study measures its models on, made once and kept: prompts, the float model's answers, text, questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from polybit.acts.study_answers import Exam, Told, examined, split_prompts
from polybit.acts.study_kept import kept
from polybit.data.chat import encode_prompt, read_prompts
from polybit.data.stream import token_stream
from polybit.data.text import has_chat_template, read_corpus, windows
from polybit.evals.choices import choice_sets
from polybit.hub.lm import LocalLM
from polybit.hub.models import is_embedded, open_model
from polybit.hub.workspace import model_digest
from polybit.options.checks import names_of
from polybit.options.study import StudyOptions
from polybit.train.material import PairMaterial, kept_tokens, read_cache, score, write_cache
from polybit.train.pairs import Pair

TEXT_WINDOW = 256  # tokens


def opened(model: str, options: StudyOptions) -> tuple[Exam, dict[str, int], Told]:
    """(the exam, how much is asked, the float model's own numbers); prompts and float answers are made once."""
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    lm = LocalLM(*open_model(model, trust_remote_code=options.trust_remote_code))
    if not (out / "test.jsonl").is_file():
        split_prompts(
            lm, names_of(options.prompts), out, train=options.train_prompts, test=options.test_prompts,
            longest=options.prompt_tokens,
        )  # fmt: skip
    chat = has_chat_template(lm.tokenizer)
    prompts = [encode_prompt(lm.tokenizer, p) for p in read_prompts(out / "test.jsonl", chat=chat)]
    documents = read_corpus(options.text, lm.tokenizer).documents
    stream = token_stream(lm.tokenizer, documents)
    sets = choice_sets(names_of(options.choices), limit=options.choice_items) if options.choices else []
    exam = Exam(
        prompts,
        float_answers(lm, prompts, options).chosen,
        windows(stream, TEXT_WINDOW, bos=lm.tokenizer.bos_token_id, count=options.text_windows),
        sets,
        options.choice_items if not sets and is_embedded(model) else 0,
        options.max_tokens,
    )
    floats = kept(out / "measured" / "float.json", lambda: {"bits": 16.0, **examined(lm, exam, "float")})
    asked = {"prompts": len(prompts), "train_prompts": options.train_prompts, "windows": len(exam.windows_NT)}
    asked |= {f"questions of {name}": len(right) for name, right in floats["tasks"].items()}
    return exam, asked, floats


def float_answers(lm: LocalLM, prompts: list[list[int]], options: StudyOptions) -> PairMaterial:
    """The float model's greedy answers and its likeliest tokens at each of theirs."""
    digest = model_digest(lm.model)
    said = kept(
        options.out / "float-answers.json",
        lambda: {"answers": lm.generate_tokens(prompts, max_tokens=options.max_tokens, label="float answers")},
    )["answers"]
    rows = [Pair(prompt, answer, answer, None) for prompt, answer in zip(prompts, said, strict=True)]
    path = options.out / "float-answers.safetensors"
    if not path.is_file():
        scored = score(lm, prompts, said, top=kept_tokens(lm.vocabulary), label="float answers, scores")
        write_cache(path, PairMaterial(prompts, scored, {}, lm.pad_token()), reference=digest)
    return read_cache(path, rows, reference=digest, pad_token=lm.pad_token())


def made(out: Path, make: Callable[[], Any]) -> Path:
    """A directory that is there, or is made now; it appears whole or not at all."""
    if not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        make()
    return out
