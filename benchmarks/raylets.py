"""Two Ray nodes on this machine: the results of one process, and what the loss of a node costs.

    python -m benchmarks.raylets --json FILE

Each node is a raylet of its own with room for two workers; two workers are asked for, one goes to each. Tasks of the
timed part sleep, so that the time is that of the scheduling and not of who else uses the machine; in the middle of the
run one raylet is killed with all its processes: told are the seconds until that is heard, and until another worker is
there. The other part (not with --timed) is `polybit allocate` with and without the cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polybit.hub.workers import Team, Where

TASKS, SECONDS = 48, 2.0


class Sleeper:
    """A worker whose tasks take their time."""

    def __call__(self, task: int) -> int:
        """The square of a number, after a while."""
        time.sleep(SECONDS)
        return task * task


def main() -> None:
    """Measure, and print or write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--timed", action="store_true", help="the timed part alone, two minutes")
    args = parser.parse_args()
    found: dict[str, Any] = {"tasks": TASKS, "task_seconds": SECONDS}
    found["whole"], found["whole_right"], _ = timed(None)
    found["killed"], found["killed_right"], found["after_the_kill"] = timed(kill)
    found["ratio"] = round(found["killed"] / found["whole"], 2)
    found["load"] = round(os.getloadavg()[0], 1)
    print(json.dumps(found, indent=1), flush=True)
    if not args.timed:
        found["same_numbers"] = same_numbers()
        print(found["same_numbers"])
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def cluster() -> tuple[Any, list[Any]]:
    """A cluster of two nodes, and the nodes."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    return made, [made.head_node, made.add_node(num_cpus=2)]


def kill(node: Any) -> None:
    """kill -9 of a raylet; its workers go with it."""
    node.kill_raylet(check_alive=False)


def timed(disturb: Callable[[Any], None] | None) -> tuple[float, bool, dict[str, float]]:
    """Seconds of all tasks once both workers are there, whether all are right, and what was heard when after the
    second node was disturbed in the middle."""
    made, nodes = cluster()
    found: dict[int, int] = {}
    heard: dict[str, float] = {}
    with Team(Sleeper, (), Where(2, made.address)) as team:
        while len(team.greeted) < 2:  # both are here before the clock starts
            team.in_order([0, 0, 0])
        began = time.monotonic()
        plain, middle = team.crew.hear, began

        def hear(seconds: float) -> list[Any]:
            words = plain(seconds)
            for word in words:
                heard.setdefault(word.kind, round(time.monotonic() - middle, 1))
            return words

        for number, result in team.map(list(range(TASKS))):
            found[number] = result
            if len(found) == TASKS // 2 and disturb is not None:
                middle, team.crew.hear = time.monotonic(), hear
                threading.Thread(target=disturb, args=(nodes[1],)).start()
        seconds = time.monotonic() - began
    made.shutdown()
    return round(seconds, 1), found == {n: n * n for n in range(TASKS)}, heard


def same_numbers() -> bool:
    """Whether `polybit allocate` finds the same with the cluster as in one process."""
    made, _ = cluster()
    plans = []
    with tempfile.TemporaryDirectory() as folder:
        for name, more in (("here", []), ("there", ["--workers", "2", "--ray", made.address])):
            words = ["--bits", "3.5", "--samples", "2", "--items", "4", "--method", "rtn", "--window", "64"]
            words += ["--front", "12"]
            words += ["--cache", f"{folder}/{name}", "--out", f"{folder}/{name}.json", "--json", f"{folder}/{name}.run"]
            subprocess.run([sys.executable, "-m", "polybit", "allocate", "tinychat", *words, *more], check=True)
            numbers = json.loads(Path(f"{folder}/{name}.run").read_text(encoding="utf-8"))["numbers"]
            plans.append({key: numbers[key] for key in ("layers", "proof", "front", "plan")})
    made.shutdown()
    return plans[0] == plans[1]


if __name__ == "__main__":
    main()
