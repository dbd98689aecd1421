"""Distillation: divergences against plain transcriptions, the bin of the rest, and weights that look at flips."""

import math

import pytest
import torch
from torch.nn.functional import kl_div

from polybit.core.runtime import PolybitError
from polybit.train.distill import (
    Distillation,
    flip_weights,
    flips_before,
    lead_shortfall,
    strongest_other,
    token_divergence,
)

V = 30


def teacher_and_student(tokens=40, spread=2.0, seed=0):
    """Log-probabilities of a teacher [N, V] and logits of a student near it."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(tokens, V, generator=generator)
    return logits.log_softmax(-1), logits + torch.randn(tokens, V, generator=generator)


def listed(logp_NV, k=V):
    """The k likeliest tokens as they are cached."""
    best = logp_NV.topk(k, -1)
    return best.values, best.indices.to(torch.int16)


def part_of(logp_NV, rows=4):
    """A part of a batch with equal answers."""
    values, indices = listed(logp_NV)
    n = len(logp_NV)
    return {
        "top_logp_NK": values,
        "top_index_NK": indices,
        "logp_N": values[:, 0],
        "row_N": torch.arange(n) // (n // rows),
        "place_N": torch.arange(n) % (n // rows),
    }


def test_divergences_are_the_written_ones():
    logp, student = teacher_and_student()
    logq = student.log_softmax(-1)
    forward = token_divergence(student, *listed(logp))
    reverse = token_divergence(student, *listed(logp), "reverse")
    middle = ((logp.exp() + logq.exp()) / 2).log()
    jensen = (kl_div(middle, logp, log_target=True, reduction="none").sum(-1)
              + kl_div(middle, logq, log_target=True, reduction="none").sum(-1)) / 2  # fmt: skip
    torch.testing.assert_close(forward, kl_div(logq, logp, log_target=True, reduction="none").sum(-1))
    torch.testing.assert_close(reverse, kl_div(logp, logq, log_target=True, reduction="none").sum(-1))
    torch.testing.assert_close(token_divergence(student, *listed(logp), "jensen"), jensen)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen"])
def test_the_likeliest_and_the_rest_bound_the_whole_from_below(kind):
    logp, student = teacher_and_student()
    whole = token_divergence(student, *listed(logp), kind)
    before = torch.zeros_like(whole)
    for k in (2, 8, 20):
        bound = token_divergence(student, *listed(logp, k), kind)
        assert bool((bound <= whole + 1e-5).all()) and bool((bound >= before - 1e-5).all())
        before = bound


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    logp, _ = teacher_and_student()
    for k in (V, 4):
        for sharpen in (1.0, 4.0):
            student = logp.clone().requires_grad_(True)
            loss = token_divergence(student, *listed(logp, k), sharpen=sharpen).sum()
            loss.backward()
            assert abs(float(loss.detach())) < 1e-4 and float(student.grad.abs().max()) < 1e-4
    assert float(lead_shortfall(logp, *listed(logp)).abs().max()) < 1e-8


def test_sharpened_divergence_counts_flips_in_the_limit():
    logp, student = teacher_and_student()
    flips = student.argmax(-1) != logp.argmax(-1)
    sharp = token_divergence(student, *listed(logp), sharpen=60.0) > 1.0
    assert (sharp == flips).float().mean() > 0.9


def test_a_certain_teacher_gives_finite_gradients():
    logp = torch.full((3, V), -math.inf)
    logp[:, 5] = 0.0
    student = torch.randn(3, V, requires_grad=True)
    for kind in ("forward", "jensen"):
        for k in (V, 4):
            token_divergence(student, *listed(logp, k), kind).sum().backward()
    assert bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize("focus", ["none", "margin", "doubt", "path", "path+doubt"])
def test_weights_have_mean_one_and_no_gradient(focus):
    logp, student = teacher_and_student()
    weights = flip_weights(student.requires_grad_(True), part_of(logp), focus, 2.0)
    assert weights.mean() == pytest.approx(1.0, abs=1e-5) and not weights.requires_grad
    assert bool((weights > 0).all())


def test_weights_look_where_they_say():
    logp, student = teacher_and_student()
    part = part_of(logp)
    flips = student.argmax(-1) != logp.argmax(-1)
    doubt = flip_weights(student, part, "doubt", 2.0)
    assert doubt[flips].min() == pytest.approx(float(doubt.max()))
    margin = flip_weights(student, part, "margin", 2.0)
    lead = part["top_logp_NK"][:, 0].exp() - part["top_logp_NK"][:, 1].exp()
    assert margin[lead.argmin()] == margin.max()
    path = flip_weights(student, part, "path", 0.5)
    assert all(bool((a >= b).all()) for a, b in zip(path.view(4, 10).T[:-1], path.view(4, 10).T[1:], strict=True))


def test_flips_before_is_the_plain_count():
    logp, student = teacher_and_student()
    part = part_of(logp)
    best = logp.argmax(-1)
    found = flips_before(student, best, part)
    for n in range(len(best)):
        same = [m for m in range(n) if part["row_N"][m] == part["row_N"][n]]
        assert found[n] == sum(int(student[m].argmax() != best[m]) for m in same)


def test_strongest_other_is_the_largest_that_is_not_the_best():
    _, student = teacher_and_student()
    best = torch.arange(40) % V
    masked = student.clone()
    masked[torch.arange(40), best] = -math.inf
    torch.testing.assert_close(strongest_other(student, best), masked.max(-1).values)


def test_objective_is_the_mean_over_tokens_times_the_weight_of_the_preset():
    logp, student = teacher_and_student()
    batch = {"chosen": part_of(logp)}
    objective = Distillation(weights={"b": 3.0})
    total, logs = objective(lambda part, preset: student, batch, ("a", "b"))
    plain = token_divergence(student, *listed(logp)).mean()
    torch.testing.assert_close(total, 4 * plain)
    assert logs["a/kd"] == pytest.approx(float(plain))


def test_what_is_not_known_is_refused():
    with pytest.raises(PolybitError, match="focus 'eyes' is not known: choose one of none"):
        Distillation(focus="eyes")
