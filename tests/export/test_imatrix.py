"""The importance matrix: mean squares of inputs as calibration counts them, in the file llama-quantize reads."""

import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from polybit.acts.export import export, windows_of
from polybit.compress.plan_files import read_plan
from polybit.compress.stats import collect
from polybit.core.runtime import PolybitError
from polybit.export.table import IMATRIX, TYPES
from polybit.hub.load import load_float, load_quantized
from polybit.nn.convert import targets
from polybit.nn.switch import stored_layers, use
from polybit.options.export import ExportOptions
from tests.export.checkpoints import checkpoint, float_llama


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(checkpoint, export of a plan with a width that GGUF holds exactly and one that it does not, its options)."""
    room = tmp_path_factory.mktemp("imatrix")
    saved = checkpoint(room / "model")
    (room / "plan.json").write_text(json.dumps({"default": "w4", "layers": {"model.layers.0.mlp.down_proj": "w6"}}))
    options = ExportOptions(
        to="gguf", out=room / "out", precision=str(room / "plan.json"), imatrix=True, windows=3, text="embedded-test"
    )
    export(str(saved), options)
    return saved, options


def test_it_is_what_calibration_counts(exported):
    """The slow twin: the diagonal of the whole Hessian of the same model, its weights decoded."""
    saved, options = exported
    model, tokenizer = load_quantized(saved)
    use(model, read_plan(Path(options.precision)))
    windows_NT = windows_of(model, tokenizer, options)
    plain = float_llama()
    weights = {name: layer.decode() for name, layer in stored_layers(model).items()}
    with torch.no_grad():
        for name, weight in weights.items():
            plain.get_submodule(name).weight.copy_(weight)
    stats = collect(plain, [windows_NT], targets(plain))
    found = {t.name: t.data for t in gguf.GGUFReader(options.out / IMATRIX).tensors}
    name = "model.layers.1.mlp.up_proj"
    count = float(found["blk.1.ffn_up.weight.counts"].reshape(-1)[0])
    assert count == windows_NT.numel() == stats[name].tokens
    mean_I = found["blk.1.ffn_up.weight.in_sum2"].reshape(-1) / count
    np.testing.assert_allclose(mean_I, stats[name].hessian_II.diagonal().numpy(), rtol=2e-3)
    assert len(found) == 2 * len(weights)


def test_the_file_says_what_it_is(exported):
    fields = gguf.GGUFReader(exported[1].out / IMATRIX).fields
    assert fields["general.type"].contents() == "imatrix" and fields["imatrix.datasets"].contents() == ["embedded-test"]
    assert fields["imatrix.chunk_count"].contents() == 3 and fields["imatrix.chunk_size"].contents() == 128


def test_what_is_exact_stays_and_the_rest_gets_a_type_of_its_width(exported):
    lines = (exported[1].out / TYPES).read_text().splitlines()
    kinds = dict(line.rsplit("=", 1) for line in lines)
    assert kinds[r"^blk\.0\.ffn_down\.weight$"] == "q6_k" and kinds[r"^blk\.1\.ffn_down\.weight$"] == "q4_1"
    assert len(kinds) == 14 and all(re.compile(key) for key in kinds)


def test_an_importance_matrix_is_of_gguf_and_needs_text(tmp_path):
    with pytest.raises(PolybitError, match="use --to gguf"):
        ExportOptions(to="mlx", out=tmp_path, imatrix=True)
    with pytest.raises(PolybitError, match="give --windows"):
        ExportOptions(to="gguf", out=tmp_path, imatrix=True, windows=0)


def test_the_card_has_the_table_of_an_eval_and_a_line_for_each_engine(exported, tiny_eval, tmp_path):
    saved, _ = exported
    export(str(saved), ExportOptions(to="gguf", out=tmp_path / "out", precision="w4", windows=0, eval=tiny_eval))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## The checkpoint measured against the float model" in card and "| w4 |" in card
    assert "llama-cli -m PATH/model.gguf" in card and "ollama run" in card


@pytest.fixture
def tiny_eval(exported, tmp_path):
    """The JSON of a small `polybit eval`."""
    from polybit.acts.evaluate import evaluate
    from polybit.core.runtime import write_json
    from polybit.options.evaluate import EvalOptions

    saved, _ = exported
    float_llama().save_pretrained(tmp_path / "float")
    load_quantized(saved)[1].save_pretrained(tmp_path / "float")
    assert load_float(tmp_path / "float")
    run = evaluate(
        str(saved),
        EvalOptions(
            reference=str(tmp_path / "float"), precision="w8,w4", text="embedded-test", windows=2, window=32, answers=2,
            max_tokens=4,
        ),
    )  # fmt: skip
    write_json(tmp_path / "eval.json", run.to_json())
    return tmp_path / "eval.json"
