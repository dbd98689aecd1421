"""The three costs of a token, each counted as it says."""

import json

import pytest

import polybit
from polybit.acts.cost import costs
from polybit.cli import main
from polybit.core.cost import spearman
from polybit.core.runtime import PolybitError
from polybit.hub.checkpoint import save
from polybit.nn.switch import use
from polybit.speed.work import float_bytes, model_bitops
from tests.families import quantized


def test_bitops_of_a_llama_by_hand():
    model = use(quantized("llama"), "w4a8q8k8v4")
    linear = 2 * (72 * 72 * 2 + 72 * 36 * 2 + 3 * 72 * 136)
    attention = 2 * 4 * 18 * 50
    assert model_bitops(model, 50) == linear * 32 + attention * 64 + attention * 32 * 4 + 72 * 96 * 32 * 32


def test_only_the_chosen_experts_work():
    model = use(quantized("mixtral"), "w8a8")
    attention = 2 * (72 * 72 * 2 + 72 * 36 * 2)
    experts = 2 * 3 * 72 * 136 * 2  # two of four
    rest = model_bitops(model, 10) - 64 * (attention + experts)
    assert rest == 1024 * (72 * 96 + 2 * 2 * 4 * 18 * 10)


def test_float_bytes_count_one_row_of_an_untied_embedding():
    tied, untied = quantized("llama-tied"), quantized("llama")
    norms = 5 * 72 * 4
    routers = 0
    assert float_bytes(tied) == 96 * 72 * 4 + norms + routers
    assert float_bytes(untied) == 96 * 72 * 4 + 72 * 4 + norms


def test_each_cost_falls_with_its_own_width():
    rows = costs(quantized("llama"), ["w8", "w4", "w4a8", "w4k4v4"], context=20, steps=0)
    w8, w4, w4a8, packed = rows
    assert w8.bitops - w4.bitops == 2 * (72 * 72 * 2 + 72 * 36 * 2 + 3 * 72 * 136) * 4 * 32
    assert w4.bytes < w8.bytes and w4a8.bytes == w4.bytes and w4a8.bitops < w4.bitops
    assert packed.cache_bytes < w4.cache_bytes / 3 and packed.weight_bytes == w4.weight_bytes
    assert all(row.ms is None for row in rows)


def test_verb(tmp_path, capsys):
    save(quantized("llama"), tmp_path / "m", widths=(8, 4))
    json_file = tmp_path / "c.json"
    main(["cost", str(tmp_path / "m"), "--context", "8", "--steps", "2", "--rounds", "1", "--json", str(json_file)])
    shown = capsys.readouterr().out
    assert "BitOPs/token" in shown and "bytes/token" in shown and "ms/token" in shown
    found = json.loads(json_file.read_text())["numbers"]["precisions"]
    assert set(found) == {"w8", "w4"} and found["w4"]["ms_per_token"]["median"] > 0
    with pytest.raises(PolybitError, match="ask for fewer"):
        polybit.cost(str(tmp_path / "m"), context=500)


def test_rank_correlation():
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0
