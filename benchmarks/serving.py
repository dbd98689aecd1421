"""Servers beside each other: tokens per second of all streams together, and seconds to the first token.

Every server is started on its own, asked for the same streamed chats by 1, 8 and 32 clients at a time, and stopped;
rounds take turns, and medians are printed. A server that is not installed is left out, with the reason.

    python benchmarks/serving.py --polybit my-model [--precision w4] [--gguf model.gguf] [--float DIR] [--json OUT]

--gguf: the same weights for llama-cpp-python's server (polybit export --to gguf) · --float: the float model for
`transformers serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from polybit.core.runtime import write_json

SUBJECTS = ("a cat", "the sea", "Paris", "a blue house", "seven", "an old friend", "rain", "a long walk")


def commands(args: argparse.Namespace, port: int) -> dict[str, tuple[list[str], str]]:
    """Name of a server -> how it is started, and the model's name in requests."""
    python = sys.executable
    found = {}
    if args.polybit:
        more = ["--slots", "32", "--queue", "256", "--context", "512", "--device", "cpu", "--name", "model"]
        command = [python, "-m", "polybit", "serve", args.polybit, "--port", str(port), *more]
        found["polybit"] = (command, f"model@{args.precision}")
    if args.gguf:
        more = [
            "--interrupt_requests",
            "false",
            "--n_ctx",
            "512",
            "--n_threads",
            os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        ]
        found["llama-cpp-python"] = (
            [python, "-m", "llama_cpp.server", "--model", args.gguf, "--port", str(port), *more],
            "model",
        )
    if args.float:
        beside = Path(python).parent / "transformers"
        found["transformers serve"] = ([str(beside), "serve", "--port", str(port), "--device", "cpu"], args.float)
    return found


@contextmanager
def started(command: list[str], port: int) -> Iterator[str]:
    """The address of a server that answers; RuntimeError with its last words when it does not start."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError((process.stdout.read() if process.stdout else "").strip().splitlines()[-1:])
            try:
                if httpx.get(f"{base}/v1/models", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        yield base
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


async def one(web: httpx.AsyncClient, model: str, number: int, most: int) -> tuple[float, int]:
    """(seconds to the first token, tokens) of one streamed chat."""
    content = f"Tell me about {SUBJECTS[number % len(SUBJECTS)]}, and mention the number {number}."
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": most}
    began, first, tokens = time.perf_counter(), 0.0, 0
    async with web.stream("POST", "/v1/chat/completions", json=body | {"stream": True, "temperature": 0.7}) as reply:
        if reply.status_code != 200:
            raise RuntimeError((await reply.aread()).decode()[:300])
        async for line in reply.aiter_lines():
            if '"content"' in line and '"content": ""' not in line and '"content":""' not in line:
                first = first or time.perf_counter() - began
                tokens += 1
    return first, tokens


async def streams(base: str, model: str, clients: int, requests: int, most: int) -> dict[str, float]:
    """Numbers of so many clients at a time."""
    limit = asyncio.Semaphore(clients)
    async with httpx.AsyncClient(base_url=base, timeout=600, limits=httpx.Limits(max_connections=clients)) as web:
        await one(web, model, 0, 4)

        async def held(number: int) -> tuple[float, int]:
            async with limit:
                return await one(web, model, number, most)

        began = time.perf_counter()
        found = await asyncio.gather(*map(held, range(requests)))
        seconds = time.perf_counter() - began
    waits = sorted(first for first, _ in found)
    return {
        "tokens_per_second": sum(tokens for _, tokens in found) / seconds,
        "first_p50": waits[len(waits) // 2],
        "first_p99": waits[min(len(waits) - 1, int(0.99 * len(waits)))],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("polybit", "gguf", "float"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--precision", default="w4")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seen: dict[str, dict[int, list[dict[str, float]]]] = {}
    for _ in range(args.rounds):
        for name, (command, model) in commands(args, port).items():
            try:
                with started(command, port) as base:
                    for clients in args.clients:
                        requests = max(8, 2 * clients)
                        found = asyncio.run(streams(base, model, clients, requests, args.tokens))
                        seen.setdefault(name, {}).setdefault(clients, []).append(found)
            except RuntimeError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for name, each in seen.items():
        for clients, found in each.items():
            middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
            rows.append({"server": name, "clients": clients, **middle})
            speed, first, last = middle.values()
            print(f"{name:20} {clients:3} streams {speed:8.1f} tokens/s, first {1e3 * first:7.1f} {1e3 * last:7.1f} ms")
    if args.json:
        write_json(args.json, {"rows": rows, "tokens": args.tokens, "rounds": args.rounds, "cores": os.cpu_count()})


if __name__ == "__main__":
    main()
