"""The compiled parts of a decoding step against torch, in double precision, over odd sizes and extreme numbers."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from polybit.core.memory import collapse
from polybit.kernels import step

library = step.library()
needs_compiled = pytest.mark.skipif(library is None, reason="needs the compiled kernels")


@needs_compiled
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_norm_adds_and_divides_by_the_root_mean_square(size):
    hidden, more, weight, out = (torch.randn(size) for _ in range(4))
    expected = (hidden + more).double()
    library.norm(hidden.data_ptr(), more.data_ptr(), weight.data_ptr(), out.data_ptr(), size, 1e-5)
    assert torch.allclose(hidden.double(), expected, atol=1e-6)
    expected = expected / (expected.square().mean() + 1e-5).sqrt() * weight
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-6)
    before = hidden.clone()
    library.norm(hidden.data_ptr(), 0, weight.data_ptr(), out.data_ptr(), size, 1e-5)
    assert torch.equal(hidden, before)


@needs_compiled
def test_gate_is_silu_times_up_everywhere():
    gate = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([0.0, -0.0, 3e38, -3e38])])
    up, out = torch.randn(len(gate)), torch.empty(len(gate))
    library.gate(gate.data_ptr(), up.data_ptr(), out.data_ptr(), len(gate))
    expected = silu(gate.double()) * up
    assert torch.allclose(out[:-2].double(), expected[:-2], rtol=1e-6, atol=1e-30)
    assert torch.allclose(out[-2:-1] / 3e38, (gate[-2] * up[-2] / 3e38)[None]) and abs(out[-1]) < 1e-30
    gate[3] = float("nan")
    library.gate(gate.data_ptr(), up.data_ptr(), out.data_ptr(), len(gate))
    assert out.isnan().nonzero().flatten().tolist() == [3]


@needs_compiled
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(1, 1, 2), (6, 2, 10), (8, 8, 64), (12, 4, 128)])
@pytest.mark.parametrize("window", [0, 5])
def test_attention_of_one_token_after_another(heads, kv_heads, size, window):
    room = 40
    keys, values = (torch.zeros(kv_heads, room, size) for _ in range(2))
    scale = size**-0.5
    compiled = library.Attention(
        heads, kv_heads, size, size, room, scale, window, 0, 0, 1e-5, keys.data_ptr(), values.data_ptr()
    )
    draw = torch.Generator().manual_seed(0)
    cosine, sine = torch.ones(size), torch.zeros(size)  # no turn: rotation is held against the models themselves
    seen_k, seen_v = [], []
    for place in range(room):
        q = 5 * torch.randn(heads, size, generator=draw)
        k, v = (torch.randn(kv_heads, size, generator=draw) for _ in range(2))
        seen_k.append(k.clone())
        seen_v.append(v.clone())
        out = torch.empty(heads, size)
        parts = (q, k, v, cosine, sine, out)
        compiled.step(*(part.data_ptr() for part in parts), place)
        first = max(0, place + 1 - window) if window else 0
        past = [
            torch.stack(seen, 1)[:, first:].double().repeat_interleave(heads // kv_heads, 0)
            for seen in (seen_k, seen_v)
        ]
        expected = scaled_dot_product_attention(q[:, None].double(), *past, scale=scale)[:, 0]
        assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-5), place  # scores are float32


def test_large_pages_change_no_byte():
    for size in (10, 3 << 20):
        tensor = torch.randint(0, 256, (size,), dtype=torch.uint8)
        before = tensor.clone()
        assert collapse(tensor) in (True, False) and torch.equal(tensor, before)
    assert collapse(torch.zeros(4 << 20, dtype=torch.uint8)[::2]) is False
