"""The quantizers by name."""

from __future__ import annotations

from collections.abc import Callable

from polybit.core.affine import QWeight
from polybit.quant.awq import awq
from polybit.quant.gptq import gptq
from polybit.quant.hqq import hqq
from polybit.quant.nested import nested
from polybit.quant.rounding import rounding
from polybit.quant.rtn import rtn

QUANTIZERS: dict[str, Callable[..., QWeight]] = {
    "rtn": rtn,
    "gptq": gptq,
    "awq": awq,
    "hqq": hqq,
    "nested": nested,
    "rounding": rounding,
}
