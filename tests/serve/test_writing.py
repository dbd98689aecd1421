"""Text while it comes: pieces join to the whole, characters arrive whole, stop texts never show."""

from hypothesis import given
from hypothesis import strategies as st

from polybit.serve.writing import Writer, overlap


class Bytes:
    """A tokenizer with a byte per token."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", errors="replace")


def write(text, stop=(), prompt=b"hi "):
    writer = Writer(Bytes(), list(prompt), stop)
    pieces = []
    for byte in text.encode():
        pieces.append(writer.add(byte))
        if writer.stopped_by is not None:
            break
    return [*pieces, writer.finish()], writer


@given(st.text(max_size=30))
def test_pieces_join_to_the_whole_text(text):
    assert "".join(write(text)[0]) == text


@given(st.text(alphabet="abé", max_size=20), st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3))
def test_stop_texts_cut_and_never_show(text, stop):
    pieces, writer = write(text, stop)
    ends = [at + len(mark) for mark in stop if (at := text.find(mark)) >= 0]
    if not ends:
        assert "".join(pieces) == text and writer.stopped_by is None
        return
    seen = text[: min(ends)]  # what had come when the first stop text was complete
    assert "".join(pieces) == seen[: min(seen.find(mark) for mark in stop if mark in seen)]
    assert writer.stopped_by in stop


def test_half_characters_wait():
    pieces, _ = write("é😀")
    assert pieces == ["", "é", "", "", "", "😀", ""]


def test_overlap():
    assert overlap("abcab", "abx") == 2 and overlap("abc", "x") == 0 and overlap("aa", "aa") == 1
