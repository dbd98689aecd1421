"""Trainable layers: what training sees is what is stored, gradients reach what they should, presets switch."""

import copy

import pytest
import torch
from torch import nn

from polybit.core.affine import Grid, QWeight
from polybit.core.plan import Plan
from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError
from polybit.hub.peft import load_peft, save_peft
from polybit.nn import switch
from polybit.nn.adapters import plug
from polybit.nn.board import board_of
from polybit.nn.switch import at, use
from polybit.train.adapters import NestedAdapter, rank_at
from polybit.train.latent import Freedom, freeze, latent_layers, make_trainable
from polybit.train.straight import Code
from tests.families import prompt, quantized, tiny_model

PRESETS = {"A": Plan.uniform("w8a8"), "B": Plan.uniform("w4a4"), "C": Plan.uniform("w3a4")}


def logits(model, preset):
    use(model, preset)
    with torch.no_grad():
        return model(prompt()).logits


def train_a_little(model, presets=PRESETS, steps=2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0)
    for _ in range(steps):
        for name in presets:
            use(model, name)
            model(prompt()).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("adapter", ["nested", "lora"])
def test_adapters_begin_alike_whatever_was_drawn_before(adapter):
    def begun(seed):
        torch.rand(3)
        model = make_trainable(tiny_model("llama"), PRESETS, group_size=32, adapter=adapter, freedom=Freedom(seed=seed))
        return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "down_RI" in name])

    assert torch.equal(begun(0), begun(0)) and not torch.equal(begun(0), begun(1))


