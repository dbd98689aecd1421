"""Layers that share their input in one call: the numbers of separate calls, whatever the siblings are asked."""

import copy
import pickle

import pytest
import torch
from torch import nn

from polybit.core.plan import ColumnWidths, Plan
from polybit.core.planes import pack
from polybit.core.precision import Precision
from polybit.kernels import cpu
from polybit.kernels.prepared import Bundle
from polybit.nn.fuse import Siblings, fuse, unfuse
from polybit.nn.linear import QuantLinear
from polybit.nn.switch import multiply_by, use
from tests.families import prompt, quantized, rtn

pytestmark = pytest.mark.skipif(not cpu.instruction_sets(), reason="needs the compiled kernels")


class Three(nn.Module):
    """Three layers with the same number of inputs."""

    def __init__(self, group_size=32):
        super().__init__()
        for name, rows in zip("qkv", (48, 16, 20), strict=True):
            layer = QuantLinear.of(
                pack(rtn(torch.randn(rows, 96), 8, group_size, "group")), nn.Parameter(torch.randn(rows))
            )
            layer.arithmetic, layer.precision = "int16", Precision(w=4)
            setattr(self, name, layer)

    def forward(self, x):
        return [self.q(x), self.k(x), self.v(x)]


@pytest.fixture
def calls(monkeypatch):
    """How many members every fused call had."""
    seen, plain = [], Bundle.linear

    def counted(self, *rest):
        seen.append(len(self.members))
        return plain(self, *rest)

    monkeypatch.setattr(Bundle, "linear", counted)
    return seen


def alone(module, x):
    """What the layers give without siblings."""
    kept = [layer.siblings for layer in module.children()]
    unfuse(module)
    made = module(x)
    for layer, siblings in zip(module.children(), kept, strict=True):
        layer.siblings = siblings
    return made


def same(module, x):
    return all(torch.equal(a, b) for a, b in zip(module(x), alone(module, x), strict=True))


@pytest.mark.parametrize("inference", [False, True])
def test_siblings_are_found_and_give_the_same(calls, inference):
    module = fuse(Three())
    with torch.inference_mode(inference):
        assert [same(module, torch.randn(2, 96)) for _ in range(4)] == [True] * 4
    assert calls == [3, 3, 3]


def test_each_member_has_its_own_precision_and_adapter(calls):
    module = fuse(Three())
    module(torch.randn(1, 96))
    module.k.precision = Precision(w=2)
    module.q.offsets = ColumnWidths(32, (1, 0, -1))
    module.v.set_adapter("chat", torch.randn(2, 96), torch.randn(20, 2))
    module.v.wear("chat")
    assert same(module, torch.randn(3, 96)) and calls == [3]
    module.v.precision = Precision(w=8, a=8)  # rounds its input first
    assert same(module, torch.randn(3, 96)) and calls == [3, 2]
    module.q.arithmetic = "int8"
    assert same(module, torch.randn(3, 96)) and calls == [3, 2]
    module.q.arithmetic = "float"
    assert same(module, torch.randn(3, 96))


def test_other_inputs_are_multiplied_alone():
    module, x = fuse(Three()), torch.randn(2, 96)
    module(x)
    for _ in range(3):
        y = torch.randn(2, 96)
        found = [module.q(x), module.k(y), module.v(x)]
        expected = [alone(module, x)[0], alone(module, y)[1], alone(module, x)[2]]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert same(module, x)


def test_a_tensor_written_to_between_the_calls():
    module = fuse(Three())
    module(torch.randn(2, 96))
    x = torch.randn(2, 96)
    module.q(x)
    x.mul_(2)
    assert torch.equal(module.k(x), alone(module, x)[1])


def test_a_module_that_writes_to_its_input_is_never_fused(calls):
    module = fuse(Three())
    with torch.inference_mode():
        for _ in range(4):
            x = torch.randn(2, 96)
            module.q(x)
            x.mul_(2)
            assert torch.equal(module.k(x), alone(module, x)[1])
    assert not calls


def test_switching_between_the_calls():
    module = fuse(Three())
    module(torch.randn(2, 96))
    x = torch.randn(2, 96)
    module.q(x)
    module.k.precision = Precision(w=2)
    assert torch.equal(module.k(x), alone(module, x)[1])


def test_results_nobody_fetches_are_no_longer_made(calls):
    module = fuse(Three())
    for _ in range(2):
        module(torch.randn(2, 96))
    for _ in range(8):
        module.q(torch.randn(2, 96))
        module.k(torch.randn(2, 96))
    assert calls[0] == 3 and len(calls) < 7
    assert same(module, torch.randn(2, 96))


def test_layers_that_scale_their_columns_differently(calls):
    module = Three()
    scale = torch.nn.Parameter(torch.ones(96).half().view(torch.int16) + 1, requires_grad=False)
    module.k.column_scale = scale
    fuse(module)
    assert [same(module, torch.randn(2, 96)) for _ in range(3)] == [True] * 3
    assert not calls


def test_groups_the_kernels_do_not_read(calls):
    module = fuse(Three(group_size=16))
    assert [same(module, torch.randn(2, 96)) for _ in range(3)] == [True] * 3
    assert not calls


def test_copies_multiply_by_themselves():
    module = fuse(Three())
    module(torch.randn(2, 96))
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.q.siblings is None
        x = torch.randn(2, 96)
        assert all(torch.equal(a, b) for a, b in zip(copied(x), module(x), strict=True))
    assert set(module.state_dict()) == set(unfuse(module).state_dict())


@pytest.mark.parametrize(
    ("family", "members"), [("llama", {3, 2}), ("qwen3", {3, 2}), ("mixtral", {3}), ("gpt2", set())]
)
def test_whole_models(family, members, calls):
    """Found in real models, by forward passes and by generate; the logits stay the same bit for bit."""
    model = even(quantized(family))
    multiply_by(model, "int16")
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, QuantLinear) and m.fields.group_size)
    offsets = ColumnWidths(layer.fields.group_size, tuple(g % 2 for g in range(layer.fields.groups)))
    with torch.no_grad():
        for wanted in ("w4", "w3", Plan(Precision(w=4), {name: Precision(w=6)}, {name: offsets}), "w4a8"):
            use(model, wanted)
            for _ in range(2):
                together = model(prompt()).logits
            found = [m.siblings for m in model.modules() if isinstance(m, QuantLinear)]
            assert torch.equal(together, unfuse(model)(prompt()).logits)
            for m, siblings in zip((m for m in model.modules() if isinstance(m, QuantLinear)), found, strict=True):
                m.siblings = siblings
        use(model, "w4")
        before = len(calls)
        written = model.generate(prompt(), max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert (len(calls) > before) == bool(members)
        assert torch.equal(written, unfuse(model).generate(prompt(), max_new_tokens=5, do_sample=False, pad_token_id=0))
    assert set(calls) == members
    assert all(m.siblings is None for m in multiply_by(model, "float").modules() if isinstance(m, QuantLinear))


def even(model):
    """The layers of one module with the same group size, as a quantized model has them."""
    for layer in [m for m in model.modules() if isinstance(m, QuantLinear)]:
        planes = pack(rtn(layer.decode().detach(), 8, 32, "group"))
        fresh = QuantLinear.of(planes, layer.bias)
        layer.fields, layer._parameters = fresh.fields, fresh._parameters
    return model


def test_siblings_hold_nothing_when_all_was_fetched():
    module = fuse(Three())
    for _ in range(3):
        module(torch.randn(2, 96))
    siblings = module.q.siblings
    assert isinstance(siblings, Siblings) and siblings.ready is None
