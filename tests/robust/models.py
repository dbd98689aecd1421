"""A small trained stand-in: the embedded model, its tokenizer and questions it can answer."""

from functools import lru_cache

import torch

from polybit.core.affine import Grid
from polybit.core.planes import pack
from polybit.data import synth
from polybit.data.squad import Answer, Asked
from polybit.hub.lm import LocalLM
from polybit.hub.models import open_model
from polybit.nn.convert import convert, targets
from polybit.quant.rtn import rtn


@lru_cache(maxsize=1)
def chat() -> LocalLM:
    """The embedded model, quantized to 8 bits by plain rounding."""
    model, tokenizer = open_model("tinychat")
    convert(model, {t.name: pack(rtn(t.weight_OI(model), None, Grid(8, 64, "group"))) for t in targets(model)})
    torch.manual_seed(0)
    return LocalLM(model, tokenizer)


def questions(n: int, seed: int = 3) -> tuple[list[Asked], dict[str, tuple[Answer, ...]]]:
    """Reading questions and their answers."""
    items = synth.items("reading", n, seed)
    asked = [Asked(item.id, item.extras["passage"], item.extras["question"]) for item in items]
    return asked, {item.id: (Answer(item.answer),) for item in items}
