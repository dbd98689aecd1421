"""The route of a product as a table over its facts; no tensor is needed to know which kernel multiplies."""

from itertools import product

import pytest

from polybit.kernels.route import MOST_TOKENS, route

TABLE = [  # arithmetic, device, readable, tokens, further facts -> way
    ("float", "cpu", True, 1, {}, "decoded"),
    ("int16", "cpu", True, 1, {}, "compiled"),
    ("int8", "cpu", True, 4096, {}, "compiled"),
    ("int8", "cpu", True, 0, {}, "compiled"),
    ("int8", "cpu", False, 1, {}, "twin"),
    ("float", "cpu", False, 1, {}, "twin"),
    ("int16", "cuda", True, 1, {}, "few"),
    ("int8", "cuda", True, MOST_TOKENS, {}, "few"),
    ("int8", "cuda", True, MOST_TOKENS + 1, {}, "many"),
    ("float", "cuda", True, 1, {}, "many"),
    ("int8", "cuda", True, 0, {}, "twin"),
    ("int8", "cuda", False, 1, {}, "twin"),
    ("int8", "mps", True, 1, {}, "twin"),
    ("int16", "cpu", True, 1, {"watched": True}, "operator"),
    ("int16", "cuda", False, 1, {"watched": True}, "operator"),
    ("int16", "cpu", True, 1, {"watched": True, "gradient": True}, "exact"),
    ("int8", "cpu", True, 1, {"gradient": True, "kept": True}, "kept"),
    ("float", "cpu", True, 1, {"kept": True, "watched": True}, "kept"),
]


@pytest.mark.parametrize("arithmetic, device, readable, tokens, facts, way", TABLE)
def test_route(arithmetic, device, readable, tokens, facts, way):
    assert route(arithmetic, device, readable, tokens, **facts) == way


def test_what_no_kernel_reads_is_never_given_to_one():
    """Over all facts: only readable weights reach kernels, and only rounded inputs integer ones."""
    facts = product(
        ("float", "int8", "int16"), ("cpu", "cuda", "xpu"), (True, False), (0, 1, 100), *[(True, False)] * 3
    )
    for arithmetic, device, readable, tokens, watched, gradient, kept in facts:
        way = route(arithmetic, device, readable, tokens, watched=watched, gradient=gradient, kept=kept)
        if way in ("compiled", "few"):
            assert readable and arithmetic != "float" and not (watched or gradient or kept)
        if way in ("compiled", "decoded"):
            assert device == "cpu"
        if way in ("few", "many"):
            assert device == "cuda" and readable and tokens
