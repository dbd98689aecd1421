"""Every format of the table keeps the contract: what its engine reads is what polybit reads, and refusals say a way."""

import json
import re

import pytest
import torch

from polybit.acts.export import export
from polybit.core.parts import load
from polybit.core.plan import Plan
from polybit.core.runtime import PolybitError
from polybit.export.table import EXPORTERS, holders
from polybit.hub.load import load_quantized
from polybit.nn.switch import stored_layers, use
from polybit.options.export import ExportOptions
from tests.export.checkpoints import checkpoint, float_llama
from tests.export.oracles import ORACLES

NESTED = [name for name, part in EXPORTERS.items() if part.zero == "any"]
SOON = {8, 4, 2}  # widths that every run of the tests looks at; the others are for `-m slow`
CASES = [
    pytest.param(name, width, marks=() if width in SOON else pytest.mark.slow)
    for name in NESTED
    for width in (EXPORTERS[name].widths or (8, 3))
]


@pytest.fixture(scope="session")
def nested(tmp_path_factory):
    """A nested checkpoint of 8 bits in groups of 32."""
    return checkpoint(tmp_path_factory.mktemp("nested") / "model")


@pytest.fixture(params=EXPORTERS)
def name(request):
    return request.param


def run(model, out, **options):
    return export(str(model), ExportOptions(out=out, windows=0, **options)).numbers


def ours(model, precision=None):
    """Layer -> weight as polybit reads it."""
    loaded, _ = load_quantized(model)
    if precision:
        use(loaded, precision)
    return {name: layer.decode() for name, layer in stored_layers(loaded).items()}


def apart(expected, got):
    """The largest difference, as a share of the largest weight."""
    return float((expected - got).abs().max() / expected.abs().max())


def test_the_line_is_true(name):
    part = EXPORTERS[name]
    assert load(part.write) and load(part.decode)
    assert part.summary[0].islower() and not part.summary.endswith(".")
    assert "{path}" in part.run and part.dtype in part.dtypes and part.file
    assert tuple(sorted(part.widths)) == part.widths and tuple(sorted(part.groups)) == part.groups
    assert name in ORACLES, "an engine's own reader, or its layout written down again, must agree"


@pytest.mark.parametrize(("name", "width"), CASES)
def test_what_the_engine_reads_is_what_polybit_reads(name, width, nested, tmp_path):
    numbers = run(nested, tmp_path / "out", to=name, precision=f"w{width}")
    assert numbers["difference"]["tiny"] == 0
    assert numbers["difference"]["relative"] < 3e-3
    assert (tmp_path / "out" / EXPORTERS[name].file).is_file()
    expected = ours(nested, f"w{width}")
    for layer in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        got = ORACLES[name](tmp_path / "out", layer, expected[layer].shape[1])
        assert apart(expected[layer], got) < 4e-3
    if EXPORTERS[name].widths:
        assert numbers["difference"]["moved"] == 0


def test_the_card_says_what_it_is(name, tmp_path):
    fixed = checkpoint(tmp_path / "fixed", bits=4, zero="level", nested=False)
    run(fixed, tmp_path / "out", to=name)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"polybit export {fixed} --to {name}" in card and "Checked:" in card
    assert EXPORTERS[name].engines in card and "PATH" in card
    assert card.startswith("---\nbase_model: tinychat\nbase_model_relation: quantized\n")
    assert (tmp_path / "out" / "tokenizer.json").is_file() or name == "gguf"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert manifest.keys() == {p.name for p in (tmp_path / "out").iterdir()} - {"README.md", "manifest.json"}


@pytest.mark.parametrize("name", [name for name, part in EXPORTERS.items() if part.wide])
def test_weights_too_small_for_float16_are_kept_where_asked(name, tmp_path):
    """A dead unit of a feed-forward, as training with weight decay leaves them."""
    model, layer = float_llama(), "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(layer).weight[5] *= 1e-8
    small = checkpoint(tmp_path / "small", model=model)
    plain = run(small, tmp_path / "plain", to=name, precision="w4")
    moved = plain["difference"]["moved"]
    assert 32 < moved <= 128 and plain["difference"]["where"] == {layer: moved}
    assert plain["difference"]["tiny"] == moved
    assert f"| {layer} | {moved} |" in (tmp_path / "plain" / "README.md").read_text()
    exact = run(small, tmp_path / "exact", to=name, precision="w4", exact=True)
    assert exact["difference"]["moved"] == 0 and not exact["difference"]["where"]
    changed = {key for key, kind in exact["layers"].items() if kind != plain["layers"][key]}
    assert changed == {layer} and "32" in exact["layers"][layer]
    expected, got = ours(small, "w4")[layer], ORACLES[name](tmp_path / "exact", layer, 128)
    assert apart(expected[5], got[5]) < 1e-6


