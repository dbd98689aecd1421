"""A long text in pieces: reference (the whole text at once), property (texts of all kinds), planted fault."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from polybit.data import stream
from polybit.data.stream import encode, encode_at_once, encode_in_pieces
from polybit.hub.tiny import path as tinychat

PROSE = "the a cat sat on in of under 3 17 houses, café naïve don't x=1; <|im_start|> 猫が好き 👩‍💻"
WORDS = [*PROSE.split(), "\n\n", " \n\t "]
SMALL = {"piece": 1500, "overlap": 400}


def prose(count, seed=0):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(count))


def made(model, trainer, pre=None, normalizer=None):
    found = Tokenizer(model)
    found.pre_tokenizer, found.normalizer = pre, normalizer
    found.train_from_iterator([prose(40, seed) for seed in range(40)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=found)


def tokenizers():
    special = ["<unk>", "<|im_start|>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    by_bytes = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=letters)
    by_chance = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>")
    by_words = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return {
        "tinychat": AutoTokenizer.from_pretrained(tinychat()),
        "bytes": made(models.BPE(), by_bytes, in_bytes, normalizers.NFC()),
        "unigram": made(models.Unigram(), by_chance, pre_tokenizers.Metaspace()),
        "words": made(
            models.WordPiece(unk_token="<unk>"),
            by_words,
            pre_tokenizers.BertPreTokenizer(),
            normalizers.BertNormalizer(),
        ),
    }


TOKENIZERS = tokenizers()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_give_the_ids_of_the_whole(name):
    tokenizer, text = TOKENIZERS[name], prose(4000)
    whole = encode_at_once(tokenizer, text)
    assert len(whole) > 4000
    assert encode_in_pieces(tokenizer, text, **SMALL).tolist() == whole.tolist()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(TOKENIZERS)), st.text(max_size=900), st.integers(0, 3), st.integers(1, 3))
def test_whatever_stands_in_it_the_ids_are_those_of_the_whole_or_none(name, odd, seed, times):
    """None where the pieces do not agree, as in a run of one character that becomes few tokens."""
    text = (prose(150, seed) + odd) * times + prose(150, seed + 1)
    found = encode_in_pieces(TOKENIZERS[name], text, **SMALL)
    assert found is None or found.tolist() == encode_at_once(TOKENIZERS[name], text).tolist()


class Counting:
    """A tokenizer whose ids depend on how far the beginning is."""

    is_fast = True

    def __call__(self, text, **options):
        offsets = [(at, at + 1) for at in range(len(text))]
        return {"input_ids": [(at + len(text)) % 97 for at in range(len(text))], "offset_mapping": offsets}


def test_pieces_that_do_not_agree_are_noticed_and_the_text_is_read_at_once(monkeypatch):
    text = prose(2000)
    assert encode_in_pieces(Counting(), text, **SMALL) is None
    monkeypatch.setattr(stream, "PIECE", 500)
    assert encode(Counting(), text).tolist() == encode_at_once(Counting(), text).tolist()


def test_a_long_text_is_read_in_pieces(monkeypatch):
    monkeypatch.setattr(stream, "PIECE", 5000)
    monkeypatch.setattr(stream, "encode_at_once", None)
    tokenizer, text = TOKENIZERS["tinychat"], prose(4000)
    assert encode(tokenizer, text).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
