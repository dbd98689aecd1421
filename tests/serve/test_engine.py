"""The engine: every answer is the one its request gets alone, whatever else runs, drafts, waits or is cut off."""

import threading

import pytest
import torch

from polybit.core.plan import Plan
from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError
from polybit.kernels import cpu
from polybit.nn.adapters import Lora, plug
from polybit.nn.switch import at, set_presets
from polybit.serve.engine import Busy, Closing, Engine
from polybit.serve.pace import Pace
from polybit.serve.request import Decoding, Done, Piece, Request, Sampling
from polybit.serve.runners import BothRunner, PlainRunner, RowRunner, make_runner
from tests.hub.test_rows import make

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="needs the compiled kernels")


class Letters:
    """A tokenizer with a character per token."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(48 + i) for i in ids)


@pytest.fixture(scope="module")
def model():
    return make("qwen2")


def prompt(seed, length=12):
    return tuple(torch.randint(0, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def ask(
    seed=0,
    precision="w8",
    *,
    tokens=None,
    temperature=0.0,
    most=20,
    ends=(),
    stop=(),
    logprobs=None,
    echo=False,
    **decoding,
):
    return Request(
        tokens=tokens or prompt(seed),
        decoding=Decoding(precision=precision, **decoding),
        sampling=Sampling(temperature=temperature, seed=seed),
        max_tokens=most,
        ends=frozenset(ends),
        stop=stop,
        logprobs=logprobs,
        echo=echo,
    )


def answers(engine, asked):
    """(token ids of the answers, their last events, their texts)."""
    heard = [[] for _ in asked]
    running = [engine.submit(one, events.append) for one, events in zip(asked, heard, strict=True)]
    while engine.tick():
        pass
    tokens = [one.tokens[len(one.asked.tokens) :] for one in running]
    texts = ["".join(event.text for event in events if isinstance(event, Piece)) for events in heard]
    assert all(isinstance(events[-1], Done) for events in heard)
    return tokens, [events[-1] for events in heard], texts


def engine(model, slots=4, room=64, kind=RowRunner, **more):
    return Engine(kind(model, slots=slots, room=room), Letters(), **more)


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_every_answer_in_a_crowd_equals_its_solo_answer(model, temperature):
    widths = ("w8", "w6", "w5", "w4", "w3", "w2")
    asked = [ask(seed, widths[seed % 6], temperature=temperature) for seed in range(18)]
    together, done, _ = answers(engine(model, chunk=7), asked)
    alone = [answers(engine(model, slots=1), [one])[0][0] for one in asked]
    assert together == alone and len({tuple(row) for row in together}) > 5
    assert all(end.reason == "length" and end.spent.answer == 20 for end in done)


def test_a_shared_beginning_is_read_once_and_changes_nothing(model):
    first = ask(1, "w4", tokens=prompt(1, 24))
    second = ask(2, "w4", tokens=(*prompt(1, 24)[:20], 7, 8, 9))
    third = ask(3, "w3", tokens=second.tokens)  # another width: another cache
    server = engine(model)
    _, [end], _ = answers(server, [first])
    assert end.spent.cached == 0
    found, [end2, end3], _ = answers(server, [second, third])
    assert end2.spent.cached == 20 and end3.spent.cached == 0
    assert found == [answers(engine(model), [one])[0][0] for one in (second, third)]
    # an answer is part of what the next turn begins with
    turn = ask(4, "w4", tokens=(*second.tokens, *found[0], 5))
    _, [end4], _ = answers(server, [turn])
    assert end4.spent.cached >= len(second.tokens) + 19


def test_a_busy_place_is_copied(model):
    server = engine(model)
    tokens = prompt(5, 30)
    server.submit(ask(1, "w4", tokens=tokens), lambda _: None)
    server.tick()
    late = ask(2, "w4", tokens=(*tokens[:25], 3, 4))
    found, [end], _ = answers(server, [late])
    assert end.spent.cached == 25 and found == answers(engine(model), [late])[0]


WAYS = [
    {"draft": "w4", "drafts": 1},
    {"draft": "w4", "drafts": 4},
    {"draft": "w5"},
    {"lookup": 1},
    {"draft": "w3", "lookup": 2},
]


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("way", WAYS)
def test_drafts_change_no_token(model, way, temperature):
    prompts = [(*prompt(seed), *prompt(seed)) for seed in range(6)]
    plain = [ask(seed, "w8", tokens=tokens, temperature=temperature) for seed, tokens in enumerate(prompts)]
    drafted = [ask(seed, "w8", tokens=tokens, temperature=temperature, **way) for seed, tokens in enumerate(prompts)]
    server = engine(model)
    expected = answers(server, plain)[0]
    found, done, _ = answers(server, drafted)
    assert found == expected
    spent = [end.spent for end in done]
    assert all(s.drafted >= sum(s.accepted) for s in spent) and sum(s.drafted for s in spent) > 0
    if not temperature:  # random logits are flat: a draw rarely meets the likeliest token
        assert sum(sum(s.accepted) for s in spent) > 0


def test_drafts_of_the_same_width_are_all_accepted(model):
    server = engine(model)
    server.pace = Pace(clock=lambda: 0.0)  # nothing costs anything: all drafts pay
    _, [end], _ = answers(server, [ask(3, "w4", draft="w4", drafts=4, most=21)])
    assert len(end.spent.accepted) == 4 and sum(end.spent.accepted) == end.spent.drafted >= 15


def test_a_gate_decides_thin_leads_anew(model):
    never = answers(engine(model), [ask(2, "w2", gate="w8", margin=0.0)])
    assert never[0] == answers(engine(model), [ask(2, "w2", prefill="w8")])[0] and never[1][0].spent.gated == 0
    always = answers(engine(model), [ask(2, "w2", gate="w8", margin=1e9)])
    assert always[1][0].spent.gated == 20 and always[0] == answers(engine(model), [ask(2, "w8")])[0]


def test_a_gate_decides_as_the_wide_width_would_have_after_the_same_text(model):
    tokens = ask(3).tokens
    [answer], [end], _ = answers(engine(model), [ask(3, "w2", gate="w8", margin=0.02)])
    assert 0 < end.spent.gated < len(answer)
    wide = [ask(0, "w8", tokens=(*tokens, *answer[:at]), most=1) for at in range(20)]
    chosen = answers(engine(model, queue=99), wide)[0]
    assert sum(a == b for a, [b] in zip(answer, chosen, strict=True)) >= end.spent.gated


@pytest.mark.parametrize("way", [{"gate": "w8", "margin": 0.3}, {"prefill": "w8"}])
def test_an_answer_read_otherwise_than_a_prompt_is_not_taken_for_one(model, way):
    server = engine(model)
    [first], _, _ = answers(server, [ask(1, "w2", **way)])
    again = ask(2, "w2", tokens=(*ask(1).tokens, *first, 5, 6), **way)
    found, [end], _ = answers(server, [again])
    assert end.spent.cached == 11 and found == answers(engine(model), [again])[0]


def test_a_prompt_read_wide_is_decoded_narrow(model):
    def read(**how):
        return answers(engine(model), [ask(seed, temperature=0.7, **how) for seed in range(8)])[0]

    mixed = read(precision="w2", prefill="w8")
    assert mixed != read(precision="w2") and mixed != read(precision="w8")


def test_ends_stop_texts_and_lengths(model):
    [tokens], _, [text] = answers(engine(model), [ask(1)])
    [cut], [done], _ = answers(engine(model), [ask(1, ends=[tokens[6]])])
    assert cut == tokens[: tokens.index(tokens[6]) + 1] and done.reason == "stop"
    mark = text[5:8]
    _, [done], [said] = answers(engine(model), [ask(1, stop=("never", mark))])
    assert said == text[: text.index(mark)] and done.stopped_by == mark
    _, [done], _ = answers(engine(model, room=16), [ask(1, most=100)])
    assert done.reason == "length" and done.spent.answer == 16 - 12


def test_logprobs_are_the_models_own(model):
    heard = []
    server = engine(model)
    server.submit(ask(1, most=3, logprobs=5, temperature=1.5), heard.append)
    while server.tick():
        pass
    chosen = [token for event in heard if isinstance(event, Piece) for token in event.tokens]
    assert len(chosen) == 3 and all(len(token.top) == 5 for token in chosen)
    assert all(token.logprob <= token.top[0][1] <= 0 and token.margin >= 0 for token in chosen)


def test_cancelled_answers_give_their_place_back(model):
    server = engine(model, slots=1)
    heard = []
    first = server.submit(ask(1, most=1000), heard.append)
    waiting = server.submit(ask(2), heard.append)
    server.tick()
    server.cancel(first)
    server.cancel(waiting)
    assert not server.tick()
    assert [event.reason for event in heard if isinstance(event, Done)] == ["cancelled", "cancelled"]
    assert server.slots.free == 1
    assert answers(server, [ask(3)])[0] == answers(engine(model), [ask(3)])[0]


def test_the_queue_is_bounded_and_closing_refuses(model):
    server = engine(model, slots=1, queue=2)
    for seed in range(3):
        server.submit(ask(seed), lambda _: None)
    with pytest.raises(Busy, match="waiting already"):
        server.submit(ask(9), lambda _: None)
    while server.tick():
        pass
    server.close()
    with pytest.raises(Closing):
        server.submit(ask(9), lambda _: None)


def test_a_failing_step_ends_its_answers_and_nothing_else(model):
    server = engine(model)
    read = server.runner.read
    server.runner.read = lambda *_: (_ for _ in ()).throw(MemoryError("no memory"))
    heard = []
    server.submit(ask(1), heard.append)
    server.tick()
    assert heard[-1].reason == "error" and "no memory" in heard[-1].message
    server.runner.read = read
    assert answers(server, [ask(1)])[0] == answers(engine(model), [ask(1)])[0]


def test_refusals(model):
    server = engine(model, room=16)
    with pytest.raises(PolybitError, match="at most 15"):
        server.submit(ask(1, tokens=prompt(1, 16)), lambda _: None)
    with pytest.raises(PolybitError, match="no tokens"):
        server.submit(Request(tokens=(), decoding=Decoding(precision="w4")), lambda _: None)


def test_the_thread_answers_and_drains(model):
    server = engine(model)
    server.start()
    ended = threading.Event()
    server.submit(ask(1), lambda event: ended.set() if isinstance(event, Done) else None)
    assert ended.wait(30) and server.close(30)


def test_any_model_by_its_own_forward_pass(model):
    """The plain runner: another family, or a GPU; the same tokens as the compiled decoder here."""
    asked = [ask(seed, "w8") for seed in range(3)]
    plain = Engine(PlainRunner(model, slots=2, room=64), Letters(), chunk=8)
    together = answers(plain, asked)[0]
    assert together == [
        answers(Engine(PlainRunner(model, slots=1, room=64), Letters(), chunk=8), [a])[0][0] for a in asked
    ]
    assert isinstance(make_runner(model, slots=1, room=64, quantized=True), BothRunner)


def test_rounded_activations_beside_compiled_rows():
    """One server, both kinds of precision: each answers as it does alone, and neither shares the other's places."""
    model = make("llama")
    set_presets(model, {"narrow": Plan(Precision.parse("w4a8k4v4")), "w4": Plan(Precision.parse("w4"))})
    asked = [ask(1, name, tokens=prompt(1, 20)) for name in ("narrow", "w4", "narrow", "w8")]
    crowd = engine(model, kind=BothRunner, chunk=8)
    assert crowd.runner.exact("w4") and not crowd.runner.exact("narrow")
    together = answers(crowd, asked)[0]
    alone = [answers(engine(model, kind=BothRunner, chunk=8), [one])[0][0] for one in asked]
    assert together == alone and together[0] == together[2] and all(together)
    slow = Engine(PlainRunner(model, slots=1, room=64), Letters(), chunk=8)
    assert answers(slow, asked[:1])[0][0] == together[0]
    again, done, _ = answers(crowd, [ask(1, "narrow", tokens=prompt(1, 20))])
    assert again[0] == together[0] and done[0].spent.cached == 16  # whole chunks of its own reading
    with pytest.raises(PolybitError):
        crowd.runner.exact("wrong")


