"""QDPO: its four invariants (docs/papers.md), TRL's numbers, and a common beginning that is computed once."""

import copy
import math

import pytest
import torch

from polybit.core.runtime import PolybitError
from polybit.nn.switch import use
from polybit.train.distill import Distillation
from polybit.train.forward import logits_of
from polybit.train.material import Gather
from polybit.train.preference import Preference, Stages, preference_loss, sum_rows, token_logps
from tests.train.tiny_run import gradients, material, trainable

PRESET = "w3"


def run(objective, batch, model=None):
    """(loss, logs, gradient) of an objective on a batch."""
    model = model or trainable()

    def forward(part, preset):
        return logits_of(use(model, preset), part)

    loss, logs = objective(forward, batch, (PRESET,))
    model.zero_grad(set_to_none=True)
    if loss.requires_grad:
        loss.backward()
    return float(loss.detach()), logs, gradients(model) if loss.requires_grad else torch.zeros(1)


def batch_of(objective, rows=range(12), made=None):
    """The batch an objective asks for."""
    return Gather(made or material(), objective, (PRESET,))(list(rows), 0)


def apart(one, other):
    """Relative L2 distance of two gradients."""
    return float((one - other).norm() / other.norm())


class Whole(Preference):
    """QDPO that counts the whole answers, common beginnings included: the slow twin."""

    @property
    def whole_answers(self):
        return True

    def margins(self, w_N, l_N, pairs):
        rows = len(pairs["star_B"])
        sides = [
            sum_rows(x - part["logp_N"], part["row_N"], rows)
            for x, part in ((w_N, pairs["chosen"]), (l_N, pairs["rejected"]))
        ]
        return sides[0] - sides[1]


def test_what_comes_before_the_divergence_cancels_in_loss_and_gradient():
    """Invariant (a)."""
    loss, _, gradient = run(Preference(), batch_of(Preference()))
    whole_loss, _, whole = run(Whole(), batch_of(Whole()))
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert apart(gradient, whole) < 1e-4


def test_equal_answers_give_log_2_and_no_gradient():
    """Invariant (b): with the policy's own answers on both sides."""
    made = material()
    made.rejected[""] = [None] * len(made)
    objective = Whole()
    batch = batch_of(objective, made=made)
    batch["pairs"][PRESET]["active_B"][:] = True  # as if nobody had noticed
    loss, _, gradient = run(objective, batch)
    _, _, usual = run(objective, batch_of(objective))
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert float(gradient.norm()) < 1e-5 * float(usual.norm())


def test_equal_answers_are_noticed_and_carry_nothing():
    made = material()
    made.rejected[""] = [None] * len(made)
    loss, logs, gradient = run(Preference(), batch_of(Preference(), made=made))
    assert loss == 0 and logs[f"{PRESET}/active"] == 0 and not gradient.any()


def test_the_first_flip_always_counts_against_the_quantized_model():
    """Invariant (c): at the first differing token the margin is below zero for every pair."""
    batch = batch_of(Preference())
    model = use(trainable(), PRESET)
    pairs = batch["pairs"][PRESET]
    gains = []
    for side in ("chosen", "rejected"):
        part = pairs[side]
        gain_N = token_logps(logits_of(model, part), part["target_N"]) - part["logp_N"]
        gains.append(gain_N[part["place_N"] == pairs["star_B"][part["row_N"]]])
    active_B = pairs["active_B"]
    assert int(active_B.sum()) >= 10
    assert bool(((gains[0] - gains[1])[active_B] < 0).all())


def test_the_start_is_above_log_2_with_an_accuracy_near_zero():
    """Invariant (d)."""
    loss, logs, _ = run(Preference(), batch_of(Preference(), rows=range(24)))
    assert loss > math.log(2)
    assert logs[f"{PRESET}/accuracy"] < 0.5 and logs[f"{PRESET}/margin"] < 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "qwen3"])
def test_a_beginning_computed_once_gives_the_same_loss_and_gradient(family):
    made = material(family=family)
    model = trainable(family=family)
    plain = run(Preference(), batch_of(Preference(), made=made), copy.deepcopy(model))
    joined = Preference(shared=True)
    shared = run(joined, batch_of(joined, made=made), copy.deepcopy(model))
    assert shared[0] == pytest.approx(plain[0], rel=1e-5)
    assert apart(shared[2], plain[2]) < 1e-4


def test_a_beginning_without_its_graph_gives_the_same_loss_and_another_gradient():
    """Why the test above looks at gradients: keys and values of a detached beginning pass a test of the loss."""
    made, model = material(), trainable()
    rows = [row for row in range(24) if made.other(row) is not None][:4]
    batch = batch_of(Preference(), rows, made)
    loss, _, gradient = run(Preference(), batch, copy.deepcopy(model))
    use(model, PRESET)
    margins = []
    for row in rows:
        chosen, other = made.chosen[row], made.other(row)
        star = min(next(i for i, (a, b) in enumerate(zip(chosen.tokens, other.tokens, strict=False)) if a != b), 99)
        prefix = [*made.prompts[row], *chosen.tokens[:star]]
        gains = []
        for answer in (chosen, other):
            with torch.no_grad():
                cache = model(input_ids=torch.tensor([prefix[:-1]]), use_cache=True).past_key_values
            tail = [prefix[-1], *answer.tokens[star:-1]]
            logits_TV = model(input_ids=torch.tensor([tail]), past_key_values=cache).logits[0]
            gains.append((token_logps(logits_TV, torch.tensor(answer.tokens[star:])) - answer.logp_T[star:]).sum())
        margins.append(gains[0] - gains[1])
    detached = preference_loss(torch.stack(margins), beta=0.1, kind="sigmoid").mean()
    model.zero_grad(set_to_none=True)
    detached.backward()
    assert float(detached.detach()) == pytest.approx(loss, rel=1e-4)
    assert apart(gradients(model), gradient) > 0.05


