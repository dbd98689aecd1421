"""Score checkpoints of the embedded model, and what rounding its weights does to them.

    python recipes/tinychat/evaluate.py CHECKPOINT... --items 200 --log LOG.jsonl    one line per checkpoint (a minute)
    python recipes/tinychat/evaluate.py CHECKPOINT --items 1500 --free 200 --seed 1 --out recipes/tinychat/scores.json

Every prompt has one right reply, so greedy decoding gives it exactly when the most likely token is right at every place
of the reply, its end included: one forward pass scores a batch and nothing is generated. `--free` checks that claim.
Rounding is plain round-to-nearest on the matrices of the blocks; the embedding, which is also the output, stays float.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import batches
import network as net
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from polybit.data import synth

SHORT = (("w4 channel", 4, 0), ("w3 channel", 3, 0), ("w2 channel", 2, 0), ("w3 g64", 3, 64), ("w2 g64", 2, 64))
LONG = (
    *((f"w{bits} channel", bits, 0) for bits in range(8, 1, -1)),
    *((f"w{bits} g{group}", bits, group) for group in (64, 32) for bits in (4, 3, 2)),
)


@dataclass(frozen=True)
class Rows:
    """A batch of items; said_BT marks the tokens of the reply that is scored, in the coordinates of ids_BT[:, 1:]."""

    ids_BT: Tensor
    said_BT: Tensor
    items: tuple[synth.Item, ...]


def rows(tokenizer: Tokenizer, items: list[synth.Item], size: int = 64) -> list[Rows]:
    """Items in batches of similar length."""
    whole = [[*item.messages, {"role": "assistant", "content": item.answer}] for item in items]
    encoded = sorted(zip(batches.encode(tokenizer, whole), items, strict=True), key=lambda pair: len(pair[0][0]))
    out = []
    for start in range(0, len(encoded), size):
        part = encoded[start : start + size]
        ids_BT = batches.pad([row for row, _ in part]).ids_BT
        place_T = torch.arange(ids_BT.shape[1])
        last_B = torch.where(ids_BT == batches.BOT, place_T, -1).amax(1)
        said_BT = (place_T > last_B[:, None]) & (ids_BT != batches.PAD)
        out.append(Rows(ids_BT, said_BT[:, 1:], tuple(item for _, item in part)))
    return out


def load(directory: Path) -> net.Network:
    """The network of a Hugging Face directory."""
    config = json.loads((directory / "config.json").read_text())
    shape = net.Shape(
        vocabulary=config["vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        feed_forward=config["intermediate_size"],
    )
    return net.from_hugging_face(load_file(directory / "model.safetensors"), shape).eval()


def round_to_nearest(weight_OI: Tensor, bits: int, group: int) -> Tensor:
    """`group` 0: one symmetric scale per row; otherwise scale and zero per `group` columns."""
    parts_OGI = weight_OI.view(weight_OI.shape[0], -1, group or weight_OI.shape[1])
    if not group:
        top = 2 ** (bits - 1) - 1
        scale_OG1 = parts_OGI.abs().amax(-1, keepdim=True).clamp_min(1e-9) / top
        return ((parts_OGI / scale_OG1).round().clamp(-top - 1, top) * scale_OG1).view_as(weight_OI)
    low_OG1, high_OG1 = parts_OGI.amin(-1, keepdim=True).clamp(max=0), parts_OGI.amax(-1, keepdim=True).clamp(min=0)
    scale_OG1 = (high_OG1 - low_OG1).clamp_min(1e-9) / (2**bits - 1)
    zero_OG1 = (-low_OG1 / scale_OG1).round()
    codes_OGI = ((parts_OGI / scale_OG1).round() + zero_OG1).clamp(0, 2**bits - 1)
    return ((codes_OGI - zero_OG1) * scale_OG1).view_as(weight_OI)


def rounded(network: net.Network, bits: int, group: int) -> net.Network:
    """A copy with every matrix of the blocks rounded."""
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if name.startswith("blocks") and weight.ndim == 2:
                weight.copy_(round_to_nearest(weight, bits, group))
    return twin


def log_probabilities(network: net.Network, data: list[Rows]) -> Iterator[tuple[Rows, Tensor]]:
    """For every batch the log-probabilities (nats) at the tokens of its replies."""
    with torch.inference_mode():
        for part in data:
            hidden_ND = network.hidden(part.ids_BT[:, :-1])[part.said_BT]
            yield part, F.log_softmax(hidden_ND @ network.embedding.weight.T, dim=-1)


def measure(network: net.Network, data: list[Rows], reference: list[Tensor] | None = None) -> dict:
    """Exact replies in per cent by task; against the float model's log-probabilities also KL and flipped tokens."""
    right: dict[str, list[bool]] = defaultdict(list)
    divergence, flips, loss, margins = [], [], [], []
    for index, (part, logp_NV) in enumerate(log_probabilities(network, data)):
        gold_N = part.ids_BT[:, 1:][part.said_BT]
        loss.append(F.nll_loss(logp_NV, gold_N, reduction="none"))
        top_N2 = logp_NV.topk(2).values
        margins.append(top_N2[:, 0] - top_N2[:, 1])
        wrong_BT = torch.zeros_like(part.said_BT)
        wrong_BT[part.said_BT] = logp_NV.argmax(-1) != gold_N
        for item, wrong in zip(part.items, wrong_BT.any(1).tolist(), strict=True):
            for label in labels(item):
                right[label].append(not wrong)
        if reference:
            true_NV = reference[index]
            divergence.append((true_NV.exp() * (true_NV - logp_NV)).sum(-1))
            flips.append(true_NV.argmax(-1) != logp_NV.argmax(-1))
    record = {label: proportion(values) for label, values in sorted(right.items())}
    record["loss"] = round(torch.cat(loss).mean().item(), 5)
    record["median margin"] = round(torch.cat(margins).median().item(), 3)
    if reference:
        kl_N, flip_N = torch.cat(divergence), torch.cat(flips)
        record["kl"] = float(f"{kl_N.mean().item():.3g}")
        record["kl 99.9 %"] = float(f"{kl_N.quantile(0.999).item():.3g}")
        record["flips %"] = round(100 * flip_N.float().mean().item(), 3)
    return record


