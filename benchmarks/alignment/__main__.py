"""Alignment: what each objective gives at equal prompts and steps. Rows go to a JSON-lines file, tables come from it.

    python benchmarks/alignment run --model MODEL --prompts FILE --text FILE --work DIR --bits 3 --rows start,kd
    python benchmarks/alignment elastic ... --widths 8,4,3,2 --rows elastic@3e-4:turns=w4/w3/w2:chained=4/3/2
    python benchmarks/alignment table --work DIR

MODEL is any float causal LM (tinychat for the embedded one, whose own generator gives prompts and text). A row is
`name[@learning rate][:key=value...]`, as in kd@3e-4 or kd@1e-3:focus=doubt:strength=2. Rows already in the file are not
run again; several processes may write to one file. Equal prompts, tokens and steps for all: `--steps` x `--batch`
float answers; a pair counts as one prompt.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import rows
import tables
import torch
from bench import Bench, Setting

from polybit.train.fit import Course


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("act", choices=("run", "table", "elastic", "prepare"))
    parser.add_argument("--model", default="tinychat")
    parser.add_argument("--prompts", default="embedded")
    parser.add_argument("--text", default="embedded")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bits", default="3")
    parser.add_argument("--widths", default="8,4,3,2")
    parser.add_argument("--start", default="rtn", help="rtn, awq, gptq, with commas")
    parser.add_argument("--rows", default="start,kd")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--probes", type=int, default=6)
    for name in ("train", "probe", "held-out", "max-tokens", "group-size", "items"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Setting, name.replace("-", "_"), None))
    parser.add_argument("--no-eos", dest="eos", action="store_false")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="the file of rows (default: rows.jsonl in the work directory)")
    return parser.parse_args()


def main() -> None:
    """Run rows or print tables."""
    args = arguments()
    path = args.out or args.work / "rows.jsonl"
    if args.act == "table":
        return tables.write([path])
    torch.set_num_threads(1)
    given = {f.name: getattr(args, f.name) for f in fields(Setting) if getattr(args, f.name) is not None}
    bench = Bench(Setting(**given))
    starts, widths = args.start.split(","), tuple(map(int, args.widths.split(",")))
    if args.act == "prepare":  # what every process would otherwise make for itself
        for bits in map(int, args.bits.split(",")):
            for start in starts:
                bench.material(start, bits)
        bench.start("nested", 8, widths)
        return None
    course = Course(
        steps=args.steps, batch=args.batch, probes=args.probes, further={"save_strategy": "no"},
    )  # fmt: skip
    done = tables.read(path) if path.is_file() else []
    for seed in map(int, args.seeds.split(",")):
        for spec in args.rows.split(","):
            if args.act == "elastic":
                key = {"row": spec, "widths": list(widths), "seed": seed}
                if not known(done, key):
                    keep(path, rows.elastic(bench, spec, widths, seed, course))
                continue
            for bits in map(int, args.bits.split(",")):
                for start in starts:
                    key = {"row": spec, "bits": bits, "start": start, "seed": seed}
                    if not known(done, key):
                        keep(path, [rows.run(bench, spec, bits, start, seed, course)])


def known(done: list[dict], key: dict) -> bool:
    """Whether a row was measured before."""
    return any(all(row.get(k) == v for k, v in key.items()) for row in done)


def keep(path: Path, records: list[dict]) -> None:
    """Append rows in one write, so that processes side by side do not mix, and say what they are."""
    shortened = json.loads(json.dumps(records), parse_float=lambda text: round(float(text), 5))
    whole = "".join(json.dumps(record) + "\n" for record in shortened)
    handle = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    os.write(handle, whole.encode())
    os.close(handle)
    for r in records:
        m = r["measured"]
        tokens = sum(m["tokens"])
        print(
            f"{r['row']} w{r['bits']} {r['start']} seed {r['seed']}: flips {sum(m['flips']) / tokens:.4f} "
            f"KL {sum(m['kl']) / tokens:.5f} ppl {np.exp(np.mean(m['nll'])):.3f} t* {np.mean(m['shared']):.2f} "
            f"task {np.mean(m.get('task', [0])):.3f} kept {r.get('kept')} {r['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
