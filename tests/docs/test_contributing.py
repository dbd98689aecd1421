"""The quantizer of CONTRIBUTING.md is real: its file, its line and its test run as they stand on the page."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from polybit.core.affine import Grid
from polybit.core.planes import pack, unpack
from polybit.quant.table import QUANTIZERS, Quantizer

PAGE = Path(__file__).parent.parent.parent / "CONTRIBUTING.md"
FILE, LINE, TEST = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def added(monkeypatch):
    """The page's quantizer, in the package and in its table."""
    name = re.match(r"# polybit/quant/(\w+)\.py\n", FILE)[1]
    module = ModuleType(f"polybit.quant.{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(FILE, PAGE, "exec"), module.__dict__)
    [(key, part)] = eval(f"{{{LINE}}}", {"Quantizer": Quantizer}).items()
    assert key == name
    monkeypatch.setitem(QUANTIZERS, key, part)
    return key


@pytest.mark.parametrize("zero", ["group", "centre"])
def test_the_line_calls_the_file(added, zero):
    weight_OI = torch.randn(32, 96, generator=torch.Generator().manual_seed(1))
    q = QUANTIZERS[added](weight_OI, None, Grid(4, 32, zero))
    assert torch.equal(unpack(pack(q)).codes_OI, q.codes_OI)
    assert float((q.dequantize() - weight_OI).square().mean()) < 0.02


def test_the_test_of_the_page_passes(added):
    assert TEST.startswith(f"# tests/quant/test_{added}.py\n")
    names: dict = {}
    exec(compile(TEST, PAGE, "exec"), names)
    tests = [found for name, found in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_lines_fit():
    assert max(map(len, PAGE.read_text().splitlines())) <= 120
