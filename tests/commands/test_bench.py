"""polybit bench on small shapes: every number is there, the figure is one, wrong flags are one sentence."""

import json

import pytest
import torch

from polybit.cli import main
from polybit.hub.random_model import Shape, random_float, random_quantized
from polybit.nn import switch
from polybit.speed import llama

SMALL = ["--hidden", "64", "--layers", "2", "--intermediate", "128", "--vocabulary", "256", "--heads", "4"]
SMALL += ["--kv-heads", "2"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_linear_keeps_constants_that_plan_uses(cache, tmp_path, capsys, tiny_llama):
    main(["plan", str(tiny_llama), "--no-dry-run"])
    assert "bench linear" in capsys.readouterr().out
    flags = ["--shape", "128x256", "--rounds", "2", "--widths", "8,3", "--threads", "1"]
    main(["bench", "linear", *flags, "--json", str(tmp_path / "b.json"), "--chart", str(tmp_path / "b.svg")])
    run = json.loads((tmp_path / "b.json").read_text())
    names = {row["name"] for row in run["numbers"]["rows"]}
    assert {"polybit w8 int8", "polybit w3 int16", "torch bf16"} <= names
    ours = next(row for row in run["numbers"]["rows"] if row["name"] == "polybit w3 int8")
    assert ours["bytes"] == 128 * 256 * 3 // 8 + 128 * 4 * 2 and ours["ratio"]["median"] > 0
    assert (tmp_path / "b.svg").read_text().startswith("<svg") and (cache / "machine.json").is_file()
    capsys.readouterr()
    main(["plan", str(tiny_llama), "--no-dry-run", "--threads", "1", "--json", str(tmp_path / "p.json")])
    assert "expected tokens per second" in capsys.readouterr().out
    speed = json.loads((tmp_path / "p.json").read_text())["numbers"]["speed"]
    assert speed["threads"] == 1 and all(value > 0 for value in speed["tokens_per_second"].values())


def test_generate_times_every_width_and_bf16(tmp_path, monkeypatch):
    monkeypatch.setattr(llama, "available", lambda: False)
    flags = ["--rounds", "1", "--widths", "8,2", "--tokens", "3", "--prompt", "5", "--json", str(tmp_path / "g.json")]
    main(["bench", "generate", *SMALL, *flags, "--chart", str(tmp_path / "g.svg")])
    rows = {row["name"]: row for row in json.loads((tmp_path / "g.json").read_text())["numbers"]["rows"]}
    assert {"transformers w8", "transformers bf16", "prompt w2", "prompt bf16"} <= set(rows)
    # the head stays at 8 bits and is read in every step; the embedding is only looked up
    blocks = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)
    norms = 4 * 5 * 64
    head = 256 * 64 * (8 + 16 / 64) / 8
    assert rows["transformers w2"]["bytes"] == 3 * (blocks * (2 + 16 / 64) / 8 + head + norms)


def test_switch_is_timed(capsys):
    main(["bench", "switch", *SMALL, "--rounds", "3"])
    assert "switching 16 layers takes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["linear", "--shape", "12"], "--shape 12"),
        (["linear", "--shape", "64x100", "--rounds", "1"], "100 columns"),
        (["linear", "some-model"], "bench linear times one random matrix"),
        (["linear", "--arithmetic", "int7"], "int7"),
        (["linear", "--rounds", "0"], "--rounds 0"),
        (["generate", "--device", "cuda"], "--device cuda"),
        pytest.param(
            ["linear", "--device", "cuda"],
            "needs an NVIDIA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one"),
        ),
        (["generate", "--hidden", "65"], "hidden size 65"),
        (["generate", "--ends", "9"], "--ends 9"),
        (["switch", "tinychat"], "is a float model"),
        (["linear", "--widths", "16"], "16"),
    ],
)
def test_what_cannot_be_is_one_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", *flags])
    said = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and sentence in said.splitlines()[-1] and "Traceback" not in said


def test_a_random_model_writes_and_switches():
    shape = Shape(64, 2, 128, 256, 4, 2, 64)
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        model, floating = random_quantized(shape), random_float(shape)
        for one in (model, switch.use(model, 3), floating):
            logits = one(ids).logits
            assert logits.shape == (1, 5, 256) and logits.isfinite().all() and 0.01 < logits.std() < 100


@pytest.mark.gpu
def test_linear_on_a_gpu(tmp_path):
    main(
        ["bench", "linear", "--device", "cuda", "--shape", "1024x2048", "--rounds", "2", "--json", str(tmp_path / "g")]
    )
    rows = json.loads((tmp_path / "g").read_text())["numbers"]["rows"]
    assert {"polybit w2 int8", "torch bf16"} <= {row["name"] for row in rows}


@pytest.mark.slow
@pytest.mark.skipif(not llama.available(), reason="needs llama-cpp-python and gguf")
@pytest.mark.parametrize("pure", [False, True])
def test_llama_reads_the_random_files(tmp_path, pure):
    shape = Shape(256, 2, 512, 320, 4, 2, 64)
    names = ["Q8_0", "Q4_0", "Q3_K", "Q2_K"]
    files = llama.random_files(shape, names, tmp_path, threads=1, pure=pure)
    sizes = []
    for path in files.values():
        session = llama.Session(path, threads=1, room=16)
        session.prompt(list(range(10)))
        session.decode(3)
        sizes.append(session.size()[1])
        session.close()
    assert sizes == sorted(sizes, reverse=True) and 8 < sizes[0] < 9 and sizes[-1] < 5