def test_a_preset_wears_its_adapter_in_a_crowd():
    """Rows of a preset with an adapter beside rows without: each says what the model says, switched to it alone."""
    model = make("llama")
    set_presets(model, {"own": Plan(Precision.parse("w4"))})
    layers = {name: m for name, m in model.named_modules() if name.endswith(("q_proj", "down_proj"))}
    torch.manual_seed(1)
    loras = {name: Lora(m.out_features, m.in_features, 2, torch.zeros(1)) for name, m in layers.items()}
    for lora in loras.values():
        lora.up_OR.data.normal_(std=20.0)
    plug(model, {name: {"own": lora.requires_grad_(False)} for name, lora in loras.items()})
    asked = [ask(1, name, tokens=prompt(1, 20)) for name in ("own", "w4", "own", "w8")]
    together = answers(engine(model, kind=BothRunner, chunk=8), asked)[0]
    slow = [answers(Engine(PlainRunner(model, slots=1, room=64), Letters(), chunk=8), [one])[0][0] for one in asked]
    assert together == slow and together[0] == together[2] != together[1]


def test_an_echoed_prompt_has_the_log_probabilities_of_a_forward_pass(model):
    server = engine(model, chunk=5)
    heard = []
    asked = ask(1, logprobs=3, echo=True, most=0)
    answer = server.submit(asked, heard.append)
    while server.tick():
        pass
    with torch.inference_mode(), at(model, "w8"):
        logp = model(torch.tensor([asked.tokens])).logits[0].float().log_softmax(-1)
    wanted = [float(logp[place, token]) for place, token in enumerate(asked.tokens[1:])]
    assert [round(chosen.logprob, 2) for chosen in answer.echoed] == pytest.approx(
        [round(w, 2) for w in wanted], abs=0.02
    )
    assert heard[-1].reason == "length" and heard[-1].spent.answer == 0
    again = server.submit(
        ask(1, logprobs=3, echo=True, most=1), heard.append
    )  # a beginning in the cache is no reason to skip
    while server.tick():
        pass
    assert [c.token for c in again.echoed] == list(asked.tokens[1:])
