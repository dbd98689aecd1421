"""Plans of widths inside layers: searched, written for people, edited, refused with one sentence, made into files."""

import json
from pathlib import Path

import pytest
import torch

from polybit.acts.columns_search import ColumnSearch, search_layer
from polybit.cli import main
from polybit.compress.loop import quantize_layer
from polybit.compress.plan_files import check_plan, fixed_preset, read_plan, read_presets, write_plan
from polybit.compress.recipe import Recipe
from polybit.core.affine import Grid
from polybit.core.plan import ColumnWidths, Plan
from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError
from polybit.nn.convert import Target
from tests.quant.inputs import stats

PLAN = Plan(
    Precision(w=4), {"a.b": Precision(w=3, a=8)}, {"a.b": ColumnWidths(32, (1, -1)), "c": ColumnWidths(32, (0, 1))}
)
LAYERS = [Target("a.b", "linear", 8, 64), Target("c", "linear", 8, 64), Target("d", "linear", 8, 64)]


def loud_half(seed: int = 0):
    """A layer whose first half of columns carries inputs thirty times as strong."""
    draw = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(24, 64, generator=draw)
    strength_I = torch.where(torch.arange(64) < 32, 30.0, 1.0)
    return weight_OI, stats(torch.randn(512, 64, generator=draw) * strength_I)


@pytest.mark.parametrize("search", ["ranked", "spend"])
def test_bits_go_where_the_inputs_are_loud(search):
    weight_OI, seen = loud_half()
    found = search_layer(weight_OI, seen, 3.0, ColumnSearch(block=16, group_size=16, how=search))
    assert sum(found.offsets) == 0 and min(found.offsets[:2]) >= 1 and max(found.offsets[2:]) <= -1
    assert found.harm < 0.6 * found.tried[0][1]


def test_quiet_layers_are_left_alone():
    draw = torch.Generator().manual_seed(1)
    weight_OI, seen = torch.randn(24, 64, generator=draw), stats(torch.randn(512, 64, generator=draw))
    asked = ColumnSearch(block=16, group_size=16)
    assert search_layer(weight_OI, seen, 3.0, asked).offsets == (0, 0, 0, 0)
    halves = search_layer(weight_OI, seen, 3.5, asked).offsets
    assert sum(halves) == 2 and set(halves) <= {-1, 0, 1}


def test_a_plan_is_written_for_people(tmp_path):
    path = tmp_path / "plan.json"
    write_plan(path, PLAN)
    assert read_plan(path) == PLAN
    assert '  "a.b": {"block": 32, "offsets": [1, -1]}' in path.read_text()
    write_plan(path, PLAN, {"model": "x", "bits": 3.5})
    assert read_plan(path) == PLAN and json.loads(path.read_text())["bits"] == 3.5


def test_a_refused_file_is_named_by_its_flag(tmp_path):
    with pytest.raises(PolybitError, match=r"^--presets none.json: there is no such file"):
        read_presets("A=none.json")
    with pytest.raises(PolybitError, match=r"^--precision none.json: there is no such file"):
        read_plan(tmp_path.joinpath("none.json").relative_to(tmp_path), "--precision")


def test_codes_follow_the_plan():
    recipe = Recipe("gptq", Grid(5, 32, "group"), (5,), plan=PLAN)
    weight_OI, seen = loud_half()
    q = quantize_layer(weight_OI, seen, recipe, recipe.grid_of("a.b", 64))
    assert q.bits_G.tolist() == [4, 2] and q.bits == 4
    assert recipe.grid_of("d", 64) == Grid(4, 32, "group")
    nested = Recipe("nested", Grid(8, 32), (8, 4), plan=PLAN)
    assert nested.grid_of("a.b", 64) == Grid(8, 32)  # read by the plan, stored as ever


def test_names_and_blocks_are_checked():
    assert check_plan(PLAN, LAYERS, 32) == LAYERS
    with pytest.raises(PolybitError, match="does not have, first 'c'"):
        check_plan(PLAN, [LAYERS[0]], 32)
    with pytest.raises(PolybitError, match="group size that divides"):
        check_plan(PLAN, LAYERS, 64)
    with pytest.raises(PolybitError, match="every layer in float"):
        check_plan(Plan(), LAYERS, 32)
    low = Plan(Precision(w=2), {}, {"c": ColumnWidths(32, (-1, -1))})
    with pytest.raises(PolybitError, match="1 bit in every block"):
        check_plan(low, LAYERS, 32)


