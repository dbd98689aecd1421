"""`polybit route` from end to end: measured, judged, kept, and asked by the server; refusals."""

import json

import pytest

from polybit.acts import route
from polybit.cli import main
from polybit.options.route import RouteOptions
from polybit.serve.loading import load_service
from polybit.serve.service import Precise
from polybit.serve.signals import FirstBlocks


@pytest.fixture(scope="module")
def nested(tmp_path_factory, tiny_llama):
    out = tmp_path_factory.mktemp("route") / "nested"
    main(["quantize", str(tiny_llama), "--out", str(out), "--widths", "8,4,2", "--effort", "fast", "--samples", "8",
          "--window", "32", "--no-measure"])  # fmt: skip
    return out


def prompts(path, count=40):
    path.write_text("\n".join(f"question {i} about {'x' * (i % 7)} {i * i}" for i in range(count)) + "\n")
    return str(path)


def test_a_router_is_kept_and_answers_auto(nested, tiny_llama, tmp_path, capsys):
    record, page = tmp_path / "route.json", tmp_path / "route.html"
    main(["route", str(nested), "--reference", str(tiny_llama), "--prompts", prompts(tmp_path / "p.txt"), "--budget",
          "4", "--max-tokens", "4", "--json", str(record), "--page", str(page)])  # fmt: skip
    said = capsys.readouterr().out
    assert "always w8" in said and "oracle" in said and "router.json" in said
    numbers = json.loads(record.read_text())["numbers"]
    assert numbers["at_budget"]["bits"] <= 4.6 and numbers["area"]["low"] <= numbers["area"]["high"]
    assert "<svg" in page.read_text() and "http://" not in page.read_text().replace("http://www.w3.org", "")
    gate = numbers["gates"]["w2:w8"]
    assert 0 <= gate["removed"]["low"] <= gate["removed"]["value"] <= 1 and gate["frontier"][-1]["removed"] == 1.0
    assert f"Gate w2 at w8: leads under {gate['margin']:.2g} nats" in said
    service = load_service(str(nested), slots=1, context=32)
    try:
        assert service.policy.needs is not None
        assert service.policy.choose((1, 2, 3), 0.0).by == "router"
        read_as = service.chosen(f"{service.name}@w2", Precise(gate="w8"), (1, 2, 3))
        assert read_as.decoding.margin == pytest.approx(gate["margin"])
    finally:
        service.engine.close()


def test_a_dry_run_leaves_the_checkpoint_alone(nested, tiny_llama, tmp_path):
    (nested / "router.json").unlink(missing_ok=True)
    main(["route", str(nested), "--reference", str(tiny_llama), "--prompts", prompts(tmp_path / "p.txt"), "--dry-run",
          "--max-tokens", "2"])  # fmt: skip
    assert not (nested / "router.json").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--budget", "9"], "--budget 9"),
        (["--limit", "3"], "--limit 3"),
        (["--precision", "w8"], "two widths"),
        (["--precision", "w5,w4"], "w5 is not stored"),
        (["--budget", "1.5"], "narrowest width"),
    ],
)
def test_refusals(nested, tiny_llama, tmp_path, capsys, flags, said):
    given = ["route", str(nested), "--reference", str(tiny_llama), "--prompts", prompts(tmp_path / "p.txt")]
    with pytest.raises(SystemExit) as stop:
        main([*given, *flags])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_rows_read_the_harm_that_forward_passes_read(nested, tiny_llama):
    """The twin is the evaluation's own; inputs that the server rounds to 8 bits are the difference."""
    options = RouteOptions(prompts="unused", reference=str(tiny_llama))
    quantized, reference = route.open_both(nested, options)
    if not FirstBlocks.fits(quantized.model):
        pytest.skip("needs the compiled kernels")
    prompts, answers = [[5, 6, 7, 8], [9], [10, 11, 12]], [[1, 2, 3], [4, 5], [6]]
    given = reference, quantized, ("w8", "w2"), prompts, answers
    fast = route.harms(*given)
    fits, FirstBlocks.fits = FirstBlocks.fits, staticmethod(lambda model: False)
    try:
        slow = route.harms(*given)
    finally:
        FirstBlocks.fits = fits
    assert fast == pytest.approx(slow, rel=0.1, abs=1e-3)
