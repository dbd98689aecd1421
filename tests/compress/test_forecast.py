"""What is foretold from one block of drawn weights.

Kinds: property (it grows with depth and text as it must, and nothing stays in memory), slow (against a real run).
"""

from dataclasses import replace

import pytest
import torch

from polybit.compress import forecast
from polybit.compress.forecast import foretell_seconds
from polybit.compress.forecast_steps import TimedSteps, learning_bytes, learning_seconds
from polybit.compress.recipe import choose
from polybit.hub.drawn import drawn_model
from polybit.hub.random_model import Shape, skeleton
from polybit.nn.convert import targets


def foretold(layers, windows, method="gptq", effort="normal", **more):
    source = drawn_model("drawn", skeleton(Shape(64, layers, 128, 96, 4, 2)))
    recipe = choose(method, (8, 4, 2) if method == "nested" else (4,), 32, effort=effort)
    chosen = targets(source.model)
    found = foretell_seconds(source, chosen, [], recipe, windows=windows, length=16, start=(0.0, 0.0), **more)
    assert all(parameter.is_meta for parameter in source.model.parameters())
    return found


@pytest.mark.parametrize("method", ["rtn", "gptq", "nested"])
def test_it_grows_with_depth_and_text(method, monkeypatch):
    block = forecast.TimedBlock("model.layers.0", 2, (1.0, 1.0), (2.0, 2.0), (0.5, 0.25))
    real = forecast.time_block
    seen = []
    monkeypatch.setattr(forecast, "time_block", lambda *args: seen.append(real(*args)) or block)
    found = foretold(6, 32, method)
    assert seen[0].codes[0] > 0 and seen[0].kept[0] > 0 and 1 <= seen[0].batches <= 8
    assert found["blocks"] == 6 and found["parts"]["codes"]["seconds"] == pytest.approx(6)
    assert found["parts"]["passes"]["seconds"] == pytest.approx(2 * 6 * 8 / 2)  # 32 windows are 8 batches, 2 were tried
    assert found["parts"]["kept"]["cpu_seconds"] == pytest.approx(1.5)
    assert found["seconds"] == pytest.approx(sum(row["seconds"] for row in found["parts"].values()))


@pytest.mark.parametrize("whole", [True, False])
def test_learned_rounding_grows_with_its_steps(whole):
    """Over the whole model with the head in every step and the teacher once a batch; by blocks with two more passes."""
    timed = TimedSteps(forward=(0.5, 0.5), step=(2.0, 1.0), head=(3.0, 3.0), held=100, hidden=10, logits=1000)
    steps = {"finish_steps": 130} if whole else {"block_steps": 200}
    recipe = replace(choose("rounding", (4,), 32, effort="fast"), **steps)
    wall, cpu = learning_seconds(timed, recipe, blocks=6, batches=8)
    assert wall == pytest.approx(140 * (6 * 2 + 3) + 8 * (6 * 0.5 + 1) if whole else 6 * (210 * 2 + 2 * 8 * 0.5))
    assert cpu == pytest.approx(140 * (6 + 3) + 8 * (6 * 0.5 + 1) if whole else 6 * (210 + 2 * 8 * 0.5))
    held = learning_bytes(timed, recipe, weights=50, blocks=6, batches=8)
    assert held == (20 * 50 + 6 * 100 + 4 * 1000 + 8 * 9 * 10 if whole else 0)


@pytest.mark.parametrize("whole", [True, False])
def test_learning_of_nested_codes_is_followed_by_their_wide_bits(whole):
    """Statistics of all text once, the bits once, and every width compared before and after on SAMPLE batches."""
    timed = TimedSteps((0.5, 0.5), (2.0, 1.0), (3.0, 3.0), 100, 10, 1000, stats=(0.25, 0.25), settled=(7.0, 6.0))
    steps = {"finish_steps": 260} if whole else {"finish_steps": 0, "block_steps": 200}
    recipe = replace(choose("nested", (8, 4, 2), 32, effort="best"), **steps)
    wall, cpu = learning_seconds(timed, recipe, blocks=6, batches=8)
    forward = 6 * 0.5 + (1 if whole else 0)
    passes = (8 if whole else 2 * 8) + 2 * 3 * 4
    after = passes * forward + 6 * 8 * 0.25
    assert wall == pytest.approx(after + 6 * 7 + (260 * (6 * 2 + 3) if whole else 200 * 6 * 2))
    assert cpu == pytest.approx(after + 6 * 6 + (260 * (6 * 1 + 3) if whole else 200 * 6 * 1))


def test_a_few_steps_are_tried():
    found = foretold(6, 32, "rounding")
    assert found["parts"]["learning"]["cpu_seconds"] > 0
    weights = 6 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert found["learning_bytes"] > 20 * weights
    assert "learning" not in foretold(6, 32, "gptq")["parts"] | foretold(6, 32, "nested")["parts"]
    nested = foretold(6, 32, "nested", "best")
    assert nested["parts"]["learning"]["cpu_seconds"] > 0 and nested["learning_bytes"] > 36 * weights


def test_drawn_weights_are_lent_and_taken_back():
    source = drawn_model("drawn", skeleton(Shape(64, 2, 128, 96, 4, 2)))
    with source.lend("model.layers.1"):
        weights = dict(source.model.model.layers[1].named_parameters())
        assert all(not p.is_meta and bool(torch.isfinite(p).all()) for p in weights.values())
        assert torch.equal(weights["input_layernorm.weight"], torch.ones(64))
        assert 0.1 < float(weights["mlp.up_proj.weight"].std()) < 0.15  # 1 / sqrt(64)
    assert all(parameter.is_meta for parameter in source.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "rounding", "nested"])
def test_a_run_takes_about_as_long(method, tmp_path):
    from polybit.acts.plan import plan
    from polybit.acts.quantize import quantize
    from polybit.hub.random_model import random_float
    from polybit.hub.tiny import path
    from polybit.options.plan import PlanOptions
    from polybit.options.quantize import QuantizeOptions

    random_float(Shape(512, 6, 1408, 2048, 8, 4)).save_pretrained(tmp_path / "model")
    for file in path().glob("*token*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    asked = {"method": method, "samples": 16, "window": 128}
    asked |= {"effort": "best"} if method == "nested" else {"bits": 4}
    foreseen = plan(str(tmp_path / "model"), PlanOptions(**asked)).numbers["time"]["cpu_seconds"]
    options = QuantizeOptions(**asked, calibration="embedded", measure=False, out=tmp_path / "out")
    assert foreseen == pytest.approx(quantize(str(tmp_path / "model"), options).cpu_seconds, rel=0.4)
