"""Precision, Plan, Grid: what can be written can be read back, and nonsense gets one clear sentence."""

import os
import subprocess
import sys
import time

import pytest
import torch

from polybit.core.affine import Grid, fake_quantize_tokens
from polybit.core.plan import Plan
from polybit.core.precision import Precision, parse_widths
from polybit.core.records import Run
from polybit.core.runtime import MACHINE, PolybitError, atomic_path, write_json


@pytest.mark.parametrize("text", ["w4", "w4a8", "w4a8k8v4", "w3q8", "float"])
def test_precision_round_trip(text):
    assert str(Precision.parse(text)) == text


def test_bare_number_means_weights():
    assert Precision.parse("4") == Precision.parse(4) == Precision(w=4)


@pytest.mark.parametrize("text", ["", "w", "w9", "w1", "x4", "w4w3", "4.5", "w4 a8", "a3", "-4", "w04x"])
def test_bad_precision_is_one_sentence(text):
    with pytest.raises(PolybitError) as caught:
        Precision.parse(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 30


@pytest.mark.parametrize("text", ["", "9", "8,1", "a,b", "16", "8,,x"])
def test_bad_widths(text):
    with pytest.raises(PolybitError):
        parse_widths(text)


def test_widths_are_sorted_and_distinct():
    assert parse_widths("3, 8,8,4") == (8, 4, 3)


def test_plan_round_trip_and_mean():
    plan = Plan(Precision(w=4), {"a": Precision(w=8), "b": Precision(w=2, a=8)})
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.mean_bits({"a": 100, "b": 100, "c": 200}) == pytest.approx(4.5)
    with pytest.raises(PolybitError, match="does not have"):
        plan.check_names(["a"])


@pytest.mark.parametrize("value", [None, [], {"layer": {}}, {"layers": 3}, {"default": "w99"}])
def test_malformed_plan(value):
    with pytest.raises(PolybitError):
        Plan.from_json(value)


def test_effective_bits_count_scales_and_zeros():
    assert Grid(4, 32).bits_per_weight(64, 64) == 4.5
    assert Grid(4, 32, "group").bits_per_weight(64, 64) == 4.625
    assert Grid(3, 64).bits_per_weight(64, 172) == pytest.approx(3 + 16 * 3 / 172)
    with pytest.raises(PolybitError, match="group size"):
        Grid(4, 48)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_activation_rounding_error_and_gradient(bits):
    x = torch.randn(7, 40, requires_grad=True)
    y = fake_quantize_tokens(x, bits)
    half_step = x.detach().abs().amax(1) / ((1 << (bits - 1)) - 1) / 2
    assert ((y - x).abs().amax(1) <= half_step * 1.0001).all()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(fake_quantize_tokens(torch.zeros(2, 3), bits), torch.zeros(2, 3))


def test_what_a_killed_process_began_to_write_goes_and_a_living_one_s_stays(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    target = tmp_path / "run.json"
    begun = [tmp_path / f".run.json.{MACHINE}.{number}.staged" for number in (child.pid, os.getppid())]
    others = [tmp_path / name for name in (f".run.json.0.{child.pid}.staged", f".run.jso.{MACHINE}.{child.pid}.staged")]
    for path in (*begun, *others):
        path.write_text("half")
    write_json(target, {})
    assert sorted(tmp_path.iterdir()) == sorted([target, begun[1], *others])


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"x": 1})
    with pytest.raises(ValueError):
        write_json(target, {"x": float("nan")})
    with pytest.raises(RuntimeError), atomic_path(target) as staged:
        staged.write_text("half")
        raise RuntimeError("killed")
    assert target.read_text() == '{\n "x": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_run_written_amid_its_work_has_the_seconds_so_far():
    """As the run.json of a checkpoint is; before and after nothing is added, and twice timed is the sum."""
    run = Run("verb", {})
    assert run.to_json()["seconds"] == 0
    with run.timed():
        time.sleep(0.02)
        assert 0.02 <= run.to_json()["seconds"] < 5
    first = run.seconds
    assert 0.02 <= first < 5 and run.to_json()["seconds"] == round(first, 3)
    with run.timed():
        time.sleep(0.02)
    assert run.seconds >= first + 0.02
