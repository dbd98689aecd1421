"""The ground truth of mixtures: harm by its definition, the table of a known case, going on where a run stopped."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from polybit.compress.blocks import Whole, find_blocks
from polybit.core.affine import Grid
from polybit.core.runtime import PolybitError
from polybit.measure.mixture_truth import Harm, Harms, judge, measure_mixtures
from polybit.nn.convert import targets
from polybit.quant.rtn import rtn
from tests.families import tiny_model


@pytest.fixture(scope="module")
def whole():
    model = tiny_model("llama")
    return Whole(model, tuple(targets(model)))


def windows(seed: int, count: int = 5) -> torch.Tensor:
    return torch.randint(3, 90, (count, 9), generator=torch.Generator().manual_seed(seed))


def rounded(whole, bits: int):
    """Codes block by block, as `compress` yields them."""
    name, modules = find_blocks(whole.model, whole.targets)
    for index in range(len(modules)):
        inside = [target for target in whole.targets if target.name.startswith(f"{name}.{index}.")]
        yield {t.name: rtn(t.weight_OI(whole.model), None, Grid(bits, 0), search=False) for t in inside}


def test_harm_is_its_definition(whole):
    """Twin: torch's own KL and cross entropy over all windows at once."""
    ids_NT = windows(1, 11)
    weights = {name: q.dequantize() for part in rounded(whole, 3) for name, q in part.items()}
    harms = Harms(whole.model, whole.targets, {"a": ids_NT[:9], "b": ids_NT[9:]})
    found, nothing = harms(rounded(whole, 3)), harms({} for _ in harms.passage.modules)
    for name, part_NT in (("a", ids_NT[:9]), ("b", ids_NT[9:])):
        with torch.no_grad():
            wanted, given = (log_softmax(whole.forward(w, part_NT)[:, :-1], -1) for w in ({}, weights))
        kl = kl_div(given, wanted, log_target=True, reduction="none").sum(-1).mean()
        ends = [cross_entropy(x.flatten(0, 1), part_NT[:, 1:].flatten()) for x in (wanted, given)]
        assert found[name].kl == pytest.approx(float(kl), rel=1e-4) and found[name].kl > 0
        assert found[name].nll == pytest.approx(float(ends[1] - ends[0]), rel=1e-3, abs=1e-5)
        assert nothing[name] == Harm(0.0, 0.0)


def test_measuring_goes_on_where_it_stopped(whole):
    texts = {"a": windows(1, 8), "b": windows(2, 8)}
    held = {"a": windows(3, 2), "b": windows(4, 2)}
    calls, kept = [], {}

    def quantize(drawn_NT, seed):
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rounded(whole, 2 + int(drawn_NT.sum()) % 3)

    def run(finished):
        return measure_mixtures(
            whole.model,
            whole.targets,
            texts,
            held,
            [(0.0, 1.0), (1.0, 0.0)],
            quantize,
            samples=6,
            seeds=[0, 1],
            keep=kept.__setitem__,
            kept=finished,
        )

    with pytest.raises(KeyboardInterrupt):
        run({})
    assert len(kept) == 2
    found = run(dict(kept))
    assert len(calls) == 5  # two before, the broken one, two after
    assert found == run(dict(kept)) and len(calls) == 5


def test_regret_of_a_known_case():
    """Mixing half and half hurts the worse domain least; the literal pick regrets 0.2 with every seed."""
    found = {
        (0.0, 1.0): {"g": [Harm(0.5, 0.1), Harm(0.7, 0.1)], "t": [Harm(0.1, 0.0), Harm(0.2, 0.0)]},
        (0.5, 0.5): {"g": [Harm(0.3, 0.1), Harm(0.5, 0.1)], "t": [Harm(0.2, 0.0), Harm(0.2, 0.0)]},
        (1.0, 0.0): {"g": [Harm(0.2, 0.1), Harm(0.2, 0.1)], "t": [Harm(0.9, 0.0), Harm(0.9, 0.0)]},
    }
    result = judge(["g", "t"], found, {"literal": (0.0, 1.0), "family": (0.5, 0.5)})
    plain = result["worst_kl"]
    assert plain["best"] == {"g": 0.5, "t": 0.5}
    assert plain["regret"]["literal"]["value"] == pytest.approx(0.2)
    assert plain["regret"]["literal"]["low"] == pytest.approx(0.2)
    assert plain["regret"]["family"]["value"] == 0.0
    assert plain["noise"] == pytest.approx(0.02**0.5) and plain["spread"] == pytest.approx(0.5)
    # shares: g is best at pure g (0.2), t at pure t (0.15); half and half costs g 0.4 / 0.2 - 1 = 1 on the mean
    shares = [row["worst_share"]["value"] for row in result["points"]]
    assert shares == pytest.approx([2.0, 1.0, 5.0])
    assert result["worst_share"]["best"] == {"g": 0.5, "t": 0.5}
    with pytest.raises(PolybitError, match="not measured"):
        judge(["g", "t"], found, {"odd": (0.25, 0.75)})
