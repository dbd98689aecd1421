"""The gradient estimate: the literal Fisher sum over drawn labels, and close to the exact KL for small changes."""

import numpy as np
import torch
from torch.nn.functional import log_softmax

from polybit.measure.sensitivity import measure_layers
from polybit.measure.signals import gather, kendall, scores
from polybit.measure.taylor import estimate_layers
from tests.families import tiny_model
from tests.measure.test_sensitivity import inside, probes


def nudge(target, weight_OI, stats):
    """A small random change, of a size of its own for every layer."""
    generator = torch.Generator().manual_seed(len(target.name) + target.rows)
    size = 0.002 * (1 + sum(map(ord, target.name)) % 7)
    return {4: weight_OI + size * torch.randn(weight_OI.shape, generator=generator)}


def literally(model, probe, chosen, passes, seed):
    """1/2 sum over tokens of (g' E x)^2 with parameter-free autograd of the whole model, one label draw per pass."""
    totals = {t.name: 0.0 for t in chosen}
    for at in range(passes):
        generator = torch.Generator().manual_seed(seed + at)
        for ids_BT, counted_BT in zip(probe.ids, probe.counted, strict=True):
            inputs, gives, handles = {}, {}, []
            for t in chosen:

                def note(_m, args, out, name=t.name, inputs=inputs, gives=gives):
                    inputs[name], gives[name] = args[0].detach(), out

                handles.append(model.get_submodule(t.module_name).register_forward_hook(note))
            logits = model(input_ids=ids_BT).logits
            for handle in handles:
                handle.remove()
            log_NV = log_softmax(logits[:, :-1][counted_BT[:, 1:]], -1)
            label_N = torch.multinomial(log_NV.detach().exp(), 1, generator=generator)
            loss = -log_NV.gather(1, label_N).sum()
            found = torch.autograd.grad(loss, list(gives.values()))
            for name, g in zip(gives, found, strict=True):
                target = next(t for t in chosen if t.name == name)
                error = nudge(target, target.weight_OI(model), None)[4] - target.weight_OI(model)
                totals[name] += float(((inputs[name] @ error.T) * g).sum(-1).square().sum()) / (2 * passes)
    return totals


def test_equals_the_literal_sum():
    model = tiny_model("llama")
    chosen = inside(model)
    probe = probes()[1]
    readings = estimate_layers(model, [probe], chosen, nudge, passes=2, seed=3)
    wanted = literally(model, probe, chosen, 2, 3)
    for reading in readings:
        for name, row in reading.kl["task"].items():
            assert np.isclose(row[4].sum(), wanted[name], rtol=1e-3), name


def test_ranks_layers_as_the_exact_measurement_does():
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.data /= 3  # a model whose answers are not all but certain
    chosen = inside(model)
    sizes = {t.name: t.size for t in chosen}
    exact = gather(measure_layers(model, probes(), chosen, nudge), sizes)["text"]
    cheap = gather(estimate_layers(model, probes(), chosen, nudge, passes=3), sizes)["text"]
    assert exact.names == cheap.names
    a, b = (scores(s.mean(), s.widths, 4) for s in (exact, cheap))
    assert kendall(a, b) > 0.6
    assert 0.3 < np.median(b / a) < 3
