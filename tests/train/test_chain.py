"""A latent weight per width in one nested code: reference (a literal twin per weight), property, gradients, files."""

import copy
from types import SimpleNamespace

import pytest
import torch

from polybit.core.affine import Grid
from polybit.core.plan import Plan
from polybit.core.runtime import PolybitError
from polybit.nn import switch
from polybit.nn.switch import use
from polybit.quant.chain import FOLLOW, Link
from polybit.quant.nested import nested
from polybit.train.chain import PACE, Chain, ThroughChain
from polybit.train.latent import Freedom, freeze, latent_layers, make_trainable
from tests.families import prompt, tiny_model

WIDTHS = (8, 4, 3, 2)
PRESETS = {f"w{b}": Plan.uniform(b) for b in WIDTHS}
CHAINED = Freedom(codes="shared", scales="frozen", margin=0.5, chained=(4, 3, 2))


def start(seed=0, rows=6, columns=40):
    weight_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
    return nested(weight_OI, None, Grid(8, 16, "group"), widths=WIDTHS, rounds=1, sweeps=1)


def moved_chain(by=0.05, widths=(4, 3, 2), seed=1):
    q = start()
    chain = Chain(q, Grid(8, 16, "group"), widths, q.dequantize())
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for latent_OI in chain.latents.values():
            latent_OI += by * torch.randn(latent_OI.shape, generator=noise)
    return q, chain


def literal_code(q, chain, row, column):
    """One weight's stored code, by the sentence of the module."""
    group = column // 16
    scale, zero = float(q.scale_OG[row, group]), float(q.zero[row, group])
    low, high = 0, 255
    for b in sorted(chain.trained):
        latent = float(chain.latents[str(b)][row, column].detach() * chain.pace[b])
        wanted = int((torch.tensor(latent) / torch.tensor(scale) + zero + 0.5).floor())
        cell = 2 ** (8 - b)
        place = min(max(wanted // cell, low // cell), high // cell)
        low, high = place * cell, place * cell + cell - 1
    return min(max(int(q.codes_OI[row, column]), low), high)


@pytest.mark.parametrize("widths", [(4, 3, 2), (8, 4, 3, 2), (3,)])
def test_codes_equal_the_literal_twin(widths):
    q, chain = moved_chain(widths=widths)
    codes_OI = chain.encode().codes_OI
    assert not torch.equal(codes_OI, q.codes_OI)
    for row in range(6):
        for column in range(40):
            assert int(codes_OI[row, column]) == literal_code(q, chain, row, column), (row, column)


def test_what_did_not_change_reads_as_before():
    q, chain = moved_chain(by=0.003)
    found = chain.encode()
    same_OI = (found.codes_OI >> 4) == (q.codes_OI >> 4)
    assert 0.2 < float(same_OI.float().mean()) < 1
    assert torch.equal(found.codes_OI[same_OI], q.codes_OI[same_OI])
    away_OI = (found.codes_OI.int() - q.codes_OI.int()).abs()[~same_OI]
    assert int(away_OI.max()) < 32  # no further than the border of its new cell


def test_an_untouched_chain_is_the_start():
    q = start()
    chain = Chain(q, Grid(8, 16, "group"), (4, 3, 2), q.dequantize())
    assert torch.equal(chain.encode().codes_OI, q.codes_OI)
    for width in WIDTHS:
        assert torch.equal(chain(torch.zeros(()), width, None), q.dequantize(width))


def test_a_latent_weight_moves_only_its_own_bits():
    _, chain = moved_chain(by=0.0)
    before = chain.encode().codes_OI
    with torch.no_grad():
        chain.latents["4"] += 10.0
    after = chain.encode().codes_OI
    assert torch.equal(after >> 5, before >> 5)  # 3 bits and fewer read the same
    assert bool(((after >> 4) % 2 == 1).all())  # 4 bits are at the upper end of their cell


def test_gradient_reaches_every_latent_weight_that_was_read():
    """Two latent weights, both where they like to be: the wider one's gradient is the narrower one's too."""
    free = torch.zeros(1, 3, dtype=torch.bool)
    links = [Link(torch.zeros(1, 3), free, free)] * 2
    latents = [torch.zeros(1, 3, requires_grad=True) for _ in range(2)]
    ThroughChain.apply(torch.ones(1, 3), links, *latents).backward(torch.full((1, 3), -1.0))
    assert [latent_OI.grad.tolist() for latent_OI in latents] == [[[-FOLLOW] * 3], [[-1.0] * 3]]


def test_pace_is_a_factor_on_the_rate():
    q = start()
    chain = Chain(q, Grid(8, 16, "group"), (4, 2), q.dequantize())
    assert torch.allclose(chain.latents["2"] * PACE[2], chain.latents["4"] * PACE[4])
    assert PACE[2] > PACE[4]


def train_a_little(model, presets=("w4", "w3", "w2")):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0)
    for name in presets * 2:
        use(model, name)
        model(prompt()).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_model_says_what_training_saw(family):
    model = train_a_little(make_trainable(tiny_model(family), PRESETS, group_size=32, freedom=CHAINED))
    wanted = {}
    for name in PRESETS:
        use(model, name)
        with torch.no_grad():
            wanted[name] = model(prompt()).logits
    frozen = freeze(copy.deepcopy(model))
    for name in PRESETS:
        switch.use(frozen, name)
        with switch.keep_decoded(frozen), torch.no_grad():
            assert torch.equal(frozen(prompt()).logits, wanted[name]), name


def test_only_the_chained_widths_are_trained():
    model = make_trainable(tiny_model("llama"), PRESETS, group_size=32, freedom=CHAINED)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all(name.rpartition(".latents.")[2] in ("4", "3", "2") for name in names)


def test_settling_changes_no_narrow_width():
    model = train_a_little(make_trainable(tiny_model("llama"), PRESETS, group_size=32, freedom=CHAINED))
    layer = next(iter(latent_layers(model).values()))
    (chain,) = layer.codes.values()
    before = chain.encode()
    chain.settle(layer.source_OI, None, (8,))
    after = chain.encode()
    assert torch.equal(after.codes_OI >> 4, before.codes_OI >> 4)
    error = lambda q: float((q.dequantize() - layer.source_OI).square().sum())  # noqa: E731
    assert error(after) <= error(before)


@pytest.mark.parametrize(
    "change", [SimpleNamespace(codes="own"), SimpleNamespace(scales="learned"), SimpleNamespace(adapter="lora")]
)
def test_refusals(change):
    more = {k: v for k, v in vars(change).items() if k != "adapter"}
    freedom = Freedom(**{"codes": "shared", "scales": "frozen", "chained": (4, 3), **more})
    with pytest.raises(PolybitError, match="chained widths"):
        make_trainable(
            tiny_model("llama"), PRESETS, freedom=freedom, adapter=getattr(change, "adapter", "none"), group_size=32
        )
