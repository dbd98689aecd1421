"""Does the server's memory stay flat? Many requests at random widths, and the resident bytes of its process on the way.

    python benchmarks/served_memory.py CHECKPOINT [--requests 10000] [--streams 8] [--json OUT]

A request has a prompt of its own (nothing of the prefix cache is met twice), a random width, one in eight is streamed,
one in sixteen is left in the middle. Memory is read after every tenth of the requests; the first tenth warms up.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

from polybit.core.records import machine
from polybit.core.runtime import write_json

TOKENS = 6
WORDS = ("Ann", "Ben", "red", "blue", "pens", "ships", "horse", "seven", "went", "saw", "has")


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) * 1024  # type: ignore[union-attr]


def ask(client: httpx.Client, names: list[str], number: int) -> int:
    """One request; the tokens of its answer."""
    draw = random.Random(number)
    words = " ".join(draw.choice(WORDS) for _ in range(12))
    body = {"model": draw.choice(names), "prompt": f"{number} {words}", "max_tokens": TOKENS, "temperature": 1.0}
    if draw.random() < 1 / 8:
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data:") and draw.random() < 1 / 8:
                    return 0  # gone in the middle
        return TOKENS
    answer = client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return int(answer.json()["usage"]["completion_tokens"])


def main() -> None:
    """Start a server, ask, and print resident megabytes by requests answered."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("checkpoint")
    words.add_argument("--requests", type=int, default=10_000)
    words.add_argument("--streams", type=int, default=8)
    words.add_argument("--json", type=Path)
    given = words.parse_args()
    command = [sys.executable, "-m", "polybit", "serve", given.checkpoint, "--port", "0", "--slots", str(given.streams)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    address = None
    while address is None:
        line = server.stdout.readline()
        if not line and server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        found = re.search(r"http://[\d.]+:\d+", line)
        address = found.group(0) if found else None
    threading.Thread(target=server.stdout.read, daemon=True).start()
    try:
        with httpx.Client(base_url=address, timeout=60) as client:
            while client.get("/health").status_code != 200:
                time.sleep(0.1)
            names = [m["id"] for m in client.get("/v1/models").json()["data"] if not m["id"].endswith("@auto")]
            rows, began, tenth = [], time.perf_counter(), given.requests // 10
            for part in range(10):
                todo = list(range(part * tenth, (part + 1) * tenth))

                def work(todo: list[int] = todo) -> None:
                    with httpx.Client(base_url=address, timeout=60) as own:
                        while todo:
                            try:
                                number = todo.pop()
                            except IndexError:
                                return
                            ask(own, names, number)

                crowd = [threading.Thread(target=work) for _ in range(given.streams)]
                for thread in crowd:
                    thread.start()
                for thread in crowd:
                    thread.join()
                rows.append({"requests": (part + 1) * tenth, "resident_bytes": resident(server.pid)})
                print(json.dumps(rows[-1]), flush=True)
            result = {
                "rows": rows,
                "growth_after_warmup_bytes": rows[-1]["resident_bytes"] - rows[0]["resident_bytes"],
                "seconds": time.perf_counter() - began,
                "machine": machine(),
            }
            print(json.dumps(result))
            if given.json:
                write_json(given.json, result)
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
