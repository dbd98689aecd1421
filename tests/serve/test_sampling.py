"""Drawing a token: each knob against its definition, the same seed the same draws."""

import pytest
import torch

from polybit.serve.request import Sampling
from polybit.serve.sampling import Sampler, lead_of, nucleus

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -6.0])
SHARES = LOGITS.softmax(-1)


def drawn(logits=LOGITS, times=4000, **knobs):
    """Shares of the tokens over many independent draws."""
    counts = torch.zeros(len(logits))
    sampler = Sampler(Sampling(seed=1, **knobs), ())
    for _ in range(times):
        counts[sampler.draw(logits).token] += 1
        sampler.counts.clear()
    return counts / times


def test_shares_follow_the_softmax_at_a_temperature():
    assert torch.allclose(drawn(), SHARES, atol=0.03)
    assert torch.allclose(drawn(temperature=0.5), (LOGITS / 0.5).softmax(-1), atol=0.03)


@pytest.mark.parametrize(
    "knobs, allowed",
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.7}, [0, 1]),
        ({"top_p": 0.6}, [0]),
        ({"min_p": 0.2}, [0, 1]),
        ({"top_k": 1}, [0]),
        ({"bias": {4: 100.0}}, [4]),
    ],
)
def test_cuts_leave_what_they_say(knobs, allowed):
    shares = drawn(times=300, **knobs)
    assert sorted(shares.nonzero()[:, 0].tolist()) == allowed


def test_the_nucleus_is_that_of_all_tokens_in_order():
    """Sorting few tokens leaves what sorting all leaves, and the draw finds every token that is left."""
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        share_V = (3 * torch.randn(500, generator=draw)).round().exp()  # many are alike
        for top_p in (0.0, 0.3, 0.9, 0.999):
            order = share_V.double().sort(descending=True, stable=True).indices
            kept, mass = [], 0.0
            for token in order.tolist():
                kept.append(token)
                mass += float(share_V[token])
                if mass >= top_p * float(share_V.double().sum()) * (1 - 1e-12):
                    break
            assert nucleus(share_V, top_p).nonzero()[:, 0].tolist() == sorted(kept)


def test_the_lead_is_that_of_topk():
    for logits in (LOGITS, LOGITS.flip(0), torch.tensor([1.0, 1.0]), torch.tensor([3.0])):
        best = logits.topk(min(2, len(logits))).values
        assert lead_of(logits) == pytest.approx(float(best[0] - best[1]) if len(best) > 1 else 0.0)


def test_greedy_and_seeds():
    greedy = Sampler(Sampling(temperature=0.0), ())
    assert [greedy.draw(LOGITS).token for _ in range(3)] == [0, 0, 0]
    rows = [[Sampler(Sampling(seed=7), ()).draw(LOGITS).token for _ in range(5)] for _ in range(2)]
    assert rows[0] == rows[1]
    one = Sampler(Sampling(seed=7), ())
    assert len({one.draw(LOGITS).token for _ in range(50)}) > 1


def test_penalties():
    sampler = Sampler(Sampling(temperature=0.0, presence=0.6, frequency=0.5), ())
    assert [sampler.draw(LOGITS).token for _ in range(5)] == [0, 1, 0, 0, 2]  # 2, .9, .4, -.1; 1, -.1; 0
    repeated = Sampler(Sampling(temperature=0.0, repetition=4.0), [0])
    assert repeated.draw(LOGITS).token == 1  # 2 / 4 < 1
    assert repeated.draw(LOGITS).token == 0  # 0.5 against 1 / 4


class Only:
    """A grammar that allows one token, once."""

    def mask(self):
        return torch.arange(5) == 3

    def take(self, token):
        return token == 3


def test_a_grammar_decides():
    sampler = Sampler(Sampling(seed=1), (), Only())
    assert sampler.draw(LOGITS).token == 3 and sampler.finished
