"""Property: switching touches precision and nothing else, in under a millisecond for 200 layers."""

import copy
import statistics
import threading
import time

import pytest
import torch
from torch import nn

from polybit.core.plan import Plan
from polybit.core.planes import pack
from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError
from polybit.nn.convert import convert
from polybit.nn.linear import QuantLinear
from polybit.nn.switch import at, current, keep_decoded, multiply_by, presets, random_precision, set_presets, use
from tests.families import prompt, quantized, rtn


def small(layers=3, bits=8):
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
    return convert(model, {str(n): pack(rtn(model[n].weight.detach(), bits, 16)) for n in range(layers)})


def test_every_spelling_switches():
    model = small()
    for wanted in ("w4", 4, Precision(w=4), Plan(Precision(w=4))):
        use(model, "float")
        use(model, wanted)
        assert [layer.width for layer in model] == [4, 4, 4]
    use(model, "float")
    assert [layer.width for layer in model] == [8, 8, 8]
    assert current(model) == Plan(Precision())


def test_plan_names_layers():
    model = small()
    plan = Plan(Precision(w=4), {"1": Precision(w=8, a=8)})
    use(model, plan)
    assert [str(layer.precision) for layer in model] == ["w4", "w8a8", "w4"]
    assert current(model) == plan


def test_presets_are_named_plans():
    model = small()
    set_presets(model, {"A": Plan.uniform("w8a8"), "C": Plan(Precision(w=3), {"0": Precision(w=8)})})
    use(model, "C")
    assert [layer.width for layer in model] == [8, 3, 3]
    assert set(presets(model)) == {"A", "C"}
    with pytest.raises(PolybitError, match="presets A, C"):
        use(model, "B")


def test_at_restores_even_after_an_error():
    model = use(small(), Plan(Precision(w=6), {"2": Precision(w=5)}))
    with pytest.raises(RuntimeError), at(model, "w3a4"):
        assert [str(layer.precision) for layer in model] == ["w3a4"] * 3
        raise RuntimeError
    assert [layer.width for layer in model] == [6, 6, 5]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("w6", "stored at 4 bits, 6 were asked for"),
        ("nonsense", "cannot be read"),
        ("w9", "not possible"),
        (Plan(Precision(w=4), {"7": Precision(w=2)}), "does not have"),
        (Plan(Precision(w=2), {"1": Precision(w=8)}), "layer '1' is stored at 4 bits"),
        ("w4k8", "attention operands"),
    ],
)
def test_refusals_leave_the_model_as_it_was(wanted, message):
    model = use(small(bits=4), 3)
    with pytest.raises(PolybitError, match=message):
        use(model, wanted)
    assert [layer.width for layer in model] == [3, 3, 3]


def test_model_without_quantized_layers_is_refused():
    with pytest.raises(PolybitError, match="no quantized layer"):
        use(nn.Sequential(nn.Linear(2, 2)), 4)


def test_random_precision_draws_per_forward_and_repeats_by_seed():
    model = small()

    def drawn(seed):
        widths = []
        with random_precision(model, ["w8", "w4", "w2"], seed=seed):
            for _ in range(12):
                model(torch.zeros(1, 16))
                widths.append(model[0].width)
        return widths

    first = drawn(0)
    assert first == drawn(0) != drawn(1) and set(first) == {8, 4, 2}
    assert model[0].precision == Precision() and not model._forward_pre_hooks
    with pytest.raises(PolybitError, match="at least one"), random_precision(model, [], seed=0):
        pass


def test_switching_copies_no_weight():
    model = quantized("llama")
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    for width in (8, 4, 2):
        use(model, width)
        with torch.no_grad():
            model(prompt())
    after = dict(model.named_parameters())
    assert all(
        after[name].data_ptr() == pointer and torch.equal(after[name], p) for name, (pointer, p) in before.items()
    )
    assert all(layer.kept is None for layer in model.modules() if isinstance(layer, QuantLinear))


def test_200_layers_switch_in_under_a_millisecond():
    model = small(layers=200)
    use(model, 8)
    seconds = []
    for n in range(50):
        start = time.perf_counter()
        use(model, (4, 8)[n % 2])
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 1e-3


def test_keep_decoded_is_dropped_by_a_switch_and_at_the_end():
    model = small()
    x = torch.randn(1, 16)
    plain = [use(model, width)(x) for width in (8, 3)]
    use(model, 8)
    with keep_decoded(model):
        assert torch.allclose(model(x), plain[0], atol=1e-5) and model[0].kept is not None
        use(model, 3)
        assert model[0].kept is None
        assert torch.allclose(model(x), plain[1], atol=1e-5)
    assert model[0].kept is None and not model[0].keep


def test_a_copy_is_switched_by_itself():
    model = use(small(), 8)
    other = copy.deepcopy(model)
    use(other, 2)
    assert model[0].width == 8 and other[0].width == 2


def test_the_way_of_multiplying_is_chosen_for_the_whole_model():
    model = small()
    x = torch.randn(4, 16)
    exact = model(x)
    assert {layer.arithmetic for layer in multiply_by(model, "int8")} == {"int8"}
    assert 1e-4 < (model(x) - exact).abs().max() / exact.abs().max() < 0.1
    multiply_by(model)
    assert torch.allclose(model(x), exact, atol=1e-3 * float(exact.abs().max()))


def test_a_second_thread_inside_is_refused_and_a_copy_is_free():
    """Two widths at a time would mix two answers in silence: a model has one."""
    model = quantized("llama")
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with at(model, "w3"):
            inside.set()
            leave.wait(20)

    first = threading.Thread(target=stay)
    first.start()
    assert inside.wait(20)
    try:
        copied = copy.deepcopy(model)
        with pytest.raises(PolybitError, match="another thread is inside"), at(model, "w4"):
            pass
        with at(copied, "w4"), at(copied, "w3"):
            pass
    finally:
        leave.set()
        first.join(20)
    with at(model, "w4"), at(model, "w3"):
        pass
