"""Property: q, k and v have their own widths on every architecture, per attention, and "float" changes nothing."""

import copy

import pytest
import torch

from polybit.core.plan import Plan
from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError
from polybit.nn.attention import arrange, attention_layers, operands_of, round_queries, use_operands
from polybit.nn.convert import convert
from polybit.nn.switch import at, current, set_presets, use
from tests.families import FAMILIES, prompt, quantize, quantized, tiny_model


def logits(model):
    with torch.no_grad():
        return model(prompt(), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_rounds_each_operand(family):
    model = tiny_model(family)
    plain = logits(model)
    seen = [plain]
    arrange(model, keys="token")
    for wanted in ("q4", "k4", "v4", "q8k8v8"):
        use_operands(model, Plan.uniform(wanted))
        seen.append(logits(model))
    for one in range(len(seen)):
        for other in range(one):
            assert not torch.equal(seen[one], seen[other]), (family, one, other)
    assert (seen[4] - plain).abs().max() < (seen[2] - plain).abs().max()
    use_operands(model, Plan())
    assert torch.equal(logits(model), plain)


def test_rounding_equals_attention_written_out():
    """One GPT-Neo attention by hand: rounded q, k and v, causal softmax."""
    from polybit.core.affine import fake_quantize_tokens
    from polybit.nn.keyvalue import round_tokens

    model = arrange(tiny_model("gpt_neo"), keys="token")
    use_operands(model, Plan.uniform("q6k5v4"))
    attention = model.transformer.h[0].attn.attention
    x = torch.randn(2, 7, 72, generator=torch.Generator().manual_seed(0))
    ours = model.transformer.h[0].attn(x)[0]
    use_operands(model, Plan())
    q, k, v = (
        p(x).unflatten(-1, (4, 18)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k, v = fake_quantize_tokens(q, 6), round_tokens(k, 5), round_tokens(v, 4)
    scores = (q @ k.transpose(2, 3)).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    literal = attention.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(ours, literal, atol=1e-5)


def test_a_token_never_sees_a_later_one():
    model = arrange(tiny_model("llama"), keys="token")
    use_operands(model, Plan.uniform("q4k3v2"))
    ids = prompt()
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 7) % 96
    with torch.no_grad():
        one, other = model(ids, use_cache=False).logits, model(changed, use_cache=False).logits
    assert torch.equal(one[:, :6], other[:, :6]) and not torch.equal(one[:, 6:], other[:, 6:])


def test_a_plan_gives_every_attention_its_own():
    model = quantized("llama")
    first, second = attention_layers(model)
    plan = Plan(Precision(w=4, v=8), {first: Precision(k=4, v=4), f"{second}.k_proj": Precision(w=8, k=6)})
    use(model, plan)
    found = operands_of(model)
    assert (str(found[first]), str(found[second])) == ("k4v4", "k6v8")
    assert str(current(model).at(f"{second}.k_proj")) == "w8k6"
    use(model, "w4")
    assert {str(p) for p in operands_of(model).values()} == {"float"}


def test_use_at_and_presets_restore_operands():
    model = arrange(quantized("gpt2"), keys="token")
    plain = logits(model)
    set_presets(model, {"A": Plan.uniform("w8k8v4")})
    with at(model, "A"):
        inside = logits(model)
        with at(model, "w8k4v8"):
            assert not torch.equal(logits(model), inside)
        assert torch.equal(logits(model), inside)
    assert torch.equal(logits(model), plain) and not torch.equal(plain, inside)


def test_a_copy_has_operands_of_its_own():
    model = use(quantized("llama"), "w8q4k4")
    twin = copy.deepcopy(model)
    use(model, "w8")
    assert not torch.equal(logits(model), logits(twin))
    assert torch.equal(logits(use(twin, "w8")), logits(model))


def test_queries_are_rounded_after_a_projection_was_replaced():
    model = tiny_model("llama")
    use_operands(model, Plan.uniform("q4"))
    convert(model, quantize(model))
    plain = logits(use(model, "w8"))
    assert not torch.equal(logits(use(model, "w8q4")), plain)


def test_fused_projections_round_only_the_queries():
    x = torch.randn(2, 3, 36, generator=torch.Generator().manual_seed(0))
    for name, first in (("c_attn", slice(0, 12)), ("query_key_value", [*range(4), *range(12, 16), *range(24, 28)])):
        rounded = round_queries(x, name, 4, 4)
        rest = torch.ones(36, dtype=torch.bool)
        rest[first] = False
        assert torch.equal(rounded[..., rest], x[..., rest])
        assert (rounded[..., ~rest] != x[..., ~rest]).float().mean() > 0.5
    # Falcon: queries, a key and a value per group; one group of 7 queries, or three of one
    assert torch.equal(round_queries(x, "query_key_value", 4, 4, 1)[..., 28:], x[..., 28:])
    assert torch.equal(round_queries(x, "query_key_value", 4, 4, 3), round_queries(x, "query_key_value", 4, 4))


def test_refusals():
    model = quantized("llama")
    with pytest.raises(PolybitError, match="belongs to no attention"):
        use(model, Plan(Precision(w=4), {"model.layers.0.mlp.up_proj": Precision(w=4, k=8)}))
    with pytest.raises(PolybitError, match="does not have"):
        use(model, Plan(Precision(w=4), {"model.layers.7.self_attn": Precision(k=8)}))
    with pytest.raises(PolybitError, match="no attention layer"):
        use_operands(torch.nn.Sequential(torch.nn.Linear(2, 2)), Plan.uniform("k8"))
    with pytest.raises(PolybitError, match="choose 'token' or 'channel'"):
        arrange(model, keys="head")
    with pytest.raises(PolybitError, match="choose 16"):
        arrange(model, group=24)
    model.model.layers[0].self_attn.q_proj = None
    with pytest.raises(PolybitError, match="leave q out"):
        use_operands(model, Plan.uniform("q8"))
