"""Servers beside each other: tokens per second of all streams together, per second and per CPU second of the server,
and seconds to the first token.

Every server is started on its own, asked for the same streamed chats by 1, 8 and 32 clients at a time, and stopped;
rounds take turns, and medians are printed. A server that is not installed is left out, with the reason.

    python benchmarks/serving.py --polybit my-model [--precision w4] [--gguf model.gguf] [--llama-server PATH]
                                 [--float DIR] [--threads 1] [--json OUT]

--gguf: the same weights for llama-cpp-python's server (polybit export --to gguf), or for llama.cpp's own where
--llama-server names it · --float: the float model for `transformers serve`. CPU seconds need Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from polybit.core.records import machine
from polybit.core.runtime import write_json

TRANSFORMERS = "from transformers.cli.transformers import main; main()"
WRITTEN = re.compile(rb'"content": ?"[^"]')  # the first event that holds text
SUBJECTS = ("a cat", "the sea", "Paris", "a blue house", "seven", "an old friend", "rain", "a long walk")


def commands(args: argparse.Namespace, port: int) -> dict[str, tuple[list[str], str]]:
    """Name of a server -> how it is started, and the model's name in requests."""
    python = sys.executable
    found = {}
    if args.polybit:
        more = ["--slots", "32", "--queue", "256", "--context", "512", "--device", "cpu", "--name", "model"]
        command = [python, "-m", "polybit", "serve", args.polybit, "--port", str(port), *more]
        found["polybit"] = (command, f"model@{args.precision}")
    threads = str(args.threads)
    if args.gguf and args.llama_server:
        more = ["--parallel", "32", "--ctx-size", str(32 * 512), "--threads", threads, "--threads-batch", threads]
        more += args.llama_flags.split()
        found["llama-server"] = ([args.llama_server, "-m", args.gguf, "--port", str(port), *more], "model")
    elif args.gguf:
        more = ["--interrupt_requests", "false", "--n_ctx", "512", "--n_threads", threads]
        command = [python, "-m", "llama_cpp.server", "--model", args.gguf, "--port", str(port), *more]
        found["llama-cpp-python"] = (command, "model")
    if args.float:
        more = ["serve", args.float, "--port", str(port), "--device", "cpu", *args.transformers_flags.split()]
        found["transformers serve"] = ([python, "-c", TRANSFORMERS, *more], args.float)
    return found


@contextmanager
def started(command: list[str], port: int, threads: int) -> Iterator[tuple[str, int]]:
    """The address and process of a server that answers; RuntimeError with its last words when it does not start."""
    log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # a pipe that nobody reads would stop it
    around = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=around)
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1500):
            if process.poll() is not None:
                log.seek(0)
                raise RuntimeError(log.read().strip().splitlines()[-1:])
            try:
                if httpx.get(f"{base}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        yield base, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and all its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def one(web: httpx.AsyncClient, model: str, number: int, most: int) -> tuple[float, int]:
    """(seconds to the first token, tokens) of one streamed chat. What comes is read at the end: a client that parsed
    every event would take a core from the server."""
    content = f"Write a long story about {SUBJECTS[number % len(SUBJECTS)]}, and mention the number {number}."
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": most, "stream": True}
    body |= {"temperature": 0.7, "seed": number, "stream_options": {"include_usage": True}}
    began, first, seen = time.perf_counter(), 0.0, b""
    async with web.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            raise RuntimeError((await reply.aread()).decode()[:300])
        async for part in reply.aiter_raw():
            seen += part
            if not first and WRITTEN.search(seen):
                first = time.perf_counter() - began
    events = [json.loads(line[6:]) for line in seen.splitlines() if line.startswith(b"data: {")]
    told = [event["usage"]["completion_tokens"] for event in events if event.get("usage")]
    counted = sum(bool((choice.get("delta") or {}).get("content")) for e in events for choice in e.get("choices") or ())
    return first, told[-1] if told else counted


async def streams(base: str, pid: int, model: str, clients: int, requests: int, most: int) -> dict[str, float]:
    """Numbers of so many clients at a time."""
    limit = asyncio.Semaphore(clients)
    # a connection each: llama.cpp's server closes kept ones when it likes
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=base, timeout=600, limits=limits) as web:
        await one(web, model, 0, 4)

        async def held(number: int) -> tuple[float, int]:
            async with limit:
                return await one(web, model, number, most)

        began, spent = time.perf_counter(), cpu_seconds(pid)
        found = await asyncio.gather(*(held(number) for number in range(1, requests + 1)))
        seconds, spent = time.perf_counter() - began, cpu_seconds(pid) - spent
    waits = sorted(first for first, _ in found)
    return {
        "tokens_per_cpu_second": sum(tokens for _, tokens in found) / max(spent, 0.01),
        "tokens_per_second": sum(tokens for _, tokens in found) / seconds,
        "first_p50": waits[len(waits) // 2],
        "first_p99": waits[min(len(waits) - 1, int(0.99 * len(waits)))],
        "tokens": sum(tokens for _, tokens in found) / len(found),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("polybit", "gguf", "llama-server", "float"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--llama-flags", default="", help="more flags of llama-server, one text")
    parser.add_argument("--transformers-flags", default="", help="more flags of transformers serve, one text")
    parser.add_argument("--least", type=int, default=4, help="requests in all, at least")
    parser.add_argument("--precision", default="w4")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2, help="for every client")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seen: dict[str, dict[int, list[dict[str, float]]]] = {}
    for _ in range(args.rounds):
        for name, (command, model) in commands(args, port).items():
            try:
                with started(command, port, args.threads) as (base, pid):
                    for clients in args.clients:
                        requests = max(args.least, args.requests * clients)
                        found = asyncio.run(streams(base, pid, model, clients, requests, args.tokens))
                        print(name, clients, found, file=sys.stderr, flush=True)
                        seen.setdefault(name, {}).setdefault(clients, []).append(found)
            except RuntimeError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for name, each in seen.items():
        for clients, found in each.items():
            middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
            ours = seen.get("polybit", {}).get(clients, [])
            ratios = {
                f"polybit_{key}": statistics.median(a[key] / b[key] for a, b in zip(ours, found, strict=False))
                for key in found[0]
                if ours
            }
            rows.append({"server": name, "clients": clients, **middle, **ratios})
            print(json.dumps(rows[-1]))
    if args.json:
        write_json(args.json, {"rows": rows, "config": vars(args) | {"json": ""}, "machine": machine()})


if __name__ == "__main__":
    main()
