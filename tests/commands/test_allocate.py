"""`polybit allocate` on a tiny model: plans, proofs, the cache, and one clear sentence for every bad input."""

import json

import pytest

from polybit.cli import main
from polybit.core import runtime
from polybit.measure.table import SIGNALS

WORDS = (
    "the",
    "cat",
    "saw",
    "a",
    "red",
    "hat",
    "and",
    "ran",
    "to",
    "see",
    "who",
    "had",
    "left",
    "it",
    "there",
    "while",
)

PARTS = [f"self_attn.{leaf}" for leaf in "qkvo"] + ["mlp.gate", "mlp.up", "mlp.down"]


def story(n, seed):
    """Words in a deterministic jumble, long enough for windows."""
    return " ".join(WORDS[(i * i + seed * i + i // 7) % len(WORDS)] for i in range(n))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A general text and a task file."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "general.txt").write_text("\n<|endoftext|>\n".join(story(260 + s, s) for s in range(12)))
    rows = [
        {"question": f"How many are {i} and {i + 2}?", "answer": f"{i} + {i + 2}\n#### {2 * i + 2}"} for i in range(30)
    ]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(tiny_llama, texts, folder, *more, bits="3.6", method="rtn"):
    """One allocation with little text."""
    arguments = ["allocate", str(tiny_llama), "--bits", bits, "--general", str(texts / "general.txt")]
    arguments += ["--tasks", str(texts / "sums.jsonl"), "--samples", "2", "--items", "8", "--calibration-samples", "4"]
    arguments += ["--window", "48", "--method", method, "--widths", "2,3,4,5", "--group-size", "32", "--refine", "8"]
    arguments += [
        "--cache",
        str(folder / "cache"),
        "--out",
        str(folder / "plan.json"),
        "--json",
        str(folder / "run.json"),
    ]
    main([*arguments, *more])
    return json.loads((folder / "plan.json").read_text()), json.loads((folder / "run.json").read_text())


def test_a_plan_from_end_to_end(tiny_llama, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "LINE_EVERY", -1.0)
    document, record = run(tiny_llama, texts, tmp_path, "--report", str(tmp_path / "page.html"))
    numbers = record["numbers"]
    assert document["bits_per_weight"] <= 3.6 + 1e-9 and numbers["bits_per_weight"] > 3.3
    widths = document["plan"]["layers"]
    assert len(widths) == document["made_for"]["layers"] == 21
    for block in range(3):
        path = f"model.layers.{block}.self_attn."
        assert len({widths[f"{path}{leaf}_proj"] for leaf in "qkv"}) == 1
    assert numbers["cost"]["share_of_naive"] <= 0.7 and numbers["cost"]["measured_now"] == 3
    assert {row["name"] for row in numbers["proof"]["rows"]} >= {"this plan", "uniform w3"}
    assert len(numbers["agreement"]) == 2 and len(numbers["front"]) > 3
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page and "Where the bits go" in page and "http://" not in page.replace("http://www.w3.org", "")
    shown = capsys.readouterr()
    assert "sensitivities: 1 of 3" in shown.err and "plans measured: 1 of " in shown.err
    assert "Kendall's tau" in shown.out and "polybit quantize" in shown.out
    assert ("NOT better" in shown.err) == (not document["better_than_uniform"])
    # another budget: nothing is measured again
    _, later = run(tiny_llama, texts, tmp_path, "--free-groups", "--pin", "*.down_proj=5", bits="4.1")
    assert later["numbers"]["cost"]["measured_now"] == 0 and later["numbers"]["front"] == []
    assert all(row["width"] == 5 for name, row in later["numbers"]["layers"].items() if "down_proj" in name)


def quantized(tiny_llama, texts, plan, folder, *more):
    """Quantize by a plan file, fast."""
    arguments = ["quantize", str(tiny_llama), "--out", str(folder / "out"), "--plan", str(plan), "--group-size", "32"]
    arguments += ["--calibration", str(texts / "general.txt"), "--samples", "4", "--window", "48", "--effort", "fast"]
    main([*arguments, "--json", str(folder / "quantize.json"), "--overwrite", *more])
    return json.loads((folder / "quantize.json").read_text())


def test_the_plan_is_quantized_as_counted(tiny_llama, texts, tmp_path):
    """Whatever the method does by itself about zero points, the plan's bits hold, unless other zeros are asked for."""
    document, _ = run(tiny_llama, texts, tmp_path)
    for more, extra in ((), 0), (("--method", "gptq"), 0), (("--method", "gptq", "--asymmetric"), 3.5 / 32):
        made = quantized(tiny_llama, texts, tmp_path / "plan.json", tmp_path, *more)
        bits = made["numbers"]["sizes"]["plan"]["bits_per_weight"]
        assert bits == pytest.approx(document["bits_per_weight"] + extra, abs=0.02 if extra else 1e-3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ((lambda d: d["plan"]["layers"].pop("model.layers.1.mlp.up_proj")), "leaves out 1 layer"),
        ((lambda d: d["plan"]["layers"].update({"model.layers.9.mlp.up_proj": "w3"})), "does not have"),
        ((lambda d: d["plan"]["layers"].update({"model.layers.1.mlp.up_proj": "w9"})), "9 bits"),
        ((lambda d: d["plan"].update(layers={"h.0.attn": "w3"})), "none of this model's layers"),
        ((lambda d: d["made_for"].update(weights=7)), "7 weights"),
        ((lambda d: d["plan"].update(layers=[])), "layers"),
    ],
)
def test_plans_spoilt_by_hand(tiny_llama, texts, tmp_path, capsys, change, sentence):
    layers = {f"model.layers.{b}.{part}_proj": "w3" for b in range(3) for part in PARTS}
    document = {"made_for": {"model": "tiny", "weights": 58752}, "plan": {"layers": layers}}
    change(document)
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(SystemExit) as error:
        quantized(tiny_llama, texts, tmp_path / "bad.json", tmp_path)
    assert error.value.code == 2 and sentence in capsys.readouterr().err


def test_interrupted_measurements_go_on(tiny_llama, texts, tmp_path):
    _, first = run(tiny_llama, texts, tmp_path)
    file = sorted((tmp_path / "cache").glob("*/block-00001.npz"))[0]
    file.unlink()
    _, second = run(tiny_llama, texts, tmp_path)
    assert second["numbers"]["cost"]["measured_now"] == 1
    assert second["numbers"]["layers"] == first["numbers"]["layers"]


def test_gradients_are_an_estimate_of_the_same(tiny_llama, texts, tmp_path):
    _, cheap = run(tiny_llama, texts, tmp_path, "--sensitivity", "gradient")
    _, exact = run(tiny_llama, texts, tmp_path)
    assert cheap["numbers"]["layers"].keys() == exact["numbers"]["layers"].keys()
    read = [{label.split(" by ")[1][:3] for label in found["numbers"]["agreement"]} for found in (cheap, exact)]
    assert read == [{"kl "}, {"kl ", "nll"}], "a gradient estimates no rise of the loss"


def test_a_loss_that_is_not_read_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        main(["allocate", "tinychat", "--bits", "3", "--sensitivity", "gradient", "--signal", "nll"])
    assert error.value.code == 2
    assert "--signal nll is not read by --sensitivity gradient, which reads kl: choose --sensitivity exact" in " ".join(
        capsys.readouterr().err.split()
    )


def test_the_mixture_is_searched_on_the_way(tiny_llama, texts, tmp_path, capsys):
    _, without = run(tiny_llama, texts, tmp_path, method="gptq")
    page = tmp_path / "page.html"
    capsys.readouterr()
    _, record = run(tiny_llama, texts, tmp_path, "--mix", "auto", "--report", str(page), method="gptq")
    found = record["numbers"]["mixture"]
    shares = found["best"]["weights"]
    assert list(shares) == [str(texts / "general.txt"), str(texts / "sums.jsonl")]
    assert found["best"]["score"] == max(point["score"] for point in found["curve"]) and len(found["curve"]) == 21
    shown = capsys.readouterr().out
    assert all(f"{name}={share:g}" in shown for name, share in shares.items() if share > 0)
    assert "Calibration mixture" in page.read_text()
    if shares[str(texts / "sums.jsonl")] > 0:  # other text, other statistics, other harms
        assert record["numbers"]["layers"] != without["numbers"]["layers"]


@pytest.mark.parametrize(
    ("flags", "method", "sentence"),
    [(["--mix", "auto"], "rtn", "--method rtn reads none"), (["--mix", "auto", "--tasks"], "gptq", "there is no task")],
)
def test_a_mixture_that_decides_nothing_is_refused(tiny_llama, texts, tmp_path, capsys, flags, method, sentence):
    arguments = ["allocate", str(tiny_llama), "--bits", "3", "--general", str(texts / "general.txt")]
    arguments += ["--method", method, "--out", str(tmp_path / "plan.json")]
    if "--tasks" not in flags:
        arguments += ["--tasks", str(texts / "sums.jsonl")]
    with pytest.raises(SystemExit) as error:
        main([*arguments, *flags[:2]])
    assert error.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("how", SIGNALS)
def test_workers_measure_the_same(how, tiny_llama, texts, tmp_path):
    _, alone = run(tiny_llama, texts, tmp_path, "--sensitivity", how)
    _, shared = run(tiny_llama, texts, tmp_path, "--sensitivity", how, "--workers", "2", "--restart")
    assert alone["numbers"]["layers"] == shared["numbers"]["layers"]


@pytest.mark.parametrize(
    ("more", "bits", "sentence"),
    [
        ((), "1.9", "below 2.667"),
        ((), "7", "above 5.667"),
        ((), "nan", "not possible"),
        (("--beta", "2"), "3.5", "--beta"),
        (("--pin", "nothing=4"), "3.5", "matches no layer"),
        (("--pin", "*q_proj=3", "*k_proj=4"), "3.5", "--free-groups"),
        (("--pin", "*q_proj=7"), "3.5", "none of the widths"),
        (("--pin", "q"), "3.5", "PATTERN=WIDTH"),
        (("--pin", "*=5"), "3.5", "budget"),
    ],
)
def test_bad_budgets_and_pins(tiny_llama, texts, tmp_path, capsys, more, bits, sentence):
    with pytest.raises(SystemExit) as error:
        run(tiny_llama, texts, tmp_path, *more, bits=bits)
    shown = capsys.readouterr().err
    assert error.value.code == 2 and sentence in shown and "Traceback" not in shown
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "no rows"),
        ('{"question": "What?"}\n', "no answer"),
        ('{"question": "What?", "answer": ""}\n', "no answer in words"),
        ('{"question": "What?", "answer": "That."}\n', "at least two"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}\n', "does not end with an answer"),
        ("{broken\n", "not JSON"),
    ],
)
def test_bad_task_files(tiny_llama, texts, tmp_path, capsys, content, sentence):
    (tmp_path / "task.jsonl").write_text(content)
    with pytest.raises(SystemExit) as error:
        run(tiny_llama, texts, tmp_path, "--tasks", str(tmp_path / "task.jsonl"))
    assert error.value.code == 2 and sentence in capsys.readouterr().err
