"""The trainer: one preset at a time equals the sum, kept positions, a killed run ends in the same weights."""

import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from polybit.core.runtime import PolybitError
from polybit.hub.likelihood import keep_positions
from polybit.nn.switch import use
from polybit.train import align
from polybit.train.align import Refresh, run
from polybit.train.balance import Balance
from polybit.train.distill import Distillation
from polybit.train.fit import Course
from polybit.train.forward import logits_of
from polybit.train.preference import Preference
from polybit.train.probe import AnswerProbe
from polybit.train.trainer import PrecisionTrainer, last_checkpoint, settings
from tests.evals.tiny import tokenizer
from tests.families import FAMILIES, tiny_model
from tests.train.tiny_run import TOKENS, float_lm, material, trainable

COURSE = Course(steps=12, batch=4, learning_rate=3e-4, probes=3)


def go(out, objective=None, widths=(3,), course=COURSE, gather=None, refresh=0):
    """(model, outcome) of a run on tiny pairs; `gather` is called before every step."""
    model = trainable(widths)
    presets = tuple(f"w{b}" for b in widths)
    if gather is not None:
        plain = align.Gather
        align.Gather = lambda *a: lambda rows, step: (gather(step), plain(*a)(rows, step))[1]
    try:
        outcome = run(
            model,
            material().split(6),
            objective or Distillation(),
            presets,
            out=out,
            course=course,
            refresh=Refresh(tokenizer(), refresh, TOKENS),
        )
    finally:
        if gather is not None:
            align.Gather = plain
    return model, outcome


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def die(out, objective, course, refresh, at, threads):
    """A run that is killed when it gathers the batch of step `at`."""
    torch.set_num_threads(threads)
    kill = lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == at else None  # noqa: E731
    go(out, objective, course=course, refresh=refresh, gather=kill)


def test_distillation_lowers_held_out_kl_and_keeps_the_best(tmp_path):
    model, outcome = go(tmp_path)
    assert outcome.best["w3"]["kl"] < 0.8 * outcome.start["w3"]["kl"]
    again = AnswerProbe(material().split(6)[1], ("w3",))(model)
    assert again["w3"]["kl"] == pytest.approx(outcome.best["w3"]["kl"], rel=1e-4)
    assert any("w3/kd" in entry for entry in outcome.log)


