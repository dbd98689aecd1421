"""A text the model writes itself: only what is read is written, and held-out windows do not depend on the rest."""

import pytest

import polybit
from polybit.compress import text

HELD_OUT = text.HELD_OUT


@pytest.fixture
def written(monkeypatch):
    """(kind, windows) of every text that is written."""
    found, write = {}, text.self_text

    def noting(model, start, *, kind, **options):
        found[kind] = write(model, start, kind=kind, **options)
        return found[kind]

    monkeypatch.setattr(text, "self_text", noting)
    return found


@pytest.mark.parametrize(
    ("method", "measure", "wanted"),
    [("rtn", True, (0, HELD_OUT)), ("gptq", True, (3, HELD_OUT)), ("gptq", False, (3, 0)), ("rtn", False, None)],
)
def test_only_what_is_read_is_written(tiny_llama, tmp_path, written, method, measure, wanted):
    polybit.quantize(str(tiny_llama), out=tmp_path / "q", bits=4, method=method, measure=measure, samples=3, window=8)
    assert wanted == (tuple(len(written[kind]) for kind in ("calibration", "held-out")) if written else None)


def test_all_methods_are_measured_on_the_same_windows(tiny_llama, tmp_path, written):
    held = []
    for method, samples in (("rtn", 3), ("gptq", 3), ("gptq", 5)):
        polybit.quantize(
            str(tiny_llama), out=tmp_path / f"{method}{samples}", bits=4, method=method, samples=samples, window=8
        )
        held.append(written["held-out"])
        assert not any((row == held[-1]).all(-1).any() for row in written["calibration"])
    assert all((other == held[0]).all() for other in held)
