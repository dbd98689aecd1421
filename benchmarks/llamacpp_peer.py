"""Files of llama.cpp and checkpoints of polybit against one float model, by one evaluator: bits and KL at every file.

    python benchmarks/llamacpp_peer.py MODEL --text test.txt --files Q3_K_M.gguf nested@w4 fixed3 [--json OUT]

The GGUF files come from llama.cpp's own tools, with its importance matrix of the text polybit calibrates on:

    convert_hf_to_gguf.py MODEL --outtype f32 --outfile f32.gguf
    llama-imatrix -m f32.gguf -f train.txt -o imatrix -c 512 --chunks 64
    llama-quantize --imatrix imatrix --token-embedding-type q8_0 f32.gguf Q3_K_M.gguf Q3_K_M

What a file decodes to is put into the float model, so that both are read with the same arithmetic and no rounded
activations. Bits: all bytes of the decoder blocks' matrices, scales and zeros among them, over their weights. The
embedding, which is the head here, is at 8 bits in every file. KL(float || file), nats per token, with its standard
error over windows; the ratio of two files is of means over the same windows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from polybit.compress.sizes import default_presets, effective_bits, quantized_layers
from polybit.core.runtime import write_json
from polybit.data.text import read_windows
from polybit.hub.load import load_float, load_quantized
from polybit.hub.models import resolve
from polybit.nn.switch import use

BATCH = 2


def main() -> None:
    """Measure every file, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--files", nargs="+", required=True, help="a .gguf, or a checkpoint, @ a width of it")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer = load_float(resolve(args.model))
    windows, _ = read_windows(args.text, tokenizer, args.window, count=args.windows)
    rows: list[dict[str, Any]] = []
    for file in args.files:
        bits, given = gguf_file(file) if file.endswith(".gguf") else checkpoint(file)
        kl_N = divergences(model, given, windows)
        row = {"file": Path(file).name, "bits": bits, "kl": float(kl_N.mean()), "kl_N": kl_N.tolist()}
        row["error"] = float(kl_N.std() / len(kl_N) ** 0.5)
        rows.append(row)
        print(f"{row['file']:24} {bits:6.3f} bits  KL {row['kl']:.5f} ±{row['error']:.5f}", flush=True)
    if args.json:
        write_json(args.json, {"windows": args.windows, "window": args.window, "rows": rows})


def gguf_file(file: str) -> tuple[float, nn.Module]:
    """Bits per weight of the blocks' matrices, and the model the file decodes to, in float32."""
    tensors = [t for t in GGUFReader(file).tensors if t.name.startswith("blk.") and min(t.shape) > 1 < len(t.shape)]
    bits = 8 * sum(t.n_bytes for t in tensors) / sum(int(t.n_elements) for t in tensors)
    where = Path(file)
    return bits, AutoModelForCausalLM.from_pretrained(where.parent, gguf_file=where.name, dtype=torch.float32)


def checkpoint(spelled: str) -> tuple[float, nn.Module]:
    """Bits per weight of a checkpoint's quantized layers at one width (default: its first), and the model at it."""
    where, _, width = spelled.partition("@")
    model, _ = load_quantized(where)
    use(model, width or default_presets(model)[0])
    ends = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    inside = [layer for layer in quantized_layers(model).values() if id(layer) not in ends]
    bits = sum(effective_bits(layer.planes, layer.reading) for layer in inside)
    return bits / sum(layer.rows * layer.columns for layer in inside), model


@torch.no_grad()
def divergences(model: nn.Module, given: nn.Module, windows_NT: Tensor) -> Tensor:
    """KL(model || given) of every window, nats per token."""
    found = []
    for ids_BT in windows_NT.split(BATCH):
        p_BTV, q_BTV = (log_softmax(m(ids_BT).logits[:, :-1].float(), -1) for m in (model, given))
        found.append((p_BTV.exp() * (p_BTV - q_BTV)).sum(-1).mean(1))
    return torch.cat(found)


if __name__ == "__main__":
    main()
