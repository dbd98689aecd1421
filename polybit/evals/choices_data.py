"""Multiple-choice sets and GSM8K as items: MMLU, CommonsenseQA, ARC, HellaSwag, PIQA, BoolQ, OpenBookQA, SocialIQA.

The form of a row is recognised by its fields, so files and datasets of the hub read alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from polybit.core.runtime import PolybitError
from polybit.data.rows import Row, is_hub_id, read_rows

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """A question with its answers and the number of the right one; `start` is where the text before an answer ends.

    group: the subject, where a set has several. passage: text to read first. letters: asked by letter unless told
    otherwise, as MMLU is. prefixes: text before each answer where it depends on the answer (WinoGrande), which then is
    the same for all.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    gold: int
    group: str = ""
    passage: str = ""
    letters: bool = False
    running: bool = False  # the answers continue the question itself, as in HellaSwag
    prefixes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sum:
    """A GSM8K problem: answered in words, ending `#### n`."""

    id: str
    question: str
    answer: str
    group: str = ""


AskedItem = ChoiceItem | Sum


def read_items(source: str | Path, *, limit: int | None = None) -> list[AskedItem]:
    """Items of a file, of a directory of .csv files (MMLU's subjects), or of a dataset id; the first `limit`
    of each file."""
    path = Path(source)
    files: list[str | Path] = [source]
    if path.is_dir() and not is_hub_id(str(source)):
        files = sorted(path.glob("*.csv"))
        if not files:
            raise PolybitError(
                f"{str(source)!r} is a directory without .csv files; give MMLU's test directory or a file."
            )
    items: list[AskedItem] = []
    for file in files:
        group = re.sub(r"_(dev|val|test)$", "", Path(file).stem) if len(files) > 1 else ""
        rows = read_rows(file)[: None if limit is None else limit]
        items += [read_item(row, f"{Path(file).stem}-{n}", group, str(file)) for n, row in enumerate(rows, start=1)]
    if len({type(item) for item in items}) > 1:
        raise PolybitError(f"{str(source)!r} mixes questions with choices and sums; give one kind per file.")
    return items


def read_item(row: Row, name: str, group: str, source: str) -> AskedItem:
    """One row, by the first form that knows it; refused when no form does or the right answer is missing."""
    for fields, make in READERS:
        if fields <= row.keys():
            try:
                item = make(row)
            except (KeyError, ValueError, TypeError, IndexError) as error:
                raise PolybitError(
                    f"Row {name} of {source!r} cannot be read ({error!s:.80}); mend or remove it."
                ) from error
            item = replace(item, id=name, group=group or item.group)
            if isinstance(item, ChoiceItem):
                check(item, source)
            return item
    raise PolybitError(
        f"Row {name} of {source!r} has {', '.join(map(repr, row))}, which is no form we know; use "
        '{"question", "choices": [...], "answer": number of the right choice from 0}.'
    )


def check(item: ChoiceItem, source: str) -> None:
    """Refuse an item that nobody could answer."""
    if len(item.answers) < 2 or not 0 <= item.gold < len(item.answers) or not all(map(str.strip, item.answers)):
        raise PolybitError(
            f"Row {item.id} of {source!r} has {len(item.answers)} choices and names choice {item.gold} as right; it "
            "needs two or more choices with text, counted from 0."
        )


def _labelled(row: Row, question: str) -> ChoiceItem:
    """Choices with labels: a list of {label, text}, or {label: [...], text: [...]}, and the label that is right."""
    choices = row["choices"] if "choices" in row else row["question"]["choices"]
    if isinstance(choices, Mapping):
        labels, texts = list(choices["label"]), list(choices["text"])
    else:
        labels, texts = [choice["label"] for choice in choices], [choice["text"] for choice in choices]
    return ChoiceItem("", question, tuple(texts), labels.index(row["answerKey"]))


def _by_key(row: Row) -> ChoiceItem:
    question = row["question"]
    return _labelled(row, question["stem"] if isinstance(question, Mapping) else question)


def _mmlu_csv(row: Row) -> ChoiceItem:
    answers = tuple(row[f"choice{n}"] for n in range(sum(key.startswith("choice") for key in row)))
    return ChoiceItem("", row["question"], answers, int(row["answer"]), letters=True)


def _listed(row: Row) -> AskedItem:
    question = next(str(row[key]) for key in ("question", "query", "context") if row.get(key))
    gold = next(row[key] for key in ("gold", "answer", "label") if row.get(key) is not None)
    subject = str(row.get("subject") or "")
    running = "query" in row and "question" not in row
    return ChoiceItem("", question, tuple(row["choices"]), int(gold), subject, letters=bool(subject), running=running)


def _hellaswag(row: Row) -> ChoiceItem:
    def clean(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))
        return re.sub(r" +", " ", text).strip()

    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return ChoiceItem("", context, tuple(map(clean, row["endings"])), int(row["label"]), running=True)


def _boolq(row: Row) -> ChoiceItem:
    return ChoiceItem(
        "", row["question"].rstrip("?") + "?", ("no", "yes"), int(bool(row["answer"])), passage=row["passage"]
    )


