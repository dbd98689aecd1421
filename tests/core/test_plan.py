"""Column widths of a plan: what can be written can be read back, means are counted, nonsense is one clear sentence."""

import pytest

from polybit.core.plan import ColumnWidths, Plan
from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError

PLAN = Plan(Precision(w=4), {"b": Precision(w=3)}, {"a": ColumnWidths(32, (0, 1, -1)), "b": ColumnWidths(64, (1, 0))})


def test_round_trip():
    assert PLAN.to_json()["columns"] == {
        "a": {"block": 32, "offsets": [0, 1, -1]},
        "b": {"block": 64, "offsets": [1, 0]},
    }
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert "columns" not in Plan.uniform("w4").to_json()  # files from before stay what they were


def test_group_widths():
    assert PLAN.group_widths("a", 96, 32) == (4, 5, 3)
    assert PLAN.group_widths("a", 80, 16) == (4, 4, 5, 5, 3)  # the last block is one group short
    assert PLAN.group_widths("b", 128, 32) == (4, 4, 3, 3)
    assert PLAN.group_widths("c", 128, 32) is None
    ends = ColumnWidths(16, (-4, 4))
    assert ends.group_widths(3, 32, 16) == (1, 7)
    assert ends.group_widths(6, 32, 16) == (2, 8)
    assert ends.group_widths(3, 32, 16, most=4) == (1, 4)


def test_mean_bits_counts_columns():
    assert PLAN.bits_of("a") == 4.0
    assert PLAN.bits_of("b") == 3.5
    assert PLAN.mean_bits({"a": 100, "b": 100, "c": 200}) == pytest.approx((400 + 350 + 800) / 400)
    # 80 columns: blocks of 32, 32 and 16
    assert PLAN.mean_bits({"a": 800}, {"a": 80}) == pytest.approx((4 * 32 + 5 * 32 + 3 * 16) / 80)


def test_unknown_layer_in_columns():
    with pytest.raises(PolybitError, match="does not have, first 'a'"):
        PLAN.check_names(["b", "c"])


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ([], "'columns' of a plan"),
        ({"a": 3}, "layer 'a'"),
        ({"a": {"block": 32}}, "layer 'a'"),
        ({"a": {"block": 32, "offsets": [0], "more": 1}}, "layer 'a'"),
        ({"a": {"block": 0, "offsets": [0]}}, "'block'"),
        ({"a": {"block": True, "offsets": [0]}}, "'block'"),
        ({"a": {"block": 32, "offsets": []}}, "'offsets'"),
        ({"a": {"block": 32, "offsets": [0.5]}}, "0.5"),
        ({"a": {"block": 32, "offsets": [9]}}, "9"),
        ({"a": {"block": 32, "offsets": "0,1"}}, "layer 'a'"),
    ],
)
def test_malformed_columns(columns, words):
    with pytest.raises(PolybitError, match=words) as caught:
        Plan.from_json({"default": "w4", "columns": columns})
    assert "\n" not in str(caught.value)


def test_float_layers_have_no_column_widths():
    with pytest.raises(PolybitError, match="leaves in float"):
        Plan(columns={"a": ColumnWidths(32, (0, 1))})


@pytest.mark.parametrize(
    ("columns", "group_size", "words"), [(96, 64, "divides"), (96, 0, "whole row"), (64, 32, "give 2")]
)
def test_misfit_is_named(columns, group_size, words):
    with pytest.raises(PolybitError, match=words) as caught:
        PLAN.group_widths("a", columns, group_size)
    assert "layer 'a'" in str(caught.value)


def test_as_people_say_it():
    assert str(Plan.uniform("w4a8")) == "w4a8"
    assert str(PLAN) == "w4, 1 layer w3, widths inside 2 layers"
    assert (
        str(Plan(Precision(w=4), {"a": Precision(w=4), "b": Precision(w=6), "c": Precision(w=6)})) == "w4, 2 layers w6"
    )