@pytest.mark.parametrize("scales", ["learned", "frozen", "recomputed"])
@pytest.mark.parametrize("adapter", ["none", "nested", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_model_says_what_training_saw(family, adapter, scales):
    model = make_trainable(
        tiny_model(family), PRESETS, group_size=32, adapter=adapter, freedom=Freedom(scales=scales, rank=3)
    )
    before = logits(model, "C")
    train_a_little(model)
    assert not torch.equal(before, logits(model, "C"))
    for name in PRESETS:
        wanted = logits(model, name)
        frozen = freeze(copy.deepcopy(model), name if adapter == "nested" else None)
        switch.use(frozen, name)
        with switch.keep_decoded(frozen), torch.no_grad():
            assert torch.equal(frozen(prompt()).logits, wanted), name
        with torch.no_grad():
            close = (frozen(prompt()).logits - wanted).abs().max() / wanted.abs().max()
        assert name != "A" or close < 0.05  # another order of the sums may move an activation to the next level


def test_training_starts_where_the_checkpoint_is():
    """Ratios, column scales, every group size and both kinds of zero are kept."""
    model = quantized("llama")
    presets = {"wide": Plan.uniform("w8"), "mid": Plan.uniform("w6a8"), "low": Plan.uniform("w3")}
    wanted = {}
    for name, plan in presets.items():
        with switch.at(model, plan), switch.keep_decoded(model), torch.no_grad():
            wanted[name] = model(prompt()).logits
    make_trainable(model, presets)
    for name in presets:
        assert torch.equal(logits(model, name), wanted[name]), name


def test_start_keeps_the_codes_it_is_given():
    source = quantized("llama")
    from polybit.core.planes import unpack

    start = {name: unpack(layer.planes) for name, layer in switch.panel(source).layers.items()}
    model = make_trainable(tiny_model("llama"), {"low": Plan.uniform("w3"), "wide": Plan.uniform("w8")}, start=start)
    for name, layer in latent_layers(model).items():
        assert torch.equal(layer.code(3).encode(layer.latent_OI).codes_OI, start[name].codes_OI)
    assert not torch.equal(layer.latent_OI, start[name].dequantize())  # inside its cell a latent keeps its own place


def test_a_margin_keeps_latents_from_the_borders_of_their_cells():
    from polybit.core.planes import unpack

    source = quantized("llama")
    start = {name: unpack(layer.planes) for name, layer in switch.panel(source).layers.items()}
    presets = {"wide": Plan.uniform("w8"), "low": Plan.uniform("w3")}
    for margin, room in ((0.2, 0.3), (0.5, 0.0)):
        model = make_trainable(tiny_model("llama"), presets, start=start, freedom=Freedom(margin=margin))
        for name, layer in latent_layers(model).items():
            q = layer.code(8).encode(layer.latent_OI)
            assert torch.equal(q.codes_OI, start[name].codes_OI)
            reach = (layer.latent_OI - q.dequantize()).abs()
            cell = (q.scale_OG.abs().amax() * q.column_scale_I.max()) if q.column_scale_I is not None else 1.0
            assert float(reach.detach().max()) <= room * float(cell) + 1e-5


def test_float_is_the_model_it_was_made_from_and_is_not_trained():
    model = tiny_model("llama")
    with torch.no_grad():
        wanted = model(prompt()).logits
    make_trainable(model, PRESETS, group_size=32, freedom=Freedom(scales="recomputed"))
    assert torch.equal(logits(model, "float"), wanted)
    train_a_little(model)
    assert torch.equal(logits(model, "float"), wanted)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.latent_OI" for name in latent_layers(model)}
    free = make_trainable(
        tiny_model("llama"), PRESETS, group_size=32, freedom=Freedom(scales="recomputed", others=True)
    )
    assert all(p.requires_grad for p in free.parameters())


def code_of(weight_OI, *, scales="learned", bits=2):
    scale_OG = torch.tensor([[0.5, 0.25]])
    start = QWeight(torch.zeros(1, 32, dtype=torch.uint8), scale_OG, torch.tensor([[1.0, 2.0]]), bits, 16, {}, None)
    return Code(start, scales, Grid(bits, 16, "group"))


def test_gradient_is_straight_through_inside_and_nothing_outside():
    torch.manual_seed(0)
    weight_OI = (torch.randn(1, 32) * 0.6).requires_grad_()
    code = code_of(weight_OI)
    value_OI = code(weight_OI, 2, 0)
    upstream_OI = torch.randn(1, 32)
    (value_OI * upstream_OI).sum().backward()
    scale = torch.tensor([0.5] * 16 + [0.25] * 16)
    zero = torch.tensor([1.0] * 16 + [2.0] * 16)
    place = weight_OI.detach()[0] / scale + zero
    inside = (place >= -0.5) & (place < 3.5)
    assert inside.any() and not inside.all()
    level = torch.floor(place + 0.5).clamp(0, 3) - zero
    assert torch.equal(value_OI.detach()[0], level * scale)
    assert torch.equal(weight_OI.grad[0], upstream_OI[0] * inside)
    # LSQ: d value / d s = level - w / s inside, level outside; s = s_0 (1 + g), so times s_0
    slope = torch.where(inside, level - weight_OI.detach()[0] / scale, level) * scale
    wanted = (slope * upstream_OI[0]).view(2, 16).sum(1)
    assert torch.allclose(code.growth_OG.grad[0], wanted, atol=1e-6)


def test_gradient_of_the_scale_agrees_with_differences():
    """Where every weight is clipped the value is s (u - z) with u fixed: an ordinary derivative."""
    weight_OI = torch.full((1, 32), 9.0)
    code = code_of(weight_OI)
    code(weight_OI, 2, 0).sum().backward()
    grad_OG = code.growth_OG.grad.clone()
    with torch.no_grad():
        values = []
        for step in (0.25, -0.25):
            code.growth_OG.fill_(step)
            values.append(code(weight_OI, 2, 0).view(2, 16).sum(1))
    assert torch.allclose((values[0] - values[1]) / 0.5, grad_OG[0], rtol=1e-3)


@pytest.mark.parametrize("kind", ["fused", "foreach", "for-loop"])
def test_kept_weights_follow_every_optimizer(kind):
    model = make_trainable(tiny_model("llama"), PRESETS, group_size=32, freedom=Freedom(scales="learned"))
    ours = [p for p in model.parameters() if p.requires_grad]
    options = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}[kind]
    optimizer = torch.optim.AdamW(ours, lr=1e-2, **options)
    use(model, "C")
    model(prompt()).logits.square().mean().backward()
    optimizer.step()
    seen = logits(model, "C")
    fresh = copy.deepcopy(model)
    for layer in latent_layers(fresh).values():
        for code in layer.codes.values():
            code.forget()
    assert torch.equal(logits(fresh, "C"), seen)


def test_weights_are_decoded_once_per_step_and_width(monkeypatch):
    model = make_trainable(tiny_model("llama"), PRESETS, group_size=32, freedom=Freedom(scales="frozen"))
    made = []
    encode = Code.encode
    monkeypatch.setattr(Code, "encode", lambda self, w: made.append(1) or encode(self, w))
    layers = len(latent_layers(model))
    for _ in range(3):
        for name in PRESETS:
            logits(model, name)
    assert len(made) == 0 or len(made) == layers  # one code for all widths
    train_a_little(model, steps=1)
    made.clear()
    for name in (*PRESETS, *PRESETS):
        logits(model, name)
    assert len(made) == layers


def test_narrow_widths_use_more_of_the_same_adapter():
    assert [rank_at(192, width) for width in (8, 7, 6, 5, 4, 3, 2)] == [64, 64, 128, 128, 192, 192, 192]
    assert rank_at(1, 8) == 1
    adapter = NestedAdapter(5, 7, 6, torch.zeros(()))
    assert torch.equal(adapter(3), torch.zeros(5, 7))
    nn.init.normal_(adapter.up_OR)
    adapter(8).sum().backward()
    assert adapter.down_RI.grad[:2].abs().sum() > 0 and adapter.down_RI.grad[2:].abs().sum() == 0
    assert torch.allclose(adapter(6), adapter.up_OR[:, :4] @ adapter.down_RI[:4])


def test_frozen_base_trains_adapters_only():
    model = make_trainable(
        tiny_model("llama"),
        PRESETS,
        group_size=32,
        adapter="nested",
        freedom=Freedom(scales="frozen", base=False, rank=2),
    )
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"down_RI", "up_OR"}
    before = logits(model, "A")
    with torch.no_grad():  # the columns only narrow widths use
        for layer in latent_layers(model).values():
            layer.nested.up_OR[:, 1:].normal_()
    assert torch.equal(before, logits(model, "A"))
    assert not torch.equal(logits(model, "C"), before)


