"""What can be measured, by name: metrics, suites, tasks, ways of asking and of judging; torch-free.

A new metric is one function, `PairedReading -> Estimate | number`, and one line in METRICS. The comparison, the
terminal's table, the JSON and its description, the model card and the page walk this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from polybit.core.parts import load

if TYPE_CHECKING:  # the table is read where no torch is loaded
    from polybit.evals.readings import PairedReading

Form = Literal["number", "level", "share", "short share"]
Gives = Literal["estimate", "estimate or null", "number", "curve", "deciles", "margins"]
Where = Literal["narrow", "page"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a quantized model beside its float model.

    title: heading of its column · unit: of the value · measure: dotted path of `PairedReading -> value` · summary: what
    it is, for the JSON's description · gives: the kind of value · form: how a cell is written (report/tables.py) ·
    where: the tables that show it, narrow = terminal and model card · harmless: its value where nothing is lost, None =
    the float model's own number of that name, if it has one · short, narrow: heading and form of narrow tables where
    they differ · instead: the metric a narrow table shows where this one could not be measured.
    """

    title: str
    unit: str
    measure: str
    summary: str
    gives: Gives = "estimate"
    form: Form = "number"
    where: tuple[Where, ...] = ("narrow", "page")
    harmless: float | None = None
    short: str = ""
    narrow: Form | None = None
    instead: str = ""

    def __call__(self, seen: PairedReading) -> Any:
        """The value for one pair of models, as JSON knows it."""
        found = load(self.measure)(seen)
        return found.to_json() if hasattr(found, "to_json") else found


METRICS: dict[str, Metric] = {
    "perplexity": Metric(
        "perplexity", "1", "polybit.evals.metrics:perplexity", "exp of the mean nats per token", narrow="level"
    ),
    "delta_nll": Metric(
        "loss more than float, nats",
        "nats per token",
        "polybit.evals.metrics:delta_nll",
        "negative log-likelihood minus the float model's, paired",
        where=(),
        harmless=0,
    ),
    "kl": Metric(
        "KL, nats",
        "nats per token",
        "polybit.evals.metrics:kl",
        "KL(float || quantized)",
        harmless=0,
        short="KL (nats)",
    ),
    "kl_p999": Metric(
        "KL 99.9 %",
        "nats per token",
        "polybit.evals.metrics:kl_p999",
        "99.9th percentile over tokens of KL(float || quantized)",
        gives="number",
        where=("page",),
        harmless=0,
    ),
    "top1": Metric(
        "top-1 agreement",
        "share of tokens",
        "polybit.evals.metrics:top1",
        "both models find the same next token likeliest, on the text",
        form="share",
        harmless=1,
        short="top-1",
    ),
    "flips_text": Metric(
        "flips on the text",
        "share of tokens",
        "polybit.evals.metrics:flips_text",
        "1 - top1: tokens for which the models choose differently, on the text",
        form="share",
        where=(),
        harmless=0,
    ),
    "flips": Metric(
        "flips on own answers",
        "share of tokens",
        "polybit.evals.metrics:flips",
        "the same, teacher-forced on the float model's own answers",
        gives="estimate or null",
        form="share",
        harmless=0,
        short="flips",
        narrow="short share",
        instead="flips_text",
    ),
    "first_divergence": Metric(
        "first divergence, tokens",
        "tokens",
        "polybit.evals.metrics:first_divergence",
        "tokens both greedy answers share before they part",
        gives="estimate or null",
        where=("page",),
    ),
    "identical": Metric(
        "same answer",
        "share of answers",
        "polybit.evals.metrics:identical",
        "greedy answers that never part",
        gives="estimate or null",
        form="share",
        where=("page",),
        harmless=1,
    ),
    "margins": Metric(
        "margins",
        "probability",
        "polybit.evals.metrics:margins",
        "mean difference between the two likeliest tokens of each text: texts per bin, means, paired difference",
        gives="margins",
        where=(),
    ),
    "flips_by_margin_decile": Metric(
        "flips by margin",
        "share of tokens",
        "polybit.evals.metrics:flips_by_margin",
        "flips on the text by decile of the float model's margin, smallest first",
        gives="deciles",
        where=(),
    ),
    "flips_by_entropy_decile": Metric(
        "flips by entropy",
        "share of tokens",
        "polybit.evals.metrics:flips_by_entropy",
        "the same by the float model's entropy",
        gives="deciles",
        where=(),
    ),
    "survival": Metric(
        "still the same",
        "share of answers",
        "polybit.evals.metrics:survival_mean",
        "greedy answers whose first k + 1 tokens are the float model's, k = 0 .. max_tokens - 1",
        gives="curve",
        where=(),
    ),
    "survival_low": Metric(
        "still the same, at least",
        "share of answers",
        "polybit.evals.metrics:survival_low",
        "the lower end of its 95 % interval",
        gives="curve",
        where=(),
    ),
    "survival_high": Metric(
        "still the same, at most",
        "share of answers",
        "polybit.evals.metrics:survival_high",
        "the upper end of its 95 % interval",
        gives="curve",
        where=(),
    ),
}
REFERENCE: dict[str, Metric] = {  # of the float model alone, on the text; called with the reading of any preset
    "perplexity": Metric("perplexity", "1", "polybit.evals.metrics:float_perplexity", "exp of the mean nats per token"),
    "margin": Metric(
        "margin",
        "probability",
        "polybit.evals.metrics:float_margin",
        "difference between the probabilities of the two likeliest tokens",
    ),
    "entropy": Metric("entropy", "nats", "polybit.evals.metrics:float_entropy", "of the next token"),
}


