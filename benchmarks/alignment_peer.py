"""QDPO steps against TRL's DPOTrainer: the same trainable model, pairs, order, batch and optimizer; time and memory.

    python benchmarks/alignment_peer.py pairs --work DIR [--model tinychat | --model random]
    python benchmarks/alignment_peer.py ours  --work DIR [--steps 30]
    python benchmarks/alignment_peer.py trl   --work DIR [--steps 30]

Run `ours` and `trl` one after the other, each is a process of its own. Seconds are of wall clock and of CPU, the pass
of the reference counted; memory is the peak of the resident set minus what it was after the imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch

from polybit.core.plan import Plan
from polybit.data.chat import encode_prompt
from polybit.hub.lm import LocalLM
from polybit.hub.load import load_float
from polybit.hub.models import resolve
from polybit.nn.switch import at, use
from polybit.train.latent import Freedom, make_trainable
from polybit.train.material import Gather, order_of, prepare
from polybit.train.pairs import Pair
from polybit.train.preference import Preference
from polybit.train.probe import forget
from polybit.train.trainer import PrecisionTrainer, settings

PRESET = "w3"


def float_model(name: str):
    """(model, tokenizer): a named one, or a Llama of 26 million random weights with the embedded tokenizer."""
    if name != "random":
        return load_float(resolve(name))
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = load_float(resolve("tinychat"))
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=16000, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(shape).eval(), tokenizer


def make_pairs(args) -> None:
    """Real pairs of a model, or random ones of 48 + 96 tokens that part after 8."""
    if args.model == "random":
        draw = torch.Generator().manual_seed(1)
        rows = torch.randint(4, 16000, (args.count, 48 + 96 + 88), generator=draw).tolist()
        found = [[row[:48], row[48:144], row[48:56] + row[144:]] for row in rows]
    else:
        from polybit.data import synth

        model, tokenizer = float_model(args.model)
        talks = synth.conversations(args.count, 5, split="train")
        prompts = [encode_prompt(tokenizer, talk[:1]) for talk in talks]
        theirs = LocalLM(model, tokenizer).generate_tokens(prompts, max_tokens=48)
        trainable = trainable_of(model)
        with at(trainable, PRESET):
            ours = LocalLM(trainable, tokenizer, keep_decoded=False).generate_tokens(prompts, max_tokens=48)
        forget(trainable)
        found = [list(row) for row in zip(prompts, theirs, ours, strict=True) if row[1] != row[2]]
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "pairs.json").write_text(json.dumps({"model": args.model, "pairs": found}))
    print(len(found), "pairs")


def trainable_of(model):
    """3-bit rounding with straight-through gradients."""
    presets = {PRESET: Plan.uniform(3)}
    return make_trainable(model, presets, group_size=32, zero="group", freedom=Freedom(scales="recomputed"))


def peak_bytes() -> int:
    """Peak resident set of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(args, name: str, rows: list, out: str) -> dict:
    """Reference once, then PrecisionTrainer; no float model stays."""
    model, tokenizer = float_model(name)
    begin = clock()
    pairs = [Pair.of(*row) for row in rows]
    material = prepare(LocalLM(model, tokenizer), pairs, top=1)
    scored = clock()
    model = trainable_of(model)
    objective = Preference(shared=args.shared)
    trainer = PrecisionTrainer(
        model, objective=objective, presets=(PRESET,), switch=use, gather=Gather(material, objective, (PRESET,)),
        args=arguments(args, out), train_dataset=order_of(len(rows), args.steps * args.batch, seed=0),
    )  # fmt: skip
    ready = clock()
    trainer.train()
    return spent(ready, clock(), reference=(begin, scored), log=trainer.state.log_history)


def arguments(args, out: str):
    """The settings of both."""
    return settings(out, steps=args.steps, batch=args.batch, learning_rate=1e-5, save_every=10**6,
                    save_strategy="no", train_sampling_strategy="sequential")  # fmt: skip


def trl(args, name: str, rows: list, out: str) -> dict:
    """DPOTrainer with the float model as its reference."""
    import datasets
    import trl as peer

    reference, tokenizer = float_model(name)
    model = use(trainable_of(float_model(name)[0]), PRESET)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    free = {n for n, p in trainable_of(float_model(name)[0]).named_parameters() if p.requires_grad}
    told = peer.DPOConfig(
        out, beta=0.1, report_to="none", use_cpu=True, per_device_train_batch_size=args.batch, max_length=None,
        bf16=False, gradient_checkpointing=False, disable_dropout=True, logging_steps=10, max_steps=args.steps,
        learning_rate=1e-5, weight_decay=0.0, max_grad_norm=1.0, save_strategy="no", disable_tqdm=True,
        train_sampling_strategy="sequential", precompute_ref_log_probs=False,
    )  # fmt: skip
    order = order_of(len(rows), args.steps * args.batch, seed=0)
    words = [{"prompt": "a", "chosen": "b", "rejected": "c"} for _ in order]
    trainer = peer.DPOTrainer(
        model, reference, told, train_dataset=datasets.Dataset.from_list(words), processing_class=tokenizer
    )
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in free)
    trainer.train_dataset = [
        {"prompt_ids": rows[n][0], "chosen_ids": rows[n][1], "rejected_ids": rows[n][2]} for n in order
    ]
    ready = clock()
    trainer.train()
    return spent(ready, clock(), log=trainer.state.log_history)


def clock() -> tuple[float, float]:
    """(wall, CPU) seconds."""
    return time.perf_counter(), time.process_time()


def spent(begin, end, *, reference=None, log=()) -> dict:
    """Seconds of the steps and of the pass of the reference."""
    found = {"wall": end[0] - begin[0], "cpu": end[1] - begin[1], "reference_cpu": 0.0}
    if reference:
        found["reference_cpu"] = reference[1][1] - reference[0][1]
    found["losses"] = [entry["loss"] for entry in log if "loss" in entry]
    return found


def main() -> None:
    """Measure one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("pairs", "ours", "trl"))
    parser.add_argument("--model", default="tinychat")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--count", type=int, default=480)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--shared", action="store_true", help="the common beginning once (ours)")
    args = parser.parse_args()
    if args.side == "pairs":
        return make_pairs(args)
    kept = json.loads((args.work / "pairs.json").read_text())
    rows = kept["pairs"][: args.steps * args.batch]
    import transformers.trainer  # noqa: F401  so that its imports are in the baseline of both

    if args.side == "trl":
        import datasets  # noqa: F401
        from trl import DPOTrainer  # noqa: F401
    before = peak_bytes()
    with tempfile.TemporaryDirectory() as out:
        found = (ours if args.side == "ours" else trl)(args, kept["model"], rows, out)
    found |= {"peak MiB above imports": round((peak_bytes() - before) / 2**20), "pairs": args.steps * args.batch}
    found["pairs per CPU second"] = found["pairs"] / (found["cpu"] + found["reference_cpu"])
    print(args.side, json.dumps(found))


if __name__ == "__main__":
    main()