def test_fixed_files_are_read_in_full():
    preset = fixed_preset(PLAN, {"a.b": 4, "c": 5})
    assert preset.at("a.b") == Precision(w=4, a=8) and preset.at("c") == Precision(w=5) and not preset.columns


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "either --bits"),
        (["--bits", "3", "--plan", "p.json"], "either --bits"),
        (["--bits", "1.5"], "--bits 1.5"),
        (["--bits", "3", "--block", "48"], "no multiple"),
        (["--bits", "3", "--group-size", "0"], "no multiple"),
        (["--bits", "3", "--group-size", "16"], "too small"),
        (["--plan", "none.json", "--block", "64"], "no such file"),
        (["--plan", "list.json", "--block", "64"], "list.json"),
        (["--plan", "broken.json", "--block", "64"], "mend it"),
        (["--plan", "short.json", "--block", "64"], "leaves out 20 layer(s)"),
        (["--plan", "other.json", "--block", "64"], "does not have"),
        (["--bits", "3", "--block", "64", "--sort", "here"], "exists already"),
    ],
)
def test_mistakes_are_one_sentence(tiny_llama, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").touch()
    (tmp_path / "short.json").write_text('{"bits": 3.5, "plan": {"layers": {"model.layers.0.mlp.up_proj": "w3"}}}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text('{"layers": [1]}')
    (tmp_path / "other.json").write_text('{"default": "w4", "layers": {"model.layers.9.mlp.up_proj": "w3"}}')
    with pytest.raises(SystemExit) as caught:
        main(["columns", str(tiny_llama), "--out", "o.json", "--samples", "2", "--window", "16", *flags])
    assert caught.value.code not in (0, None)
    error = " ".join(capsys.readouterr().err.split())
    assert words in error and not (tmp_path / "o.json").exists()


def test_the_zero_points_of_a_plan_stay(tiny_llama, tmp_path, monkeypatch, capsys):
    """What allocate counted per group is searched with, said in the new plan, and stored by quantize."""
    monkeypatch.chdir(tmp_path)
    flags = ["--samples", "2", "--window", "16", "--group-size", "32", "--method", "rtn"]
    bits = {}
    for zero in ("group", "centre"):
        Path(f"{zero}.json").write_text(json.dumps({"plan": {"default": "w3"}, "zero": zero}))
        search = ["--plan", f"{zero}.json", "--block", "32", "--out", "o.json", "--json", "run.json", *flags]
        main(["columns", str(tiny_llama), *search])
        assert json.loads(Path("o.json").read_text())["zero"] == zero
        bits[zero] = json.loads(Path("run.json").read_text())["numbers"]["without"]["bits_per_weight"]
    assert bits["group"] > bits["centre"] + 0.05
    main(
        ["columns", str(tiny_llama), "--bits", "3.25", "--block", "32", "--out", "o.json", "--json", "run.json", *flags]
    )
    told = json.loads(Path("run.json").read_text())["numbers"]["with"]["bits_per_weight"]
    text = ["--samples", "2", "--window", "16", "--group-size", "32", "--no-measure", "--calibration", "self"]
    main(["quantize", str(tiny_llama), "--plan", "o.json", "--effort", "fast", "--out", "made", *text])
    made = json.loads(Path("made/run.json").read_text())["numbers"]["stored_bits_per_weight"]
    assert json.loads(Path("o.json").read_text())["zero"] == "group" and made == pytest.approx(told, abs=0.01)


def test_search_sort_and_quantize(tiny_llama, tmp_path, monkeypatch, capsys):
    """A user's path: a plan for a mean of 3.5 bits, and the file it makes."""
    monkeypatch.chdir(tmp_path)
    flags = ["--samples", "8", "--window", "32", "--group-size", "32"]
    main(["columns", str(tiny_llama), "--bits", "3.5", "--block", "32", "--sort", "sorted", "--out", "p.json", *flags])
    assert "KL on held-out windows" in capsys.readouterr().out
    plan = read_plan(tmp_path / "p.json")
    sizes = {"model.layers.0.mlp.down_proj": 48 * 72, "model.layers.0.mlp.up_proj": 48 * 72}
    assert plan.mean_bits(sizes, {"model.layers.0.mlp.down_proj": 72, "model.layers.0.mlp.up_proj": 48}) <= 3.5
    main(["quantize", "sorted", "--plan", "p.json", "--out", "q", "--effort", "fast", "--json", "q.json", *flags])
    numbers = json.loads((tmp_path / "q.json").read_text())["numbers"]
    assert numbers["presets"] == ["plan"]
    assert numbers["stored_bits_per_weight"] < 3.5 + 3 * 16 / 72 + 0.2


@pytest.mark.slow
def test_a_nested_file_is_read_by_the_plan(tiny_llama, tmp_path, monkeypatch):
    """Offsets apply when the file is read: the plan's bits and output lie between those of the widths around it."""
    monkeypatch.chdir(tmp_path)
    up, down = (f"model.layers.1.mlp.{leaf}_proj" for leaf in ("up", "down"))
    inside = {up: ColumnWidths(32, (1, -1)), down: ColumnWidths(32, (1, 0, -1))}
    write_plan(tmp_path / "p.json", Plan(Precision(w=3), {}, inside))
    flags = ["--samples", "4", "--window", "24", "--group-size", "32", "--json", "q.json"]
    main(["quantize", str(tiny_llama), "--plan", "p.json", "--widths", "8,4,3,2", "--out", "q", *flags])
    numbers = json.loads((tmp_path / "q.json").read_text())["numbers"]
    assert numbers["presets"] == ["w8", "w4", "w3", "w2", "plan"]
    sizes = {name: row["bits_per_weight"] for name, row in numbers["sizes"].items()}
    assert sizes["w3"] < sizes["plan"] < sizes["w3"] + 0.1  # one more bit for 32 columns than for the short block
    read = numbers["layers"][up]["bytes"]
    assert read["w2"] < read["plan"] < read["w4"]