def labels(item: synth.Item) -> list[str]:
    """The groups that an item is counted in."""
    found = [item.task]
    if item.extras.get("new_pair"):
        found.append(f"{item.task}, new pair")
    if item.task == "dialogue":
        found.append(f"dialogue, {item.extras['kind']}")
    return found


def proportion(values: list[bool]) -> dict:
    """Per cent, with a 95 % interval (Wilson, 1927) and the number of items."""
    n, share, z = len(values), sum(values) / len(values), 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return {
        "%": round(100 * share, 2),
        "low": round(100 * (centre - half), 2),
        "high": round(100 * (centre + half), 2),
        "n": n,
    }


def controls(network: net.Network, data: list[Rows]) -> dict:
    """The scorer itself: replies of other items, and the right replies, must score near 0 and 100."""
    shuffled, gold, total = 0, 0, 0
    for part, logp_NV in log_probabilities(network, data):
        answers = [item.answer for item in part.items]
        shuffled += sum(a == b for a, b in zip(answers, answers[1:] + answers[:1], strict=True))
        gold_N = part.ids_BT[:, 1:][part.said_BT]
        perfect_NV = F.one_hot(gold_N, logp_NV.shape[-1])
        gold += int((perfect_NV.argmax(-1) == gold_N).all()) * len(answers)
        total += len(answers)
    return {"shuffled replies %": round(100 * shuffled / total, 2), "right replies %": round(100 * gold / total, 2)}


def free_running(directory: Path, items: list[synth.Item]) -> dict:
    """Generate with transformers and compare the text; arithmetic also by the number after ####."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(items), 32):
        part = items[start : start + 32]
        prompt = tokenizer.apply_chat_template(
            [list(item.messages) for item in part],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            ids_BT = model.generate(**prompt, max_new_tokens=96, do_sample=False)[:, prompt["input_ids"].shape[1] :]
        for item, ids_T in zip(part, ids_BT, strict=True):
            reply = tokenizer.decode(ids_T, skip_special_tokens=True)
            right[item.task].append(reply == item.answer)
            right[item.task + ", ended"].append(bool((ids_T == batches.END).any()))
            if item.task == "arithmetic":
                right["arithmetic, number"].append(reply.rpartition("#### ")[2] == str(item.extras["number"]))
    return {label: proportion(values) for label, values in sorted(right.items())}


def score(directory: Path, *, items: int, seed: int, variants: tuple, free: int = 0) -> dict:
    """Everything about one checkpoint."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    drawn = {task: synth.items(task, items, seed) for task in synth.TASKS}
    data = rows(tokenizer, [item for part in drawn.values() for item in part])
    network = load(directory)
    result: dict = {"checkpoint": directory.name, "items per task": items, "seed": seed}
    resume = directory / "resume.json"
    if resume.exists():
        result |= {key: json.loads(resume.read_text())[key] for key in ("step", "tokens", "seconds")}
    result["float"] = measure(network, data)
    result["controls"] = controls(network, data)
    reference = [logp_NV for _, logp_NV in log_probabilities(network, data)]
    result["rounded"] = {
        name: measure(rounded(network, bits, group), data, reference) for name, bits, group in variants
    }
    if free:
        result["free running"] = free_running(directory, [item for part in drawn.values() for item in part[:free]])
    return result


def line(result: dict) -> dict:
    """The figures of one checkpoint that a reader of the log wants to see."""
    short = {key: result[key] for key in ("checkpoint", "tokens", "seconds") if key in result}
    short["float"] = {key: value["%"] if isinstance(value, dict) else value for key, value in result["float"].items()}
    for name, record in result["rounded"].items():
        short[name] = {task: record[task]["%"] for task in synth.TASKS} | {
            key: record[key] for key in ("kl", "kl 99.9 %", "flips %")
        }
    return short


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--items", type=int, default=200, help="items per task")
    parser.add_argument("--seed", type=int, default=0, help="choose the checkpoint with one seed, report with another")
    parser.add_argument("--free", type=int, default=0, help="items per task to generate for, too")
    parser.add_argument("--log", type=Path, help="append one short line per checkpoint")
    parser.add_argument("--out", type=Path, help="write the whole record of the last checkpoint, at every width")
    knobs = parser.parse_args()
    torch.set_num_threads(1)
    variants = LONG if knobs.out else SHORT
    for directory in knobs.checkpoints:
        result = score(directory, items=knobs.items, seed=knobs.seed, variants=variants, free=knobs.free)
        text = json.dumps(line(result))
        print(text, flush=True)
        if knobs.log:
            with knobs.log.open("a") as log:
                log.write(text + "\n")
        if knobs.out:
            knobs.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
