"""Models for benchmarks/serving.py: the same 4-bit weights as a polybit checkpoint and as GGUF, and the float ones.

    python benchmarks/serving_models.py tinychat|random|HF_DIR OUT

OUT/polybit, OUT/gguf/model.gguf and OUT/float appear. Weights are rounded to nearest in groups of 32 with their zero in
the middle, embedding and head at 8 bits: what Q4_0 and Q8_0 hold exactly, so that both engines read the same numbers.
random: half a billion random weights under the tokenizer of --tokenizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from polybit.acts.export import export
from polybit.compress.ends import hold_ends
from polybit.core.affine import Grid
from polybit.core.planes import pack
from polybit.hub.checkpoint import save
from polybit.hub.models import open_model
from polybit.hub.random_model import Shape, random_float
from polybit.nn.convert import convert, targets
from polybit.options.export import ExportOptions
from polybit.quant.rtn import rtn

BITS, ENDS, GROUP = 4, 8, 32


def original(name: str, tokenizer: str) -> tuple[Any, Any]:
    """A float32 model and its tokenizer."""
    if name != "random":
        model, words = open_model(name)
        return model.float(), words
    words = open_model(tokenizer)[1]
    model = random_float(Shape(vocabulary=len(words)), torch.float32)
    for part in ("bos_token_id", "eos_token_id"):
        setattr(model.config, part, getattr(words, part))  # type: ignore[arg-type]
    return model, words


def main() -> None:
    """Write all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", default="tinychat", help="whose words a random model has")
    given = parser.parse_args()
    model, tokenizer = original(given.model, given.tokenizer)
    given.out.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(given.out / "float")
    tokenizer.save_pretrained(given.out / "float")
    model.float()
    stored, held = {}, []
    for target in targets(model, include_embeddings=True):
        inside = target.kind == "linear" and ".layers." in target.name
        held += [] if inside else [target.name]
        grid = Grid(BITS if inside else ENDS, GROUP, "level")
        stored[target.name] = pack(rtn(target.weight_OI(model), None, grid, search=False))
    convert(model, stored)
    hold_ends(model, held, ENDS, (BITS,))
    save(model, given.out / "polybit", tokenizer=tokenizer, widths=(BITS,))
    export(str(given.out / "polybit"), ExportOptions(to="gguf", out=given.out / "gguf", precision=f"w{BITS}"))


if __name__ == "__main__":
    main()
