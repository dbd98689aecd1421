"""An endpoint: replies are cached and resumed; slow, refusing, broken and mad endpoints end in a sentence."""

import socket

import pytest

from polybit.core.runtime import PolybitError
from polybit.hub.endpoint import Endpoint, Reply, ReplyCache, ask, request_key
from tests.hub.endpoint import serve

pytest.importorskip("openai")


def messages(text):
    return [{"role": "user", "content": text}]


def endpoint(judge, **changes):
    return Endpoint(**{"url": judge.url, "model": "j", "retries": 1, "timeout": 5, **changes})


def asked_texts(judge):
    return [request[-1]["content"] for request in judge.asked]


def test_replies_come_in_order_and_only_once(tmp_path):
    cache = ReplyCache(tmp_path / "replies.sqlite")
    with serve(lambda m: m[-1]["content"].upper()) as judge:
        requests = [messages(text) for text in ("a", "b", "a", "c")]
        assert [r.text for r in ask(endpoint(judge), requests, cache)] == ["A", "B", "A", "C"]
        assert sorted(asked_texts(judge)) == ["a", "b", "c"]
        again = ask(endpoint(judge), [*requests, messages("d")], ReplyCache(cache.path))
        assert [r.text for r in again] == ["A", "B", "A", "C", "D"] and len(judge.asked) == 4
        ask(endpoint(judge, model="other"), requests[:1], cache)
        assert len(judge.asked) == 5, "another judge must not inherit replies"


def test_concurrency_is_limited(tmp_path):
    with serve(lambda m: "x") as judge:
        judge.seconds = 0.03
        ask(endpoint(judge, concurrency=3), [messages(str(i)) for i in range(12)], ReplyCache(tmp_path / "r"))
        assert 2 <= judge.most_busy <= 3


def test_a_stumbling_endpoint_is_retried(tmp_path):
    seen = []

    def rule(m):
        seen.append(m)
        return (503, {"error": {"message": "busy"}}) if len(seen) % 2 else "fine"

    with serve(rule) as judge:
        found = ask(endpoint(judge, concurrency=1), [messages(t) for t in "abc"], ReplyCache(tmp_path / "r"))
        assert [reply.text for reply in found] == ["fine"] * 3 and len(judge.asked) == 6


def test_one_failing_request_costs_one_reply_and_is_asked_again(tmp_path):
    broken = True

    def rule(m):
        return (500, {"error": {"message": "cannot"}}) if m[-1]["content"] == "b" and broken else "fine"

    cache = ReplyCache(tmp_path / "r")
    with serve(rule) as judge:
        requests = [messages(t) for t in "abc"]
        found = ask(endpoint(judge, retries=0), requests, cache)
        assert [reply and reply.text for reply in found] == ["fine", None, "fine"]
        broken, before = False, len(judge.asked)
        assert [reply.text for reply in ask(endpoint(judge), requests, cache)] == ["fine"] * 3
        assert len(judge.asked) == before + 1


def failing(tmp_path, rule, *, seconds=0.0, n=8, **changes):
    """The sentence an endpoint ends in, and how often it was asked."""
    with serve(rule) as judge:
        judge.seconds = seconds
        with pytest.raises(PolybitError) as caught:
            changed = {"retries": 0, "concurrency": 1, **changes}
            ask(endpoint(judge, **changed), [messages(str(i)) for i in range(n)], ReplyCache(tmp_path / "r"))
        return str(caught.value), len(judge.asked)


def test_a_slow_endpoint(tmp_path):
    sentence, asked = failing(tmp_path, lambda m: "late", seconds=0.4, timeout=0.05)
    assert "no reply within 0.05 s" in sentence and "--timeout" in sentence and asked in (5, 6)


@pytest.mark.parametrize(
    ("status", "word", "asked"),
    [(401, "refuses the key", 1), (404, "does not know 'j'", 1), (429, "limits our rate", 5), (500, "status 500", 5)],
)
def test_a_refusing_endpoint(tmp_path, status, word, asked):
    sentence, times = failing(tmp_path, lambda m: (status, {"error": {"message": "no"}}))
    assert word in sentence and "0 of 8 replies are kept" in sentence
    assert times == asked or times == asked + 1 == 6, "one more may be under way when the fifth fails"


def test_an_endpoint_that_is_no_judge(tmp_path):
    sentence, asked = failing(tmp_path, lambda m: (200, {"hello": "world"}))
    assert "not with a completion" in sentence and asked == 1
    sentence, asked = failing(tmp_path, lambda m: (200, b"<html>welcome</html>"))
    assert "not with a completion" in sentence and asked == 1


def test_an_endpoint_that_is_down(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    down = Endpoint(f"http://127.0.0.1:{port}/v1", "j", retries=0, timeout=2)
    with pytest.raises(PolybitError, match="cannot be reached at the first attempt; start it or mend --endpoint"):
        ask(down, [messages("a")], ReplyCache(tmp_path / "r"))


def test_what_was_answered_before_the_endpoint_died_is_kept(tmp_path):
    count = []

    def rule(m):
        count.append(m)
        return "fine" if len(count) <= 3 else (500, {})

    cache = ReplyCache(tmp_path / "r")
    with serve(rule) as judge:
        requests = [messages(str(i)) for i in range(20)]
        with pytest.raises(PolybitError, match="3 of 20 replies are kept"):
            ask(endpoint(judge, retries=0, concurrency=1), requests, cache)
    keys = [request_key(endpoint(judge), request) for request in requests]
    assert len(cache.read(keys)) == 3


def test_refusals_are_replies(tmp_path):
    def rule(m):
        message = {"role": "assistant", "content": None, "refusal": "I will not judge this."}
        if m[-1]["content"] == "filtered":
            return 400, {"error": {"message": "filtered", "code": "content_filter"}}
        return {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}

    with serve(rule) as judge:
        found = ask(endpoint(judge), [messages("a"), messages("filtered")], ReplyCache(tmp_path / "r"))
    assert [reply.refused for reply in found] == [True, True] and found[0].text == "I will not judge this."


def test_a_damaged_cache_is_one_sentence(tmp_path):
    path = tmp_path / "r"
    path.write_bytes(b"not a database, " * 200)
    with pytest.raises(PolybitError, match="cannot be read"):
        ReplyCache(path)
    assert Reply("x", "stop") == Reply("x", "stop", False)
