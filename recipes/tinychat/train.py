"""Train the embedded model from nothing.

    python recipes/tinychat/train.py OUT_DIRECTORY --tokens 40e6

One process, one thread, no accelerator. Stops and starts again where it was: run the same command once more. Every
checkpoint is a Hugging Face directory with two files beside it (resume.safetensors, resume.json).
See README.md for the hardware, the minutes and the numbers of the shipped run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import batches
import network as net
import tokenizer as text
import torch
import torch.nn.functional as F
from optimizer import StackedMuon
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

MATRIX_RATE, OTHER_RATE = 0.02, 0.004
WARM_UP_STEPS = 30
DECAY_FROM = 0.6
READ_SHARE, READ_WEIGHT = 0.2, 0.5  # a fifth of what is only read counts, by half: 0.1 on average, at less cost


@dataclass
class Position:
    """How far a run is. `chunk_tokens` is what had been read when the present chunk began."""

    seed: int = 0
    step: int = 0
    tokens: int = 0
    chunk: int = 0
    batch: int = 0
    chunk_tokens: int = 0
    seconds: float = 0.0


class Trainer:
    """Network, optimisers and position of one run; `checkpoint` and `resume` are exact inverses."""

    def __init__(self, shape: net.Shape, tokenizer: Tokenizer, *, total: int, batch_tokens: int, seed: int) -> None:
        self.tokenizer, self.total, self.batch_tokens = tokenizer, total, batch_tokens
        self.network = net.Network(shape, seed)
        self.position = Position(seed=seed)
        self._optimisers()

    def _optimisers(self) -> None:
        parts = {"qkv": 3, "gate_up": 2, "o": 1, "down": 1}
        named = dict(self.network.named_parameters())
        matrices = {
            name: (p, parts[name.split(".")[2]]) for name, p in named.items() if p.ndim == 2 and "blocks" in name
        }
        self.others = {name: p for name, p in named.items() if name not in matrices}
        self.muon = StackedMuon(matrices)
        self.adamw = torch.optim.AdamW(
            self.others.values(), lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    @property
    def done(self) -> float:
        return self.position.tokens / self.total

    def chunk(self) -> list[batches.Batch]:
        """The batches of the present chunk."""
        place = self.position
        return batches.chunk(
            self.tokenizer, place.seed, place.chunk, place.chunk_tokens / self.total, self.batch_tokens
        )

    def step(self, batch: batches.Batch) -> float:
        """One update; returns the mean loss on the assistant's tokens in nats."""
        place = self.position
        chance = torch.Generator().manual_seed(place.seed * 1_000_003 + place.step)
        role_BT = batch.role_BT[:, 1:]
        read_BT = (role_BT == 1) & (torch.rand(role_BT.shape, generator=chance) < READ_SHARE)
        chosen_BT = (role_BT == 2) | read_BT
        hidden_ND = self.network.hidden(batch.ids_BT[:, :-1])[chosen_BT]
        logits_NV = hidden_ND @ self.network.embedding.weight.T
        loss_N = F.cross_entropy(logits_NV, batch.ids_BT[:, 1:][chosen_BT], reduction="none")
        said_N = role_BT[chosen_BT] == 2
        weight_N = torch.where(said_N, 1.0, READ_WEIGHT)
        ((loss_N * weight_N).sum() / weight_N.sum()).backward()
        rate = min(1.0, place.step / WARM_UP_STEPS) * min(1.0, (1.0 - self.done) / (1.0 - DECAY_FROM) + 0.01)
        nn.utils.clip_grad_norm_(self.others.values(), 1.0)
        self.adamw.param_groups[0]["lr"] = OTHER_RATE * rate
        self.adamw.step()
        self.muon.step(MATRIX_RATE * rate)
        self.network.zero_grad(set_to_none=True)
        place.step += 1
        place.batch += 1
        place.tokens += batch.tokens
        return loss_N.detach()[said_N].mean().item()

    def next_chunk(self) -> None:
        self.position.chunk += 1
        self.position.batch = 0
        self.position.chunk_tokens = self.position.tokens

    def checkpoint(self, directory: Path) -> None:
        """Write a Hugging Face directory and what is needed to go on, then put it in place at once."""
        unfinished = directory.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_model(self.network, self.tokenizer, unfinished)
        state: dict[str, Tensor] = dict(self.muon.state())
        for name, parameter in self.others.items():
            for key, value in self.adamw.state[parameter].items():
                state[f"adamw.{name}.{key}"] = value
        save_file(state, unfinished / "resume.safetensors")
        (unfinished / "resume.json").write_text(json.dumps(asdict(self.position), indent=1) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        unfinished.rename(directory)

    def resume(self, directory: Path) -> None:
        """Go back to a checkpoint."""
        self.network = net.from_hugging_face(load_file(directory / "model.safetensors"), self.network.shape)
        self._optimisers()
        state = load_file(directory / "resume.safetensors")
        self.muon.load(state)
        for name, parameter in self.others.items():
            prefix = f"adamw.{name}."
            self.adamw.state[parameter] = {
                key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
            }
        self.position = Position(**json.loads((directory / "resume.json").read_text()))


def write_model(network: net.Network, tokenizer: Tokenizer, directory: Path) -> None:
    """A directory that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    text.write(tokenizer, directory)
    save_file(net.to_hugging_face(network), directory / "model.safetensors", metadata={"format": "pt"})
    config = net.hugging_face_config(network.shape, bos=batches.BEGIN, eos=batches.END, pad=batches.PAD)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "bos_token_id": batches.BEGIN,
        "eos_token_id": batches.END,
        "pad_token_id": batches.PAD,
        "do_sample": False,
        "max_new_tokens": 128,
    }
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def run(trainer: Trainer, out: Path, *, saves: int, stop_after: int | None = None) -> None:
    """Train to the end, with `saves` checkpoints at equal distances and a line in log.jsonl every hundred steps."""
    place = trainer.position
    began, mean = time.time() - place.seconds, None
    next_save = int(trainer.done * saves) + 1
    with (out / "log.jsonl").open("a") as log:
        while trainer.done < 1:
            for batch in trainer.chunk()[place.batch :]:
                loss = trainer.step(batch)
                mean = loss if mean is None else 0.98 * mean + 0.02 * loss
                if place.step % 100 == 0:
                    place.seconds = time.time() - began
                    log.write(json.dumps(asdict(place) | {"loss": round(mean, 4)}) + "\n")
                    log.flush()
                if trainer.done >= next_save / saves or place.step == stop_after:
                    place.seconds = time.time() - began
                    trainer.checkpoint(out / f"step-{place.step:06d}")
                    next_save = int(trainer.done * saves) + 1
                if place.step == stop_after:
                    return
                if trainer.done >= 1:
                    break
            trainer.next_chunk()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=float, default=40e6, help="length of the whole run")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--stop-after", type=int, default=None, help="stop at this step, with a checkpoint")
    knobs = parser.parse_args()
    torch.set_num_threads(1)
    knobs.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        net.Shape(layers=knobs.layers),
        text.train(),
        total=int(knobs.tokens),
        batch_tokens=knobs.batch_tokens,
        seed=knobs.seed,
    )
    saved = sorted(path for path in knobs.out.glob("step-*") if path.suffix != ".unfinished")
    if saved:
        trainer.resume(saved[-1])
    run(trainer, knobs.out, saves=knobs.saves, stop_after=knobs.stop_after)


if __name__ == "__main__":
    main()
