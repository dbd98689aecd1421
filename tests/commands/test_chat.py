"""Talking: turns, widths that change between them, pipes and a terminal, and answers that stream."""

import errno
import io
import os
import pty
import select
import subprocess
import sys
import time

import pytest
import torch

import polybit
from polybit.acts.streaming import Heard
from polybit.cli import main
from polybit.core.runtime import PolybitError
from polybit.hub.models import open_model


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    """The tiny Llama at 8 bits, which serves narrower widths too."""
    out = tmp_path_factory.mktemp("chat") / "made"
    polybit.quantize(str(tiny_llama), out=out, bits=8, method="rtn", measure=False)
    return out


def talk(model, *lines, **options):
    """(the run, everything that was said)."""
    from polybit.acts.chat import chat
    from polybit.options.chat import ChatOptions

    said = []
    run = chat(str(model), ChatOptions(max_tokens=8, **options), lines=lines, say=said.append)
    return run.numbers["turns"], "".join(said)


def test_turns_and_widths(checkpoint):
    turns, said = talk(checkpoint, "Hello", "", "/width", "/width w3", "And now?", "/again", "/quit", "never")
    assert [turn["said"] for turn in turns] == ["Hello", "And now?", "And now?"]
    assert [turn["precision"] for turn in turns] == ["w8", "w3", "w3"]
    assert turns[1]["answer"] == turns[2]["answer"]
    assert "w8 now; there are w8" in said and "w3: 3." in said and "w8: 8." in said
    assert "tokens of the last answer would be" in said or "All " in said
    for turn in turns:
        assert turn["answer"] in said


def test_the_conversation_is_remembered_and_forgotten(checkpoint):
    first, _ = talk(checkpoint, "Hello")
    both, _ = talk(checkpoint, "What?", "Hello")
    anew, _ = talk(checkpoint, "What?", "/new", "Hello")
    told, _ = talk(checkpoint, "Hello", system="Be brief.")
    assert anew[1]["answer"] == first[0]["answer"] != both[1]["answer"]
    assert told[0]["answer"] != first[0]["answer"]


def test_what_cannot_be_done_is_said_and_the_talk_goes_on(checkpoint):
    turns, said = talk(checkpoint, "/again", "/width nine", "/dance", "word " * 300, "Hello\ud83d", "/bye")
    assert "nothing was answered yet" in said and "'nine' cannot be read" in said and "/new" in said
    assert "say it shorter" in said and [turn["said"] for turn in turns] == ["Hello�"]
    turns, said = talk(checkpoint, *["some words to fill the room"] * 12)
    assert len(turns) == 12 and "no longer fit the model's 128 tokens" in said
    _, said = talk("tinychat", "/width w3")
    assert "a float model has one width" in said
    with pytest.raises(PolybitError, match="--max-tokens"):
        polybit.chat(str(checkpoint), max_tokens=0)


def test_options_give_lines_too(checkpoint, capsys, tmp_path):
    run = polybit.chat(str(checkpoint), line=["Hello", "/width w4", "Hello"], max_tokens=4)
    assert [turn["precision"] for turn in run.numbers["turns"]] == ["w8", "w4"]
    main(["chat", str(checkpoint), "--line", "Hello", "--max-tokens", "4", "--json", str(tmp_path / "run.json")])
    assert capsys.readouterr().out == run.numbers["turns"][0]["answer"] + "\n" and (tmp_path / "run.json").is_file()


def test_in_a_pipe_only_answers_are_written(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n\xff\n")))
    main(["chat", str(checkpoint), "--max-tokens", "4"])
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.count("\n") == 2 and ">" not in shown.out.split("\n")[0][:2]


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *command):
        self.mine, its = pty.openpty()
        kept = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
        self.process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=kept, start_new_session=True)
        os.close(its)
        self.shown = ""

    def until(self, text, seconds=60.0):
        """Read until a text was shown."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"{text!r} never came: {self.shown!r}"
            if select.select([self.mine], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.mine, 4096).decode(errors="replace")
                except OSError as error:  # the program ended
                    assert error.errno == errno.EIO and text in self.shown, self.shown
        seen, self.shown = self.shown, self.shown.partition(text)[2]
        return seen

    def type(self, line):
        os.write(self.mine, line.encode() + b"\n")

    def end(self):
        status = self.process.wait(30)
        os.close(self.mine)
        return status


def test_on_a_terminal(checkpoint):
    terminal = Terminal(sys.executable, "-m", "polybit", "chat", str(checkpoint), "--max-tokens", "4")
    seen = terminal.until("\n> ")
    assert "Chatting with" in seen and "Loading" not in seen
    terminal.type("Hello")
    terminal.until("\n> ")
    terminal.type("/width w2")
    assert "w2: 2." in terminal.until("\n> ")
    terminal.type("/quit")
    assert terminal.end() == 0


def test_generate_streams_to_a_terminal_what_it_prints_to_a_pipe(checkpoint, capsys, monkeypatch):
    command = ["generate", str(checkpoint), "--prompt", "Hello", "--max-tokens", "12"]
    main(command)
    piped = capsys.readouterr()
    pieces = []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "write", lambda text: pieces.append(text))
    main(command)
    assert "".join(pieces) == piped.out and len(pieces) > 3 and piped.err == "" and piped.out.count("\n") == 1


def test_pieces_joined_are_the_answer():
    _, tokenizer = open_model("tinychat")
    for text in ("  Hello there, Öl!\n", "a\n\n b", "", "   ", "日本"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        said = []
        heard = Heard(tokenizer, [1], said.append)
        heard.put(torch.tensor([[1, 5, 6]]))  # the prompt
        for token in ids:
            heard.put(torch.tensor([token]))
        heard.end()
        assert "".join(said) == tokenizer.decode([1, *ids], skip_special_tokens=True).strip() and heard.tokens == ids
