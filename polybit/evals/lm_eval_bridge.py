"""lm-eval's tasks on our models: its LM interface over LocalLM, scored as its own Hugging Face model scores.

Needs the extra `lm-eval`. Token boundaries, special tokens, truncation and stop strings follow
lm_eval.models.huggingface.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from polybit.core.runtime import PolybitError
from polybit.evals.scoring import bootstrap
from polybit.evals.sharing import Here, Share
from polybit.hub.lm import LocalLM

GENERATED_TOKENS = 256  # lm-eval's own default
HEAVY = ("doc", "arguments", "resps", "filtered_resps", "target")  # of a sample; nothing is compared there


class BridgeLM(TemplateLM):
    """A LocalLM as lm-eval sees a model, at whatever precision it currently has."""

    def __init__(self, lm: LocalLM) -> None:
        super().__init__()
        self.lm, self.tokenizer = lm, lm.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    @property
    def max_length(self) -> int:
        """Longest input in tokens."""
        return self.lm.max_length or 2048

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids with the special tokens the tokenizer itself adds, unless the text already begins with BOS."""
        if add_special_tokens is None:
            start = self.tokenizer.decode(self.prefix_token_id)
            if not string.startswith(start):
                return list(self.tokenizer.encode(string))
        return list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self.lm.loglik_tokens([(context, continuation) for _, context, continuation in requests])
        return [(reply.total_nats, reply.is_greedy) for reply in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in windows, every token predicted once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, (text,) in enumerate(request.args for request in requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [nats for nats, _ in self._loglikelihood_tokens(windows)])
        return totals.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers cut at the stop strings; a task that asks for sampling is refused."""
        answers: list[str | None] = [None] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._settings(request.args[1]), []).append(number)
        for (tokens, stop), members in groups.items():
            room = self.max_length - tokens
            if room < 1:
                raise PolybitError(
                    f"A task of lm-eval asks for {tokens} new tokens, but the model reads {self.max_length}; leave the "
                    "task out or give it a smaller max_gen_toks."
                )
            prompts = [self.tok_encode(requests[n].args[0])[-room:] for n in members]
            for n, ids in zip(members, self.lm.generate_tokens(prompts, max_tokens=tokens, stop=stop), strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                for mark in stop:
                    text = text.split(mark)[0]
                answers[n] = text
        return [str(text) for text in answers]

    def _settings(self, wanted: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
        """Longest answer and stop strings of a request."""
        warm = wanted.get("temperature") or 0
        if wanted.get("do_sample", warm > 0) or (wanted.get("num_beams") or 1) > 1:
            raise PolybitError(
                "A task of lm-eval asks for sampling or beams, but answers here are greedy; leave it out."
            )
        until = wanted.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        tokens = next(
            (wanted[k] for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if k in wanted), GENERATED_TOKENS
        )
        return int(tokens), tuple(text for text in [*stop, end] if text)


def evaluate_tasks(
    lm: Any, tasks: Sequence[str], *, include: Path | None = None, limit: int | None = None, shots: int | None = None
) -> dict[str, Any]:
    """lm-eval's results on its tasks with any of its models: {"results": ..., "samples": ...}."""
    manager = TaskManager(include_path=None if include is None else str(include))
    missing = [name for name in tasks if name not in manager.all_tasks]
    if missing:
        raise PolybitError(
            f"lm-eval does not know the task {missing[0]!r}; see `lm-eval ls tasks`, or name --lm-eval-path."
        )
    try:
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=shots,
            bootstrap_iters=0,
            log_samples=True,
        )
    except PolybitError:
        raise
    except (ConnectionError, OSError) as error:
        raise PolybitError(
            f"lm-eval cannot read the data of {', '.join(tasks)} ({error!s:.120}); check the connection."
        ) from error
    assert found is not None  # None only on ranks other than 0
    return {"results": found["results"], "samples": found["samples"]}


def evaluated(
    reference: LocalLM,
    quantized: LocalLM,
    of_reference: bool,
    preset: str | None,
    tasks: Sequence[str],
    rest: Mapping[str, Any],
) -> dict[str, Any]:
    """`evaluate_tasks` of one of two models, the quantized one at a preset; of the samples what is compared."""
    lm = reference if of_reference else quantized
    with lm.at(None if of_reference else preset):
        found = evaluate_tasks(BridgeLM(lm), tasks, **rest)
    return {**found, "samples": {task: [slim(row) for row in rows] for task, rows in found["samples"].items()}}


def slim(row: Mapping[str, Any]) -> dict[str, Any]:
    """A sample without its document and what was asked and replied."""
    return {key: value for key, value in row.items() if key not in HEAVY}


def compare_tasks(
    reference: LocalLM,
    quantized: LocalLM,
    presets: Sequence[str | None],
    tasks: Sequence[str],
    *,
    seed: int = 0,
    share: Share | None = None,
    **rest: Any,
) -> dict[str, Any]:
    """{TASK: {"reference": {METRIC: number}, "presets": {NAME: {METRIC: {"value", "difference": E, "flips": E}}}}}.

    `value` is lm-eval's own figure; difference and flips are paired over the samples of yes/no metrics.
    """
    parts = [(True, None, tasks, rest), *((False, preset, tasks, rest) for preset in presets)]
    base, *others = (share or Here(reference, quantized))(evaluated, parts, "lm-eval")
    found: dict[str, Any] = {
        task: {"n": len(base["samples"].get(task, ())), "reference": figures(row), "presets": {}}
        for task, row in base["results"].items()
    }
    for preset, now in zip(presets, others, strict=True):
        for task, row in now["results"].items():
            found[task]["presets"][preset or "as loaded"] = {
                name: {"value": value, **paired_samples(base["samples"], now["samples"], task, name, seed=seed)}
                for name, value in figures(row).items()
            }
    return found


def figures(row: dict[str, Any]) -> dict[str, float]:
    """lm-eval's numbers of one task without standard errors; the filter `none` is not named."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "," in key and "_stderr" not in key
    }


def paired_samples(base: Any, now: Any, task: str, metric: str, *, seed: int) -> dict[str, Any]:
    """Paired difference and flips of a metric that every sample has as 0 or 1; empty for others."""
    name, _, wanted = metric.partition(",")
    values = []
    for side in (base, now):
        rows = [row for row in side.get(task, ()) if row.get("filter", "none") == (wanted or "none")]
        values.append({row["doc_id"]: row.get(name) for row in rows})
    was, is_now = values
    seen = [*was.values(), *is_now.values()]
    if not seen or was.keys() != is_now.keys() or any(value not in (0, 1) for value in seen):
        return {}
    old, new = (np.array([side[key] for key in was], dtype=bool) for side in values)
    return {
        "difference": bootstrap(new.astype(float), paired_with=old.astype(float), seed=seed).to_json(),
        "flips": bootstrap(old != new, seed=seed).to_json(),
    }
