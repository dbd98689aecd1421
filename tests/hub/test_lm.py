"""Reference: batched decoding equals one prompt at a time without a cache; lm-eval's rules, written out literally."""

import pytest
import torch

from polybit.core.runtime import PolybitError
from polybit.hub.likelihood import loglik_alone, stems
from polybit.hub.lm import LM, LocalLM, cut_at
from tests.evals.tiny import tokenizer
from tests.families import quantized, tiny_model

PROMPTS = ["hello there", "a", "What is 12 + 7?", "once upon a time, a dog", "zz"]


def greedy_twin(lm, ids, max_tokens):
    """No cache, no padding, no batch."""
    row = list(ids)
    for _ in range(max_tokens):
        with torch.no_grad():
            token = int(lm.model(input_ids=torch.tensor([row])).logits[0, -1].argmax())
        row.append(token)
        if token in lm.end_tokens():
            break
    return row[len(ids) :]


def loglik_twin(lm, context, continuation):
    """lm-eval's HFLM for one request, step by step."""
    spaces = len(context) - len(context.rstrip())
    if spaces > 0:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    tok = lm.tokenizer
    whole = tok.encode(context + continuation, add_special_tokens=False)
    before = tok.encode(context, add_special_tokens=False)
    if not context:
        before = [tok.bos_token_id if tok.bos_token_id is not None else tok.eos_token_id]
        whole = before + whole
    after = whole[len(before) :]
    inputs = (before + after)[-(lm.max_length + 1) :][:-1]
    with torch.no_grad():
        logp = lm.model(input_ids=torch.tensor([inputs])).logits[0].float().log_softmax(-1)[-len(after) :]
    total = sum(float(logp[i, token]) for i, token in enumerate(after))
    return total, len(after), all(int(logp[i].argmax()) == token for i, token in enumerate(after))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "opt", "qwen3", "mixtral", "gpt_neox"])
def test_generate_equals_the_slow_twin(family):
    lm = LocalLM(tiny_model(family), tokenizer(chat=False), batch_tokens=120)
    ids = [lm.tokenizer.encode("<s>" + text, add_special_tokens=False) for text in PROMPTS]
    assert lm.generate_tokens(ids, max_tokens=12) == [greedy_twin(lm, row, 12) for row in ids]


def test_rows_end_at_eos_and_leave_the_batch():
    lm = LocalLM(tiny_model("llama"), tokenizer(chat=False))
    ids = [lm.tokenizer.encode("<s>" + text, add_special_tokens=False) for text in PROMPTS]
    free = lm.generate_tokens(ids, max_tokens=24)
    # whatever each of four rows says at a different step becomes an end token
    lm.model.generation_config.eos_token_id = [2, free[0][3], free[1][5], free[2][8], free[3][2]]
    got = lm.generate_tokens(ids, max_tokens=24)
    assert got == [greedy_twin(lm, row, 24) for row in ids]
    assert len({len(row) for row in got}) > 1 and min(map(len, got)) < 24


def test_generate_text_order_and_stop():
    lm = LocalLM(tiny_model("llama"), tokenizer(chat=False), batch_tokens=64)
    texts = lm.generate(PROMPTS, max_tokens=16)
    assert texts == [lm.generate([prompt], max_tokens=16)[0] for prompt in PROMPTS]
    marks = [texts[0][4:6], texts[3][-1]]
    assert all(marks)
    assert lm.generate(PROMPTS, max_tokens=16, stop=marks) == [cut_at(text, marks) for text in texts]
    assert cut_at("abcabc", ["ca", "bc"]) == "a" and cut_at("abc", ["x"]) == "abc"


def test_conversation_prompts_use_the_template():
    lm = LocalLM(tiny_model("llama"), tokenizer())
    messages = [{"role": "user", "content": "hi"}]
    ids = lm.tokenizer.encode("<s>[user]hi\n[assistant]", add_special_tokens=False)
    assert lm.generate([messages], max_tokens=5) == [lm.decode(lm.generate_tokens([ids], max_tokens=5)[0])]


@pytest.mark.parametrize("bos", [True, False])
def test_loglik_equals_lm_eval_literally(bos):
    lm = LocalLM(tiny_model("llama"), tokenizer(bos=bos, chat=False), batch_tokens=100)
    pairs = [("hello ", "world"), ("hello", " world"), ("", "abc"), ("a b  ", "c"), ("x" * 70, "yes"), ("q" * 64, "z")]
    greedy = lm.generate(["hello"], max_tokens=3)[0] if not bos else None
    if greedy:
        pairs.append(("hello", greedy))
    for got, pair in zip(lm.loglik(pairs), pairs, strict=True):
        total, count, is_greedy = loglik_twin(lm, *pair)
        assert got.total_nats == pytest.approx(total, abs=1e-4)
        assert (got.n_tokens, got.is_greedy) == (count, is_greedy)
    assert not greedy or lm.loglik([("hello", greedy)])[0].is_greedy


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mixtral"])
@pytest.mark.parametrize("shots", [0, 3])
def test_what_is_shared_is_read_once(family, shots, monkeypatch):
    """Reference: every answer as a row of its own, with all its logits."""
    lm = LocalLM(tiny_model(family), tokenizer(chat=False), batch_tokens=100, batch_logits=1 << 10)
    before = "a: b. " * shots
    asked = [
        (f"{before}question {n}" + "?" * (n % 7), f" {text}")
        for n in range(9)
        for text in ("y", "no", "no", "maybe so")
    ]
    asked += [("q" * 60, " long"), ("q" * 60, " longer"), ("alone", " z"), ("", "a"), ("", "b")]
    encoded = [lm.encode_pair(*pair) for pair in asked]
    found, read = lm.loglik(asked), []
    for got, want in zip(found, loglik_alone(lm, encoded, read.append), strict=True):
        assert got.total_nats == pytest.approx(want.total_nats, abs=1e-4)
        assert (got.n_tokens, got.is_greedy) == (want.n_tokens, want.is_greedy)
    assert sum(read) == len(asked)
    assert found[1].total_nats == pytest.approx(found[2].total_nats, abs=1e-5)
    tokens = []
    monkeypatch.setattr(
        lm, "_call", lambda call=lm._call, **said: tokens.append(said["input_ids"].numel()) or call(**said)
    )
    lm.loglik(asked)
    assert sum(tokens) < 0.6 * sum(len(context) + len(answer) for context, answer in encoded)


