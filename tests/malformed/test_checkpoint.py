"""Damaged, edited and hostile polybit checkpoints: refused before a module is built, naming what is wrong."""

import json
import shutil
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from polybit.core.runtime import PolybitError
from polybit.hub.checkpoint import save, validate
from polybit.hub.directory import write_manifest
from polybit.hub.load import load
from tests.families import quantized

LAYER = "model.layers.0.mlp.up_proj"
WEIGHTS = "polybit.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good checkpoint in one file."""
    return save(quantized("llama"), tmp_path_factory.mktemp("whole") / "out", widths=(8, 4))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A good checkpoint in several files."""
    return save(quantized("llama"), tmp_path_factory.mktemp("sharded") / "out", shard_bytes=40_000)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A good checkpoint of ragged weights."""
    return save(quantized("llama", ragged=True), tmp_path_factory.mktemp("uneven") / "out", widths=(8, 4))


def refused(path, message, seconds=20.0):
    """Loading fails fast with one sentence that matches."""
    start = time.perf_counter()
    with pytest.raises(PolybitError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert time.perf_counter() - start < seconds


def copied(source, tmp_path):
    return shutil.copytree(source, tmp_path / "bad")


def edit_config(path, change, *, sign=True):
    """Change config.json; by default the manifest is made to agree, as a careful forger would."""
    config = json.loads((path / "config.json").read_text())
    change(config, config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))
    if sign:
        write_manifest(path)


