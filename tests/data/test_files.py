"""Files people have: the same rows in every container are the same text, and what is broken is said in one sentence."""

import bz2
import gzip
import json
import lzma
import random

import pytest

from polybit.core.runtime import PolybitError
from polybit.data.chat import read_prompts
from polybit.data.files import mend, read_file
from polybit.data.rows import read_rows
from polybit.data.text import read_documents

TEXTS = [f"Lily had {n} red balls, and a dog named {name}." for n, name in enumerate(("Tom", "Öl", "Ida", "日本"))]
ROWS = [{"text": text} for text in TEXTS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def containers(folder):
    """The rows in every container, by name."""
    import pyarrow
    from pyarrow import parquet

    table = "text\n" + "".join(f'"{text}"\n' for text in TEXTS)
    made = {
        "a.jsonl": LINES.encode(),
        "lines.json": LINES.encode(),  # lines in a file called .json
        "list.jsonl": json.dumps(ROWS).encode(),  # and the other way round
        "list.json": json.dumps(ROWS, indent=2).encode(),
        "inside.json": json.dumps({"version": 1, "data": ROWS}).encode(),
        "a.csv": table.encode("utf-8-sig"),
        "windows.csv": table.replace("\n", "\r\n").encode(),
        "two.csv": b"id;text\n" + "".join(f"{n};{text}\n" for n, text in enumerate(TEXTS)).encode(),
        "a.tsv": b"id\ttext\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(TEXTS)).encode(),
        "body.csv": table.replace("text\n", "body\n", 1).encode(),  # one column: nothing else can be meant
        "a.jsonl.gz": gzip.compress(LINES.encode()),
        "a.csv.bz2": bz2.compress(table.encode()),
        "list.json.xz": lzma.compress(json.dumps(ROWS).encode()),
    }
    for name, data in made.items():
        (folder / name).write_bytes(data)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "a.parquet")
    return [*made, "a.parquet"]


def test_every_container_holds_the_same_text(tmp_path):
    for name in containers(tmp_path):
        assert read_documents(tmp_path / name) == TEXTS, name
    (tmp_path / "p.txt.gz").write_bytes(gzip.compress("\n".join(TEXTS).encode()))
    assert [p[0]["content"] for p in read_prompts(tmp_path / "p.txt.gz")] == TEXTS


def test_every_container_holds_the_same_prompts_and_rows(tmp_path):
    for name in containers(tmp_path):
        found = read_prompts(tmp_path / name)
        assert [prompt[0]["content"] for prompt in found] == TEXTS, name
        rows = read_rows(tmp_path / name)
        if name == "inside.json":  # read as one object by those who know its layout
            assert rows == [{"version": 1, "data": ROWS}]
        else:
            assert [row.get("text", row.get("body")) for row in rows] == TEXTS, name


def test_conversations_in_parquet_and_saved_datasets(tmp_path):
    import datasets

    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    made = datasets.Dataset.from_list([{"messages": talk}, {"messages": [*talk, talk[0]]}])
    made.to_parquet(tmp_path / "a.parquet")
    assert read_documents(tmp_path / "a.parquet") == ["hi\nyo", "hi\nyo\nhi"]
    assert read_prompts(tmp_path / "a.parquet") == [[talk[0]], [*talk, talk[0]]]
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": made.select([0]), "train": made}).save_to_disk(tmp_path / "splits")
    assert read_documents(tmp_path / "saved") == read_documents(tmp_path / "splits") == ["hi\nyo", "hi\nyo\nhi"]


def test_half_a_character_is_replaced_and_said(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "half \\ud83d of it"}\n{"text": "\\udc00"}\n')
    assert read_documents(path) == ["fine 😀", "half � of it", "�"]
    assert "Line 2 of" in (said := capsys.readouterr().err) and "(and 1 more)" in said and said.count("\n") == 1
    same = {"a": ["b", {"c": 1}]}
    assert mend(same) is same and mend({"\ud800": 1}) == {"�": 1}


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:-9], "cannot be read"),
        ("a.jsonl.xz", b"\xfd7zXZ\x00\x00", "cannot be read"),
        ("a.parquet", b"PAR1 and nothing", "cannot be read as parquet"),
        ("a.parquet", b"", "cannot be read as parquet"),
        ("a.json", b'{"a": ' * 30000, "nested too deeply"),
        ("a.jsonl", b'{"text": ' + b"[" * 100000, "Line 1 .* nested too deeply"),
        ("a.json", b"[1", "not JSON"),
        ("a.json", b'{"text": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
        ("a.csv", b"text\na, b\n", "Row 1 .* more fields than the header"),
        ("a.docx", b"PK", "ends in '.docx'"),
        ("a", b"x", "has no ending"),
    ],
)
def test_what_is_broken_is_said(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    for read in (read_file, read_documents):
        with pytest.raises(PolybitError, match=words) as told:
            read(tmp_path / name)
        assert "\n" not in str(told.value)


def test_a_long_cell_is_no_error(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "word " * 60000 + "\n")
    assert len(read_documents(tmp_path / "a.csv")[0]) > 200_000


def test_random_bytes_give_text_or_one_sentence(tmp_path):
    draw = random.Random(0)
    pieces = [b"{", b"}", b"[", b"]", b'"text"', b":", b'"a"', b",", b"\n", b"\xff", b"\\ud800", b"0", b"null", b'"']
    for turn in range(600):
        name = draw.choice(
            ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.jsonl.gz", "a.parquet"][: 6 + turn % 30 // 29]
        )
        data = b"".join(draw.choice(pieces) for _ in range(draw.randrange(30)))
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        for read in (read_documents, read_prompts, read_rows):
            try:
                read(tmp_path / name)
            except PolybitError as error:
                assert "\n" not in str(error)
