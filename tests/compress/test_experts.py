"""Experts that calibration hardly reaches are counted, named, and rounded by what the others saw.

Kinds: reference (the router's own choices), property (resume), messages.
"""

from contextlib import suppress

import pytest
import torch

from polybit.acts.quantize import expert_numbers
from polybit.compress import loop
from polybit.compress.loop import compress_in_place
from polybit.compress.recipe import choose
from polybit.hub.workspace import Workspace
from polybit.nn.convert import targets
from polybit.report.quantizing import few_experts
from tests.families import tiny_model


def text():
    return list(torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(1)).split(2))


def routers(model):
    """The weights that choose experts, by the name of the Experts module."""
    return {
        f"{name}.experts": module.gate.weight for name, module in model.named_modules() if hasattr(module, "experts")
    }


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", ["gptq", "nested"])
def test_tokens_are_counted_and_an_unseen_expert_keeps_close_to_its_weights(family, method, tmp_path):
    model = tiny_model(family)
    for gate in routers(model).values():
        gate.data.zero_()  # ties: the first experts are chosen
    floats = {t.name: t.weight_OI(model) for t in targets(model)}
    experts = {}
    recipe = choose(method, (4, 3) if method == "nested" else (4,), 32)
    compress_in_place(model, targets(model), text(), recipe, Workspace(tmp_path / "q", {}), experts=experts)
    assert len(experts) == 2 and set(experts) == set(routers(tiny_model(family)))
    for name, tokens in experts.items():
        assert len(tokens) == 4 and sum(tokens) == 2 * 48 and sorted(tokens) == [0, 0, 48, 48]
        layer = model.get_submodule(name).gate_up_proj
        error_OI = layer.decode() - floats[f"{name}.gate_up_proj"]
        unseen = [e for e in range(4) if not tokens[e]]
        per_E = error_OI.view(4, -1).square().mean(1) / floats[f"{name}.gate_up_proj"].view(4, -1).square().mean(1)
        assert float(per_E[unseen].max()) < 3 * float(per_E.median()) < 0.1
    numbers = expert_numbers(experts)["experts"]
    assert all(len(few) == 2 for few in numbers["few"].values())
    assert "4 of 8 experts" in few_experts(numbers)[0] and "(4 none)" in few_experts(numbers)[0]


def test_counts_are_the_routers_choices_also_after_a_kill(tmp_path, monkeypatch):
    counts = []
    quantize_layer = loop.quantize_layer
    for out, last in (("whole", 0), ("killed", 9)):
        calls = []

        def stops(*args, last=last, calls=calls, **kwargs):
            calls.append(1)
            if len(calls) == last:
                raise KeyboardInterrupt
            return quantize_layer(*args, **kwargs)

        monkeypatch.setattr(loop, "quantize_layer", stops)
        for _ in range(2 if last else 1):
            experts, model, store = {}, tiny_model("mixtral"), Workspace(tmp_path / out, {})
            with suppress(KeyboardInterrupt):
                compress_in_place(model, targets(model), text(), choose("gptq", (4,), 32), store, experts=experts)
            store.close()
        counts.append(experts)
    assert counts[0] == counts[1] and all(sum(tokens) == 96 for tokens in counts[0].values())
    assert few_experts({}) == [] and expert_numbers({}) == {}
