"""Property: what a run has finished comes back exactly, and never into another run."""

import errno

import pytest
import torch

from polybit.core.runtime import PolybitError
from polybit.hub.checkpoint import save
from polybit.hub.workspace import Workspace
from tests.families import quantized, rtn

PRINT = {"model": "abc", "bits": 8}


def weights():
    torch.manual_seed(3)
    return {"a.b": rtn(torch.randn(20, 40)), "a.c": rtn(torch.randn(7, 33), 4, 0, "fixed")}


def same(one, other):
    assert one.keys() == other.keys()
    for name, q in one.items():
        p = other[name]
        assert (q.bits, q.group_size, q.shape) == (p.bits, p.group_size, p.shape)
        for width in range(1, q.bits + 1):
            assert torch.equal(q.dequantize(width), p.dequantize(width))
        for key in ("codes_OI", "scale_OG", "zero", "column_scale_I"):
            assert torch.equal(getattr(q, key), getattr(p, key)), key
        assert q.ratios.keys() == p.ratios.keys()
        assert all(torch.equal(q.ratios[width], p.ratios[width]) for width in q.ratios)


def test_finished_blocks_come_back_exactly_in_the_next_run(tmp_path):
    store = Workspace(tmp_path / "out", PRINT)
    assert store.read("model.layers.0") is None
    store.write("model.layers.0", weights())
    store.close()
    again = Workspace(tmp_path / "out", PRINT)
    same(weights(), again.read("model.layers.0"))
    assert again.read("model.layers.1") is None
    again.discard()
    assert not list(tmp_path.iterdir()), "nothing is left, not even the lock"


def test_a_state_comes_back_until_its_block_is_finished(tmp_path, monkeypatch, capsys):
    store = Workspace(tmp_path / "out", PRINT)
    state = {"step": torch.tensor(7), "0.value": torch.randn(5, 3)}
    assert store.state("finish").read() is None
    store.state("finish").write(state)
    assert not store.places(), "a state is no part of the checkpoint"
    found = Workspace.state(store, "finish").read()
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    with monkeypatch.context() as patched:
        patched.setattr("polybit.hub.tensors.write_pieces", full)
        store.state("finish").write({"step": torch.tensor(8)})
    assert "progress was not kept" in capsys.readouterr().err and int(store.state("finish").read()["step"]) == 7
    store.state("finish").path.write_bytes(b"{")
    with pytest.raises(PolybitError, match="--restart"):
        store.state("finish").read()
    store.write("finish", weights())
    assert store.state("finish").read() is None
    store.discard()


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_names_that_no_file_system_can_spell_stay_apart(tmp_path):
    store = Workspace(tmp_path / "out", PRINT)
    store.write("a/b", {"x": weights()["a.b"]})
    assert store.read("a_b") is None and store.read("a/b") is not None
    store.discard()


@pytest.mark.parametrize("other", [{"model": "abd", "bits": 8}, {"model": "abc"}, {**PRINT, "seed": 1}])
def test_work_of_another_run_is_refused_and_kept(tmp_path, other):
    store = Workspace(tmp_path / "out", PRINT)
    store.write("b", weights())
    store.close()
    with pytest.raises(PolybitError, match="--restart"):
        Workspace(tmp_path / "out", other)
    same(weights(), Workspace(tmp_path / "out", PRINT).read("b"))


def test_restart_forgets(tmp_path):
    store = Workspace(tmp_path / "out", PRINT)
    store.write("b", weights())
    store.close()
    store = Workspace(tmp_path / "out", {"model": "other"}, restart=True)
    assert store.read("b") is None
    store.discard()


def test_directory_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(PolybitError, match="in the way"):
        Workspace(tmp_path / "out", PRINT)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


def test_cut_block_is_named(tmp_path):
    store = Workspace(tmp_path / "out", PRINT)
    store.write("b", weights())
    path = store.file("b")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(PolybitError, match=path.name):
        store.read("b")
    store.close()


def test_the_run_may_save_into_the_output_it_holds(tmp_path):
    store = Workspace(tmp_path / "out", PRINT)
    save(quantized("llama"), tmp_path / "out")
    assert (tmp_path / ".out.lock").exists()
    store.discard()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
