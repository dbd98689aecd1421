"""What is foretold from one block of drawn weights.

Kinds: property (it grows with depth and text as it must, and nothing stays in memory), slow (against a real run).
"""

import pytest
import torch

from polybit.compress import forecast
from polybit.compress.forecast import foretell_seconds
from polybit.compress.recipe import choose
from polybit.hub.drawn import drawn_model
from polybit.hub.random_model import Shape, skeleton
from polybit.nn.convert import targets


def foretold(layers, windows, method="gptq", **more):
    source = drawn_model("drawn", skeleton(Shape(64, layers, 128, 96, 4, 2)))
    recipe = choose(method, (4, 2) if method == "nested" else (4,), 32)
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


def test_drawn_weights_are_lent_and_taken_back():
    source = drawn_model("drawn", skeleton(Shape(64, 2, 128, 96, 4, 2)))
    with source.lend("model.layers.1"):
        weights = dict(source.model.model.layers[1].named_parameters())
        assert all(not p.is_meta and bool(torch.isfinite(p).all()) for p in weights.values())
        assert torch.equal(weights["input_layernorm.weight"], torch.ones(64))
        assert 0.1 < float(weights["mlp.up_proj.weight"].std()) < 0.15  # 1 / sqrt(64)
    assert all(parameter.is_meta for parameter in source.model.parameters())


@pytest.mark.slow
def test_a_run_takes_about_as_long(tmp_path):
    from polybit.acts.plan import plan
    from polybit.acts.quantize import quantize
    from polybit.hub.random_model import random_float
    from polybit.hub.tiny import path
    from polybit.options.plan import PlanOptions
    from polybit.options.quantize import QuantizeOptions

    random_float(Shape(512, 6, 1408, 1000, 8, 4)).save_pretrained(tmp_path / "model")
    for file in path().glob("*token*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    asked = {"bits": 4, "method": "gptq", "samples": 16, "window": 128}
    foreseen = plan(str(tmp_path / "model"), PlanOptions(**asked)).numbers["time"]["cpu_seconds"]
    options = QuantizeOptions(**asked, calibration="embedded", measure=False, out=tmp_path / "out")
    assert foreseen == pytest.approx(quantize(str(tmp_path / "model"), options).cpu_seconds, rel=0.4)
