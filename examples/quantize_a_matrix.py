"""Quantize one weight matrix by hand and look at its nested planes.

Run:  .venv/bin/python examples/quantize_a_matrix.py
"""

import torch

from polybit.core.affine import Grid
from polybit.core.planes import pack, unpack
from polybit.quant.nested import nested

weight_OI = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
planes = pack(nested(weight_OI, None, Grid(8, 64, "group"), widths=(8, 4, 3, 2)))

print(f"float32: {weight_OI.numel() * 4:,} bytes; stored once, read at any width:")
for width in (8, 4, 3, 2):
    error = unpack(planes, width).dequantize(width) - weight_OI
    print(f"  {width} bits: {planes.nbytes(width):7,} bytes read, mean squared error {float((error**2).mean()):.2e}")
