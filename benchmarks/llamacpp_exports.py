"""Does llama.cpp say what polybit says with an exported file, and where does the difference come from?

    polybit quantize MODEL --out my-model --group-size 32
    python -m benchmarks.llamacpp_exports my-model --precision w4 --text TEXT --json rows.json
    LLAMA_CPP_LIB_PATH=DIR python -m benchmarks.llamacpp_exports …     # another build, as one with -DGGML_BLAS=ON

One width is exported as GGUF and read by llama.cpp in several ways; each is compared with transformers, which decodes
the same file and computes in 32 bits, by its largest difference of logits, KL and the greedy text of 20 prompts:

    as it comes   llama.cpp's own defaults: inputs of products rounded to the block type's 8 bits (16 for F16 weights),
                  past keys and values kept in 16 bits
    cache in F32  the same with keys and values in 32 bits
    as F32        the control: the file decoded by llama-quantize to F32, nothing is rounded

A build of llama.cpp with a BLAS multiplies batches of 32 tokens and more in F32, with the blocks as they are: there the
first two show the weights alone. polybit itself is the row `polybit`, whose steps and zero points are not rounded to
16 bits; the same prompts give its greedy text.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from polybit.acts.export import export
from polybit.core.affine import Grid
from polybit.core.planes import pack
from polybit.core.runtime import write_json
from polybit.data.text import read_windows
from polybit.hub.checkpoint import save
from polybit.hub.load import load_float, load_quantized
from polybit.hub.models import resolve
from polybit.nn.convert import convert, targets
from polybit.nn.switch import use
from polybit.options.export import ExportOptions
from polybit.quant.rtn import rtn
from polybit.speed.llama import library

HEAD, GREEDY = 32, 32  # tokens of a prompt, tokens that follow
WAYS = ("polybit", "as it comes", "cache in F32", "as F32")
F32, ALL_F32 = 0, 0  # a ggml type, a llama_ftype


def main() -> None:
    """Measure every way, print a line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--precision", required=True)
    parser.add_argument("--symmetric", action="store_true", help="round this float model to --precision about a code")
    parser.add_argument("--dtype", default="fp16", help="of what has no codes, and of what no block holds")
    parser.add_argument("--text", default="embedded-test")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--build", default="llama.cpp", help="name of this build in the rows")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = json.loads(args.json.read_text())["rows"] if args.json and args.json.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        for row in measured(args, Path(folder)):
            rows.append({"model": Path(args.checkpoint).name, "precision": args.precision, **row})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            if args.json:
                write_json(args.json, {"rows": rows})