def test_switching_a_preset_switches_its_adapter(tmp_path):
    model = make_trainable(tiny_model("llama"), PRESETS, group_size=32, adapter="lora", freedom=Freedom(rank=2))
    plain = {name: logits(model, name) for name in PRESETS}
    with torch.no_grad():
        for layer in latent_layers(model).values():
            lora = layer.loras["B"]
            lora.up_OR.normal_(std=0.3)
            for factor in lora.parameters():  # adapters are saved in 16 bits
                factor.copy_(factor.half())
    assert torch.equal(logits(model, "A"), plain["A"]) and torch.equal(logits(model, "C"), plain["C"])
    assert not torch.equal(logits(model, "B"), plain["B"])
    with at(model, "A"):
        assert torch.equal(logits(model, "A"), plain["A"])
    wanted = logits(model, "B")
    loras = {name: layer.loras["B"] for name, layer in latent_layers(model).items()}
    save_peft(loras, tmp_path / "B", base_model="tiny")
    frozen = freeze(make_trainable(tiny_model("llama"), PRESETS, group_size=32, freedom=Freedom(rank=2)))
    plug(frozen, {name: {"B": lora} for name, lora in load_peft(tmp_path / "B").items()})
    switch.use(frozen, "A")
    with switch.at(frozen, "B"), switch.keep_decoded(frozen), torch.no_grad():
        assert torch.equal(frozen(prompt()).logits, wanted)
    assert board_of(frozen).worn == "A"
    switch.use(frozen, "w4a4")  # the same precision without the preset's name: no adapter
    with switch.keep_decoded(frozen), torch.no_grad():
        assert torch.equal(frozen(prompt()).logits, plain["B"])


def test_checkpoint_keeps_presets(tmp_path):
    from polybit.hub.checkpoint import save
    from polybit.hub.load import load

    model = freeze(train_a_little(make_trainable(tiny_model("llama"), PRESETS, group_size=32)))
    save(model, tmp_path / "out", widths=(8, 4, 3))
    loaded, _ = load(tmp_path / "out")
    assert switch.presets(loaded) == PRESETS
    for name in PRESETS:
        for each in (model, loaded):
            switch.use(each, name)
        with torch.no_grad(), switch.keep_decoded(loaded), switch.keep_decoded(model):
            assert torch.equal(loaded(prompt()).logits, model(prompt()).logits)


def test_own_codes_freeze_into_one_checkpoint_each():
    model = train_a_little(make_trainable(tiny_model("llama"), PRESETS, group_size=32, adapter="nested"))
    with pytest.raises(PolybitError, match="name one preset of A, B, C"):
        freeze(copy.deepcopy(model))
    with pytest.raises(PolybitError, match="no preset 'Z'"):
        freeze(copy.deepcopy(model), "Z")
    for name, bits in (("A", 8), ("B", 4), ("C", 3)):
        frozen = freeze(copy.deepcopy(model), name)
        assert {layer.bits for layer in switch.panel(frozen).layers.values()} == {bits}
        assert set(switch.presets(frozen)) == {name}


