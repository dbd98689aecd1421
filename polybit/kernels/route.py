"""Which way a product goes: the one place that decides it, from facts that need no tensor."""

from __future__ import annotations

from typing import Literal

Arithmetic = Literal["float", "int8", "int16"]
Route = Literal["kept", "exact", "operator", "compiled", "decoded", "few", "many", "twin"]
# Beyond these tokens on a GPU decoding and a dense product are faster. On an H200, 4096 x 4096: triton_gemv takes
# 7 + 1.2 µs for every further token at 4 bits and 9 + 2 at 8; decoding moves 40 to 50 MB, about 12 µs, and bf16 cuBLAS
# takes 14.
MOST_TOKENS = 12


def route(
    arithmetic: Arithmetic,
    device: str = "cpu",
    readable: bool = True,
    tokens: int = 1,
    *,
    watched: bool = False,
    gradient: bool = False,
    kept: bool = False,
) -> Route:
    """The way of one product x W^T.

    device: where the weight is · readable: its kernels are there and read this weight, at these widths, for this input
    · tokens: how many are multiplied at once · watched: somebody traces, records or replaces operators, or the call
    has not reached one yet · gradient: the input wants one · kept: the decoded weight is in memory.

    kept: dense, with the decoded weight that is there · exact: the slow twin, through which gradients pass · operator:
    torch.ops.polybit.linear, which asks again inside · compiled: the C++ kernels on rounded inputs · decoded: decoded
    by the C++ kernels, then dense · few: the Triton kernels on rounded inputs · many: decoded by Triton, then dense ·
    twin: plain torch (kernels/reference.py).
    """
    if kept:
        return "kept"
    if gradient:
        return "exact"
    if watched:
        return "operator"
    if not readable:
        return "twin"
    if device == "cpu":
        return "decoded" if arithmetic == "float" else "compiled"
    if device == "cuda" and tokens:
        return "few" if arithmetic != "float" and tokens <= MOST_TOKENS else "many"
    return "twin"
