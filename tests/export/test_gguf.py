"""GGUF: llama.cpp says what polybit says, cuts texts as the tokenizer does, and a GGUF file can be quantized."""

import numpy as np
import pytest
import torch

from polybit.acts.export import export
from polybit.core.runtime import PolybitError
from polybit.hub.load import load_float, load_quantized
from polybit.nn.switch import use
from polybit.options.export import ExportOptions
from tests.export.checkpoints import checkpoint

PROMPTS = ["Mara has 12 apples.", "What colour is the cat?", "don't  stop\nnow: 3.14!"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(checkpoint, export at w4)."""
    out = tmp_path_factory.mktemp("gguf")
    saved = checkpoint(out / "model", ends=True)
    export(str(saved), ExportOptions(to="gguf", out=out / "w4", precision="w4", windows=0))
    return saved, out / "w4"


def llama(path, **options):
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, verbose=False, **options)


def test_llama_cpp_says_what_polybit_says(exported):
    saved, out = exported
    model, tokenizer = load_quantized(saved)
    use(model, "w4")
    theirs = llama(out / "model.gguf", logits_all=True)
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        assert theirs.tokenize(prompt.encode(), add_bos=False, special=True) == ids
        theirs.reset()
        theirs.eval(ids)
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        got = np.array(theirs.scores[: len(ids)])
        assert np.abs(got - expected).max() < 4e-2 * np.abs(expected).max()  # llama.cpp rounds inputs to 8 bits


def test_llama_cpp_computes_the_same_where_it_rounds_nothing(exported, tmp_path):
    saved, _ = exported
    export(str(saved), ExportOptions(to="gguf", out=tmp_path / "w8", precision="w8", dtype="fp32", windows=0))
    model, tokenizer = load_quantized(saved)
    theirs = llama(tmp_path / "w8" / "model.gguf", logits_all=True)
    ids = tokenizer(PROMPTS[0])["input_ids"]
    theirs.eval(ids)
    with torch.inference_mode():
        expected = use(model, "w8")(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(np.array(theirs.scores[: len(ids)]) - expected).max() < 1e-2


@pytest.mark.parametrize(
    ("bits", "zero", "kind"),
    [(4, "level", "Q4_0"), (5, "level", "Q5_0"), (8, "centre", "F16"), (6, "centre", "Q8_0"), (3, "centre", "Q4_1")],
)
def test_fixed_files_take_the_block_that_holds_them(bits, zero, kind, tmp_path):
    saved = checkpoint(tmp_path / "model", bits=bits, zero=zero, group_size=64, nested=False)
    numbers = export(str(saved), ExportOptions(to="gguf", out=tmp_path / "out", windows=0)).numbers
    assert set(numbers["layers"].values()) == {kind}
    assert numbers["difference"]["moved"] == 0 and numbers["difference"]["relative"] < 5e-4


def test_transformers_reads_it_and_polybit_quantizes_it(exported, capfd):
    saved, out = exported
    model, tokenizer = load_quantized(saved)
    use(model, "w4")
    capfd.readouterr()
    plain, again = load_float(out / "model.gguf")
    assert capfd.readouterr() == ("", ""), "no bars where nobody asked"
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    assert again(PROMPTS[0])["input_ids"] == ids[0].tolist()
    with torch.inference_mode():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=2e-2, rtol=1e-2)


def test_a_mistyped_file_is_not_looked_for_on_the_hub(tmp_path):
    for name in ("nofile.gguf", str(tmp_path / "no.gguf")):
        with pytest.raises(PolybitError, match=r"there is no file .*no"):
            load_float(name)
    with pytest.raises(PolybitError, match="is an address: give the hub id alone"):
        load_float("https://huggingface.co/owner/name")
