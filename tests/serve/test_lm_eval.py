"""lm-eval's own `local-completions` client measures a width through the server: the scores of the model in memory.

Kind: oracle.
"""

import json

import pytest

from polybit.hub.lm import LocalLM
from polybit.hub.tiny import path
from tests.evals.toy import CHOICE

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity", reason="pip install lm-eval[api]")
pytestmark = pytest.mark.slow


def test_a_width_is_measured(address, rounded, tmp_path):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from polybit.evals.lm_eval_bridge import BridgeLM, evaluate_tasks

    rows = [
        {"question": f"Ann has {n} red pens. Who has pens?", "answer": n % 2, "choices": ["Ann", "horse and cart"]}
        for n in range(2, 8)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "toy.yaml").write_text(CHOICE.format(name="toy_served", data=tmp_path / "items.jsonl"))
    found = {}
    for width in ("w8", "w2"):
        client = LocalCompletionsAPI(
            base_url=f"{address}/v1/completions",
            model=f"tinychat@{width}",
            tokenizer=str(path()),
            tokenizer_backend="huggingface",
            num_concurrent=1,
        )
        found[width] = replies(evaluate_tasks(client, ["toy_served"], include=tmp_path))
        with LocalLM(*rounded).at(width) as lm:
            wanted = replies(evaluate_tasks(BridgeLM(lm), ["toy_served"], include=tmp_path))
        # narrow widths round their inputs to 8 bits here, and not in memory
        assert found[width] == pytest.approx(wanted, **({"abs": 2e-3} if width == "w8" else {"rel": 0.05}))
    assert found["w8"] != pytest.approx(found["w2"], abs=0.05)


def replies(result):
    """Log-likelihoods of all choices."""
    return [float(reply[0]) for row in result["samples"]["toy_served"] for reply in row["filtered_resps"]]