def edit_tensors(path, change):
    """Change the weights; the manifest is made to agree."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    write_manifest(path)


def edit_file(path, name, change):
    """Change the bytes of one file; the manifest is left as it was."""
    data = bytearray((path / name).read_bytes())
    (path / name).write_bytes(change(data))


def flip(data):
    data[-500] ^= 1
    return data


BYTES = {
    "truncated": (WEIGHTS, lambda data: data[:-1000], "polybit.safetensors has .* bytes instead of"),
    "zero length": (WEIGHTS, lambda data: b"", "polybit.safetensors has 0 bytes"),
    "bit flip": (WEIGHTS, flip, "polybit.safetensors differs from its sha256"),
    "config bit flip": ("config.json", lambda data: data.replace(b'"bits": 8', b'"bits": 7', 1), "sha256"),
    "config cut": ("config.json", lambda data: data[:90], "config.json cannot be read as JSON"),
    "config of zeros": ("config.json", lambda data: bytes(len(data)), "config.json cannot be read as JSON"),
    "config with NaN": ("config.json", lambda data: b'{"x": NaN}', "NaN is no JSON number"),
    "config key twice": ("config.json", lambda data: b'{"a": 1, "a": 2}', "appears twice"),
    "config a list": ("config.json", lambda data: b"[1]", "holds list"),
    "config nested 100000 deep": ("config.json", lambda data: b'{"a":' * 100_000, "cannot be read as JSON"),
    "manifest cut": ("manifest.json", lambda data: data[:20], "manifest.json cannot be read"),
    "manifest empty": ("manifest.json", lambda data: b"{}", "manifest.json lists no files"),
    "manifest climbing": (
        "manifest.json",
        lambda data: data.replace(b'"config.json"', b'"../config.json"'),
        "malformed entry",
    ),
}


@pytest.mark.parametrize("case", BYTES)
def test_damaged_bytes(case, whole, tmp_path):
    name, change, message = BYTES[case]
    path = copied(whole, tmp_path)
    edit_file(path, name, change)
    refused(path, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (WEIGHTS, "polybit.safetensors is missing"),
        ("config.json", "no config.json"),
        ("manifest.json", "has no manifest.json"),
        ("generation_config.json", "generation_config.json is missing"),
    ],
)
def test_missing_files(name, message, whole, tmp_path):
    path = copied(whole, tmp_path)
    (path / name).unlink()
    refused(path, message)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "polybit-00001-of-00002.safetensors"])
def test_stray_weights(name, whole, tmp_path):
    path = copied(whole, tmp_path)
    shutil.copy(path / WEIGHTS, path / name)
    refused(path, "is not part of the checkpoint")


@pytest.mark.parametrize(
    "name",
    [
        "additional_chat_templates/evil.jinja",
        "additional_chat_templates/default.jinja",
        "chat_template.jinja",
        "chat_template.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "adapter_config.json",
        "modeling_evil.py",
    ],
)
def test_stray_files_that_transformers_would_read(name, whole, tmp_path):
    path = copied(whole, tmp_path)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("EVIL")
    refused(path, "is not part of the checkpoint, and transformers would read it")


def test_stray_files_that_nobody_reads_are_fine(whole, tmp_path):
    path = copied(whole, tmp_path)
    for name in ("notes.txt", "eval.json", "report.html", "figure.png", ".gitattributes"):
        (path / name).write_text("mine")
    validate(path)


def set_layer(key, value):
    return lambda config, q: q["layers"][LAYER].__setitem__(key, value)


def set_both(config_key, value):
    return lambda config, q: config.__setitem__(config_key, value)


def set_own(key, value):
    return lambda config, q: q.__setitem__(key, value)


PRESET = {"default": "w8", "layers": {}}
EDITS = {
    "bits 9": (set_layer("bits", 9), "bits 9 .* from 2 to 8"),
    "bits true": (set_layer("bits", True), "bits True"),
    "bits 7 of 8": (set_layer("bits", 7), r"mlp\.up_proj.*declares U8"),
    "group size 48": (set_layer("group_size", 48), "group_size 48"),
    "group size other": (set_layer("group_size", 128), "the config declares"),
    "shape turned": (set_layer("shape", [72, 136]), "the config declares"),
    "shape huge": (set_layer("shape", [2**40, 72]), "shape .* 2\\^31"),
    "shape negative": (set_layer("shape", [-1, 72]), "shape"),
    "shape text": (set_layer("shape", "large"), "shape 'large'"),
    "gain zero": (set_layer("gain", 0), "gain 0"),
    "gain text": (set_layer("gain", "1"), "gain '1'"),
    "zero out of range": (set_layer("zero", 256), "zero 256"),
    "ratio width": (set_layer("ratios", {"9": [1, 1, False]}), "width of ratios '9'"),
    "ratio upside down": (set_layer("ratios", {"4": [2, 1, False]}), "low <= high"),
    "kind": (set_layer("kind", "pickle"), "kind"),
    "unknown key in layer": (set_layer("exec", "rm"), "exec"),
    "layer a list": (lambda c, q: q["layers"].__setitem__(LAYER, []), "no kind polybit knows"),
    "layer gone": (lambda c, q: q["layers"].pop(LAYER), "is not declared"),
    "no layers": (set_own("layers", {}), "1 to 1000000 entries"),
    "unknown key": (set_own("device", "cuda"), "unknown key 'device'"),
    "key gone": (lambda c, q: q.pop("widths"), "lacks the key 'widths'"),
    "widths unsorted": (set_own("widths", [4, 8]), "widest first"),
    "widths above stored": (set_own("widths", [9, 8]), "from 2 to the stored 8"),
    "preset of an unknown layer": (
        set_own("presets", {"A": {"default": "w4", "layers": {"lm_head": "w2"}}}),
        "does not have",
    ),
    "preset malformed": (set_own("presets", {"A": {"default": "w99"}}), "not possible"),
    "preset with code": (set_own("presets", {"A": {**PRESET, "run": "x"}}), "a plan is an object"),
    "weights climbing": (set_own("weights", "../../etc/passwd.safetensors"), "only 'polybit.safetensors'"),
    "weights of transformers": (set_own("weights", "model.safetensors"), "only 'polybit.safetensors'"),
    "newer format": (set_own("format_version", 2), "newer polybit.*upgrade"),
    "format text": (set_own("format_version", "1"), "format_version is '1'"),
    "other method": (set_own("quant_method", "gptq"), r"quantized already \(gptq\)"),
    "1e9 layers": (set_both("num_hidden_layers", 10**9), "num_hidden_layers = 1000000000"),
    "1e30 layers": (set_both("num_hidden_layers", 10**30), "num_hidden_layers"),
    "negative size": (set_both("hidden_size", -72), "hidden_size = -72"),
    "size text": (set_both("hidden_size", "wide"), "hidden_size = 'wide'"),
    "3 layers of 2": (set_both("num_hidden_layers", 3), "missing from the checkpoint"),
    "1 layer of 2": (set_both("num_hidden_layers", 1), "does not have"),
    "other vocabulary": (set_both("vocab_size", 97), r"embed_tokens\.weight.*shape"),
    "other architecture": (set_both("model_type", "opt"), "."),
    "unknown architecture": (set_both("model_type", "nonsense"), "configuration of .* cannot be used"),
}


@pytest.mark.parametrize("case", EDITS)
def test_edited_configuration(case, whole, tmp_path):
    change, message = EDITS[case]
    path = copied(whole, tmp_path)
    edit_config(path, change)
    refused(path, message)


RAGGED = {
    "not all groups": ("87", "a string of 3 digits"),
    "too many groups": ("8744", "a string of 3 digits"),
    "no digits": ("8a4", "a string of 3 digits"),
    "width 0": ("804", "a string of 3 digits"),
    "width 9": ("894", "a string of 3 digits"),
    "a list": ([8, 7, 4], "a string of 3 digits"),
    "below the declared bits": ("774", "the largest, and not all, are 8"),
    "all the same": ("888", "the largest, and not all, are 8"),
    "other sizes": ("877", "declares U8"),
}


@pytest.mark.parametrize("case", RAGGED)
def test_edited_group_bits(case, uneven, tmp_path):
    value, message = RAGGED[case]
    path = copied(uneven, tmp_path)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    name = next(n for n, layer in config["layers"].items() if layer.get("group_bits") == "874")
    edit_config(path, lambda c, q: q["layers"][name].__setitem__("group_bits", value))
    refused(path, message)


def test_group_bits_where_they_cannot_be(whole, tmp_path):
    path = copied(whole, tmp_path)
    name = next(
        n
        for n, f in json.loads((path / "config.json").read_text())["quantization_config"]["layers"].items()
        if f["group_size"] == 16
    )
    edit_config(path, lambda c, q: q["layers"][name].__setitem__("group_bits", "87654"))
    refused(path, "only groups of 32 to 256")


@pytest.mark.parametrize(
    ("layer", "columns", "message"),
    [
        (LAYER, {"block": 32, "offsets": [0]}, "."),
        (LAYER, {"block": 40, "offsets": [0, 1]}, "fit groups"),
        ("model.nothing", {"block": 32, "offsets": [0]}, "does not have"),
        (LAYER, {"block": 32, "offsets": "0"}, "must be an object"),
    ],
)
def test_edited_column_widths(layer, columns, message, uneven, tmp_path):
    path = copied(uneven, tmp_path)
    edit_config(path, lambda c, q: q.update(presets={"A": {**PRESET, "columns": {layer: columns}}}))
    refused(path, message)


def test_newer_format_is_named_even_when_nothing_else_is_understood(whole, tmp_path):
    path = copied(whole, tmp_path)
    edit_config(path, lambda c, q: q.update(format_version=7, layout="other"), sign=False)
    refused(path, "format 7, written by a newer polybit")


def test_preset_above_the_stored_width(tmp_path):
    path = save(quantized("llama", bits=4), tmp_path / "bad")
    edit_config(path, lambda c, q: q.update(presets={"A": {"default": "w8", "layers": {}}}))
    refused(path, "preset 'A' wants 8 bits")


def rename(tensors):
    for name in [name for name in tensors if name.startswith(LAYER)]:
        tensors[name.replace("up_proj", "up_prof")] = tensors.pop(name)


TENSORS = {
    "NaN scale": (lambda t: t[f"{LAYER}.scale"].fill_(0x7E00), r"up_proj\.scale holds NaN"),
    "infinite scale": (lambda t: t[f"{LAYER}.scale"].fill_(0x7C00), r"up_proj\.scale holds NaN or infinity"),
    "tensor gone": (lambda t: t.pop(f"{LAYER}.qplanes"), r"up_proj\.qplanes' is missing"),
    "float tensor gone": (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight"),
    "tensor too many": (lambda t: t.update(extra=torch.zeros(3)), "'extra'"),
    "stored tensor too many": (lambda t: t.update({"x.qplanes": torch.zeros(3, dtype=torch.uint8)}), "not declared"),
    "empty tensor": (lambda t: t.update(x=torch.zeros(0)), "not declared"),
    "other type": (lambda t: t.update({f"{LAYER}.scale": t[f"{LAYER}.scale"].view(torch.float16)}), "is F16"),
    "other shape": (lambda t: t.update({f"{LAYER}.qplanes": t[f"{LAYER}.qplanes"][:4].clone()}), "declares U8"),
    "climbing name": (lambda t: t.update({"../../../etc/x": torch.zeros(2)}), "etc/x"),
    "renamed layer": (rename, r"up_proj\.qplanes' is missing"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_edited_tensors(case, whole, tmp_path):
    change, message = TENSORS[case]
    path = copied(whole, tmp_path)
    edit_tensors(path, change)
    refused(path, message)


def test_layer_the_model_does_not_have(whole, tmp_path):
    path = copied(whole, tmp_path)
    edit_tensors(path, rename)
    edit_config(path, lambda c, q: q["layers"].update({LAYER.replace("up_proj", "up_prof"): q["layers"].pop(LAYER)}))
    refused(path, "up_prof.*LlamaForCausalLM does not have")


def header(path, change):
    """Rewrite the header of the weights; the manifest is made to agree."""
    data = (path / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = change(data[8 : 8 + length])
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    write_manifest(path)


HEADERS = {
    "cut but signed": lambda text: text[:-40],
    "hole": lambda text: text.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1),
    "no JSON": lambda text: b"{" * 50,
    "huge shape": lambda text: text.replace(b'"shape":[', b'"shape":[4611686018427387904,', 1),
}


@pytest.mark.parametrize("case", HEADERS)
def test_forged_header(case, whole, tmp_path):
    path = copied(whole, tmp_path)
    header(path, HEADERS[case])
    refused(path, "is no whole safetensors file")


def test_tensor_named_twice_in_one_header(whole, tmp_path):
    path = copied(whole, tmp_path)
    name = b'"model.norm.weight":'

    def repeat(text):
        start = text.index(name)
        entry = text[start : text.index(b"}", start) + 1]
        return text.replace(entry, entry + b"," + entry)

    header(path, repeat)
    refused(path, "names the tensor 'model.norm.weight' twice")


def test_missing_shard(sharded, tmp_path):
    path = copied(sharded, tmp_path)
    first = sorted(path.glob("polybit-0*.safetensors"))[0]
    first.unlink()
    refused(path, f"{first.name} is missing")


def test_missing_index(sharded, tmp_path):
    path = copied(sharded, tmp_path)
    (path / "polybit.safetensors.index.json").unlink()
    refused(path, "index.json is missing")


@pytest.mark.parametrize("name", ["../../etc/passwd.safetensors", "pytorch_model.bin", "absent.safetensors"])
def test_index_that_names_other_files(name, sharded, tmp_path):
    path = copied(sharded, tmp_path)
    index = json.loads((path / "polybit.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    (path / "polybit.safetensors.index.json").write_text(json.dumps(index))
    write_manifest(path)
    refused(path, "names the shard|is missing")


def test_shard_of_another_checkpoint(sharded, tmp_path):
    path = copied(sharded, tmp_path)
    first, second = sorted(path.glob("polybit-0*.safetensors"))[:2]
    shutil.copy(first, second)
    write_manifest(path)
    refused(path, "repeats the tensor")


def test_the_undamaged_originals_load(whole, sharded):
    """Or every test above proves nothing."""
    for path in (whole, sharded):
        model, tokenizer = load(path)
        assert tokenizer is None and not model.training