def test_weights_too_large_for_float16_are_refused_with_a_way_out(tmp_path):
    model = float_llama()
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight[5] *= 1e8
    large = checkpoint(tmp_path / "large", model=model)
    with pytest.raises(PolybitError, match=r"'model.layers.0.mlp.up_proj' reach .*float16 cannot hold.*--exact"):
        run(large, tmp_path / "plain", to="mlx", precision="w4")
    assert run(large, tmp_path / "exact", to="mlx", precision="w4", exact=True)["difference"]["moved"] == 0
    with pytest.raises(PolybitError, match="--exact is for --to mlx or gguf"):
        ExportOptions(to="humming", out=tmp_path / "humming", exact=True)
    with pytest.raises(PolybitError, match="give one of the two"):
        ExportOptions(to="gguf", out=tmp_path / "gguf", exact=True, imatrix=True)


def test_zero_points_that_do_not_fit_are_refused_with_a_way_out(name, nested, tmp_path):
    part = EXPORTERS[name]
    if part.zero == "any" or part.else_decoded:
        return
    with pytest.raises(PolybitError, match=rf"{name} cannot hold.*{re.escape(holders())}"):
        run(nested, tmp_path / "out", to=name, precision="w4")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*staged"))


def test_activation_bits_are_refused(name, nested, tmp_path):
    with pytest.raises(PolybitError, match="holds weights alone"):
        run(nested, tmp_path / "out", to=name, precision="w4a8")


def test_an_existing_directory_is_kept(name, tmp_path):
    fixed = checkpoint(tmp_path / "fixed", bits=4, zero="level", nested=False)
    run(fixed, tmp_path / "out", to=name)
    with pytest.raises(PolybitError, match="exists already"):
        run(fixed, tmp_path / "out", to=name)
    run(fixed, tmp_path / "out", to=name, overwrite=True)
    with pytest.raises(PolybitError, match="is MODEL itself"):
        run(fixed, fixed, to=name, overwrite=True)


