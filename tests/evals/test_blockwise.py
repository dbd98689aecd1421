"""A checkpoint read block by block says what it says in memory.

Kinds: reference (the models in memory), property (nothing stays behind), refusals.
"""

import pytest
import torch

from polybit.acts.evaluate import evaluate
from polybit.acts.evaluate_blockwise import BlockwiseLM, of_text_alone
from polybit.acts.quantize import quantize
from polybit.core.runtime import PolybitError
from polybit.evals.token_flip import measure_tokens, text_batches
from polybit.hub.lent import open_lent
from polybit.hub.lent_checkpoint import open_lent_checkpoint
from polybit.hub.lm import LocalLM
from polybit.hub.load import load_float, load_quantized
from polybit.nn.convert import targets
from polybit.options.evaluate import EvalOptions
from polybit.options.quantize import QuantizeOptions
from tests.families import tiny_model


@pytest.fixture(scope="module", params=["llama", "llama-tied", "gpt2", "qwen3_moe"])
def made(request, tmp_path_factory):
    """A float model and a nested checkpoint of it, its ends held at 8 bits for one of them."""
    from polybit.compress.ends import quantize_ends
    from polybit.compress.loop import compress_in_place
    from polybit.compress.recipe import choose
    from polybit.hub.checkpoint import save
    from polybit.hub.tiny import path
    from polybit.hub.workspace import Workspace

    folder = tmp_path_factory.mktemp("blockwise")
    tiny_model(request.param).save_pretrained(folder / "float")
    for file in path().glob("*token*"):
        (folder / "float" / file.name).write_bytes(file.read_bytes())
    model = tiny_model(request.param)
    recipe = choose("rtn", (4,), 32)
    compress_in_place(model, targets(model), [], recipe, Workspace(folder / "q", {}))
    quantize_ends(model, 8 if request.param == "llama-tied" else 16, 32)
    return folder / "float", save(model, folder / "q", widths=recipe.widths)


def test_text_is_read_as_in_memory(made):
    folder, saved = made
    whole = LocalLM(load_float(str(folder))[0], None), LocalLM(load_quantized(saved)[0], None)
    lent = open_lent(str(folder))
    every = targets(lent.model)
    parts = [BlockwiseLM(source, None, every, 4000) for source in (lent, open_lent_checkpoint(str(saved)))]
    windows_NT = torch.randint(5, 60, (5, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for reference, quantized in (whole, parts):
        reference.batch_tokens = quantized.batch_tokens = 24
        batches = text_batches(reference, windows_NT)
        found.append(measure_tokens(reference, quantized, [None, "w4"], batches, label="text"))
    for field in ("nll_N", "margin_N", "entropy_N"):
        assert torch.allclose(*(torch.from_numpy(getattr(f[0], field)) for f in found), atol=2e-6)
    for field in ("kl_N", "nll_N", "margin_N"):
        assert torch.allclose(*(torch.from_numpy(getattr(f[1]["w4"], field)) for f in found), atol=2e-6)
    assert found[1][1]["w4"].kl_N.mean() > 1e-4
    for lm in parts:
        lm.read_ahead([], [])
        assert all(parameter.is_meta for parameter in lm.model.parameters()) and not lm.room.taken


def test_answers_are_refused(made):
    lent = open_lent(str(made[0]))
    with pytest.raises(PolybitError, match="--answers 0"):
        BlockwiseLM(lent, None, targets(lent.model), 0).generate(["x"], max_tokens=2)


def test_eval_chooses_by_memory(tmp_path, capsys):
    quantize("tinychat", QuantizeOptions(out=tmp_path / "q", bits=4, method="rtn", measure=False))
    asked = {"windows": 3, "window": 32}
    little = evaluate(str(tmp_path / "q"), EvalOptions(memory=1e-5, **asked))
    assert "no free answers" in capsys.readouterr().err and little.config["blockwise"]
    much = evaluate(str(tmp_path / "q"), EvalOptions(memory=1.0, answers=0, **asked))
    assert "blockwise" not in much.config
    rows = [run.numbers["presets"]["w4"] for run in (little, much)]
    assert rows[0]["bits_per_weight"] == rows[1]["bits_per_weight"]
    assert rows[0]["kl"]["value"] == pytest.approx(rows[1]["kl"]["value"], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "flag"), [({"tasks": "reading"}, "--tasks"), ({"breakdown": True}, "--breakdown"), ({}, "--text")]
)
def test_what_writes_is_refused(more, flag):
    with pytest.raises(PolybitError, match=flag):
        of_text_alone("model", EvalOptions(**more), embedded=False)
