"""How far is drafted: as far as it pays, by what was seen of proposals and steps."""

import numpy as np
import pytest
import torch

from polybit.kernels import cpu
from polybit.serve.drafting import Lookup
from polybit.serve.pace import KEPT, Odds, Pace, StepTimes
from polybit.serve.runners import RowRunner
from tests.hub.test_rows import make
from tests.serve.test_engine import answers, ask, engine


def followed(text, drafts, length):
    """Lookup's slow twin: what stood behind the last place in the text where the ending stood."""
    end = [*text, *drafts][-length:]
    at = [place for place in range(length, len(text)) if text[place - length : place] == end]
    return [(length, text[at[-1]])] if at else []


def test_a_lookup_proposes_what_followed_before():
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4, (120,), generator=draw).tolist()
    for least in (1, 2, 3, 6):
        lookup = Lookup(least)
        for count in range(len(tokens) - 3):
            for drafts in ([], tokens[count : count + 3]):
                lengths = range(least, max(least, 4) + 1)
                expected = [found for length in lengths for found in followed(tokens[:count], drafts, length)]
                assert lookup(tokens[:count], drafts) == expected
    assert Lookup(0)(tokens) == []


def test_odds_follow_what_happens_lately():
    odds = Odds(0.9)
    assert odds.chance == pytest.approx(0.9)
    for _ in range(10 * KEPT):
        odds.note(False)
    assert odds.chance < 0.01
    for _ in range(2 * KEPT):
        odds.note(True)
    assert odds.chance > 0.8


def test_a_row_costs_the_slope_of_a_weighted_line():
    draw, times, seen = np.random.default_rng(0), StepTimes(), []
    for _ in range(300):
        rows = int(draw.integers(1, 30))
        seen.append((rows, 0.008 + 0.002 * rows + draw.normal() * 1e-4))
        times.note(1, rows, seen[-1][1])
    weights = (1 - 1 / KEPT) ** np.arange(len(seen))[::-1]
    slope, start = np.polyfit(*np.array(seen).T, 1, w=np.sqrt(weights))
    assert times.row == pytest.approx(slope, rel=0.02)
    assert times.rate == pytest.approx(1 / (start + slope), rel=0.02)  # a row per answer


class Costly(RowRunner):
    """Tells a clock what its steps would take: so much for a row, and for a step of the answer's width 1."""

    now = 0.0
    row = 0.0

    def read(self, parts, keep):
        step = 0.2 if parts[0].setting == self.setting("w4", draft=True) else 1.0
        self.now += step + self.row * sum(len(part.tokens) for part in parts)
        return super().read(parts, keep)


@pytest.mark.skipif(cpu.library() is None, reason="needs the compiled kernels")
@pytest.mark.parametrize(("row", "least", "most"), [(0.01, 0.7, 0.76), (20.0, 0.001, 0.1)])
def test_drafts_are_many_where_rows_are_cheap_and_few_where_they_are_dear(row, least, most):
    server = engine(make("qwen2"), slots=1, room=512, kind=Costly)
    server.runner.row = row
    server.pace = Pace(clock=lambda: server.runner.now)
    plain = answers(server, [ask(1, "w4", most=400)])[0]
    # the draft is the width itself: all that it proposes comes true, and yet it pays only where rows are cheap
    found, [end], _ = answers(server, [ask(1, "w4", draft="w4", most=400)])
    assert found == plain
    assert least <= end.spent.drafted / end.spent.answer <= most, end.spent.drafted
