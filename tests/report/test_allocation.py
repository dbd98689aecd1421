"""The page of an allocation: every part is there, self-contained, and a plan that does not pay is said to be one."""

import copy
import re

from polybit.report.allocation import page, short


def e(value):
    return {"value": value, "low": 0.8 * value, "high": 1.2 * value, "n": 8}


def allocation():
    """A run of the verb allocate, made up."""
    layers = {}
    for block in range(2):
        for at, kind in enumerate(("self_attn.q_proj", "mlp.down_proj")):
            harm = {str(w): e(0.1 * (at + 1) * 4.0 ** (3 - w)) for w in (2, 3, 4)}
            both = {"kl": harm, "nll": {w: e(-0.01) for w in harm}}
            layers[f"model.layers.{block}.{kind}"] = {
                "shape": [8, 8],
                "width": 3 + at,
                "group": 2 * block + at,
                "sensitivity": {"stories": both, "<sums>": both},
            }
    rows = [
        {"name": name, "bits": bits, "score": score, "kl": {"stories": e(score / 9), "<sums>": e(score / 9)}}
        for name, bits, score in (("this plan", 3.5, 1.2), ("uniform w3", 3.25, 2.0), ("uniform w4", 4.25, 0.5))
    ]
    label = "of stories and <sums> by kl at 3 bits"
    numbers = {
        "bits_per_weight": 3.5,
        "group_size": 64,
        "layers": layers,
        "tasks": ["<sums>"],
        "general": ["stories"],
        "agreement": {label: {"tau": e(0.3), "reliability": {"stories": 0.9, "<sums>": None}}},
        "proof": {"rows": rows, "score": 1.2, "uniform_score": 1.5, "better_than_uniform": True},
        "front": [{"bits": b, "score": 9.0 / b**3, "kl": {"stories": 0.1}} for b in (2.25, 3.0, 4.0)],
    }
    machine = {"processor": "CPU", "threads": 1, "python": "3.11", "torch": "2"}
    return {"config": {"model": "tiny"}, "numbers": numbers, "machine": machine, "seconds": 3.0}


def mixture():
    points = [
        {"weights": {"stories": s, "<sums>": 1 - s}, "score": 1 - (s - 0.5) ** 2, "alignment": 0.9, "erank_ratio": None}
        for s in (0.0, 0.5, 1.0)
    ]
    found = {"criterion": "family", "general": ["stories"], "best": points[1], "curve": points}
    return {"numbers": {"mixture": found}}


def test_every_part_is_there():
    text = page(allocation(), mixture())
    for part in ("Where the bits go", "Sensitivities", "Loss against bits", "Calibration mixture", "20 % less", "0.90"):
        assert part in text
    assert text.count("<svg") == 5
    assert "<sums>" not in text and "&lt;sums&gt;" in text
    assert not re.search(r"(src|href)=\"http", text)
    assert text == page(allocation(), mixture()), "the same numbers give the same bytes"
    assert "Calibration mixture" not in page(allocation())


def test_a_plan_that_does_not_pay_says_so():
    run = copy.deepcopy(allocation())
    run["numbers"]["proof"] |= {"better_than_uniform": False, "score": 1.6}
    assert "not better than spending the same bits evenly" in page(run)


def test_names_of_layers():
    assert short("model.layers.3.mlp.up_proj") == ("3", "mlp.up_proj")
    assert short("head") == ("", "head")
