"""What the first blocks of a model say of a prompt: a small part of what reading it costs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polybit.hub.rows import RowDecoder, TokenRows, supported

Array = NDArray[np.float64]
BLOCKS = 2  # that are read
MOST = 512  # tokens of a prompt that are read: its last ones


class FirstBlocks:
    """Hidden states after the first blocks, their mean over the prompt and that of its last token, [2 D].

    The planes are the model's own; keys and values of one prompt are all it adds. Calls take turns.
    """

    def __init__(self, model: Any, precision: str, blocks: int = BLOCKS) -> None:
        longest = getattr(model.config, "max_position_embeddings", None) or MOST
        self.most = min(MOST, int(longest))
        self.decoder = RowDecoder(model, slots=1, room=self.most, blocks=blocks)
        # inputs of 8 bits are told apart as well, in two thirds of the time
        self.setting = self.decoder.setting(precision, "int8")
        self.lock = threading.Lock()

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the compiled decoder reads this model."""
        return supported(model)

    def __call__(self, tokens: Sequence[int]) -> Array:
        """The states of one prompt."""
        with self.lock:
            hidden_TD = self.decoder.step([TokenRows(self.setting, 0, 0, list(tokens)[-self.most :])]).double().numpy()
        return np.concatenate([hidden_TD.mean(0), hidden_TD[-1]])


def main_parts(states_NE: Array, count: int) -> Array:
    """The `count` directions in which the states of prompts differ most, [E, count], each scaled to unit spread."""
    centred = states_NE - states_NE.mean(0)
    _, spread, rows = np.linalg.svd(centred, full_matrices=False)
    kept = min(count, int((spread > 1e-9 * max(spread[0], 1e-30)).sum()))
    return (rows[:kept] / spread[:kept, None] * np.sqrt(len(states_NE))).T
