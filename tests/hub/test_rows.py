"""TokenRows of many sequences at many widths: the model's own logits, and for each row the same bits in any company."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from polybit.core.affine import Grid
from polybit.core.plan import Plan
from polybit.core.planes import pack
from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError
from polybit.hub.rows import CLOSE, FEW, RowDecoder, TokenRows, supported
from polybit.kernels import cpu
from polybit.nn.convert import convert, targets
from polybit.nn.switch import at, current, panel, set_presets, use
from polybit.quant.rtn import rtn

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="needs the compiled kernels")

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 4, "vocab_size": 128, "max_position_embeddings": 256}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral window": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}
PROMPT = [5, 9, 100, 3, 77, 41, 12, 8, 60, 2, 99, 31, 17, 4, 50]


def make(family, *, ends=True):
    configuration, kind, more = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(configuration(**SIZES, **more)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    chosen = targets(model, include_embeddings=ends)
    convert(model, {t.name: pack(rtn(t.weight_OI(model), None, Grid(8, 32, "group"))) for t in chosen})
    return model


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_have_the_logits_of_the_models_own_forward_pass(family, ends):
    model = make(family, ends=ends)
    assert supported(model)
    decoder = RowDecoder(model, slots=2, room=32)
    for width in ("w8", "w3"):
        setting = decoder.setting(width, "int16")
        found = decoder.logits(decoder.step([TokenRows(setting, 1, 0, PROMPT)]), setting)
        with torch.inference_mode(), at(model, width):
            expected = model(torch.tensor([PROMPT])).logits[0]
        assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_the_same_bits_in_any_company(family):
    decoder = RowDecoder(make(family), slots=6, room=32)
    eight, three = decoder.setting("w8"), decoder.setting("w3")
    alone = decoder.step([TokenRows(three, 0, 0, PROMPT)])
    one_by_one = torch.cat([decoder.step([TokenRows(three, 1, i, [token])]) for i, token in enumerate(PROMPT)])
    assert torch.equal(one_by_one, alone)
    crowd = decoder.step(
        [TokenRows(eight, 2, 0, PROMPT[::-1]), TokenRows(three, 3, 0, PROMPT[:4]), TokenRows(three, 4, 0, PROMPT)]
    )
    assert torch.equal(crowd[-len(PROMPT) :], alone) and torch.equal(crowd[len(PROMPT) :][:4], alone[:4])
    decoder.copy(3, 5, 4)
    assert torch.equal(decoder.step([TokenRows(three, 5, 4, PROMPT[4:])]), alone[4:])
    few = torch.cat([decoder.logits(row, three) for row in alone.split(1)])
    assert torch.equal(decoder.logits(alone, three), few)


def test_a_token_read_again_at_another_width_leaves_nothing_of_the_first():
    """What verifies a draft: rows written at 2 bits and then at 8 are those of 8 bits alone."""
    decoder = RowDecoder(make("llama"), slots=2, room=32)
    eight, two = decoder.setting("w8"), decoder.setting("w2")
    decoder.step([TokenRows(eight, 0, 0, PROMPT[:6])])
    decoder.step([TokenRows(two, 0, 6, PROMPT[6:9])])
    verified = decoder.step([TokenRows(eight, 0, 6, PROMPT[6:9])])
    assert torch.equal(verified, decoder.step([TokenRows(eight, 1, 0, PROMPT[:9])])[6:])


def test_settings_leave_the_models_precision_alone_and_know_presets():
    model = make("llama")
    set_presets(model, {"mixed": Plan(Precision(w=4), {"model.layers.1.mlp.down_proj": Precision(w=2)})})
    use(model, "w5")
    decoder = RowDecoder(model, slots=1, room=32)
    mixed = decoder.setting("mixed")
    assert current(model) == Plan(Precision(w=5)) and decoder.setting("mixed") == mixed
    found = decoder.logits(decoder.step([TokenRows(mixed, 0, 0, PROMPT)]), mixed)
    use(model, "mixed")
    for layer in panel(model).layers.values():
        layer.arithmetic = "int8"
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_rounded_activations_are_refused_by_name():
    decoder = RowDecoder(make("llama"), slots=1, room=32)
    with pytest.raises(PolybitError, match=r"w4a8.*8 bits"):
        decoder.setting("w4a8")


def test_rounded_keys_and_values_are_refused_by_name():
    model = make("llama")
    decoder = RowDecoder(model, slots=1, room=32)
    with pytest.raises(PolybitError, match=r"w4k4v4.*rounds queries, keys or values"):
        decoder.setting("w4k4v4")
    assert decoder.setting("w4") == 0 and current(model) == Plan(Precision())  # left as it was


def test_a_draft_reads_a_short_narrow_head_and_the_same_blocks(monkeypatch):
    monkeypatch.setattr("polybit.hub.rows.SHORT", 48)
    for ends in (True, False):
        decoder = RowDecoder(make("llama", ends=ends), slots=2, room=32)
        whole, draft = decoder.setting("w8", "int8"), decoder.setting("w8", draft=True)
        hidden = [decoder.step([TokenRows(setting, 0, 0, PROMPT)]) for setting in (whole, draft)]
        assert torch.equal(*hidden)
        logits = decoder.logits(hidden[1], draft)
        if not ends:  # a float head
            assert torch.equal(logits, decoder.logits(hidden[0], whole)[:, :48])
            continue
        narrow, exact = (decoder.logits(hidden[0], decoder.setting(width))[:, :48] for width in ("w4", "w8"))
        close = narrow >= narrow.max(-1, keepdim=True).values - CLOSE
        for row, expected, is_close in zip(logits, exact, close, strict=True):
            known = row > -torch.inf  # those that came close at 4 bits, at most so many, at the head's own 8 bits
            assert known.sum() == min(FEW, is_close.sum()) and is_close[known].all()
            assert torch.allclose(row[known], expected[known], atol=1e-3)


def test_rows_outside_the_cache_are_refused():
    decoder = RowDecoder(make("llama"), slots=1, room=8)
    setting = decoder.setting("w4")
    for slot, start in ((1, 0), (0, 8), (-1, 0)):
        with pytest.raises(ValueError):
            decoder.step([TokenRows(setting, slot, start, [3])])


def test_what_is_not_supported():
    model = make("llama")
    handle = model.register_forward_pre_hook(lambda *_: None)
    assert not supported(model)
    handle.remove()
    assert supported(model)
    plain = FAMILIES["llama"]
    assert not supported(plain[1](plain[0](**SIZES)))
