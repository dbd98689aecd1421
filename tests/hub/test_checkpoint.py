"""Round trips through the file and through plain transformers; crashes, full disks and locks while saving."""

import json
import os
import resource
import shutil
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from polybit.core.plan import ColumnWidths, Plan
from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError
from polybit.hub import checkpoint, directory, tiny
from polybit.hub.checkpoint import describe, save, validate, verify
from polybit.hub.directory import absolute, exchange, files_of, output_lock, publish, replaced, restore, staging
from polybit.hub.load import load, load_tokenizer
from polybit.nn.linear import QuantLinear
from polybit.nn.switch import set_presets, use
from tests.families import quantized


def test_file_holds_every_tensor_of_the_model_once(tmp_path):
    model = quantized("llama-tied", include_embeddings=True)
    path = save(model, tmp_path / "out")
    stored = load_file(path / "polybit.safetensors")
    assert stored.keys() == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.named_parameters())
    assert verify(path, model).layers == describe(model).layers


def test_tied_float_head_is_stored_once(tmp_path):
    stored = load_file(save(quantized("llama-tied"), tmp_path / "out") / "polybit.safetensors")
    assert "model.embed_tokens.weight" in stored and "lm_head.weight" not in stored


def test_description_round_trip_with_presets(tmp_path):
    model = quantized("llama")
    name = "model.layers.0.mlp.up_proj"
    presets = {"A": Plan.uniform("w8a8"), "C": Plan(Precision(w=3, a=4), {name: Precision(w=8)})}
    set_presets(model, presets)
    found = validate(save(model, tmp_path / "out", widths=(2, 8, 4), notes={"method": "rtn"}))
    assert found.widths == (8, 4, 2) and found.presets == presets and found.notes == {"method": "rtn"}
    assert found.layers == {n: m.fields for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert set(found.kinds.values()) == {"linear"}


def test_ragged_weights_and_column_widths(tmp_path):
    """Fewer bytes in the file, the same numbers after loading, the plan's columns with it."""
    model, even = quantized("llama", ragged=True), quantized("llama")
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, QuantLinear) and m.fields.bits_G)
    offsets = tuple(-(g % 2) for g in range(layer.fields.groups))
    presets = {"mixed": Plan(Precision(w=5), {}, {name: ColumnWidths(layer.fields.group_size, offsets)})}
    set_presets(model, presets)
    path = save(model, tmp_path / "out", widths=(8, 5))
    whole = save(even, tmp_path / "even", widths=(8, 5))
    saved = sum(m.qplanes.numel() for m in even.modules() if isinstance(m, QuantLinear)) - sum(
        m.qplanes.numel() for m in model.modules() if isinstance(m, QuantLinear)
    )
    sizes = [(directory / "polybit.safetensors").stat().st_size for directory in (whole, path)]
    assert saved > 5000 and abs(sizes[0] - sizes[1] - saved) < 100
    assert verify(path, model).presets == presets
    again = load(path)[0]
    for precision in ("float", "w3", "mixed"):
        use(model, precision)
        use(again, precision)
        for n, module in model.named_modules():
            if isinstance(module, QuantLinear):
                assert torch.equal(again.get_submodule(n).decode(), module.decode()), (precision, n)
    assert again.get_submodule(name).reading == tuple(5 + v for v in offsets)


def test_shards_are_cut_and_read_back(tmp_path):
    model = quantized("llama")
    path = save(model, tmp_path / "out", shard_bytes=40_000)
    shards = sorted(path.glob("polybit-*-of-*.safetensors"))
    assert len(shards) > 2 and not (path / "polybit.safetensors").exists()
    assert sum(len(load_file(shard)) for shard in shards) == len(dict(model.named_parameters()))
    verify(path, model)


def test_further_files_are_listed_and_the_card_is_free_to_change(tmp_path):
    path = save(quantized("llama"), tmp_path / "out", files={"README.md": "# card", "plan.json": "{}"})
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert "plan.json" in listed and "README.md" not in listed
    (path / "README.md").write_text("# measured since")
    validate(path)
    with pytest.raises(PolybitError, match="plain name"):
        save(quantized("llama"), tmp_path / "other", files={"../evil": ""})
    assert not (tmp_path / "other").exists()


