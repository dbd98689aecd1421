"""The GPU kernels on a GPU: every width, weight, shape and float type against the slow twin there; graphs, compile."""

import pytest
import torch

from polybit.kernels import ops, reference
from polybit.kernels.prepared import Prepared
from polybit.kernels.route import route
from polybit.speed.products_gpu import time_on_gpu, to_gpu
from tests.kernels.test_ops import KINDS, random_input, random_planes, relative
from tests.kernels.test_triton_round import awkward_input
from tests.kernels.test_triton_round import check as check_rounding

triton_gemv, triton_decode = ops.gpu_kernels() or (None, None)

DEVICE = "cuda"
MODES = ["int8", "int16"]
ERROR = 2e-6  # of the largest output: float32 sums of a few thousand products
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def exact_error(p, tokens, width, mode, seed=1):
    """Error of the operator on the GPU, with a bias, against the slow twin there in float64. Many tokens are not
    rounded; groups the kernels do not read are the twin's, which rounds whatever the number of tokens."""
    many = route(mode, "cuda", ops.read_by_gpu(p, width), tokens) == "many"
    mode_of_twin = "float" if many else mode
    rows, columns = p.shape
    x, bias = random_input(tokens, columns, seed=seed).to(DEVICE), random_input(rows, seed=2).to(DEVICE)
    exact = reference.linear(x.double(), p, width, bias, arithmetic=mode_of_twin, precision=torch.float64)
    return relative(ops.linear(x, p, width, bias, arithmetic=mode), exact)


def test_the_kernels_are_there_and_compiled():
    kernels = ops.gpu_kernels()
    assert kernels is not None and not kernels[0].INTERPRETED


@pytest.mark.parametrize("chunk", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_gives_the_very_bits_of_the_slow_twin(chunk, dtype):
    for columns in (200, 4096, 5000):
        for scaled in (False, True):
            check_rounding(DEVICE, 7, columns, chunk, dtype, scaled)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", range(1, 9))
def test_few_tokens_equal_the_slow_twin_at_every_width(width, mode):
    p = to_gpu(random_planes(84, 1000, **KINDS["everything"]))
    for tokens in (1, 2, 3, 12):
        assert exact_error(p, tokens, width, mode) <= ERROR, tokens


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", range(1, 9))
def test_many_tokens_equal_the_slow_twin_at_every_width(width, mode):
    p = to_gpu(random_planes(84, 1000, **KINDS["everything"]))
    for tokens in (13, 200):
        assert exact_error(p, tokens, width, mode) <= ERROR, tokens


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_the_very_bits_of_the_slow_twin(kind):
    for group_size in (0, 32, 64, 128, 256):
        p = to_gpu(random_planes(84, 1000, 8, group_size, **KINDS[kind]))
        for width in range(1, 9):
            for dtype in ops.FLOATS:
                assert torch.equal(triton_decode.decode(p, width, dtype), reference.decode(p, width).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_tokens_of_16_bits(dtype):
    p = to_gpu(random_planes(84, 1000, **KINDS["everything"]))
    x, bias = random_input(40, 1000, dtype=dtype).to(DEVICE), random_input(84, dtype=dtype).to(DEVICE)
    for mode, digits in (("int8", 1.0), ("int16", 1.0), ("float", 0.5)):  # a float input meets the exact weight
        y = ops.linear(x, p, 5, bias, arithmetic=mode)
        assert y.dtype == dtype
        assert relative(y, reference.linear(x.float(), p, 5, bias.float())) <= digits * torch.finfo(dtype).eps


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ops.FLOATS)
def test_one_token_rounded_in_the_kernel_and_launched_again_is_the_same(dtype, mode):
    for kind in KINDS.values():
        p = to_gpu(random_planes(84, 5000, **kind))
        x = awkward_input(1, 5000).clamp(-1e3, 1e3).to(DEVICE, dtype)
        layer, other, bias = Prepared(p), torch.randn_like(x), random_input(84, seed=2).to(DEVICE)
        for width in (3, 4, 8):
            y = ops.linear(x, p, width, bias, arithmetic=mode)
            assert not y.isnan().any() and torch.equal(y, triton_gemv.linear(x, p, width, bias, mode, fuse=False))
            # rounded once, at the end: what float16 does not hold becomes infinity, as in torch's own products
            assert torch.equal(y, ops.linear(x.float(), p, width, bias, arithmetic=mode).to(dtype))
            for given in (x, other, x):
                again = layer.linear(given, width, bias, mode)
                assert torch.equal(again, ops.linear(given, p, width, bias, arithmetic=mode))
        assert len(layer.on_gpu.launches) == 3


def test_rows_decoded_in_blocks_are_the_same(monkeypatch):
    p, x = to_gpu(random_planes(84, 600)), random_input(3, 5, 600, dtype=torch.bfloat16).to(DEVICE)
    whole = ops.linear(x, p, 4, arithmetic="int8")
    monkeypatch.setattr(triton_decode, "LARGEST", 32 * 600 * 2)
    assert relative(ops.linear(x, p, 4, arithmetic="int8"), whole) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("group_size", [0, 16, 32, 64, 128, 256])
def test_every_group_size(group_size, tokens):
    p = to_gpu(random_planes(84, 600, 8, group_size, **KINDS["zero"]))
    for width in (3, 6):
        assert exact_error(p, tokens, width, "int16") <= ERROR


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weight(kind, tokens):
    p = to_gpu(random_planes(84, 600, **KINDS[kind]))
    for width in (3, 6):
        assert exact_error(p, tokens, width, "int8") <= ERROR


@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (4096, 4096), (1030, 11008), (40, 20000)])
def test_odd_and_large_shapes(shape):
    p = to_gpu(random_planes(*shape))
    for tokens in (1, 4, 40):
        assert exact_error(p, tokens, 4, "int16") <= ERROR, tokens