@pytest.mark.parametrize(
    "objective, refresh",
    [
        (Preference(), 2),
        pytest.param(Distillation(), 0, marks=pytest.mark.slow),
        pytest.param(Distillation("own", "reverse"), 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_in_the_same_weights(tmp_path, objective, refresh):
    """kill -9 in the middle of a step, twice, then the same command again."""
    course = Course(steps=12, batch=4, learning_rate=1e-3, probes=3)
    for at in (1, 10):
        # a fork would inherit the locks of torch's threads
        args = (tmp_path / "killed", objective, course, refresh, at, torch.get_num_threads())
        child = multiprocessing.get_context("spawn").Process(target=die, args=args)
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-8"
    seen = []
    resumed, one = go(tmp_path / "killed", objective, course=course, refresh=refresh, gather=seen.append)
    whole, other = go(tmp_path / "whole", objective, course=course, refresh=refresh)
    assert seen[0] == 8 and len(seen) == 4
    assert torch.equal(weights(resumed), weights(whole))
    assert one.picker.history == other.picker.history


def test_a_checkpoint_written_in_half_is_not_resumed_from(tmp_path):
    go(tmp_path)
    newest = last_checkpoint(tmp_path)
    (newest / "whole").unlink()
    assert last_checkpoint(tmp_path) != newest and not newest.exists()


def moved(out, widths=(3,)):
    """What the last checkpoint of a run holds."""
    reader = FileSystemReader(last_checkpoint(out) / "weights")
    shapes = {name: entry.size for name, entry in reader.read_metadata().state_dict_metadata.items()}
    stored = {name: torch.empty(size) for name, size in shapes.items()}
    load(stored, storage_reader=reader, no_dist=True)
    names = [name for name, p in trainable(widths).named_parameters() if p.requires_grad]
    return torch.cat([stored[name].flatten() for name in names])


def test_presets_one_at_a_time_give_the_gradient_of_the_sum(tmp_path):
    course = Course(steps=3, batch=4, learning_rate=3e-4, probes=1)
    found = []
    for alone in (True, False):
        go(tmp_path / str(alone), Distillation(separable=alone), (4, 3), course)
        found.append(moved(tmp_path / str(alone), (4, 3)) - weights(trainable((4, 3))))
    assert float((found[0] - found[1]).norm()) < 1e-3 * float(found[1].norm())


@pytest.mark.parametrize("share", ["loss", "project"])
def test_several_widths_none_below_its_start(tmp_path, share):
    course = Course(steps=8, batch=4, learning_rate=3e-4, probes=4, balance=Balance(share))
    _, outcome = go(tmp_path, widths=(4, 2), course=course)
    for name, start in outcome.start.items():
        assert outcome.best[name]["kl"] <= start["kl"] and outcome.best[name]["flips"] <= start["flips"]
    assert min(entry["presets"]["w2"]["kl"] for entry in outcome.picker.history) < outcome.start["w2"]["kl"]


def test_accumulated_batches_give_the_step_of_one_batch(tmp_path):
    found = []
    for parts in (1, 2):
        go(tmp_path / str(parts), course=replace(COURSE, steps=2, probes=1, accumulate=parts))
        found.append(moved(tmp_path / str(parts)) - weights(trainable()))
    # answers differ in length, so the mean over tokens of halves is not exactly that of the whole
    assert float((found[0] - found[1]).norm()) < 0.5 * float(found[0].norm())


def test_a_diverging_run_is_stopped_and_the_start_kept(tmp_path):
    course = Course(steps=40, batch=4, learning_rate=0.5, probes=20, patience=2)
    model, outcome = go(tmp_path, course=course)
    assert outcome.picker.stopped and "below the start" in outcome.picker.reason()
    assert outcome.picker.history[-1]["step"] < 40
    if outcome.picker.best["step"] == 0:
        assert torch.equal(weights(model), weights(trainable()))


def test_identical_answers_leave_nothing_to_prefer(tmp_path):
    train, held_out = material().split(6)
    train.rejected[""] = [None] * len(train)
    with pytest.raises(PolybitError, match="all answers of the two models are the same"):
        run(trainable(), (train, held_out), Preference(), ("w3",), out=tmp_path, course=COURSE)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama-tied"}))
def test_kept_positions_are_those_of_all_logits(family):
    model = tiny_model(family)
    ids_BT = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    keep_BT = torch.zeros(2, 7, dtype=torch.bool)
    keep_BT[0, 3:], keep_BT[1, 5] = True, True
    with torch.no_grad():
        whole = logits_of(model, {"ids_BT": ids_BT})
        kept = logits_of(model, {"ids_BT": ids_BT, "keep_BT": keep_BT})
    torch.testing.assert_close(kept, whole[keep_BT], atol=1e-5, rtol=1e-5)


def test_the_head_is_as_it_was_after_an_error():
    model = tiny_model("llama")
    with pytest.raises(RuntimeError), keep_positions(model, torch.ones(1, 2)):
        raise RuntimeError
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape[:2] == (1, 2)


def test_a_schedule_chooses_the_presets_of_a_step(tmp_path):
    used = []

    def objective(forward, batch, presets):
        used.append(presets)
        return forward({"ids_BT": torch.tensor([[5, 6, 7]])}, presets[0]).sum(), {}

    trainer = PrecisionTrainer(
        trainable((4, 3)),
        objective=objective,
        presets=("w4", "w3"),
        switch=use,
        schedule=lambda step, presets: (presets[step % 2],),
        args=settings(tmp_path, steps=4, batch=1, learning_rate=1e-4, save_every=4),
        train_dataset=[0] * 4,
    )
    trainer.fit()
    assert used == [("w4",), ("w3",), ("w4",), ("w3",)]


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(PolybitError, match="steps 0"):
        Course(steps=0)
    with pytest.raises(PolybitError, match="learning rate 3"):
        Course(learning_rate=3)


def test_float_scores_need_no_float_model_while_training():
    """The material holds all a step reads of the reference; the float preset of the model is not called."""
    batch = align.Gather(material(), Distillation(), ("w3",))([0, 1], 0)
    asked = []

    def forward(part, preset):
        asked.append(preset)
        return logits_of(use(trainable(), preset), part)

    Distillation()(forward, batch, ("w3",))
    assert asked == ["w3"] and float_lm() is float_lm()


def test_a_preference_at_a_rate_that_ruins_it_goes_back_and_ends_better(tmp_path):
    """At 3e-2 the first steps multiply KL; three returns later the rate is one at which something is learnt."""
    halves = material(24).split(8)
    more = {"further": {"save_strategy": "no"}}
    course = Course(steps=20, batch=8, probes=10, learning_rate=3e-2, back=0.1, **more)
    outcome = run(trainable(), halves, Preference(), ("w3",), out=tmp_path / "a", course=course)
    history = outcome.picker.history
    assert history[1]["back"] and history[1]["score"] > 2 and outcome.picker.stopped is None
    assert outcome.picker.best["step"] > 0 and outcome.picker.best["score"] < 1
    stopped = run(trainable(), halves, Preference(), ("w3",), out=tmp_path / "b", course=replace(course, back=None))
    assert stopped.picker.stopped is not None and stopped.picker.best["step"] == 0