@dataclass(frozen=True, slots=True)
class AnswerTask:
    """How a task with one right answer is asked and scored, every metric 0..1 per item.

    metrics: dotted paths of `(prediction, right answers) -> 0..1` · correct: the one that decides whether an answer is
    right when answers are said to flip, and that tables show · rates: those that give exactly 0 or 1.
    """

    max_tokens: int
    metrics: Mapping[str, str]
    correct: str
    rates: frozenset[str]


TASKS: dict[str, AnswerTask] = {
    "reading": AnswerTask(
        24,
        {"em": "polybit.evals.scoring:squad_exact", "f1": "polybit.evals.scoring:squad_f1"},
        "em",
        frozenset({"em"}),
    ),
    "arithmetic": AnswerTask(96, {"exact": "polybit.evals.scoring:gsm8k_any"}, "exact", frozenset({"exact"})),
    "dialogue": AnswerTask(48, {"exact": "polybit.evals.scoring:text_any"}, "exact", frozenset({"exact"})),
}


@dataclass(frozen=True, slots=True)
class Suite:
    """What `polybit eval` measures on request; its key is also that of its numbers.

    flag: the option that asks for it · summary: what is then measured · measure: dotted path of
    `(pair, options) -> numbers`, None = part of the comparison itself · tables: dotted path of `numbers -> table or
    None`, None = columns of the first table · with_text: needs the comparison on text and its answers.
    """

    flag: str
    summary: str
    measure: str | None = None
    table: str | None = None
    with_text: bool = False


SUITES: dict[str, Suite] = {
    "tasks": Suite("tasks", "tasks with one right answer"),
    "choices": Suite(
        "choices",
        "questions with choices",
        "polybit.acts.evaluate_suites:choices",
        "polybit.report.suites:choices_table",
    ),
    "lm_eval": Suite(
        "lm_eval", "tasks of lm-eval", "polybit.acts.evaluate_suites:lm_eval", "polybit.report.suites:lm_eval_table"
    ),
    "breakdown": Suite(
        "breakdown", "what a flipped token does", None, "polybit.report.suites:breakdown_table", with_text=True
    ),
    "talk": Suite(
        "talk", "long conversations", "polybit.acts.evaluate_suites:talk", "polybit.report.suites:talk_table"
    ),
    "squad": Suite(
        "squad", "questions of a SQuAD file", "polybit.acts.evaluate_suites:squad", "polybit.report.suites:squad_table"
    ),
}


@dataclass(frozen=True, slots=True)
class JudgingMode:
    """One way of judging answers: summary for --help, whether it asks an endpoint, and the table of its numbers."""

    summary: str
    asks: bool
    table: str


JUDGING: dict[str, JudgingMode] = {
    "pair": JudgingMode("which of two answers is better", True, "polybit.report.judged:pair_table"),
    "single": JudgingMode("a grade for each answer", True, "polybit.report.judged:grade_table"),
    "skills": JudgingMode("grades by FLASK's skills", True, "polybit.report.judged:skill_table"),
    "fidelity": JudgingMode(
        "closeness to the float model's answers, offline", False, "polybit.report.judged:fidelity_table"
    ),
}

CHOICE_FORMS = ("cloze", "letters")  # how choices are asked: the answer's own words, or its letter
SQUAD_HEADS = ("generate", "span")  # how SQuAD is answered: free text, or a start and an end in the text