@pytest.mark.parametrize("bits", [2, 4, 5])
def test_fewer_stored_planes(bits):
    p = to_gpu(random_planes(20, 96, bits, 32, asymmetric=True, ratios=range(1, bits)))
    for width in (1, bits):
        for tokens in (1, 20):
            assert exact_error(p, tokens, width, "int16") <= ERROR


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_floats_are_rounded_once(dtype, tokens):
    p = to_gpu(random_planes(84, 600))
    x, bias = random_input(tokens, 600, dtype=dtype).to(DEVICE), random_input(84, dtype=dtype).to(DEVICE)
    y = ops.linear(x, p, 4, bias, arithmetic="int16")
    exact = reference.linear(x.float(), p, 4, bias.float(), arithmetic="int16")
    assert y.dtype == dtype
    assert torch.allclose(y.float(), exact, rtol=torch.finfo(dtype).eps, atol=ERROR * float(exact.abs().max()))


@pytest.mark.parametrize("mode", ["float", *MODES])
def test_layouts_of_the_input(mode):
    """Strided input, leading axes, one axis, no tokens at all."""
    p, x = to_gpu(random_planes(20, 96)), random_input(96, 4).to(DEVICE).T
    y = ops.linear(x, p, 4, arithmetic=mode)
    assert torch.allclose(ops.linear(x.view(2, 2, 96), p, 4, arithmetic=mode), y.view(2, 2, 20))
    assert torch.allclose(ops.linear(x[0], p, 4, arithmetic=mode), y[0], rtol=1e-5, atol=1e-6)
    assert ops.linear(x[:0], p, 4, arithmetic=mode).shape == (0, 20)


@pytest.mark.parametrize("tokens", [5, 20])
def test_a_spoiled_token_spoils_only_itself(tokens):
    p, x = to_gpu(random_planes(20, 200)), random_input(tokens, 200).to(DEVICE)
    clean = ops.linear(x, p, 4, arithmetic="int8")
    for bad in (torch.nan, torch.inf):
        x[2, 70] = bad
        y = ops.linear(x, p, 4, arithmetic="int8")
        keep = [0, 1, *range(3, tokens)]
        assert not y[2].isfinite().any() and torch.equal(y[keep], clean[keep])


def test_decoding_equals_that_in_main_memory():
    for kind in KINDS.values():
        p = random_planes(37, 300, **kind)
        for width in (8, 3):
            assert torch.allclose(ops.decode(to_gpu(p), width).cpu(), ops.decode(p, width), rtol=1e-6, atol=0)


def test_a_width_per_group_goes_to_the_slow_twin():
    p, x = random_planes(20, 192, **KINDS["everything"]), random_input(3, 192)
    y = ops.linear(x.to(DEVICE), to_gpu(p), (3, 5, 8), arithmetic="int16")
    assert relative(y.cpu(), reference.linear(x, p, (3, 5, 8), arithmetic="int16")) <= ERROR


@pytest.mark.parametrize("tokens", [1, 40])
def test_compiles_without_graph_breaks(tokens):
    p, x = to_gpu(random_planes(20, 96)), random_input(tokens, 96).to(DEVICE)
    compiled = torch.compile(lambda x: ops.linear(x, p, 4, arithmetic="int8") * 2, fullgraph=True)
    assert torch.equal(compiled(x), ops.linear(x, p, 4, arithmetic="int8") * 2)


@pytest.mark.parametrize("tokens", [1, 40])
def test_replays_from_a_cuda_graph(tokens):
    p, x = to_gpu(random_planes(84, 600, **KINDS["everything"])), random_input(tokens, 600).to(DEVICE)
    ops.linear(x, p, 5, arithmetic="int16")  # compiled before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear(x, p, 5, arithmetic="int16")
    for seed in (3, 4):
        x.copy_(random_input(tokens, 600, seed=seed))
        graph.replay()
        assert torch.equal(y, ops.linear(x, p, 5, arithmetic="int16"))


def test_bench_times_every_job():
    with torch.inference_mode():
        numbers = time_on_gpu(256, 1024, 1, [4], ["int8"], 3, peers=True)
    assert [row["name"] for row in numbers["rows"]][:2] == ["polybit w4 int8", "torch bf16"]
    assert not any("without a CUDA graph" in note for note in numbers["notes"]), numbers["notes"]
    assert all(row["seconds"] > 0 and row["eager_seconds"] > 0 for row in numbers["rows"])
