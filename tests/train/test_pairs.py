"""Pairs: what is left out of the prompts, what a shard holds, and damaged ones."""

import json

import pytest

from polybit.core.runtime import PolybitError
from polybit.train.pairs import Pair, count, first_divergence, read_pairs, read_shard, sift, summary, write_shard


def test_first_divergence():
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([1, 2, 3], [1, 5, 3]) == 1
    assert first_divergence([1, 2], [1, 2, 3]) == 2  # one ended, the other went on
    assert first_divergence([], []) is None


def test_prompts_are_sifted_and_counted():
    found = sift([[1, 2], [], [1, 2], [1, 2, 3, 4], [9]], room=3)
    assert found.prompts == [[1, 2], [9]]
    assert (found.empty, found.duplicate, found.too_long) == (1, 1, 1)
    assert sift([[1] * 99], room=None).too_long == 0


def test_shards_hold_pairs_exactly_and_identical_answers_once(tmp_path):
    made = [Pair.of([1], [2, 3], [2, 4]), Pair.of([5], [6], [6])]
    write_shard(tmp_path / "shard-00000.jsonl", made)
    assert list(read_shard(tmp_path / "shard-00000.jsonl")) == made
    assert json.loads((tmp_path / "shard-00000.jsonl").read_text().splitlines()[1])["rejected"] is None
    assert count(made) == {
        "prompts": 2, "pairs": 1, "identical": 1, "mean_first_divergence": 1.0, "mean_answer_tokens": 1.5
    }  # fmt: skip


@pytest.mark.parametrize(
    "line, fault",
    [
        ("{", "not JSON"),
        ('{"prompt": [1]}', "no pair"),
        ('{"prompt": [1], "chosen": [2], "rejected": [3], "star": 1}', "contradicts itself"),
        ('{"prompt": [], "chosen": [2], "rejected": null, "star": null}', "contradicts itself"),
    ],
)
def test_damaged_shards_are_refused_with_their_line(tmp_path, line, fault):
    path = tmp_path / "shard-00000.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(PolybitError, match=f"Line 1 of .*{fault}"):
        list(read_shard(path))


def test_an_unfinished_directory_is_refused(tmp_path):
    with pytest.raises(PolybitError, match="no finished pairs"):
        summary(tmp_path)
    with pytest.raises(PolybitError, match="no finished pairs"):
        read_pairs(tmp_path / "nowhere")