def test_a_plan_with_a_width_of_its_own_for_every_layer(nested, tmp_path):
    plan = {"default": "w4", "layers": {"model.layers.0.mlp.down_proj": "w6"}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    numbers = run(nested, tmp_path / "out", to="mlx", precision=str(tmp_path / "plan.json"))
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert entries["bits"] == 4 and entries["model.layers.0.mlp.down_proj"] == {"group_size": 32, "bits": 6}
    assert numbers["difference"]["moved"] == 0


def test_humming_asks_for_fused_layers_by_their_own_names(nested, tmp_path):
    """As vLLM's HummingConfig does: the first expression that matches the fused name wins."""
    plan = {"default": "w4", "layers": {f"model.layers.1.self_attn.{x}_proj": "w6" for x in "qkv"}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    numbers = run(nested, tmp_path / "out", to="humming", precision=str(tmp_path / "plan.json"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    found = [own for key, own in config["dynamic"].items() if re.match(key[2:], "model.layers.1.self_attn.qkv_proj")]
    assert config["b_dtype"] == "uint4" and found[0]["b_dtype"] == "uint6"
    assert not [key for key in config["dynamic"] if re.match(key[2:], "model.layers.11.self_attn.qkv_proj")]
    assert numbers["difference"]["moved"] == 0


def test_fused_layers_share_a_width_or_are_refused(nested, tmp_path):
    from polybit.export.fused import check_fused

    loaded, _ = load_quantized(nested)
    use(loaded, "w4")
    check_fused(stored_layers(loaded), "compressed-tensors")
    layers = stored_layers(loaded)
    layers["model.layers.1.self_attn.k_proj"].set_precision(
        type(layers["model.layers.1.self_attn.k_proj"].precision)(w=6)
    )
    with pytest.raises(PolybitError, match=r"layers.1.self_attn.q_proj w4 .*k_proj w6"):
        check_fused(layers, "compressed-tensors")


def test_column_scales_are_decoded_or_refused(tmp_path):
    from polybit.hub.checkpoint import save
    from tests.families import quantized

    saved = save(quantized("llama"), tmp_path / "awq")
    assert run(saved, tmp_path / "dense", to="dense", dtype="fp32")["difference"]["differing"] == 0
    with pytest.raises(PolybitError, match="scales its columns"):
        run(saved, tmp_path / "mlx", to="mlx")


@pytest.mark.parametrize(
    "family",
    ["gpt2", "mixtral", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen3_moe", "llama-tied", "gemma"))],
)
def test_dense_is_what_plain_transformers_loads(family, tmp_path):
    from transformers import AutoModelForCausalLM

    from polybit.hub.checkpoint import save
    from tests.families import prompt, quantized

    model = quantized(family, include_embeddings=True)
    saved = save(model, tmp_path / "model")
    numbers = run(saved, tmp_path / "dense", to="dense", dtype="fp32", precision="w5")
    assert numbers["difference"]["differing"] == 0
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    use(model, "w5")
    with torch.inference_mode():
        torch.testing.assert_close(plain(prompt()).logits, model(prompt()).logits, atol=1e-3, rtol=1e-3)


def test_an_adapter_is_folded_into_decoded_weights_alone(nested, tmp_path):
    from polybit.hub.peft import save_peft
    from polybit.nn.adapters import Lora

    layer = "model.layers.0.mlp.up_proj"
    lora = Lora(192, 128, 4, torch.zeros(1), alpha=8.0)
    with torch.no_grad():
        lora.up_OR.copy_(torch.randn(192, 4).half())
        lora.down_RI.copy_(lora.down_RI.half())
    save_peft({layer: lora}, tmp_path / "adapter", base_model="tinychat")
    run(nested, tmp_path / "out", to="dense", dtype="fp32", precision="w3", adapter=tmp_path / "adapter")
    expected = ours(nested, "w3")[layer] + 2 * lora.up_OR @ lora.down_RI
    assert apart(expected.detach(), ORACLES["dense"](tmp_path / "out", layer, 128)) < 1e-6
    with pytest.raises(PolybitError, match="rounded away"):
        ExportOptions(to="mlx", out=tmp_path / "mlx", adapter=tmp_path / "adapter")


def test_a_preset_brings_its_own_adapter(nested, tmp_path):
    from polybit.hub.checkpoint import save
    from polybit.nn.adapters import Lora, plug
    from polybit.nn.switch import set_presets

    model, tokenizer = load_quantized(nested)
    layer = "model.layers.0.mlp.up_proj"
    lora = Lora(192, 128, 4, torch.zeros(1), alpha=8.0)
    lora.up_OR.data.normal_()
    for factor in lora.parameters():
        factor.data.copy_(factor.data.half())
    set_presets(model, {"own": Plan.uniform("w3")})
    plug(model, {layer: {"own": lora.requires_grad_(False)}})
    worn = save(model, tmp_path / "worn", tokenizer=tokenizer, widths=(8, 3))
    run(worn, tmp_path / "out", to="dense", dtype="fp32", precision="own")
    expected = ours(nested, "w3")[layer] + 2 * lora.up_OR @ lora.down_RI
    assert apart(expected, ORACLES["dense"](tmp_path / "out", layer, 128)) < 1e-6
    run(worn, tmp_path / "plain", to="dense", dtype="fp32", precision="w3")
    assert apart(ours(nested, "w3")[layer], ORACLES["dense"](tmp_path / "plain", layer, 128)) < 1e-6
    with pytest.raises(PolybitError, match="rounded away"):
        run(worn, tmp_path / "mlx", to="mlx", precision="own")


def test_mlx_runs_the_export_and_says_the_same(nested, tmp_path):
    import mlx.core as mx
    import numpy as np
    from mlx_lm import load as load_mlx

    run(nested, tmp_path / "out", to="mlx", precision="w4", dtype="fp32")
    model, _ = load_mlx(str(tmp_path / "out"))
    loaded, _ = load_quantized(nested)
    ids = [[1, 5, 77, 300, 12, 9]]
    with torch.inference_mode():
        expected = use(loaded, "w4")(torch.tensor(ids)).logits
    torch.testing.assert_close(torch.from_numpy(np.array(model(mx.array(ids)))), expected, atol=1e-3, rtol=1e-3)


INTEGER = [
    pytest.param(name, bits, marks=() if bits in SOON else pytest.mark.slow)
    for name, part in EXPORTERS.items()
    if part.zero == "integer"
    for bits in part.widths
]


@pytest.mark.parametrize("zero", [pytest.param("level", marks=pytest.mark.slow), "group"])
@pytest.mark.parametrize(("name", "bits"), INTEGER)
def test_fixed_files_come_out_bit_for_bit(name, bits, zero, tmp_path):
    fixed = checkpoint(tmp_path / "fixed", bits=bits, zero=zero, nested=False, group_size=64)
    numbers = run(fixed, tmp_path / "out", to=name)
    assert numbers["difference"]["differing"] == 0
    layer = "model.layers.1.mlp.down_proj"
    assert torch.equal(ORACLES[name](tmp_path / "out", layer, 192), ours(fixed)[layer])


def test_compressed_tensors_are_loaded_by_plain_transformers(tmp_path):
    """A width of its own for one layer, a group per row; transformers 5.23 loads no zero points (docs/export.md)."""
    from transformers import AutoModelForCausalLM

    widths = {"model.layers.0.mlp.down_proj": 6}
    fixed = checkpoint(tmp_path / "fixed", bits=3, zero="level", nested=False, group_size=0, widths=widths)
    run(fixed, tmp_path / "out", to="compressed-tensors", dtype="fp32")
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    model, _ = load_quantized(fixed)
    ids = torch.tensor([[1, 5, 77, 300, 12]])
    with torch.inference_mode():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=2e-3, rtol=2e-3)


def test_a_gptq_file_has_one_width(tmp_path):
    fixed = checkpoint(tmp_path / "fixed", bits=4, nested=False, widths={"model.layers.0.mlp.down_proj": 8})
    with pytest.raises(PolybitError, match="one width and one group size"):
        run(fixed, tmp_path / "out", to="gptq")


def test_a_float_model_is_told_to_be_quantized_first(tmp_path):
    with pytest.raises(PolybitError, match="tinychat is a float model: quantize it first"):
        run("tinychat", tmp_path / "out", to="dense")