def test_files_have_the_mode_the_user_asked_for(tmp_path):
    path = save(quantized("llama"), tmp_path / "out")
    (tmp_path / "plain").write_text("")
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_saving_is_deterministic(tmp_path):
    one = save(quantized("llama"), tmp_path / "one")
    two = save(quantized("llama"), tmp_path / "two")
    assert (one / "manifest.json").read_text() == (two / "manifest.json").read_text()


def test_not_finite_weights_are_not_saved(tmp_path):
    model = quantized("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.nan
    with pytest.raises(PolybitError, match=r"layers\.1\.input_layernorm\.weight holds NaN"):
        save(model, tmp_path / "out")
    model = quantized("llama")
    model.model.layers[0].mlp.up_proj.scale.view(torch.float16)[0, 0, 0] = torch.inf
    with pytest.raises(PolybitError, match=r"up_proj\.scale holds NaN"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_verify_finds_a_difference(tmp_path):
    model = quantized("llama")
    path = save(model, tmp_path / "out")
    model.model.layers[0].mlp.up_proj.qplanes[0, 0, 0, 0] ^= 1
    with pytest.raises(PolybitError, match="up_proj"):
        verify(path, model)


def test_existing_output_needs_overwrite(tmp_path):
    save(quantized("llama"), tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_text()
    with pytest.raises(PolybitError, match="exists already"):
        save(quantized("gpt2"), tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_text() == before
    save(quantized("gpt2"), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "manifest.json").read_text() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_somebody_elses_directory_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(PolybitError, match="no polybit checkpoint"):
        save(quantized("llama"), tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "mine"


def test_paths_that_cannot_be_written(tmp_path):
    model = quantized("llama")
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("file", "file/below", "loop", "n" * 300, "/proc/none"):
        with pytest.raises(PolybitError, match="choose"):
            save(model, tmp_path / path)


def test_what_reads_back_otherwise_never_takes_the_name(tmp_path, monkeypatch):
    model = quantized("llama")
    path = save(model, tmp_path / "out", verified=True)
    before = (path / directory.MANIFEST).read_bytes()
    monkeypatch.setattr(checkpoint, "same_pieces", lambda *_: False)
    with pytest.raises(PolybitError, match="disk may be failing"):
        save(model, tmp_path / "out", notes={"x": 1}, verified=True, overwrite=True)
    assert (path / directory.MANIFEST).read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_odd_but_legal_paths_work(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "a b@c", "ünï/深/out"):
        validate(save(quantized("llama"), tmp_path / name))


def test_read_only_parent(tmp_path, monkeypatch):
    monkeypatch.setattr(directory.os, "access", lambda *_: False)
    with pytest.raises(PolybitError, match="read-only"):
        save(quantized("llama"), tmp_path / "out")


def test_lock_is_held_against_other_processes_only(tmp_path):
    def work():
        directory.HELD.clear()  # as in a process of its own
        try:
            with output_lock(tmp_path / "out"):
                return "free"
        except PolybitError as error:
            return str(error)

    def told():
        child, pipe = in_child(work)
        os.waitpid(child, 0)
        return json.loads(os.read(pipe, 1000))

    with output_lock(tmp_path / "out"), output_lock(tmp_path / "out"):
        assert "another process is writing" in told()
    assert told() == "free" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("swaps", [True, False])
def test_publish_replaces_in_one_step_where_the_system_can(tmp_path, monkeypatch, swaps):
    out, stage = tmp_path / "out", staging(tmp_path / "out")
    for path, text in ((out, "old"), (stage, "new")):
        path.mkdir()
        (path / "x").write_text(text)
    if swaps:
        assert exchange(out, stage) and (out / "x").read_text() == "new"
        assert exchange(out, stage) and (out / "x").read_text() == "old"
    else:
        monkeypatch.setattr(directory, "exchange", lambda *_: False)
    publish(stage, out)
    assert (out / "x").read_text() == "new"


def test_interrupted_swap_in_two_steps_is_repaired(tmp_path):
    out = save(quantized("llama"), tmp_path / "out")
    out.rename(replaced(out))
    restore(out)
    validate(out)


def in_child(work) -> tuple[int, int]:
    """Run `work` in a forked child; (its process id, a pipe that carries what it returned)."""
    readable, writable = os.pipe()
    child = os.fork()
    if child:
        os.close(writable)
        return child, readable
    try:
        os.write(writable, json.dumps(work()).encode())
    finally:
        os._exit(0)


def test_full_disk_is_one_sentence_and_leaves_the_old_artefact(tmp_path):
    """RLIMIT_FSIZE stops every write past a size, as a full disk does, at one file after the other."""
    out = save(quantized("llama"), tmp_path / "out")
    before = (out / "manifest.json").read_text()
    model = quantized("gpt2")
    model.config.filler = "x" * 70_000

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        said = []
        for limit in (100, 5_000, 60_000, 150_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                save(model, out, overwrite=True)
                said.append("saved")
            except PolybitError as error:
                said.append(str(error))
        return said

    child, pipe = in_child(work)
    os.waitpid(child, 0)
    said = json.loads(os.read(pipe, 100_000))
    assert len(said) == 4 and all("full" in line and "free some space" in line for line in said), said
    assert (out / "manifest.json").read_text() == before
    validate(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_full_disk_at_every_file_those_of_the_tokenizer_too(tmp_path):
    """Each file in turn is the first that no longer fits; tokenizers raise errors of a kind of their own."""
    model, tokenizer = quantized("llama"), load_tokenizer(str(tiny.path()))
    tokenizer.chat_template = {"default": "x" * 30_000, "tool_use": "y" * 40_000}
    out = save(model, tmp_path / "out", tokenizer=tokenizer)
    sizes = {name: path.stat().st_size for name, path in files_of(out).items()}
    assert {"tokenizer.json", "additional_chat_templates/tool_use.jinja"} <= set(sizes)
    assert load_tokenizer(str(out)).chat_template == tokenizer.chat_template and validate(out)

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        said = []
        for size in sizes.values():
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, resource.RLIM_INFINITY))
            try:
                save(model, out, tokenizer=tokenizer, overwrite=True)
                said.append("saved")
            except PolybitError as error:
                said.append(str(error))
        return said

    child, pipe = in_child(work)
    os.waitpid(child, 0)
    said = json.loads(os.read(pipe, 100_000))
    assert len(said) == len(sizes) and all("full" in line for line in said), said
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and validate(out)


CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.symlink")


def killed_at(count, work):
    """Fork a child that kills itself with -9 right before its `count`-th change of the file system; True if it was."""

    def in_the_child():
        seen = [0]

        def watch(event, arguments):
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            change = bool(writes) or event in CHANGES
            seen[0] += change
            if change and seen[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        work()

    child, pipe = in_child(in_the_child)
    os.close(pipe)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("swaps", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_before_any_change_of_the_disk_leaves_the_old_artefact_or_the_new(swaps, tmp_path, monkeypatch):
    """kill -9 before every file operation of a save, with and without a swap in one step; the next save cleans up."""
    if not swaps:
        monkeypatch.setattr(directory, "exchange", lambda *_: False)
    old, new = quantized("llama"), quantized("gpt2")
    out = save(old, tmp_path / "out")
    wholes = {(out / "manifest.json").read_text(), (save(new, tmp_path / "new") / "manifest.json").read_text()}
    shutil.rmtree(tmp_path / "new")
    count, found = 1, set()
    while killed_at(count, lambda: save(new, out, overwrite=True)):
        validate(out)
        found.add((out / "manifest.json").read_text())
        save(old, out, overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        count += 1
    assert count > 10 and found == wholes


def test_killed_at_random_moments_leaves_a_whole_artefact(tmp_path):
    """The same by the clock, which also falls inside a single write."""
    models = [quantized("gpt2"), quantized("llama")]
    out = save(models[1], tmp_path / "out")

    def work():
        for n in range(10_000):
            save(models[n % 2], out, overwrite=True)

    for n in range(6):
        child, pipe = in_child(work)
        time.sleep(0.003 + 0.0171 * n)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(pipe)
        validate(out)
    save(models[1], out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failure_at_every_step_of_saving_leaves_the_old_artefact(tmp_path, monkeypatch):
    """The slow twin of the kill test: each step of the save fails once."""
    out = save(quantized("llama"), tmp_path / "out")
    before = (out / "manifest.json").read_text()
    other = quantized("gpt2")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    for step in ("write_manifest", "fsync_tree", "publish"):
        with monkeypatch.context() as patched:
            patched.setattr(directory, step, fail)
            with pytest.raises(PolybitError, match="full"):
                save(other, out, overwrite=True)
        assert (out / "manifest.json").read_text() == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    validate(out)


def test_absolute_follows_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert absolute(tmp_path / "link") == (tmp_path / "real").resolve()
