"""`polybit pairs` and `polybit align` end to end on a tiny model: files, resume, processes, one-sentence errors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import polybit
from polybit.cli import main
from polybit.commands.pairs import next_step
from polybit.core.planes import unpack
from polybit.hub.checkpoint import describe
from polybit.hub.lm import LocalLM
from polybit.hub.load import load
from polybit.hub.models import open_model
from polybit.nn.switch import panel, presets, use
from polybit.train import answering
from polybit.train.chain import Chain
from polybit.train.pairs import read_pairs
from tests.hub.endpoint import serve

QUICK = ["--group-size", "16", "--max-tokens", "8"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Twenty prompts, one of them empty, one twice, one too long."""
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    texts = [f"Tell me about number {n}." for n in range(18)]
    rows = [{"prompt": text} for text in [*texts, texts[0], " ", "word " * 400]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(model, prompts, out, *more):
    main(["pairs", str(model), "--prompts", str(prompts), "--precision", "w2", "--out", str(out), *QUICK, *more])


@pytest.fixture(scope="module")
def made(tiny_llama, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "pairs"
    make(tiny_llama, prompts, out, "--shard", "5")
    return out


def aligned(model, pairs, out, *more):
    flags = ["--pairs", str(pairs), "--out", str(out), "--steps", "4", "--batch", "4", "--probes", "2"]
    main(["align", str(model), *flags, "--group-size", "16", "--json", f"{out}.json", *more])
    return json.loads(Path(f"{out}.json").read_text())["numbers"]


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_pairs_are_counted_and_whole(made):
    numbers = json.loads((made / "pairs.json").read_text())
    found = read_pairs(made)
    assert numbers["prompts"] == len(found) == 18
    assert (numbers["empty"], numbers["duplicate"], numbers["too_long"]) == (1, 1, 1)
    assert numbers["pairs"] + numbers["identical"] == 18 and numbers["pairs"] > 0
    assert len(list(made.glob("shard-*.jsonl"))) == 4 == len(list(made.glob("scores-*.safetensors")))
    assert not made.with_name("pairs.partial").exists()


def test_float_answers_of_an_endpoint_are_those_of_the_model(tmp_path):
    pytest.importorskip("openai")
    lm, asked = LocalLM(*open_model("tinychat")), tmp_path / "asked.txt"
    asked.write_text("How are you?\nWhat is 3 plus 4?\nTell me a story.\nWho are you?\n")

    def rule(ids):
        (said,) = lm.generate_tokens([ids], max_tokens=8)
        ended = "stop" if said[-1] in lm.end_tokens() else "length"
        choice = {"index": 0, "finish_reason": ended, "text": lm.decode(said, after=ids)}
        return {"id": "1", "object": "text_completion", "choices": [choice]}

    make("tinychat", asked, tmp_path / "here", "--shard", "3")
    with serve(rule) as server:
        make("tinychat", asked, tmp_path / "there", "--shard", "3", "--endpoint", server.url)
    assert len(server.asked) == 4 and read_pairs(tmp_path / "there") == read_pairs(tmp_path / "here")
    names = sorted(path.name for path in (tmp_path / "there").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "here").iterdir())
    assert json.loads((tmp_path / "there" / "pairs.json").read_text())["writer"] == "tinychat"


def test_interrupted_pairs_go_on_and_end_the_same(tiny_llama, prompts, made, tmp_path, monkeypatch):
    plain, seen = answering.PairMaker.__call__, []

    def interrupt(self, task):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(task[0])
        return plain(self, task)

    monkeypatch.setattr(answering.PairMaker, "__call__", interrupt)
    with pytest.raises(SystemExit):
        make(tiny_llama, prompts, tmp_path / "out", "--shard", "5")
    assert not (tmp_path / "out").exists()
    seen.clear()
    monkeypatch.setattr(
        answering.PairMaker, "__call__", lambda self, task: (seen.append(task[0]), plain(self, task))[1]
    )
    make(tiny_llama, prompts, tmp_path / "out", "--shard", "5")
    assert seen == [2, 3]
    for path in made.glob("shard-*.jsonl"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_float_answers_alone_teach_the_same(tiny_llama, prompts, made, tmp_path, capsys):
    asked = tmp_path / "floats"
    make(tiny_llama, prompts, asked, "--shard", "5", "--float-only")
    assert "float answers of" in capsys.readouterr().out
    assert [pair.chosen for pair in read_pairs(asked)] == [pair.chosen for pair in read_pairs(made)]
    found = [aligned(tiny_llama, pairs, tmp_path / name) for name, pairs in (("a", made), ("b", asked))]
    assert found[0]["presets"] == found[1]["presets"] and found[0]["history"] == found[1]["history"]
    refreshed = ["--method", "qdpo", "--refresh-every", "2"]
    found = [aligned(tiny_llama, pairs, tmp_path / name, *refreshed) for name, pairs in (("c", made), ("d", asked))]
    assert found[0]["presets"] == found[1]["presets"] and found[0]["history"] == found[1]["history"]
    static = ["--method", "qdpo", "--refresh-every", "0", "--group-size", "16", "--steps", "2", "--batch", "4"]
    said = refused(capsys, "align", tiny_llama, "--pairs", asked, "--out", tmp_path / "e", *static)
    assert "--float-only" in said and "--refresh-every" in said


@pytest.mark.slow
def test_several_processes_make_the_same_pairs(tiny_llama, prompts, made, tmp_path):
    make(tiny_llama, prompts, tmp_path / "out", "--shard", "5", "--workers", "2")
    for path in made.glob("shard-*.jsonl"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_an_aligned_checkpoint_is_a_plain_one(tiny_llama, made, tmp_path):
    """Same tensors, same shapes, same bytes as a checkpoint that was rounded and never trained."""
    numbers = aligned(tiny_llama, made, tmp_path / "out", "--learning-rate", "1e-3")
    row = numbers["presets"]["w2"]
    assert row["after"]["kl"] <= row["before"]["kl"] and row["after"]["flips"] <= row["before"]["flips"]
    model, tokenizer = load(tmp_path / "out")
    assert tokenizer is not None
    rounded = answering.quantized_of(answering.AskedModels(str(tiny_llama), None, "w2", 16))
    layers = [{name: replace(f, gain=1.0) for name, f in describe(m).layers.items()} for m in (model, rounded)]
    assert layers[0] == layers[1]  # but for one number a layer that the scales are multiplied by
    ours, theirs = ({n: (t.shape, t.dtype) for n, t in m.named_parameters()} for m in (model, rounded))
    assert ours == theirs
    assert bool(torch.isfinite(model(input_ids=torch.arange(5, 15)[None]).logits).all())


def test_ends_with_a_width_of_their_own_stay_as_they_are(tiny_llama, prompts, tmp_path, capsys):
    """As a real model's checkpoint has them by default; training sees the numbers that are read."""
    start = tmp_path / "start"
    polybit.quantize(str(tiny_llama), out=start, widths="4,2", method="nested", ends=8, measure=False, group_size=16,
                     samples=4, window=16)  # fmt: skip
    make(start, prompts, tmp_path / "pairs")
    numbers = aligned(start, tmp_path / "pairs", tmp_path / "out", "--precision", "w2", "--learning-rate", "1e-2")
    (before, _), (after, _) = load(start), load(tmp_path / "out")
    ends = [dict(model.named_modules())["model.embed_tokens"] for model in (before, after)]
    assert all(
        torch.equal(a, b) for a, b in zip(ends[0].state_dict().values(), ends[1].state_dict().values(), strict=True)
    )
    for width in (4, 2):
        use(after, f"w{width}")
        layers = panel(after).layers
        assert {layers[name].width for name in layers} == {8, width} and layers["model.embed_tokens"].width == 8
    moved = ["model.layers.0.mlp.up_proj" in name and not torch.equal(t, dict(before.state_dict())[name])
             for name, t in after.state_dict().items()]  # fmt: skip
    assert any(moved) and numbers["presets"]["w2"]["after"]["kl"] < numbers["presets"]["w2"]["before"]["kl"]
    every = tmp_path / "every"
    polybit.quantize(str(tiny_llama), out=every, bits=4, method="rtn", include_embeddings=True, measure=False)
    said = refused(capsys, "align", every, "--pairs", tmp_path / "pairs", "--out", tmp_path / "no")
    assert "model.embed_tokens" in said and "--include-embeddings" in said


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd-own", "flip", "qdpo", "qdpo+kd", "kd-then-qdpo"])
def test_every_method_runs(tiny_llama, made, tmp_path, method):
    numbers = aligned(tiny_llama, made, tmp_path / "out", "--method", method)
    assert "kept" in numbers and (tmp_path / "out" / "config.json").is_file()


def test_one_run_for_several_widths(tiny_llama, made, tmp_path):
    numbers = aligned(tiny_llama, made, tmp_path / "out", "--precision", "w4,w2")
    assert set(numbers["presets"]) == {"w4", "w2"}
    model, _ = load(tmp_path / "out")
    assert {layer.bits for layer in describe(model).layers.values()} == {4}


def test_the_library_in_three_lines(tiny_llama, prompts, made, tmp_path):
    """Text serves for paths, options are keywords, and what comes back has the numbers of the command line."""
    told = {"precision": "w2", "group_size": 16, "max_tokens": 8, "shard": 5}
    asked = polybit.pairs(tiny_llama, prompts=str(prompts), out=f"{tmp_path}/pairs", **told)
    run = polybit.align(
        tiny_llama, pairs=f"{tmp_path}/pairs", out=f"{tmp_path}/out", group_size=16, steps=4, batch=4, probes=2
    )
    assert asked.numbers["pairs"] == json.loads((made / "pairs.json").read_text())["pairs"]
    flags = aligned(tiny_llama, made, tmp_path / "flags")
    assert run.numbers["presets"] == flags["presets"] and run.verb == "align"
    with pytest.raises(TypeError, match="stepz"):
        polybit.align(tiny_llama, out="o", stepz=1)


@pytest.fixture(scope="module")
def nested(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("nested") / "nested"
    flags = ["--widths", "8,4,3,2", "--group-size", "16", "--effort", "fast", "--no-measure", "--samples", "4"]
    main(["quantize", str(tiny_llama), "--out", str(out), *flags, "--window", "32"])
    return out


def codes(path):
    return {name: unpack(layer.planes).codes_OI for name, layer in panel(load(path)[0]).layers.items()}


def test_other_widths_of_a_nested_file_are_kept(nested, made, tmp_path, capsys):
    flags = ["--precision", "w2", "--learning-rate", "2e-3", "--keep-within", "1", "--held-out", "4"]
    numbers = aligned(nested, made, tmp_path / "out", *flags)
    assert set(numbers["presets"]) == {"w8", "w4", "w3", "w2"} and "the start is kept" not in numbers["kept"]
    before, after = codes(nested), codes(tmp_path / "out")
    moved = {name: (before[name] >> 6) != (after[name] >> 6) for name in before}
    assert any(bool(m.any()) for m in moved.values()) and not all(bool(m.all()) for m in moved.values())
    for name in before:  # what 2 bits left in its cell stays near: only the settling may move it, inside the cell
        assert int((before[name].int() - after[name].int())[~moved[name]].abs().max()) < 64
    kept = aligned(nested, made, tmp_path / "kept", *flags[:4], "--keep-within", "0")
    assert kept["presets"]["w8"]["after"]["kl"] <= 1.05 * kept["presets"]["w8"]["before"]["kl"]
    assert "does not hold w5" in refused(
        capsys, "align", nested, "--pairs", made, "--precision", "w5", "--out", tmp_path / "five"
    )


def test_a_nested_file_aligns_its_narrow_widths_by_default(nested, made, tmp_path):
    numbers = aligned(nested, made, tmp_path / "out")
    assert list(numbers["presets"]) == ["w4", "w3", "w2", "w8"]  # trained ones, then those that were kept
    shared = aligned(nested, made, tmp_path / "shared", "--latents", "shared")
    assert set(shared["presets"]) == {"w4", "w3", "w2"}


BY_LAYER = {
    "default": "w2", "layers": {"model.layers.0.self_attn.q_proj": "w4", "model.layers.1.mlp.down_proj": "w3"},
}  # fmt: skip
INSIDE = {"default": "w3", "columns": {"model.layers.0.mlp.up_proj": {"block": 32, "offsets": [0, -1]}}}


@pytest.mark.parametrize(("ends", "plan", "widths"), [("16", BY_LAYER, {4, 3, 2}), ("8", INSIDE, {8, 3})])
def test_a_file_made_by_a_plan_is_aligned_at_its_plan(ends, plan, widths, tiny_llama, made, tmp_path, capsys):
    """Every layer at its own width, blocks of columns at theirs; the ends, where they have codes, keep theirs."""
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    size = "32" if "columns" in plan else "16"
    flags = ["--plan", str(tmp_path / "plan.json"), "--group-size", size, "--ends", ends, "--no-measure"]
    main(["quantize", str(tiny_llama), "--out", str(tmp_path / "q"), "--method", "rtn", *flags])
    more = ["--precision", "plan", "--learning-rate", "2e-3", "--held-out", "4"]
    numbers = aligned(tmp_path / "q", made, tmp_path / "out", *more)
    assert list(numbers["presets"]) == ["plan"]
    assert numbers["presets"]["plan"]["after"]["kl"] <= numbers["presets"]["plan"]["before"]["kl"]
    before, after = (load(path)[0] for path in (tmp_path / "q", tmp_path / "out"))
    assert list(presets(before)) == list(presets(after)) == ["plan"]
    read = [{name: layer.width for name, layer in panel(use(m, "plan")).layers.items()} for m in (before, after)]
    assert read[0] == read[1] and set(read[0].values()) == widths
    inside = [{n: layer.planes.bits_G for n, layer in panel(m).layers.items()} for m in (before, after)]
    assert inside[0] == inside[1] and any(inside[0].values()) == ("columns" in plan)
    assert "does not hold w3" in refused(
        capsys, "align", tmp_path / "q", "--pairs", made, "--precision", "w3", "--out", tmp_path / "three"
    )


def test_the_plan_of_a_nested_file_is_kept(tiny_llama, made, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"default": "w3", "layers": {"model.layers.1.mlp.up_proj": "w4"}}))
    flags = ["--plan", str(tmp_path / "plan.json"), "--widths", "4,3", "--method", "nested", "--group-size", "16"]
    more = ["--ends", "8", "--samples", "4", "--window", "32", "--no-measure"]
    main(["quantize", str(tiny_llama), "--out", str(tmp_path / "q"), *flags, *more])
    aligned(tmp_path / "q", made, tmp_path / "out")
    model = load(tmp_path / "out")[0]
    read = {name: layer.width for name, layer in panel(use(model, "plan")).layers.items()}
    assert read["model.layers.1.mlp.up_proj"] == 4 and set(read.values()) == {8, 4, 3}


def test_settling_that_does_harm_is_undone(nested, made, tmp_path, monkeypatch):
    flags = ["--precision", "w2", "--learning-rate", "2e-3", "--keep-within", "1", "--held-out", "4"]

    def spoil(code, weight_OI, stats, widths):
        code.start_OI = 255 - code.start_OI
        code.forget()

    monkeypatch.setattr(Chain, "settle", lambda *_: None)
    plain = aligned(nested, made, tmp_path / "plain", *flags)
    monkeypatch.setattr(Chain, "settle", spoil)
    aligned(nested, made, tmp_path / "spoiled", *flags)
    assert "the start is kept" not in plain["kept"]
    one, other = codes(tmp_path / "plain"), codes(tmp_path / "spoiled")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_scales_all_widths_share_are_not_trained_for_one(nested, made, tmp_path, capsys):
    said = refused(capsys, "align", nested, "--pairs", made, "--scales", "learned", "--out", tmp_path / "out")
    assert "--latents shared" in said and not (tmp_path / "out").exists()


def test_scores_of_another_model_are_refused(broken_llama, made, tmp_path, capsys):
    other = broken_llama(lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    said = refused(capsys, "align", other, "--pairs", made, "--group-size", "16", "--out", tmp_path / "out")
    assert "another reference" in said and not (tmp_path / "out").exists()


def test_prompts_are_answered_first_and_again_when_they_change(tiny_llama, prompts, tmp_path):
    lines = prompts.read_text().splitlines(keepends=True)
    for count in (12, 16):
        (tmp_path / "p.jsonl").write_text("".join(lines[:count]))
        flags = ["--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out"), "--overwrite", *QUICK]
        more = ["--precision", "w2", "--steps", "2", "--batch", "4", "--probes", "1", "--held-out", "2"]
        main(["align", str(tiny_llama), *flags, *more])
        assert len(read_pairs(tmp_path / "out.pairs")) == count


@pytest.mark.parametrize(
    "flags, fault",
    [
        (["--out", "o"], "give --pairs DIR"),
        (["--pairs", "nowhere", "--out", "o"], "holds no finished pairs"),
        (["--pairs", "x", "--out", "o", "--batch", "6", "--accumulate", "4"], "does not divide"),
        (["--pairs", "x", "--out", "o", "--precision", "w4a8"], "cannot be aligned"),
        (["--pairs", "x", "--out", "o", "--shared-prefix"], "belongs to --method qdpo"),
        (["--pairs", "x", "--out", "o", "--steps", "0"], "--steps 0"),
    ],
)
def test_alignments_that_cannot_be_meant(tiny_llama, tmp_path, monkeypatch, capsys, flags, fault):
    monkeypatch.chdir(tmp_path)
    assert fault in refused(capsys, "align", tiny_llama, *flags)


@pytest.mark.parametrize(
    "text, flags, fault",
    [
        ("", [], "is empty"),
        ("a\n", ["--precision", "float"], "leaves the weights in float"),
        ("a\n", ["--max-tokens", "500"], "leaves no room"),
        ("a\n", ["--workers", "0"], "--workers 0"),
        ("a\n", ["--reference", "x"], "is itself a float model"),
    ],
)
def test_pairs_that_cannot_be_meant(tiny_llama, tmp_path, capsys, text, flags, fault):
    (tmp_path / "p.txt").write_text(text)
    assert fault in refused(
        capsys, "pairs", tiny_llama, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "o", *flags
    )


def test_no_pairs_are_said_with_a_remedy(tmp_path):
    said = next_step("m", tmp_path / "o", {"pairs": 0, "precision": "w8"})
    assert "All answers are the same at w8" in said and "lower precision" in said
    assert "polybit align m --pairs" in next_step("m", tmp_path / "o", {"pairs": 3, "precision": "w8"})
