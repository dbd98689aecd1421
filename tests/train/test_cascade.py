"""Objectives by hand: two tokens, three precisions; who teaches whom, and where the gradient goes."""

import math

import pytest
import torch
from torch import nn

from polybit.core.runtime import PolybitError
from polybit.train.cascade import (
    Agreement,
    Cascade,
    alignment,
    answer_part,
    consistency,
    distance_kl,
    distance_mse,
    switchability,
)

LOGITS = {"float": (3.0, 0.0), "A": (2.0, 0.0), "B": (1.0, 0.0), "C": (0.0, 0.0)}
BATCH = {"ids_BT": torch.tensor([[5, 0]]), "mask_BT": torch.ones(1, 2).bool(), "learn_BT": torch.tensor([[0, 1]])}


class Speaker:
    """A vocabulary of two; each preset says its own logits, one parameter each."""

    def __init__(self):
        self.parameters = {name: torch.tensor([values], requires_grad=True) for name, values in LOGITS.items()}
        self.asked = []

    def __call__(self, part, name):
        self.asked.append(name)
        return self.parameters[name] * 1.0

    def gradients(self):
        return {name: p.grad for name, p in self.parameters.items()}


def nll(name):
    a, b = LOGITS[name]
    return -(a - math.log(math.exp(a) + math.exp(b)))  # token 0 is right


def kl(teacher, student):
    def p(name):
        a, b = (math.exp(v) for v in LOGITS[name])
        return a / (a + b), b / (a + b)

    return sum(t * math.log(t / s) for t, s in zip(p(teacher), p(student), strict=True))


WANTED = {
    "cdt": lambda: (
        nll("A") + kl("float", "A")
        + nll("B") + kl("float", "B") + kl("A", "B")
        + nll("C") + kl("float", "C") + kl("A", "C") + kl("B", "C")
    ),
    "sp": lambda: sum(nll(n) + kl("float", n) for n in "ABC"),
    "recursive": lambda: kl("float", "A") + kl("A", "B") + kl("B", "C"),
    "joint": lambda: nll("A") + nll("B") + nll("C"),
}  # fmt: skip


@pytest.mark.parametrize("method", WANTED)
def test_every_method_by_hand(method):
    loss, logs = Cascade(method)(Speaker(), BATCH, ("A", "B", "C"))
    assert float(loss.detach()) == pytest.approx(WANTED[method](), abs=1e-6)
    assert "C/kl" in logs or method == "joint"


def test_without_the_float_model_the_widest_preset_teaches():
    for method, wanted in {
        "cdt": nll("A") + nll("B") + kl("A", "B") + nll("C") + kl("A", "C") + kl("B", "C"),
        "sp": nll("A") + nll("B") + kl("A", "B") + nll("C") + kl("A", "C"),
        "recursive": nll("A") + kl("A", "B") + kl("B", "C"),
        "joint": nll("A") + nll("B") + nll("C"),
    }.items():
        speaker = Speaker()
        loss, _ = Cascade(method, teacher=False)(speaker, BATCH, ("A", "B", "C"))
        assert float(loss.detach()) == pytest.approx(wanted, abs=1e-6), method
        assert "float" not in speaker.asked


def test_independent_is_the_data_and_the_float_model():
    loss, _ = Cascade("independent")(Speaker(), BATCH, ("B",))
    assert float(loss.detach()) == pytest.approx(nll("B") + kl("float", "B"), abs=1e-6)
    loss, _ = Cascade("independent", teacher=False)(Speaker(), BATCH, ("B",))
    assert float(loss.detach()) == pytest.approx(nll("B"), abs=1e-6)


def test_mean_squared_logits_and_averaging():
    loss, _ = Cascade("cdt", "mse", beta=2.0, data=0.0)(Speaker(), BATCH, ("A", "C"))
    assert float(loss.detach()) == pytest.approx(2 * (1 / 2 + (9 + 4) / 2))  # (3-2)²/2; (3-0)²/2 + (2-0)²/2
    loss, _ = Cascade("cdt", "mse", data=0.0, average=True)(Speaker(), BATCH, ("A", "C"))
    assert float(loss.detach()) == pytest.approx(1 / 2 + (9 + 4) / 4)


