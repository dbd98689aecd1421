"""The walk through a model: same statistics and hidden states as the whole model gives, for several architectures.

Kinds: reference (hooks on the whole model, its own hidden states), property (resume, sharing), oracle (transformers).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from polybit.compress.blocks import VisitedBlock, Whole, as_stored, find_blocks, outside, parameter_name, run_blocks
from polybit.compress.stats import collect
from polybit.core.runtime import PolybitError
from polybit.nn.convert import targets

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 40}
WIDE = SIZES | {"intermediate_size": 48, "max_position_embeddings": 64}
FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "mixtral", "gemma3", "falcon", "openai-gpt")


def tiny(family: str) -> nn.Module:
    """A random model of three blocks."""
    import transformers as tf

    small = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 40, "n_positions": 64}
    configs = {
        "llama": lambda: tf.LlamaConfig(**WIDE, num_key_value_heads=2),
        "gpt2": lambda: tf.GPT2Config(**small),
        "gpt_neox": lambda: tf.GPTNeoXConfig(**WIDE),
        "opt": lambda: tf.OPTConfig(**SIZES, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32),
        "mixtral": lambda: tf.MixtralConfig(**WIDE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
        "falcon": lambda: tf.FalconConfig(**SIZES, num_kv_heads=2, new_decoder_architecture=True),
        "openai-gpt": lambda: tf.OpenAIGPTConfig(**small),  # its blocks give back lists
        # sliding and full attention in turn: masks and position embeddings differ from block to block
        "gemma3": lambda: tf.Gemma3TextConfig(
            **WIDE,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=4,
            sliding_window_pattern=2,
            query_pre_attn_scalar=8,
        ),
    }
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(configs[family]()).eval()


def text() -> list[torch.Tensor]:
    """Three batches of two windows."""
    return list(torch.randint(0, 40, (6, 12), generator=torch.Generator().manual_seed(1)).split(2))


def shaken(block: VisitedBlock) -> dict[str, torch.Tensor]:
    """Stand-ins for quantized weights."""
    draw = torch.Generator().manual_seed(block.index)
    return {name: w + 0.05 * torch.randn(w.shape, generator=draw) for name, w in block.weights().items()}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny(request.param)


def replaced(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Write weights into the model itself: the slow twin of the functional call."""
    for target in targets(model):
        if target.name in weights:
            target.parameter(model).data.copy_(as_stored(target, weights[target.name], model))


def test_float_walk_gives_the_models_own_statistics_and_hidden_states(model: nn.Module) -> None:
    chosen, batches = targets(model), text()
    whole = collect(model, batches, chosen)
    last = None
    for block in run_blocks(model, batches, chosen):
        for name, stats in block.stats().items():
            torch.testing.assert_close(stats.hessian_II, whole[name].hessian_II, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(stats.absmean_I, whole[name].absmean_I, rtol=1e-4, atol=1e-5)
            assert stats.tokens == whole[name].tokens
        block.finish()
        last = block
    assert last is not None and last.index == 2
    assert {t.name for t in chosen} == set(whole)
    with torch.no_grad():
        for ids, hidden in zip(batches, last.outputs, strict=True):
            # the last hidden state is the one after the final norm, so compare through the head of the model
            seen: list[torch.Tensor] = []
            handle = last.module.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out))
            model(input_ids=ids, use_cache=False)
            handle.remove()
            expected = seen[0][0] if isinstance(seen[0], (tuple, list)) else seen[0]
            torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-6)


def test_statistics_and_outputs_come_from_one_pass(model: nn.Module) -> None:
    chosen, batches = targets(model), text()
    for block in run_blocks(model, batches, chosen, references=False):
        stats = block.stats()
        block.finish()
        outputs, block.outputs = block.outputs, []
        for name, found in block.stats_and_outputs().items():
            assert torch.equal(found.hessian_II, stats[name].hessian_II)
        kept = block.outputs
        block.finish()
        assert block.outputs is kept
        assert all(torch.equal(a, b) for a, b in zip(outputs, kept, strict=True))


