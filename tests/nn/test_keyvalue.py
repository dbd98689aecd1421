"""Property: a store gives back what rounding alone would, in the bytes the arithmetic says, whatever is done to it."""

import pytest
import torch

from polybit.nn.coding import code_rows, decode_rows, pack_rows, unpack_rows
from polybit.nn.keyvalue import ChannelStore, FloatStore, TokenStore, round_blocks, round_tokens


def states(tokens, batch=2, heads=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, tokens, size, generator=generator) * 3 + 1


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 24, 33])
def test_packing_is_lossless_and_dense(bits, columns):
    codes = torch.randint(0, 1 << bits, (5, columns), dtype=torch.uint8)
    packed = pack_rows(codes, bits)
    assert packed.shape == (5, bits * -(-columns // 8))
    assert torch.equal(unpack_rows(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_equals_a_literal_one(bits):
    """Group by group in plain Python: lowest value and step as 16-bit floats, nearest code."""
    x = states(4).transpose(1, 2).flatten(2).reshape(8, 24)
    codes, scale, low = code_rows(x, bits, 16)
    ours = decode_rows(codes, scale, low, 16)
    for row in range(8):
        for start in (0, 16):
            group = x[row, start : start + 16]
            bottom = float(group.min().half())
            step = float(torch.tensor((float(group.max()) - bottom) / (2**bits - 1)).half())
            for column, value in enumerate(group.tolist()):
                code = min(2**bits - 1, max(0, int((value - bottom) / step + 0.5)))
                assert ours[row, start + column] == pytest.approx(bottom + step * code, abs=step * 1e-3 + 1e-6)


def test_rounding_stays_within_half_a_step_and_takes_constants():
    x = states(20)
    for bits in (4, 8):
        step = (x.amax() - x.amin()) / (2**bits - 1)
        assert (round_tokens(x, bits) - x).abs().max() <= 0.51 * step + 5e-3  # the lowest value is a 16-bit float
    assert torch.allclose(round_tokens(torch.full((1, 1, 2, 8), 1e-9), 4), torch.zeros(1, 1, 2, 8), atol=1e-6)
    assert torch.isfinite(round_tokens(torch.full((1, 1, 2, 8), 1e9), 4)).all()


def test_gradient_passes_straight():
    x = states(3).requires_grad_()
    round_tokens(x, 4).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_token_store_reads_what_rounding_gives_in_any_portions():
    x = states(13)
    store = TokenStore(4, 16)
    for part in x.split([1, 5, 1, 6], dim=2):
        store.append(part)
    assert torch.equal(store.read(torch.float32), round_tokens(x, 4, 16))
    # 24 channels at 4 bits, and two groups with two 16-bit numbers each
    assert store.nbytes == 2 * 13 * (12 + 2 * 4)


def test_channel_store_rounds_full_blocks_per_channel():
    x = states(70)
    store = ChannelStore(4, 32, 64)
    for part in x.split([10, 30, 1, 29], dim=2):
        store.append(part)
    assert store.length == 70 and store.full == 64
    read = store.read(torch.float32)
    rows = round_tokens(x[:, :, :10], 8)  # tokens that waited were rounded to 8 bits before
    whole = torch.cat([rows, x[:, :, 10:]], dim=2)[:, :, :32]
    literal = whole.permute(0, 1, 3, 2).reshape(-1, 32)
    literal = decode_rows(*code_rows(literal, 4, 32), 32).view(2, 3, 8, 32).transpose(2, 3)
    assert torch.allclose(read[:, :, :32], literal, atol=1e-6)
    assert torch.equal(read[:, :, 64:], round_tokens(x[:, :, 64:], 8))
    assert store.nbytes == 2 * (2 * 24 * (16 + 4) + 6 * (24 + 4))


def test_keys_with_large_channels_profit_from_blocks_per_channel():
    x = states(64)
    x[:, 0, :, 2] += 60  # one channel far from the others, as keys have
    tokens, channels = TokenStore(4, 64), ChannelStore(4, 32, 64)
    errors = []
    for store in (tokens, channels):
        store.append(x)
        errors.append((store.read(torch.float32) - x).square().mean())
    assert errors[1] < errors[0] / 10


@pytest.mark.parametrize("make", [FloatStore, lambda: TokenStore(4, 16), lambda: ChannelStore(4, 16, 16)])
def test_rows_and_tokens_change_together(make):
    x = states(40, batch=3)
    store = make()
    store.append(x)
    read = store.read(torch.float32)
    store.change_rows(lambda tensor: tensor[torch.tensor([2, 0, 0])])
    assert torch.equal(store.read(torch.float32), read[torch.tensor([2, 0, 0])])
    store.keep_first(37)
    assert store.length == 37
    kept = store.read(torch.float32)
    assert torch.allclose(kept, read[torch.tensor([2, 0, 0])][:, :, :37], atol=0.05)
    assert torch.equal(kept[:, :, :32], read[torch.tensor([2, 0, 0])][:, :, :32])
    store.keep_first(0)
    assert store.length == 0
    store.append(x[:, :, :5])
    assert store.length == 5


@pytest.mark.parametrize("make", [FloatStore, lambda: TokenStore(4, 16), lambda: ChannelStore(4, 16, 16)])
def test_the_beginning_can_be_forgotten(make):
    store = make()
    store.append(states(40))
    read = store.read(torch.float32)
    gone = store.drop_first(20)
    assert gone == (16 if isinstance(store, ChannelStore) else 20)
    assert torch.equal(store.read(torch.float32), read[:, :, gone:])


def test_rounding_by_blocks_equals_the_store():
    x = states(70)
    store = ChannelStore(4, 32)
    store.append(x)
    assert torch.equal(round_blocks(x, 4), store.read(torch.float32))
    short = x[:, :, :5]
    assert torch.equal(round_blocks(short, 4), round_tokens(short, 8))
    x.requires_grad_()
    round_blocks(x, 4).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