@pytest.mark.parametrize("method", ["cdt", "sp", "recursive"])
def test_no_gradient_reaches_a_teacher(method):
    speaker = Speaker()
    objective = Cascade(method, data=0.0)
    objective(speaker, BATCH, ("A",))
    loss, _ = objective(speaker, BATCH, ("C",))  # the same batch: A has spoken already
    loss.backward()
    gradients = speaker.gradients()
    assert gradients["A"] is None and gradients["float"] is None and gradients["C"].abs().sum() > 0
    if method == "cdt":  # d KL(t ‖ s) / d logits = s - t, from both teachers
        s = torch.tensor([0.5, 0.5])
        t = sum(torch.softmax(torch.tensor(LOGITS[n]), 0) for n in ("float", "A"))
        assert torch.allclose(gradients["C"][0], 2 * s - t, atol=1e-6)


def test_presets_one_by_one_are_the_sum_and_teachers_speak_once():
    together = Speaker()
    whole, _ = Cascade("cdt")(together, BATCH, ("A", "B", "C"))
    apart, objective = Speaker(), Cascade("cdt")
    parts = [objective(apart, BATCH, (name,))[0] for name in "ABC"]
    assert float(sum(parts).detach()) == pytest.approx(float(whole.detach()))
    assert apart.asked == together.asked == ["float", "A", "B", "C"]
    objective(apart, dict(BATCH), ("C",))  # another batch: the float model is asked again, A and B are forgotten
    assert apart.asked[4:] == ["float", "C"]


def test_only_learnt_tokens_count():
    batch = {
        "ids_BT": torch.tensor([[7, 8, 9, 2], [7, 8, 0, 0]]),
        "mask_BT": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "learn_BT": torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]),
    }
    part, target_N = answer_part(batch)
    assert target_N.tolist() == [9, 2, 8]  # nothing predicts the first token of a row
    assert part["keep_BT"].int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert "learn_BT" not in part
    with pytest.raises(PolybitError, match="no token to learn"):
        answer_part({**batch, "learn_BT": torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0]])})


def test_distances_are_zero_only_for_equals():
    same = torch.randn(3, 5)
    assert float(distance_kl(same, same)) == pytest.approx(0, abs=1e-6) and float(distance_mse(same, same)) == 0
    assert float(distance_kl(same, same + 1)) == pytest.approx(0, abs=1e-6)  # a constant changes no probability
    assert float(distance_mse(same, same + 1)) == pytest.approx(1)


def test_consistency_by_hand_with_gradient_on_both_sides():
    speaker = Speaker()
    value = consistency([speaker({}, "A"), speaker({}, "C")])
    assert float(value.detach()) == pytest.approx((kl("A", "C") + kl("C", "A")) / 2, abs=1e-6)
    value.backward()
    assert speaker.gradients()["A"].abs().sum() > 0 and speaker.gradients()["C"].abs().sum() > 0
    assert float(consistency([torch.zeros(1, 2)])) == 0


def test_alignment_by_hand():
    top = [torch.tensor([[2.0, 0.0]], requires_grad=True), torch.tensor([[1.0, 1.0]], requires_grad=True)]
    low = [torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([[1.0, 3.0]], requires_grad=True)]
    value = alignment([top, low])
    assert float(value.detach()) == pytest.approx((1 / 4 + 4 / 2) / 2)
    value.backward()
    assert top[0].grad is None and low[0].grad is not None


def test_switchability_is_the_distance_of_the_products():
    torch.manual_seed(0)
    pairs = [[(torch.randn(2, 5), torch.randn(3, 2))] for _ in range(2)]
    (a, b), (c, d) = pairs[0][0], pairs[1][0]
    dense = (b @ a - d @ c).square().sum() / ((b @ a).square().sum() + (d @ c).square().sum())
    assert float(switchability(pairs)) == pytest.approx(float(dense), rel=1e-5)
    assert float(switchability([pairs[0], pairs[0]])) == pytest.approx(0, abs=1e-6)
    assert float(switchability([[(torch.zeros(2, 5), torch.zeros(3, 2))]] * 2)) == 0
    assert float(switchability([])) == 0


def test_agreement_adds_weighted_terms():
    speaker = Speaker()
    plain, _ = Cascade("joint")(speaker, BATCH, ("A", "C"))
    both, logs = Agreement(Cascade("joint"), nn.Linear(1, 1), consistency=0.5)(speaker, BATCH, ("A", "C"))
    assert float((both - plain).detach()) == pytest.approx(0.5 * (kl("A", "C") + kl("C", "A")) / 2, abs=1e-6)
    assert logs["consistency"] == pytest.approx((kl("A", "C") + kl("C", "A")) / 2, abs=1e-6)
