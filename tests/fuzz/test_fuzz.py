"""A few of the cases that `python -m tests.fuzz` makes by the hundred thousand, of every reader; and those it found."""

import json
import signal

import pytest

from polybit.compress.mix_files import read_mix
from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError
from polybit.hub.gguf_file import open_gguf
from polybit.train.pairs import SUMMARY, read_shard, summary
from tests.fuzz.__main__ import outcome, overdue
from tests.fuzz.readers import READERS
from tests.fuzz.room import furnish

SLOW = ("gguf",)  # a model is built in each case


@pytest.fixture(scope="session")
def room(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("fuzz") / "room")


@pytest.mark.parametrize("reader", READERS)
def test_changed_files_are_read_or_refused_in_one_sentence(reader, room, tmp_path):
    before = signal.signal(signal.SIGPROF, overdue)
    try:
        case = READERS[reader](room)
        found = [outcome(case, reader, number, tmp_path / "case") for number in range(5 if reader in SLOW else 40)]
    finally:
        signal.signal(signal.SIGPROF, before)
    assert not [said for verdict, said in found if verdict == "fault"]
    assert {verdict for verdict, _ in found} <= {"read", "refused"} and "refused" in {verdict for verdict, _ in found}


@pytest.mark.parametrize("best", [{"weights": {"a": "x"}}, {"weights": {"a": True}}, "x", {"weights": {"a": 0}}, None])
def test_a_mixture_that_is_none(best, tmp_path):
    (tmp_path / "mix.json").write_text(json.dumps({"numbers": {"mixture": {"best": best}}}))
    with pytest.raises(PolybitError, match="--mix"):
        read_mix(str(tmp_path / "mix.json"))


def test_pairs_that_are_none(tmp_path):
    (tmp_path / SUMMARY).write_text("{}")
    with pytest.raises(PolybitError, match="names no precision"):
        summary(tmp_path)
    (tmp_path / "shard.jsonl").write_text(json.dumps({"prompt": [1], "chosen": 5, "rejected": None, "star": None}))
    with pytest.raises(PolybitError, match="no lists of tokens"):
        list(read_shard(tmp_path / "shard.jsonl"))


def test_numbers_that_python_does_not_read():
    for text in ("²", "9" * 5000, "w" + "9" * 5000):
        with pytest.raises(PolybitError, match="cannot be read"):
            Precision.parse(text)


def test_a_gguf_file_that_lacks_a_weight_is_refused(room, tmp_path):
    """transformers alone gives such a weight random numbers."""
    import torch

    data = (room.path / "gguf" / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(data.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xp.weight"))
    with pytest.raises(PolybitError, match="up_proj"):
        open_gguf(str(tmp_path / "model.gguf"), dtype=torch.float32)


def test_half_a_character_in_an_answer_reaches_the_page_as_a_question_mark(room, tmp_path):
    from polybit.acts.report import report
    from polybit.options.report import ReportOptions

    evaluation = room.json("eval.json")
    evaluation["numbers"]["presets"]["w4"]["answers"][0]["prompt"] = "half \ud83d"
    (tmp_path / "eval.json").write_text(json.dumps(evaluation))
    report(str(tmp_path), ReportOptions(eval=tmp_path / "eval.json", out=tmp_path / "page.html"))
    assert "half ?" in (tmp_path / "page.html").read_text()


def test_a_plan_with_blocks_as_wide_as_the_world_is_read_at_once():
    from polybit.core.plan import ColumnWidths

    assert ColumnWidths(32 * 10**9, (1,)).group_widths(4, 128, 32) == (5, 5, 5, 5)
