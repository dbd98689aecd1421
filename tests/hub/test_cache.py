"""Property: the packed cache answers as a float cache of rounded numbers would, in a fraction of its bytes."""

import pytest
import torch
from transformers import DynamicCache

from polybit.core.plan import Plan
from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError
from polybit.hub.cache import PackedCache, PackedLayer, cache_bytes, keep_packed, logits_in_blocks
from polybit.hub.checkpoint import save
from polybit.hub.lm import LocalLM
from polybit.hub.load import load
from polybit.nn.attention import arrange, operands_of, use_operands
from polybit.nn.switch import set_presets, use
from tests.families import FAMILIES, prompt, quantized, tiny_model


def decode_step_by_step(model, ids, cache):
    rows = []
    with torch.no_grad():
        for token in range(ids.shape[1]):
            out = model(ids[:, token : token + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits)
    return torch.cat(rows, dim=1), cache


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_run_equals_one_without_a_cache(family):
    model = use(arrange(keep_packed(quantized(family)), keys="token"), "w8q8k4v3")
    with torch.no_grad():
        whole = model(prompt(), use_cache=False).logits
    stepped, cache = decode_step_by_step(model, prompt(), None)
    assert cache.packs
    # the last bit of a float may differ between the two runs, and carry a number to the next code
    error = (stepped - whole).abs()
    assert error.median() < 2e-5 and error.max() < 0.05 * whole.std()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "gpt_neox"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_generate_equals_a_float_cache_of_rounded_numbers(family, how):
    model = arrange(quantized(family), keys="token")
    use(model, "w8k5v4")
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | how
    torch.manual_seed(0)
    literal = model.generate(prompt(), **settings)  # nothing packs yet: a DynamicCache holds what was rounded
    torch.manual_seed(0)
    explicit = model.generate(prompt(), past_key_values=PackedCache(model), **settings)
    keep_packed(model)
    torch.manual_seed(0)
    implicit = model.generate(prompt(), **settings)
    assert torch.equal(explicit, literal) and torch.equal(implicit, literal)


def test_an_empty_cache_that_somebody_holds_becomes_a_packed_one():
    model = use(arrange(keep_packed(quantized("llama")), keys="token"), "w8k4v4")
    ids, held = prompt(), DynamicCache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=held, use_cache=True)
        assert held.get_seq_length() == 5 and isinstance(held.layers[0], PackedLayer)
        following = model(ids[:, 5:], past_key_values=held, use_cache=True).logits
        whole = model(ids, use_cache=False).logits
    assert torch.allclose(following, whole[:, 5:], atol=1e-3)


def test_padding_on_the_left_changes_nothing():
    model = use(keep_packed(quantized("llama")), "w8k4v4")
    ids = prompt()
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(13) >= 4).long().expand(2, -1)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    shifted = model.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(plain[:, 9:], shifted[:, 13:])


def test_bytes_are_those_of_the_widths():
    model = arrange(keep_packed(tiny_model("gpt2")), keys="token")  # 72 channels: 64 + 8, so two groups
    use_operands(model, Plan.uniform("k8v4"))
    with torch.no_grad():
        cache = model(prompt(), use_cache=True).past_key_values
    scales = 2 * 2 * 2
    assert cache_bytes(cache) == 2 * 2 * 9 * ((72 + scales) + (36 + scales))
    plain = DynamicCache()
    use_operands(model, Plan())
    with torch.no_grad():
        model(prompt(), past_key_values=plain, use_cache=True)
    assert cache_bytes(plain) == 2 * 2 * 9 * 2 * 72 * 4


def test_crop_forgets_the_last_tokens():
    model = use(keep_packed(quantized("llama")), "w8k4v4")
    with torch.no_grad():
        cache = model(prompt(), use_cache=True).past_key_values
        cache.crop(-4)
        assert cache.get_seq_length() == 5
        again = model(prompt()[:, 5:], past_key_values=cache, use_cache=True).logits
        whole = model(prompt(), use_cache=False).logits
    assert torch.allclose(again, whole[:, 5:], atol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_bytes(cache) == 0


def test_rows_can_be_repeated_chosen_and_reordered():
    model = use(keep_packed(quantized("llama")), "w8k4v4")
    ids = prompt()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 1, 0, 2]))
        cache.batch_select_indices(torch.tensor([0, 1]))
        following = model(torch.tensor([[5], [5]]), past_key_values=cache, use_cache=True).logits
        literal = model(torch.cat([ids[[1, 0]], torch.tensor([[5], [5]])], dim=1), use_cache=False).logits[:, -1:]
    assert torch.allclose(following, literal, atol=1e-4)


