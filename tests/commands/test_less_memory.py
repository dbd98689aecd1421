"""Verbs under a limit of private memory below the model's size in float32, killed by kill -9 in their middle and asked
for again."""

import argparse

import pytest

from benchmarks import streamed

LIMIT = 0.75  # GB, of which half are libraries and what they keep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not streamed.LINUX, reason="only Linux limits private memory"),
]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The flags of benchmarks/streamed.py, a model that has no room, and what quantizing it was like."""
    folder = tmp_path_factory.mktemp("less")
    given = argparse.Namespace(shape="200m", limit=LIMIT, data=True, memory=0.05, method="rtn", samples=1, window=32)
    given.seed, given.after, given.folder, given.model = 0, 8.0, folder, folder / "200m"
    assert streamed.write_model(given.model, streamed.SHAPES["200m"]) * 4 > 1e9 * LIMIT
    given.quantized = streamed.killed("quantize", given.model, folder, given)
    return given


@pytest.mark.parametrize("verb", ["quantize", "export", "eval", "gradient"])
def test_a_killed_verb_goes_on_below_the_size_of_the_model(verb, given):
    found = given.quantized if verb == "quantize" else streamed.killed(verb, given.model, given.folder, given)
    assert found["went_on"]["VmData"] < LIMIT
    assert streamed.written(given.folder / streamed.VERBS[verb].writes)
