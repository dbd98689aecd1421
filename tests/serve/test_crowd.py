"""Many clients at once at widths of their own: nobody hears another's answer, memory stays, switching is free."""

import asyncio
import os
import time
from pathlib import Path

import httpx
import pytest

from polybit.hub.rows import TokenRows
from tests.serve.conftest import make_service

CHAT = "/v1/chat/completions"
EVERY = ("w8", "w4", "w3", "w2")


async def crowd(address, bodies, at_once):
    """The texts of all answers, asked by so many clients at the same time."""
    limit = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=httpx.Limits(max_connections=at_once)) as web:

        async def one(body):
            async with limit:
                reply = await web.post(CHAT, json=body)
                assert reply.status_code == 200, reply.text
                return reply.json()["choices"][0]["message"]["content"]

        return await asyncio.gather(*map(one, bodies))


def random_bodies(count):
    """Requests of many widths and ways."""
    subjects = ("Paris", "a cat", "two and two", "the sea", "a blue house", "Anna", "seven")
    for number in range(count):
        body = {"model": f"tinychat@{EVERY[number * 7 % 4]}", "max_tokens": 4 + number % 13, "seed": number}
        body["messages"] = [{"role": "user", "content": f"Tell me about {subjects[number % 7]}, number {number % 5}."}]
        body["temperature"] = (0, 0.9)[number % 2]
        if number % 9 == 0:
            body["precision"] = {"draft": "w2"}
        if number % 11 == 0:
            body["precision"] = {"gate": "w8", "margin": 1.0} if "w8" not in body["model"] else {"prefill": "w4"}
        yield body


def test_thirty_two_clients_hear_what_they_would_hear_alone(address):
    bodies = list(random_bodies(48))
    together = asyncio.run(crowd(address, bodies, 32))
    alone = asyncio.run(crowd(address, bodies[::-1], 1))[::-1]
    assert together == alone and len(set(together)) > 10


def memory():
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_over(address, rounds, size):
    """Resident bytes after each round of requests."""
    found = []
    for _ in range(rounds):
        asyncio.run(crowd(address, list(random_bodies(size)), 16))
        found.append(memory())
    return found


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_requests(address):
    found = memory_over(address, 20, 500)
    assert found[-1] - found[4] < 16 << 20, [round(size / 2**20, 1) for size in found]


def test_another_width_costs_nothing(rounded):
    """The first step at another width takes no longer than at the same one, but for what a millisecond may hide."""
    service = make_service(rounded, slots=2, context=128)
    service.engine.close(5)
    runner = service.engine.runner

    def seconds(widths):
        taken = []
        for step, width in enumerate(widths):
            part = [TokenRows(runner.setting(width), 0, 3 + step, [5])]
            began = time.perf_counter()
            runner.read(part, [1])
            taken.append(time.perf_counter() - began)
        return sorted(taken)[len(taken) // 2]

    runner.read([TokenRows(runner.setting("w8"), 0, 0, [1, 2, 3])], [1])
    seconds(["w8", "w4"] * 5)
    alike = (seconds(["w8"] * 40) + seconds(["w4"] * 40)) / 2
    assert seconds(["w8", "w4"] * 20) - alike < 1e-3
