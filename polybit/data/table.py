"""The named sets of text, read without naming a file: those inside the package, and those people calibrate on."""

from __future__ import annotations

from typing import Literal

EMBEDDED = "embedded"  # conversations of our own generator, or its reading task where questions are asked for
# name -> (split of our own generator, seed): synthetic conversations that need no download
EMBEDDED_SETS: dict[str, tuple[Literal["train", "test"], int]] = {
    EMBEDDED: ("train", 1),
    "embedded-test": ("test", 2),
}
EMBEDDED_TASKS = ("reading", "arithmetic", "dialogue")  # of our own generator, each with right answers
# name -> (dataset id, configuration, split): sets people calibrate on, read through the `datasets` library
HUB_SETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    "wikitext2-test": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "tinystories": ("roneneldan/TinyStories", None, "validation"),
    "ultrachat": ("HuggingFaceH4/ultrachat_200k", None, "train_sft"),
    "gsm8k": ("openai/gsm8k", "main", "train"),
}
# name -> dataset:configuration:split: tasks with right answers, read through the `datasets` library
HUB_TASKS = {"gsm8k": "openai/gsm8k:main:train", "squad": "rajpurkar/squad:plain_text:train"}