def _social(row: Row) -> ChoiceItem:
    answers = tuple(row[f"answer{letter}"] for letter in "ABC")
    return ChoiceItem("", f"{row['context']} {row['question']}", answers, int(row["label"]) - 1)


def _winogrande(row: Row) -> ChoiceItem:
    before, after = row["sentence"].split("_")
    options = (row["option1"], row["option2"])
    prefixes = tuple(before + option for option in options)
    return ChoiceItem(
        "", row["sentence"], (after.strip(),) * 2, int(row["answer"]) - 1, running=True, prefixes=prefixes
    )


def _adapters(row: Row) -> ChoiceItem:
    """LLM-Adapters writes question and choices into one instruction; take them apart again."""
    text, right = row["instruction"], str(row["answer"])
    body = re.split(r"\n\s*Answer format:", text)[0]
    question = re.split(r"question: |sentence: ", body, maxsplit=1)[1]
    if right in ("true", "false"):
        return ChoiceItem("", question.strip(), ("no", "yes"), int(right == "true"))
    word, number = re.fullmatch(r"([a-z]+)(\d+)", right).groups()  # type: ignore[union-attr]
    parts = re.split(rf"(?:^|\s){word.capitalize()}(\d+):\s?", question)
    texts, numbers = parts[2::2], list(map(int, parts[1::2]))
    if numbers != list(range(1, len(numbers) + 1)):
        raise ValueError(f"choices are numbered {numbers}")
    if word == "option" and parts[0].count("_") == 1:
        options = {"option1": texts[0].strip(), "option2": texts[1].strip(), "answer": number}
        return _winogrande({"sentence": parts[0].strip(), **options})
    return ChoiceItem("", parts[0].strip(), tuple(map(str.strip, texts)), int(number) - 1)


READERS: Sequence[tuple[set[str], Callable[[Row], AskedItem]]] = (
    ({"instruction", "answer"}, _adapters),
    ({"question", "choice0", "choice1", "answer"}, _mmlu_csv),
    ({"sentence", "option1", "option2", "answer"}, _winogrande),
    ({"ctx_a", "ctx_b", "endings", "label", "activity_label"}, _hellaswag),
    ({"question_stem", "choices", "answerKey"}, lambda row: _labelled(row, row["question_stem"])),
    ({"question", "answerKey"}, _by_key),
    ({"goal", "sol1", "sol2", "label"}, lambda r: ChoiceItem("", r["goal"], (r["sol1"], r["sol2"]), int(r["label"]))),
    ({"passage", "question", "answer"}, _boolq),
    ({"context", "question", "answerA", "answerB", "answerC", "label"}, _social),
    ({"choices"}, _listed),
    ({"question", "answer"}, lambda row: Sum("", row["question"], _with_number(row["answer"]))),
)


def _with_number(answer: str) -> str:
    if "####" not in answer:
        raise ValueError("no #### before the final number, and no choices")
    return answer


def ask(item: AskedItem, form: str | None = None) -> str:
    """The text a model continues. letters: the choices are listed and a letter is the answer; cloze: they are not."""
    if isinstance(item, Sum):
        return f"Question: {item.question.strip()}\nAnswer:"
    if by_letter(item, form):
        listed = "".join(f"\n{LETTERS[n]}. {text.strip()}" for n, text in enumerate(item.answers))
        passage = f"{item.passage.strip()}\n" if item.passage else ""
        return f"{passage}{item.question.strip()}{listed}\nAnswer:"
    if item.running:
        return item.question.strip()
    passage = f"{item.passage.strip()}\n" if item.passage else ""
    return f"{passage}Question: {item.question.strip()}\nAnswer:"


def by_letter(item: ChoiceItem, form: str | None) -> bool:
    """Whether the item is asked by letter; a running text cannot be."""
    return item.letters if form is None or item.running else form == "letters"


def texts(item: ChoiceItem, form: str | None = None) -> tuple[str, ...]:
    """What stands for each answer, without the blank before it."""
    return tuple(LETTERS[: len(item.answers)]) if by_letter(item, form) else tuple(map(str.strip, item.answers))


def pairs(item: ChoiceItem, before: str = "", form: str | None = None) -> list[tuple[str, str]]:
    """(context, continuation) for each answer; `before` holds worked examples."""
    contexts = item.prefixes or (ask(item, form),) * len(item.answers)
    return [(before + context, f" {text}") for context, text in zip(contexts, texts(item, form), strict=True)]


def worked(item: AskedItem, form: str | None = None) -> str:
    """An item with its right answer, as an example."""
    if isinstance(item, Sum):
        return f"{ask(item)} {item.answer.strip()}"
    context, answer = pairs(item, form=form)[item.gold]
    return context + answer


def examples(items: Sequence[AskedItem], shots: int, group: str, form: str | None = None) -> str:
    """The first `shots` examples of the same group, each followed by an empty line; for MMLU with its subject named."""
    chosen = [item for item in items if item.group == group][:shots]
    if len(chosen) < shots:
        raise PolybitError(f"{len(chosen)} examples for {group or 'this set'!r} are fewer than --shots {shots}.")
    named = f"The following are multiple choice questions (with answers) about {group.replace('_', ' ')}.\n\n"
    return (named if group else "") + "".join(f"{worked(item, form)}\n\n" for item in chosen)
