"""The gate of the SQuAD evaluation on a real file: models that must score 0, chance, little and 100.

python benchmarks/squad_gate.py FILE
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from random import Random

from polybit.data.squad import Asked, SquadFile
from polybit.evals.squad import run, summarize


def span(one: Asked, rng: Random) -> str:
    """One to four words of the text, anywhere."""
    words = one.context.split()
    start = rng.randrange(len(words))
    return " ".join(words[start : start + rng.randint(1, 4)])


def main() -> None:
    file = SquadFile(Path(sys.argv[1]))
    asked, gold, rng = file.questions(), file.answers(), Random(0)
    first = [gold[one.id][0].text if gold[one.id] else "" for one in asked]
    models = {
        "says nothing": [""] * len(asked),
        "stop words": ["the, a an"] * len(asked),
        "gold of other questions": rng.sample(first, len(first)),
        "random spans": [span(one, rng) for one in asked],
        "gold": first,
    }
    print("| model | EM | F1 |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, said in models.items():
            found = summarize(run(lambda _, said=said: said, asked, file, Path(folder) / "said.json"))
            cells = [f"{100 * e.value:.1f} ({100 * e.low:.1f}-{100 * e.high:.1f})" for e in (found["em"], found["f1"])]
            print(f"| {name} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