@pytest.mark.parametrize("window", [3, 5, 20])
def test_a_sliding_window_keeps_only_its_tokens(window):
    model = arrange(tiny_model("mistral"), keys="token")
    model.config.sliding_window = window
    use_operands(model, Plan.uniform("k5v4"))
    ids = prompt()
    literal, plain = decode_step_by_step(model, ids, DynamicCache(config=model.config))
    with torch.no_grad():
        chunked = model(ids[:, :6], past_key_values=(cache := PackedCache(model)), use_cache=True).logits
        chunked = torch.cat([chunked, model(ids[:, 6:], past_key_values=cache, use_cache=True).logits], dim=1)
    stepped, packed = decode_step_by_step(model, ids, PackedCache(model))
    assert torch.allclose(stepped, literal, atol=1e-5) and torch.allclose(chunked, literal, atol=1e-4)
    assert cache_bytes(packed) < cache_bytes(plain)
    assert packed.layers[0].key_store.length == min(9, window - 1)


def test_keys_per_channel_need_a_packed_cache():
    model = tiny_model("llama")
    use_operands(model, Plan.uniform("k4v4"))
    with pytest.raises(PolybitError, match="keep_packed"):
        model.generate(prompt(), max_new_tokens=3, pad_token_id=0, eos_token_id=None)


def long_prompt(tokens=50):
    return torch.randint(3, 96, (2, tokens), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "mistral"])
def test_text_read_in_blocks_equals_decoding_token_by_token(family):
    """Nothing a token is read as depends on a later one: windows are scored as they would be decoded."""
    model = arrange(keep_packed(tiny_model(family)), block=16)
    if family == "mistral":
        model.config.sliding_window = 20
    use_operands(model, Plan.uniform("k4v4"))
    stepped, _ = decode_step_by_step(model, long_prompt(), None)
    with torch.no_grad():
        whole = logits_in_blocks(model, long_prompt(), 16)
        lossy = model(long_prompt(), use_cache=False).logits
    # tokens wait at 8 bits before their block is coded, which a block read at once is spared
    assert (stepped - whole).abs().mean() < 0.1 * (lossy - whole).abs().mean() + 0.02 * whole.std()
    assert torch.allclose(stepped[:, :16], whole[:, :16], atol=1e-4)


def test_a_sliding_window_drops_whole_blocks_of_keys():
    model = arrange(keep_packed(tiny_model("mistral")), block=16)
    model.config.sliding_window = 20
    use_operands(model, Plan.uniform("k8v8"))
    stepped, cache = decode_step_by_step(model, long_prompt(), None)
    use_operands(model, Plan())
    with torch.no_grad():
        plain = model(long_prompt(), use_cache=False).logits
    assert (stepped - plain).abs().mean() < 0.1 * plain.std()
    assert cache.layers[0].key_store.length < 20 + 16


def test_padding_does_not_widen_the_scale_of_keys():
    model = arrange(keep_packed(tiny_model("llama")), block=16)
    use_operands(model, Plan.uniform("k4v8"))
    ids = long_prompt(32)
    padded = torch.cat([torch.zeros(2, 16, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(48) >= 16).long().expand(2, -1)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        one = model(ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
        other = model(padded, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
    ours, theirs = (c.layers[0].key_store.read(torch.float32) for c in (one, other))
    assert torch.allclose(ours, theirs[:, :, 16:], atol=1e-4)


def test_keys_per_channel_generate_and_crop():
    model = arrange(use(keep_packed(quantized("llama")), "w8k4v4"), keys="channel", block=16)
    out = model.generate(
        prompt(), max_new_tokens=30, do_sample=False, eos_token_id=None, return_dict_in_generate=True, pad_token_id=0
    )
    cache = out.past_key_values
    assert cache.get_seq_length() == 38 and cache.layers[0].key_store.full == 32
    cache.crop(-20)
    assert cache.get_seq_length() == 18 and cache.layers[0].key_store.full == 16


def test_a_view_of_a_model_uses_the_packed_cache():
    from transformers import AutoTokenizer

    from polybit.hub.models import resolve

    model, tokenizer = tiny_model("llama"), AutoTokenizer.from_pretrained(resolve("tinychat"))
    lm = LocalLM(model, tokenizer)
    seen = []
    model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(out.past_key_values.packs), with_kwargs=True
    )
    use_operands(model, Plan.uniform("k8v8"))
    lm.generate_tokens([[5, 6, 7], [8, 9]], max_tokens=3)
    assert set(seen) == {True}


def test_presets_carry_operands_through_a_checkpoint(tmp_path):
    model = quantized("llama")
    plan = Plan(Precision(w=4, k=8, v=4), {"model.layers.0.self_attn": Precision(k=4, v=5)})
    set_presets(model, {"A": plan, "B": Plan.uniform("w8k8v8")})
    save(model, tmp_path / "m")
    loaded, _ = load(tmp_path / "m")
    use(model, "A"), use(loaded, "A")
    assert [str(p) for p in operands_of(loaded).values()] == ["k4v5", "k8v4"]
    out = loaded.generate(prompt(), max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0)
    assert isinstance(out.past_key_values.layers[0], PackedLayer)
