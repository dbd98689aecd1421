"""A training run as one of several processes, for test_sharded: what it logged, its weights and its bytes in a file."""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from polybit.train import align, fit, world
from polybit.train.align import run
from polybit.train.balance import Balance
from polybit.train.distill import Distillation
from polybit.train.fit import Course
from polybit.train.latent import Freedom
from polybit.train.preference import Preference
from polybit.train.sharded import local_bytes
from tests.train.tiny_run import material, trainable

KINDS = {  # what is trained -> (widths, freedom and adapter, objective)
    "latents": ((3,), {"scales": "recomputed"}, Distillation()),
    "learned": ((4, 3), {"scales": "learned"}, Distillation()),
    "nested": ((3,), {"scales": "learned", "adapter": "nested", "base": False}, Preference()),
    "lora": ((4, 3), {"scales": "learned", "adapter": "lora"}, Distillation()),
    "balanced": ((4, 3), {"scales": "learned", "balance": Balance("project")}, Distillation()),
    "chained": ((4, 2), {"scales": "frozen", "chained": (4, 2)}, Distillation()),
}


def main(kind: str, out: str, kill_at: int = -1) -> None:
    torch.set_num_threads(1)
    widths, more, objective = KINDS[kind]
    with world.joined("cpu"):
        adapter, balance = more.pop("adapter", "none"), more.pop("balance", Balance())
        model = trainable(widths, freedom=Freedom(**more), adapter=adapter)
        plain, seen = align.Gather, {}
        keep = fit.PrecisionTrainer.training_step

        def step(self, *given, **named):
            found = keep(self, *given, **named)
            moments = [t for state in self.optimizer.state.values() for t in state.values()]
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            seen["bytes"] = local_bytes([*self.model.parameters(), *gradients, *moments])
            seen["buffers"] = sum(b.numel() * b.element_size() for b in self.model.buffers())
            return found

        fit.PrecisionTrainer.training_step = step
        align.Gather = lambda *a: (
            lambda rows, at: (
                os.kill(os.getpid(), signal.SIGKILL) if at == kill_at and world.first() else None,
                plain(*a)(rows, at),
            )[1]
        )
        told = {"probes": 3, "balance": balance, "further": {"logging_steps": 1}}
        course = Course(steps=6, batch=8, accumulate=2, learning_rate=1e-3, **told)
        outcome = run(
            model, material().split(8), objective, tuple(f"w{b}" for b in widths), out=Path(out), course=course
        )
        weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        if world.first():
            found = {
                "losses": [entry["loss"] for entry in outcome.log if "loss" in entry],
                "probes": [entry["presets"] for entry in outcome.picker.history],
                "weights": weights.tolist(),
                **seen,
            }
            Path(out + ".json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
