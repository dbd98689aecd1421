"""What every objective of the tables promises: nothing to learn from an equal, a gradient only where it belongs, finite
numbers at extreme logits, the same value twice. What each computes is checked by hand in tests/train."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from polybit.nn.switch import at
from polybit.train.forward import logits_of
from polybit.train.material import Gather, kept_tokens, score
from polybit.train.table import ANSWER_OBJECTIVES, LESSON_OBJECTIVES, AnswerKnobs, LessonKnobs
from tests.train.tiny_run import float_lm, material, pairs, trainable

PRESETS = ("w4", "w3")
KNOBS = AnswerKnobs(steps=10)
LAST = KNOBS.steps - 1
V = 96  # the tiny models' vocabulary
ANSWERS, LESSONS = sorted(ANSWER_OBJECTIVES), sorted(LESSON_OBJECTIVES)
TAUGHT = [name for name in LESSONS if LESSON_OBJECTIVES[name].taught]
BATCH = {
    "ids_BT": torch.tensor([[7, 8, 9, 2], [7, 8, 0, 0]]),
    "mask_BT": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    "learn_BT": torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]),
}


class Bigrams:
    """A model whose next token depends on the last one: a table of logits [V, V] per preset, the only parameters."""

    def __init__(self, names=(*PRESETS, "float"), *, size=1.0, equal=False):
        generator = torch.Generator().manual_seed(1)
        first = size * torch.randn(V, V, generator=generator)
        draw = lambda: first if equal else size * torch.randn(V, V, generator=generator)  # noqa: E731
        self.tables = {name: draw().clone().requires_grad_(True) for name in names}
        self.asked = []

    def __call__(self, part, name):
        self.asked.append(name)
        return self.tables[name][part["ids_BT"]][part["keep_BT"].bool()]

    def gradients(self):
        return {name: table.grad for name, table in self.tables.items() if table.grad is not None}


def answers():
    """Pairs with scores, and for every preset renewed answers with the teacher's distribution."""
    made = material()
    prompts, ours = [pair.prompt for pair in pairs()], [pair.rejected for pair in pairs()]
    for name in PRESETS:
        made.rejected[name] = list(score(float_lm(), prompts, ours, top=kept_tokens(V)))
    return made


def of_answers(name, forward, presets=PRESETS, knobs=KNOBS):
    """(objective, loss, logs) of a built objective on one batch of answers at the last step of a run."""
    objective = ANSWER_OBJECTIVES[name].build(knobs)
    batch = Gather(answers(), objective, PRESETS)(list(range(8)), LAST)
    return (objective, *objective(forward, batch, presets))


def of_lessons(name, forward, presets=PRESETS, **knobs):
    """The same on one batch of texts."""
    objective = LESSON_OBJECTIVES[name].build(LessonKnobs(**knobs))
    return (objective, *objective(forward, BATCH, presets))


def test_names_are_of_one_verb_and_say_what_they_are():
    assert not ANSWER_OBJECTIVES.keys() & LESSON_OBJECTIVES.keys()
    for part in (*ANSWER_OBJECTIVES.values(), *LESSON_OBJECTIVES.values()):
        assert part.summary and not part.summary.endswith(".")


@pytest.mark.parametrize("name", ANSWERS)
def test_the_table_says_what_the_objective_reads(name):
    part = ANSWER_OBJECTIVES[name]
    needs = part.build(KNOBS).needs
    assert part.pairs == ("pairs" in needs) and part.own == bool({"pairs", "own"} & needs)
    assert 0 < part.rate < 1 and (part.static_rate is None or part.static_rate <= part.rate)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_student_equal_to_its_teacher(name):
    """Its loss is the one the table gives; an objective without pairs pulls it nowhere."""
    model = trainable((4, 3))

    def forward(part, preset):
        with at(model, "float"):
            return logits_of(model, part).requires_grad_(True)

    told = []
    listening = lambda part, preset: told.append(forward(part, preset)) or told[-1]  # noqa: E731
    _, loss, _ = of_answers(name, listening)
    assert float(loss.detach()) == pytest.approx(len(PRESETS) * ANSWER_OBJECTIVES[name].at_teacher, abs=1e-4)
    if not ANSWER_OBJECTIVES[name].pairs:
        assert all(float(g.abs().max()) < 1e-4 for g in torch.autograd.grad(loss, told))


@pytest.mark.parametrize("name", LESSONS)
def test_presets_equal_to_the_float_model(name):
    """Teachers have nothing to teach; what is left without teachers is the data."""
    presets = PRESETS[:1] if LESSON_OBJECTIVES[name].alone else PRESETS
    equal = Bigrams(equal=True)
    _, loss, _ = of_lessons(name, equal, presets, data=0.0 if name in TAUGHT else 1.0)
    logits_NV = equal({"ids_BT": BATCH["ids_BT"], "keep_BT": torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])}, "float")
    nll = cross_entropy(logits_NV, torch.tensor([9, 2, 8]))
    wanted = 0.0 if name in TAUGHT else float(nll.detach()) * len(presets)
    assert float(loss.detach()) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_move_only_the_presets_asked_for(name):
    """The float model's scores come with the batch: it is not asked, and gets no gradient."""
    student = Bigrams()
    _, loss, logs = of_answers(name, student, ("w3",))
    loss.backward()
    assert student.gradients().keys() == {"w3"} == set(student.asked)
    assert student.gradients()["w3"].abs().sum() > 0 and all(key.startswith("w3/") for key in logs)


@pytest.mark.parametrize("name", LESSONS)
def test_lessons_never_move_a_teacher(name):
    student = Bigrams()
    objective, _, _ = of_lessons(name, student, ("w4",), data=0.0 if name in TAUGHT else 1.0)
    loss, _ = objective(student, BATCH, ("w3",))  # the same batch: w4 has spoken already
    loss.backward()
    assert student.gradients().keys() == {"w3"} and student.gradients()["w3"].abs().sum() > 0


@pytest.mark.parametrize("name, of", [*((n, of_answers) for n in ANSWERS), *((n, of_lessons) for n in LESSONS)])
def test_extreme_logits_give_finite_numbers(name, of):
    student = Bigrams(size=1e4)
    _, loss, logs = of(name, student)
    loss.backward()
    assert bool(torch.isfinite(loss)) and all(abs(float(value)) < float("inf") for value in logs.values())
    assert all(bool(torch.isfinite(gradient).all()) for gradient in student.gradients().values())


@pytest.mark.parametrize("name, of", [*((n, of_answers) for n in ANSWERS), *((n, of_lessons) for n in LESSONS)])
def test_the_same_twice_and_one_by_one(name, of):
    """Nothing is drawn; an objective that calls itself separable is the sum over presets."""
    objective, loss, _ = of(name, Bigrams())
    torch.manual_seed(99)
    assert torch.equal(loss, of(name, Bigrams())[1])
    if objective.separable:
        student = Bigrams()
        again, first, _ = of(name, student, PRESETS[:1])
        batch = BATCH if of is of_lessons else Gather(answers(), again, PRESETS)(list(range(8)), LAST)
        second, _ = again(student, batch, PRESETS[1:])
        assert float((first + second).detach()) == pytest.approx(float(loss.detach()), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in ANSWERS if ANSWER_OBJECTIVES[name].prefix])
def test_a_shared_beginning_changes_nothing(name):
    shared = of_answers(name, Bigrams(), knobs=AnswerKnobs(steps=10, shared_prefix=True))[1]
    assert float(shared.detach()) == pytest.approx(float(of_answers(name, Bigrams())[1].detach()), rel=1e-4)
