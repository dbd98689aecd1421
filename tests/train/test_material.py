"""Cached references: what is kept, what is refused, and how rows become batches."""

import pytest
import torch

from polybit.core.runtime import PolybitError
from polybit.train.material import (
    PairMaterial,
    Scored,
    join,
    kept_tokens,
    order_of,
    prepare,
    read_cache,
    score,
    write_cache,
)
from polybit.train.pairs import Pair
from tests.train.tiny_run import float_lm, material, pairs


def test_scores_are_the_float_models_token_by_token():
    made = material(8)
    lm = float_lm()
    for row in range(8):
        answer = made.chosen[row]
        ids = torch.tensor([[*made.prompts[row], *answer.tokens]])
        logp_TV = lm.logits(ids)[0].log_softmax(-1)[len(made.prompts[row]) - 1 : -1]
        plain = logp_TV[torch.arange(len(answer.tokens)), torch.tensor(answer.tokens)]
        torch.testing.assert_close(answer.logp_T, plain, atol=1e-5, rtol=1e-5)
        assert answer.logp_T.dtype == torch.float32
        assert answer.top_index_TK[:, 0].tolist() == answer.tokens  # greedy: the answer is the likeliest token


def test_a_cache_gives_back_the_same_and_knows_its_model_and_its_rows(tmp_path):
    made, found = material(8), list(pairs(8))
    path = tmp_path / "scores.safetensors"
    write_cache(path, made, reference="abc")
    again = read_cache(path, found, reference="abc")
    assert again.prompts == made.prompts
    for kind in ("logp_T", "top_logp_TK", "top_index_TK"):
        for a, b in zip(again.chosen, made.chosen, strict=True):
            assert torch.equal(getattr(a, kind), getattr(b, kind))
    for a, b in zip(again.rejected[""], made.rejected[""], strict=True):
        assert (a is None and b is None) or (a.tokens == b.tokens and torch.equal(a.logp_T, b.logp_T))
    with pytest.raises(PolybitError, match="another reference"):
        read_cache(path, found, reference="abd")
    with pytest.raises(PolybitError, match="other pairs"):
        read_cache(path, found[:-1], reference="abc")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PolybitError, match="cannot be read"):
        read_cache(path, found, reference="abc")


def test_only_the_likeliest_tokens_of_a_large_vocabulary_are_kept():
    assert kept_tokens(512) == 512 and kept_tokens(50_000) == 64 and kept_tokens(100, 8) == 8
    small = prepare(float_lm(), list(pairs(8))[:3], top=5)
    assert small.chosen[0].top_logp_TK.shape[1] == 5


def made_up():
    """Two prompts, one with a pair that parts at its second token, one without."""
    answer = lambda tokens: Scored(tokens, torch.zeros(len(tokens)))  # noqa: E731
    return PairMaterial([[5, 6], [7]], [answer([1, 2, 3]), answer([4, 4])], {"": [answer([1, 9]), None]}, 0)


def test_parts_say_which_logits_are_needed():
    batch = made_up().pairs([0, 1], "w3", tails=True, joined=False)
    assert batch["active_B"].tolist() == [True, False] and batch["star_B"].tolist() == [1, 0]
    chosen = batch["chosen"]
    assert chosen["ids_BT"].tolist() == [[5, 6, 1, 2], [7, 4, 0, 0]]
    assert chosen["keep_BT"].tolist() == [[False, False, True, True], [True, True, False, False]]
    assert chosen["target_N"].tolist() == [2, 3, 4, 4]
    assert chosen["place_N"].tolist() == [1, 2, 0, 1] and chosen["row_N"].tolist() == [0, 0, 1, 1]
    assert batch["rejected"]["target_N"].tolist() == [9, 4, 4]


def test_renewed_answers_take_the_place_of_the_first():
    made = made_up()
    made.rejected["w3"] = [None, Scored([4, 8], torch.zeros(2))]
    assert made.other(0, "w3") is None and made.other(1, "w3").tokens == [4, 8]
    assert made.other(0, "w2").tokens == [1, 9]


def test_joined_rows_share_positions_and_hide_one_tail_from_the_other():
    part = join([([5, 6], [1, 2, 3], [1, 9])], [1], 0)
    assert part["ids_BT"].tolist() == [[5, 6, 1, 2, 1]]  # the last common token begins both tails
    assert part["positions_BT"].tolist() == [[0, 1, 2, 3, 2]]
    assert part["keep_BT"].tolist() == [[False, False, True, True, True]]
    assert part["chosen_N"].tolist() == [True, True, False]
    assert part["mask_B1TT"][0, 0, 4].tolist() == [True, True, False, False, True]


def test_an_answer_that_begins_the_other_still_has_its_end():
    lm = float_lm()
    pair = Pair.of([5, 6], [10, 11, 2], [10, 11, 2, 12])
    assert pair.star == 3
    made = prepare(lm, [pair, Pair.of([5, 6], [10], [11])])
    batch = made.pairs([0, 1], "w3", tails=True, joined=True)
    assert batch["chosen"]["tokens_B"].tolist() == [0, 1] and batch["rejected"]["tokens_B"].tolist() == [1, 1]


def test_the_order_is_drawn_once_and_covers_all():
    assert order_of(5, 12, seed=1) == order_of(5, 12, seed=1) != order_of(5, 12, seed=2)
    assert sorted(order_of(5, 10, seed=1)) == sorted([*range(5)] * 2)


def test_held_out_rows_are_the_last_and_must_leave_some():
    first, last = material(8).split(3)
    assert (len(first), len(last)) == (5, 3) and last.prompts == material(8).prompts[5:]
    with pytest.raises(PolybitError, match="8 prompts cannot give 8"):
        material(8).split(8)


def test_no_answers_to_score_is_no_error():
    assert score(float_lm(), [], []) == []
