"""A switchable run: every row once before any twice, a resumed run ends in the same weights, the guard holds."""

from collections import Counter

import pytest
import torch

from polybit.core.plan import Plan
from polybit.core.runtime import PolybitError
from polybit.data.lessons import Lesson, Lessons
from polybit.nn.switch import at, use
from polybit.train.cascade import Agreement, Cascade
from polybit.train.fit import Course
from polybit.train.latent import Freedom, latent_layers, make_trainable
from polybit.train.schedules import Drawn
from polybit.train.switchable import grouped_order, means, rows_of, run
from polybit.train.trainer import settings
from tests.families import tiny_model

PRESETS = {"A": Plan.uniform("w8a8"), "B": Plan.uniform("w3a4")}


def lessons(count=24, seed=0, first=3):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(
            first, first + 17, (int(torch.randint(5, 12, (), generator=generator)),), generator=generator
        ).tolist()
        rows.append(Lesson(ids, [n > 1 for n in range(len(ids))]))
    return Lessons(rows, source="made up")


def trainable(**freedom):
    return make_trainable(tiny_model("llama"), PRESETS, group_size=32, freedom=Freedom(scales="learned", **freedom))


def test_order_uses_every_row_before_any_again_and_pads_little():
    lengths = [3 * (n % 40) + 1 for n in range(100)]
    order = grouped_order(lengths, 25, 4, seed=0)
    assert len(order) == 100 and set(Counter(order).values()) == {1}
    assert order == grouped_order(lengths, 25, 4, seed=0) != grouped_order(lengths, 25, 4, seed=1)
    padded = sum(4 * max(lengths[row] for row in order[i : i + 4]) for i in range(0, 100, 4))
    assert padded < 1.2 * sum(lengths)
    assert len(grouped_order([1, 2, 3], 5, 2, seed=0)) == 10  # a small set goes round and round


def test_training_lowers_the_loss_of_every_preset(tmp_path):
    model, rows = trainable(), lessons()
    before = {name: means(rows_of(model, rows, name)) for name in PRESETS}
    run(
        model, rows, Cascade("cdt"), tuple(PRESETS), out=tmp_path, course=Course(steps=20, learning_rate=5e-3, probes=0)
    )
    after = {name: means(rows_of(model, rows, name)) for name in PRESETS}
    assert all(after[name]["nll"] < before[name]["nll"] for name in PRESETS)


def test_rows_of_is_the_plain_mean(tmp_path):
    model, rows = trainable(), lessons(5)
    found = rows_of(model, rows, "B", size=2)
    for index, row in enumerate(rows.rows):
        with at(model, "B"), torch.no_grad():
            logits_TV = model(torch.tensor([row.ids])).logits[0]
        learnt = [n for n in range(1, len(row.ids)) if row.learn[n]]
        nll = -sum(logits_TV[n - 1].log_softmax(-1)[row.ids[n]] for n in learnt)
        assert float(found["nll"][index]) == pytest.approx(float(nll), rel=1e-3)
        assert float(found["tokens"][index]) == len(learnt)
    assert float(rows_of(model, rows, "float")["kl"].abs().max()) < 1e-4


class Stop(Exception):
    """Ends a run in the middle."""


def test_an_interrupted_run_ends_in_the_same_weights(tmp_path):
    rows, held_out = lessons(), lessons(6, seed=9)
    course = Course(steps=8, batch=4, learning_rate=1e-3, probes=4, slack=1.0)

    def go(model, out, objective):
        run(model, rows, objective, tuple(PRESETS), out=out, course=course, schedule=Drawn(1), held_out=held_out)
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    whole = go(trainable(), tmp_path / "whole", Cascade("cdt"))
    calls = []

    def stopping(forward, batch, presets):
        calls.append(1)
        if len(calls) == 6:
            raise Stop
        return Cascade("cdt")(forward, batch, presets)

    with pytest.raises(Stop):
        go(trainable(), tmp_path / "cut", stopping)
    resumed = go(trainable(), tmp_path / "cut", Cascade("cdt"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_preset_that_gets_worse_is_noticed(tmp_path):
    model, others = trainable(), lessons(6, first=60)  # words training unlearns
    before = {name: layer.latent_OI.detach().clone() for name, layer in latent_layers(model).items()}
    course = Course(steps=6, learning_rate=1e-2, probes=2, slack=0.0)
    outcome = run(model, lessons(), Cascade("joint"), tuple(PRESETS), out=tmp_path, course=course, held_out=others)
    assert "the start is kept" in outcome.picker.reason()
    assert all(torch.equal(before[name], layer.latent_OI) for name, layer in latent_layers(model).items())


def test_further_terms_reach_hidden_states_and_adapters(tmp_path):
    model = make_trainable(tiny_model("llama"), PRESETS, group_size=32, adapter="lora", freedom=Freedom(rank=2))
    objective = Agreement(Cascade("joint"), model, 0.1, 0.1, 0.1)
    outcome = run(
        model, lessons(), objective, tuple(PRESETS), out=tmp_path, course=Course(steps=10, learning_rate=1e-2, probes=0)
    )
    said = {key for entry in outcome.log for key in entry}
    assert {"consistency", "alignment", "switchability", "A/nll"} <= said
    use(model, "A")
    assert any(bool(layer.loras["A"].up_OR.any()) for layer in latent_layers(model).values())


def test_a_course_that_cannot_be():
    with pytest.raises(PolybitError, match="steps 0"):
        Course(steps=0)
    with pytest.raises(PolybitError, match="learning rate 2"):
        Course(learning_rate=2)


def test_kl_is_to_the_float_model_when_norms_have_moved():
    model = trainable(others="norms")
    source = tiny_model("llama").eval()
    rows = lessons(6)
    same = rows_of(model, rows, "A", source=source)
    assert all(torch.equal(same[name], value) for name, value in rows_of(model, rows, "A").items())
    with torch.no_grad():
        for _name, parameter in model.named_parameters():
            if parameter.ndim == 1 and parameter.requires_grad:
                parameter.mul_(1.5)
    moved = rows_of(model, rows, "A", source=source)
    assert (moved["kl"] > 10 * same["kl"]).all() and not torch.equal(moved["kl"], rows_of(model, rows, "A")["kl"])
    assert torch.equal(moved["nll"], rows_of(model, rows, "A")["nll"])


def test_training_goes_where_the_model_is(tmp_path):
    given = {"steps": 1, "batch": 1, "learning_rate": 1e-3, "save_every": 1}
    assert settings(tmp_path, device=torch.device("cpu"), **given).use_cpu
    model = trainable()
    run(model, lessons(), Cascade("cdt"), ("A", "B"), out=tmp_path / "run", course=Course(steps=1, batch=2, probes=0))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