def test_stems_are_what_contexts_begin_with():
    long, other = list(range(40)), list(range(100, 130))
    contexts = [[*long, 1, 2], [*other, 5], [7, 8], [*long, 3], [*long, 1, 2], [*other, 6], [9]]
    found = stems(contexts)
    assert sorted(n for _, members in found for n in members) == list(range(7))
    assert {(length, frozenset(members)) for length, members in found} == {
        (40, frozenset({0, 3, 4})),
        (30, frozenset({1, 5})),
        (0, frozenset({2, 6})),
    }
    assert stems([long, long]) == [(39, [0, 1])]  # a token is left, whose logits are wanted


def test_boundary_is_where_the_context_ends_not_where_tokens_merge():
    lm = LocalLM(tiny_model("llama"), tokenizer())
    context, continuation = lm.encode_pair("ab ", "cd")
    assert lm.tokenizer.decode(context) == "ab" and lm.tokenizer.decode(continuation) == " cd"


def test_too_long_prompts_lose_their_first_tokens():
    lm = LocalLM(tiny_model("llama"), tokenizer(chat=False))
    assert lm.max_length == 64
    text = "abcdefgh" * 20
    ids = lm.tokenizer.encode(text, add_special_tokens=False)
    assert lm.generate_tokens([ids], max_tokens=10) == lm.generate_tokens([ids[-54:]], max_tokens=10)


def test_what_cannot_be_done_is_said():
    lm = LocalLM(tiny_model("llama"), tokenizer(chat=False))
    with pytest.raises(PolybitError, match="at most 63"):
        lm.generate(["a"], max_tokens=64)
    with pytest.raises(PolybitError, match="at least 1"):
        lm.generate(["a"], max_tokens=0)
    with pytest.raises(PolybitError, match="maximum of 64"):
        lm.logits(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(PolybitError, match="no tokens"):
        lm.loglik([("a", "")])
    with pytest.raises(PolybitError, match="split it"):
        lm.loglik([("a", "b" * 65)])
    with pytest.raises(PolybitError, match="at least one token"):
        lm.generate_tokens([[]], max_tokens=1)


def test_reads_a_switchable_model_at_its_precision():
    lm = LocalLM(quantized("llama"), tokenizer(chat=False))
    assert isinstance(lm, LM)
    ids_BT = torch.tensor([[1, 20, 30, 40]])
    stored = lm.logits(ids_BT)
    with lm.at("w8"):
        eight = lm.logits(ids_BT)
    with lm.at("w2"):
        two = lm.logits(ids_BT)
        answer = lm.generate(["hello"], max_tokens=8)
    assert torch.allclose(stored, eight, atol=1e-4) and not torch.allclose(two, eight, atol=1e-2)
    assert torch.allclose(lm.logits(ids_BT), stored)
    plain = LocalLM(lm.model, lm.tokenizer, keep_decoded=False)
    with plain.at("w2"):
        assert torch.allclose(plain.logits(ids_BT), two, atol=1e-4)
        assert plain.generate(["hello"], max_tokens=8) == answer


def test_pieces_join_to_the_text():
    lm = LocalLM(tiny_model("llama"), tokenizer(chat=False))
    ids = [*lm.tokenizer.encode("to be", add_special_tokens=False), 2]
    assert lm.pieces(ids) == ["t", "o", " ", "b", "e", "<end>"]


def full_gpu(lm, monkeypatch, most):
    """The model runs out of memory for more than `most` rows; how many it was asked for."""
    seen, real = [], lm._call

    def call(**inputs):
        seen.append(len(inputs["input_ids"]))
        if seen[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(**inputs)

    monkeypatch.setattr(lm, "_call", call)
    return seen


def test_batches_become_smaller_where_memory_is_used_up(monkeypatch):
    lm, whole = (LocalLM(tiny_model("llama"), tokenizer()) for _ in range(2))
    ids_BT = torch.randint(5, 60, (5, 7), generator=torch.Generator().manual_seed(0))
    before = lm.batch_tokens
    seen = full_gpu(lm, monkeypatch, most=2)
    assert torch.allclose(lm.logits(ids_BT), whole.logits(ids_BT), atol=1e-5)
    assert seen == [5, 2, 3, 1, 2] and lm.batch_tokens == before // 4
    prompts = ids_BT.tolist()
    assert lm.generate_tokens(prompts, max_tokens=3) == whole.generate_tokens(prompts, max_tokens=3)


def test_a_row_that_is_too_much_is_one_sentence(monkeypatch):
    lm = LocalLM(tiny_model("llama"), tokenizer())
    full_gpu(lm, monkeypatch, most=0)
    with pytest.raises(PolybitError, match="--device cpu"):
        lm.logits(torch.ones(2, 4, dtype=torch.long))