def measured(args: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for every way to read the file."""
    checkpoint = str(symmetric(args, folder / "symmetric") if args.symmetric else args.checkpoint)
    options = ExportOptions(to="gguf", out=folder / "out", precision=args.precision, dtype=args.dtype, windows=0)
    held = export(checkpoint, options).numbers["layers"]
    file, plain = folder / "out" / "model.gguf", folder / "plain.gguf"
    decoded, tokenizer = load_float(str(file))
    model, _ = load_quantized(resolve(checkpoint))
    use(model, args.precision)
    windows_NT, _ = read_windows(args.text, tokenizer, args.window, count=args.windows)
    prompts_NT, _ = read_windows(args.text, tokenizer, HEAD, count=args.prompts)
    reference, own = Transformers(decoded), Transformers(model)
    expected = [reference.logits(ids_T) for ids_T in windows_NT]
    said = [reference.greedy(ids_T) for ids_T in prompts_NT]
    ours = [own.greedy(ids_T) for ids_T in prompts_NT]
    types = "+".join(sorted(set(held.values())))

    def row(how: str, engine: Transformers | LlamaCpp) -> dict[str, Any]:
        found = [difference(wanted, engine.logits(ids_T)) for wanted, ids_T in zip(expected, windows_NT, strict=True)]
        texts = [engine.greedy(ids_T) for ids_T in prompts_NT]
        return {
            "build": args.build if isinstance(engine, LlamaCpp) else "polybit",
            "type": types,
            "how": how,
            "largest": round(max(d for d, _ in found), 6),
            "range": round(max(float(e.abs().max()) for e in expected), 1),
            "kl": float(f"{sum(kl for _, kl in found) / len(found):.3g}"),
            "same_as_decoded": sum(a == b for a, b in zip(texts, said, strict=True)),
            "same_as_polybit": sum(a == b for a, b in zip(texts, ours, strict=True)),
            "prompts": args.prompts,
        }

    if "as F32" in args.ways:
        to_f32(file, plain)
    for way in args.ways:
        given = plain if way == "as F32" else file
        yield row(way, own if way == "polybit" else LlamaCpp(given, args.window, plain_cache=way != "as it comes"))


def symmetric(args: Any, out: Path) -> Path:
    """A checkpoint of one width whose zero is a code, one of all weights: Q4_0 and Q5_0 hold it."""
    model, tokenizer = load_float(resolve(args.checkpoint))
    bits = int(args.precision.removeprefix("w"))
    planes = {each.name: pack(rtn(each.weight_OI(model), None, Grid(bits, 32, "level"))) for each in targets(model)}
    save(convert(model, planes), out, tokenizer=tokenizer, widths=(bits,), notes={"base_model": args.checkpoint})
    return out


class Transformers:
    """A transformers model as a function of tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def logits(self, ids_T: Tensor) -> Tensor:
        """[T, V], of one batch."""
        return self.model(ids_T[None]).logits[0].float()

    def greedy(self, ids_T: Tensor) -> list[int]:
        """The likeliest tokens that follow, whatever they are."""
        count = {"max_new_tokens": GREEDY, "min_new_tokens": GREEDY}
        ids_BT = self.model.generate(ids_T[None], do_sample=False, eos_token_id=None, pad_token_id=0, **count)
        return ids_BT[0, len(ids_T) :].tolist()


class LlamaCpp:
    """A GGUF file in llama.cpp as the same, on one thread."""

    def __init__(self, file: Path, window: int, *, plain_cache: bool) -> None:
        self.llama = llama = library()
        options = llama.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(str(file).encode(), options)
        context = llama.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = max(window, HEAD + GREEDY)
        context.n_threads = context.n_threads_batch = 1
        if plain_cache:
            context.type_k = context.type_v = F32
            context.flash_attn_type = 0  # off: it computes in 16 bits
        self.state = llama.llama_init_from_model(self.model, context)
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def __del__(self) -> None:
        self.llama.llama_free(self.state)
        self.llama.llama_model_free(self.model)

    def clear(self) -> None:
        """Forget the text."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.state), True)

    def read(self, tokens: list[int], start: int) -> Tensor:
        """Logits [T, V] of tokens from a position on, in one batch."""
        batch = self.llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, start + at, 1
            batch.seq_id[at][0], batch.logits[at] = 0, True
        assert self.llama.llama_decode(self.state, batch) == 0
        found = np.ctypeslib.as_array(self.llama.llama_get_logits(self.state), (len(tokens), self.vocabulary)).copy()
        self.llama.llama_batch_free(batch)
        return torch.from_numpy(found)

    def logits(self, ids_T: Tensor) -> Tensor:
        """[T, V], of one batch."""
        self.clear()
        return self.read(ids_T.tolist(), 0)

    def greedy(self, ids_T: Tensor) -> list[int]:
        """The likeliest tokens that follow, whatever they are."""
        found = [int(self.logits(ids_T)[-1].argmax())]
        while len(found) < GREEDY:
            found.append(int(self.read(found[-1:], len(ids_T) + len(found) - 1)[-1].argmax()))
        return found


def difference(wanted_TV: Tensor, got_TV: Tensor) -> tuple[float, float]:
    """(largest difference of a logit, KL(wanted || got) in nats per token)."""
    p_TV, q_TV = (log_softmax(values.double(), -1) for values in (wanted_TV, got_TV))
    return float((wanted_TV - got_TV).abs().max()), float((p_TV.exp() * (p_TV - q_TV)).sum(-1).mean())


def to_f32(source: Path, out: Path) -> None:
    """A file of blocks decoded to F32 by llama.cpp's own quantizer."""
    llama = library()
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.allow_requantize = ALL_F32, 1, True
    assert llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options)) == 0


if __name__ == "__main__":
    main()