@pytest.mark.parametrize(
    ("presets", "options", "sentence"),
    [
        ({}, {}, "at least one preset"),
        ({"float": Plan.uniform("w4")}, {}, "no preset can have its name"),
        ({"A": Plan(Precision(w=4), {"nope": Precision(w=8)})}, {}, "does not have, first 'nope'"),
        (
            {"A": Plan.uniform("w4"), "B": Plan(Precision(w=4), {"model.layers.0.mlp.up_proj": Precision()})},
            {},
            "preset 'B' leaves layer 'model.layers.0.mlp.up_proj' in float",
        ),
        (PRESETS, {"adapter": "nested", "freedom": Freedom(codes="shared")}, "one shared code cannot hold"),
    ],
)
def test_refusals(presets, options, sentence):
    with pytest.raises(PolybitError, match=sentence):
        make_trainable(tiny_model("llama"), presets, **options)


def test_a_narrow_checkpoint_cannot_serve_wide_presets():
    with pytest.raises(PolybitError, match="starts from 4 bits, a preset wants 8"):
        make_trainable(quantized("llama", bits=4), PRESETS)
    with pytest.raises(PolybitError, match="fused experts"):
        make_trainable(tiny_model("mixtral"), PRESETS)
    with pytest.raises(PolybitError, match="make_trainable first"):
        freeze(tiny_model("llama"))


def test_layers_that_are_float_in_every_preset_stay_as_they_are():
    name = "model.layers.0.mlp.up_proj"
    plans = {key: Plan(plan.default, {name: Precision()}) for key, plan in PRESETS.items()}
    model = make_trainable(tiny_model("llama"), plans, group_size=32, freedom=Freedom(scales="recomputed"))
    assert type(model.get_submodule(name)) is nn.Linear and name not in latent_layers(model)


@pytest.mark.parametrize("scales", ["learned", "frozen", "recomputed"])
@pytest.mark.parametrize("adapter", ["none", "nested", "lora"])
def test_a_step_waits_for_no_device(adapter, scales):
    """On the meta device every question to the host is an error, and so is a tensor left on the CPU."""
    model = make_trainable(tiny_model("llama"), PRESETS, group_size=32, adapter=adapter, freedom=Freedom(scales=scales))
    for layer in latent_layers(model.to("meta")).values():
        x = torch.randn(2, 5, layer.in_features, device="meta", requires_grad=True)
        for name in PRESETS:
            use(model, name)
            layer(x).square().mean().backward()
        assert layer.latent_OI.grad.device.type == "meta"


def test_kept_weights_stay_behind_when_a_model_moves():
    model = make_trainable(tiny_model("llama"), PRESETS, group_size=32)
    logits(model, "B")
    assert all(code.seen for layer in latent_layers(model).values() for code in layer.codes.values())
    model.to("meta")
    assert not any(
        code.seen or code.growing for layer in latent_layers(model).values() for code in layer.codes.values()
    )


def test_weights_that_were_quantized_before_do_not_tip_over_at_the_first_step():
    """Every other one of 15 levels lies on a border of 8 codes: without a margin a step of nothing moves its code."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 32, bias=False)
    levels_OI = torch.randint(-6, 9, (32, 64), generator=generator).float()
    levels_OI[:, ::32], levels_OI[:, 1::32] = -6, 8
    layer.weight.data.copy_(0.01 * levels_OI)
    moved = {}
    for margin in (0.0, 0.05):
        freedom = Freedom(scales="recomputed", margin=margin)
        model = make_trainable(
            nn.Sequential(copy.deepcopy(layer)), {"w3": Plan.uniform(3)}, group_size=32, freedom=freedom
        )
        [(_, found)] = latent_layers(model).items()
        code = found.codes["3"]
        start = code.encode(found.latent_OI)
        wanted = code.encode(found.source_OI)
        assert torch.equal(start.scale_OG, wanted.scale_OG) and torch.equal(start.codes_OI, wanted.codes_OI)
        noise_OI = 1e-5 * torch.randn(32, 64, generator=generator)
        moved[margin] = float((code.encode(found.latent_OI + noise_OI).codes_OI != start.codes_OI).float().mean())
    assert moved[0.0] > 0.03 and moved[0.05] == 0