def test_quantized_prefix_equals_the_model_with_these_weights(model: nn.Module) -> None:
    chosen, batches = targets(model), text()
    weights: dict[str, torch.Tensor] = {}
    for block in run_blocks(model, batches, chosen):
        assert (block.index == 0) == (block.inputs is block.references)
        weights |= shaken(block)
        block.finish(shaken(block))
        wanted, outputs = block.wanted(1), block.outputs
    whole = Whole(model, tuple(chosen))
    with torch.no_grad():
        functional = whole.forward(weights, batches[1])
        before = model(input_ids=batches[1], use_cache=False).logits
        replaced(model, weights)
        seen: list[torch.Tensor] = []
        find_blocks(model, chosen)[1][-1].register_forward_hook(lambda _m, _a, out: seen.append(out))
        after = model(input_ids=batches[1], use_cache=False).logits
    torch.testing.assert_close(functional, after, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before, after, atol=1e-3)
    expected = seen[0][0] if isinstance(seen[0], (tuple, list)) else seen[0]
    torch.testing.assert_close(outputs[1], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(wanted, expected, atol=1e-3)


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for block in run_blocks(model, text(), targets(model)):
        block.stats(given=shaken(block))
        block.finish(shaken(block))
        assert "forward" not in vars(block.module)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_walk_resumes_bit_for_bit(model: nn.Module) -> None:
    """Whoever only propagates through what is on disk sees what the first run saw."""
    chosen = targets(model)
    first = {}
    for block in run_blocks(model, text(), chosen):
        first[block.name] = block.stats()
        block.finish(shaken(block))
    for block in run_blocks(model, text(), chosen):
        if block.index == 2:
            again = block.stats()
            assert all(torch.equal(again[n].hessian_II, s.hessian_II) for n, s in first[block.name].items())
        block.finish(shaken(block))


def test_without_the_float_path_the_prefix_is_the_same() -> None:
    model = tiny("llama")
    both = [list(run_and_finish(model, references)) for references in (True, False)]
    assert all(torch.equal(a, b) for one, other in zip(*both, strict=True) for a, b in zip(one, other, strict=True))


def run_and_finish(model: nn.Module, references: bool) -> Iterator[list[torch.Tensor]]:
    """Outputs of every block, quantized."""
    for block in run_blocks(model, text(), targets(model), references=references):
        block.finish(shaken(block))
        yield block.outputs


def test_statistics_stop_early_only_when_all_is_seen(model: nn.Module) -> None:
    """One stage at a time leaves the forward early; the sums are those of the full pass."""
    block = next(run_blocks(model, text(), targets(model)))
    together = block.stats()
    for stage in block.stages():
        for name, stats in block.stats(stage).items():
            assert stats.tokens == together[name].tokens
            assert torch.equal(stats.hessian_II, together[name].hessian_II)


def test_stages_follow_the_data(model: nn.Module) -> None:
    block = next(run_blocks(model, text(), targets(model)))
    stages = [[t.name.rpartition(".")[2] for t in stage] for stage in block.stages()]
    assert sorted(name for stage in stages for name in stage) == sorted(
        t.name.rpartition(".")[2] for t in block.targets
    )
    expected = {
        "LlamaForCausalLM": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
        "GPT2LMHeadModel": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
        "MixtralForCausalLM": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
        "OPTForCausalLM": [["k_proj", "v_proj", "q_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    }.get(type(model).__name__)
    if expected is not None:
        assert [sorted(stage) for stage in stages] == [sorted(stage) for stage in expected]


def test_stats_given_quantized_layers_differ_only_after_them(model: nn.Module) -> None:
    block = next(run_blocks(model, text(), targets(model)))
    stages = block.stages()
    given = {target.name: shaken(block)[target.name] for target in stages[0]}
    plain, moved = block.stats(), block.stats(given=given)
    for target in stages[0]:
        assert torch.equal(plain[target.name].hessian_II, moved[target.name].hessian_II)
    second = stages[1][0].name
    assert not torch.allclose(plain[second].hessian_II, moved[second].hessian_II, rtol=1e-3)


def test_gradients_reach_the_weights(model: nn.Module) -> None:
    block = next(run_blocks(model, text(), targets(model)))
    weights = {name: w.clone().requires_grad_() for name, w in block.weights().items()}
    block.forward(weights, 0).square().sum().backward()
    assert all(w.grad is not None and float(w.grad.abs().max()) > 0 for w in weights.values())


def test_expert_statistics_are_the_routed_tokens() -> None:
    """Slow twin: route by hand."""
    model = tiny("mixtral")
    block = next(run_blocks(model, text(), targets(model)))
    stats = block.stats()["model.layers.0.mlp.experts.gate_up_proj"]
    seen: list[tuple[torch.Tensor, ...]] = []
    handle = block.module.mlp.experts.register_forward_pre_hook(lambda _m, args: seen.append(args))
    for index in range(block.batches):
        block.forward({}, index)
    handle.remove()
    outer, tokens = torch.zeros(32, 32), 0
    for hidden_TD, chosen_TK, _ in seen:
        for token, choices in zip(hidden_TD.detach(), chosen_TK, strict=True):
            outer += len(choices) * torch.outer(token, token)
            tokens += len(choices)
    assert stats.tokens == tokens == 2 * 6 * 12
    torch.testing.assert_close(stats.hessian_II, outer / tokens, rtol=1e-4, atol=1e-6)


def test_masks_are_kept_once() -> None:
    block = next(run_blocks(tiny("llama"), text(), targets(tiny("llama"))))
    first, second = (call.kwargs["position_embeddings"] for call in block.calls[:2])
    assert first[0] is second[0]


def test_targets_outside_the_blocks_are_told_apart() -> None:
    model = tiny("llama")
    both = targets(model, include_embeddings=True)
    assert {t.name for t in outside(model, both)} == {t.name for t in both} - {t.name for t in targets(model)}
    stats = collect(model, text(), [t for t in both if t.name == "lm_head"])
    assert set(stats) <= {"lm_head"}
    assert parameter_name(both[0]) == f"{both[0].name}.weight"


def test_nothing_to_walk_through_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(PolybitError, match="0 batches"):
        next(run_blocks(model, [], targets(model)))
    with pytest.raises(PolybitError, match="no list of decoder blocks"):
        next(run_blocks(model, text(), []))