def formula(logq_w, logq_l, logp_w, logp_l, beta):
    """DPO, arXiv 2305.18290 equation 7, one pair at a time in double precision."""
    losses = []
    for qw, ql, pw, pl in zip(logq_w, logq_l, logp_w, logp_l, strict=True):
        margin = beta * ((float(qw) - float(pw)) - (float(ql) - float(pl)))
        losses.append(math.log1p(math.exp(-margin)) if margin > -30 else -margin)
    return sum(losses) / len(losses)


def sides(batch, model):
    """Summed log-probabilities of policy and reference of both answers."""
    found = []
    pairs = batch["pairs"][PRESET]
    for side in ("chosen", "rejected"):
        part = pairs[side]
        logq_N = token_logps(logits_of(use(model, PRESET), part).double(), part["target_N"])
        found.append((sum_rows(logq_N, part["row_N"], 12), sum_rows(part["logp_N"].double(), part["row_N"], 12)))
    return found


def test_loss_is_the_written_formula():
    objective, made = Whole(beta=0.3), material()
    rows = [row for row in range(24) if made.other(row) is not None][:12]
    batch, model = batch_of(objective, rows, made), trainable()
    with torch.no_grad():
        (qw, pw), (ql, pl) = sides(batch, model)
    assert run(objective, batch, model)[0] == pytest.approx(formula(qw, ql, pw, pl, 0.3), abs=1e-5)


def test_loss_is_trls(tmp_path):
    """TRL's DPOTrainer with the float model as its reference, on the same batch of tokens."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tests.train.tiny_run import float_lm

    made, model = material(), use(trainable(), PRESET)
    rows = [row for row in range(24) if made.other(row) is not None][:8]
    texts = [
        {"prompt_ids": made.prompts[r], "chosen_ids": made.chosen[r].tokens, "rejected_ids": made.other(r).tokens}
        for r in rows
    ]
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # TRL looks for something to train
    arguments = trl.DPOConfig(
        str(tmp_path), beta=0.1, report_to="none", use_cpu=True, per_device_train_batch_size=8, max_length=None,
        bf16=False, gradient_checkpointing=False, disable_dropout=True, logging_steps=1,
    )  # fmt: skip
    words = [{"prompt": "a", "chosen": "b", "rejected": "c"} for _ in texts]
    trainer = trl.DPOTrainer(
        model, float_lm().model, arguments, train_dataset=datasets.Dataset.from_list(words),
        processing_class=float_lm().tokenizer,
    )  # fmt: skip
    inputs = trainer.data_collator(texts)
    theirs = float(trainer.compute_loss(model.eval(), inputs))
    ours = run(Preference(), batch_of(Preference(), rows, made), model)[0]
    assert ours == pytest.approx(theirs, abs=1e-6 * max(1.0, abs(theirs)))


def test_ipo_is_the_square_around_its_target():
    margins = torch.tensor([-2.0, 5.0, 7.0])
    assert preference_loss(margins, beta=0.1, kind="ipo").tolist() == [49.0, 0.0, 4.0]
    loss, _, gradient = run(Preference(kind="ipo"), batch_of(Preference(kind="ipo")))
    assert loss > 0 and gradient.any()


def test_nll_and_distillation_are_added():
    made = material()
    parts = [Preference(), Preference(nll=0.5), Preference(gamma=2.0, distill=Distillation())]
    plain, nll, both = (run(o, batch_of(o, made=made)) for o in parts)
    kd = run(Distillation(), batch_of(Distillation(), made=made))
    assert nll[0] > plain[0]
    assert both[0] == pytest.approx(plain[0] + 2 * kd[0], rel=1e-4)


def test_stages_follow_each_other():
    stages = Stages([(Distillation(), 3), (Preference(), 2)])
    assert [type(stages.at(step)).__name__ for step in (0, 2, 3, 9)] == ["Distillation"] * 2 + ["Preference"] * 2
    assert "chosen" in Gather(material(), stages, (PRESET,))([0, 1], 2)
    assert "pairs" in Gather(material(), stages, (PRESET,))([0, 1], 3)


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(PolybitError, match="beta 0"):
        Preference(beta=0)
    with pytest.raises(PolybitError, match="drop one"):
        Preference(shared=True, nll=1.0)
    with pytest.raises(PolybitError, match="sigmoid or ipo"):
        preference_loss(torch.zeros(1), beta=0.1, kind="hinge")


def test_an_anchor_takes_what_the_float_answer_lost_off_the_margin():
    """Literally: the fall of the float answer's log-probability after the divergence, in nats, where it fell."""
    batch = batch_of(Preference())
    pairs = batch["pairs"][PRESET]
    w_N, l_N = (pairs[side]["logp_N"] - 0.25 for side in ("chosen", "rejected"))
    plain, held = (Preference(anchor=anchor).margins(w_N, l_N, pairs) for anchor in (0.0, 2.0))
    for row, star in enumerate(pairs["star_B"].tolist()):
        fell = sum(0.25 for at, place in zip(pairs["chosen"]["row_N"], pairs["chosen"]["place_N"], strict=True)
                   if at == row and place >= star)  # fmt: skip
        assert float(plain[row] - held[row]) == pytest.approx(2 * fell, abs=1e-4)
    risen = Preference(anchor=2.0).margins(w_N + 1, l_N, pairs)
    assert torch.equal(risen, Preference().margins(w_N + 1, l_N, pairs))
    means = Preference(mean=True).margins(w_N, l_N, pairs)
    assert torch.allclose(means[pairs["active_B"]], torch.zeros_like(means[pairs["active_B"]]), atol=1e-5)
