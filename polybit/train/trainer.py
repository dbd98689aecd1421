"""PrecisionTrainer: transformers' Trainer over a model whose precision changes from one pass to the next."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_accelerate_available

from polybit.core.runtime import PolybitError, atomic_path, track, write_json
from polybit.hub.files import read_json
from polybit.train import world
from polybit.train.balance import Balance, Gradient, add, combine, settled
from polybit.train.cascade import decoder_blocks
from polybit.train.forward import logits_of
from polybit.train.picker import Picker, Probed
from polybit.train.probe import forget
from polybit.train.schedules import every
from polybit.train.sharded import is_sharded, read_moments, read_state, write_moments, write_state
from polybit.train.table import Schedule
from polybit.train.world import gathered

Forward = Callable[[Mapping[str, Tensor], str], Tensor]
Objective = Callable[[Forward, Any, tuple[str, ...]], tuple[Tensor, Mapping[str, float | Tensor]]]
Switch = Callable[[nn.Module, str], object]

WEIGHTS, MOMENTS, BEST, WHOLE = "weights", "moments", "best-", "whole"
SCHEDULE = "schedule.json"
SMALLER = 1 / 3  # the rate after a return to the best weights, in parts of what it was


def settings(
    out: str | Path,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    save_every: int,
    seed: int = 0,
    floor: float = 0.1,
    device: torch.device | None = None,
    **further: Any,
) -> TrainingArguments:
    """The project's defaults as TrainingArguments: AdamW without decay, 5 % warm-up, cosine to `floor`, clip at 1.

    device: where to train (None = a GPU where there is one) · `further` are TrainingArguments by their own names
    (gradient_accumulation_steps, fsdp, report_to, ...).
    """
    if not is_accelerate_available():
        raise PolybitError("training needs the package accelerate (1.1 or newer): pip install 'polybit[train]'")
    chosen: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": floor},
        "warmup_steps": max(1, steps // 20),
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "save_strategy": "steps",
        "save_steps": save_every,
        "save_total_limit": 2,
        "seed": seed,
        "report_to": "none",
        "logging_steps": 10,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        # a loss that is not finite must be seen, not smoothed over
        "logging_nan_inf_filter": False,
        "use_cpu": device.type == "cpu" if device is not None else not torch.cuda.is_available(),
    }
    return TrainingArguments(**(chosen | further))


class PrecisionTrainer(Trainer):
    """Trains one model at several presets, each step at those its schedule names.

    model: what make_trainable returned · objective(forward, batch, presets) -> (loss, logs), where forward(part,
    preset) switches the model and gives logits_BTV; a `part` with the mask "keep_BT" gives only the logits at those
    positions, [N, V], and the others are never computed · schedule(step, presets) -> the presets of that step ·
    switch(model, preset) · gather(rows, step) turns what the dataset holds into the batch, at the moment it is needed,
    so that a dataset of row numbers can stand for answers that change while training.

    An objective with the attribute `separable = True` is a sum over presets: they are then run one at a time, so that
    memory is that of one, and `balance` says how their gradients are put together. probe(model) -> {preset: {"flips",
    "kl", ...}} on held-out prompts every `probe_every` steps; `picker` keeps the best moment and stops a run that
    falls below its start. renew(step) is called before the step, every `renew_every` steps.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        objective: Objective,
        presets: Sequence[str],
        switch: Switch,
        schedule: Schedule = every,
        gather: Callable[[Any, int], Any] | None = None,
        balance: Balance | None = None,
        probe: Callable[[nn.Module], Probed] | None = None,
        probe_every: int = 0,
        picker: Picker | None = None,
        renew: Callable[[int], None] | None = None,
        renew_every: int = 0,
        **trainer: Any,
    ) -> None:
        trainer.setdefault("data_collator", list)
        super().__init__(model, **trainer)
        if world.size() > 1 and not (is_sharded(model) and self.args.world_size == world.size()):
            raise PolybitError(f"{world.size()} processes were started and the model is not spread over them")
        self.core = model
        self.objective: Objective = objective
        self.presets, self.switch, self.schedule = tuple(presets), switch, schedule
        self.gather, self.balance = gather, balance or Balance()
        self.probe, self.probe_every = probe, probe_every
        self.picker = picker or Picker()
        self.renew, self.renew_every = renew, renew_every
        self.heard: dict[str, list[float | Tensor]] = {}
        self.parts: list[Gradient] = []  # gradients of the parts of a step so far, by preset
        # our objectives divide by their own counts; the Trainer must average over accumulated batches
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)  # a bar instead; every number is in the log history
        self.add_callback(_Watch(self))

    # one step ---------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch at the presets of this step; returns the loss for the log."""
        model.eval()  # dropout would be noise the reference does not have
        if self.args.gradient_checkpointing or is_sharded(model):  # only blocks in training are computed again
            for block in decoder_blocks(model):
                block.training = True
        if self.gather is not None:
            inputs = self.gather(inputs, self.state.global_step)
        batch = self._prepare_inputs(dict(inputs)) if isinstance(inputs, Mapping) else inputs
        chosen = tuple(self.schedule(self.state.global_step, self.presets))
        alone = bool(getattr(self.objective, "separable", False)) and len(chosen) > 1
        groups = [(name,) for name in chosen] if alone else [chosen]
        total = torch.zeros((), device=self.args.device)
        gradients: list[list[Tensor | None]] = []
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        before = [parameter.grad for parameter in parameters]
        for group in groups:
            if alone:
                for parameter in parameters:
                    parameter.grad = None
            with self.compute_loss_context_manager():
                loss, logs = self.objective(self.forward_of(model), batch, group)
            if loss.requires_grad:
                self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
            total += loss.detach() / self.current_gradient_accumulation_steps
            self.hear(logs)
            if alone:
                gradients.append([parameter.grad for parameter in parameters])
        if alone and self.balance.how != "sum":  # lengths and conflicts are those of the whole step, not of its parts
            gradients = [both(old, new) for old, new in zip_longest(self.parts, gradients)]
            self.parts = [] if self.accelerator.sync_gradients else gradients
        if alone:
            joined = [None] * len(parameters) if self.parts else combine(gradients, chosen, self.balance)
            for parameter, old, new in zip(parameters, before, joined, strict=True):
                parameter.grad = new if old is None else old if new is None else old + new
        return total

    def forward_of(self, model: nn.Module) -> Forward:
        """forward(part, preset) -> logits, with the model at that preset."""

        def forward(part: Mapping[str, Tensor], preset: str) -> Tensor:
            self.switch(self.core, preset)
            return logits_of(model, part, head_of=self.core)

        return forward

    def hear(self, logs: Mapping[str, float | Tensor]) -> None:
        """Gather what the objective says until the next log; tensors are read only then, so that no step waits."""
        for name, value in logs.items():
            self.heard.setdefault(name, []).append(value)

    def log(self, logs: dict[str, float], *rest: Any, **named: Any) -> None:
        """The Trainer's log with the means of what the objective said since the last one."""
        everywhere = gathered({name: [float(value) for value in values] for name, values in self.heard.items()})
        values = {name: [v for part in everywhere for v in part.get(name, ())] for name in everywhere[0]}
        means = {name: sum(found) / len(found) for name, found in values.items() if found}
        self.heard = {}
        super().log({**logs, **means}, *rest, **named)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: batches are row numbers here."""
        return 0

    # states -----------------------------------------------------------------------------------------------------

    @property
    def out(self) -> Path:
        """Where checkpoints, probes and the best weights are kept."""
        return Path(str(self.args.output_dir))

    def trainable(self) -> dict[str, Tensor]:
        """Name -> parameter of everything that is trained."""
        return {name: p for name, p in self.core.named_parameters() if p.requires_grad}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what is trained and nothing else, every process its share."""
        write_state(Path(output_dir or self.out) / WEIGHTS, self.trainable())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The same of the optimizer, and where the learning rate is."""
        schedule: Any = self.lr_scheduler
        write_moments(Path(output_dir) / MOMENTS, self.core, bare(self.optimizer))
        if world.first():
            write_json(Path(output_dir) / SCHEDULE, schedule.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The inverse of save_model."""
        self.put(Path(resume_from_checkpoint) / WEIGHTS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The inverse of _save_optimizer_and_scheduler."""
        if checkpoint is None:
            return
        schedule: Any = self.lr_scheduler
        read_moments(Path(checkpoint) / MOMENTS, self.core, bare(self.optimizer))
        schedule.load_state_dict(read_json(Path(checkpoint) / SCHEDULE))

    def put(self, path: Path) -> None:
        """Read stored values into the trained parameters."""
        read_state(path, self.trainable())
        forget(self.core)

    @property
    def best_weights(self) -> Path:
        """Where the weights of the best moment are kept."""
        assert self.picker.best is not None
        return self.out / f"{BEST}{self.picker.best['step']}"

    def begin(self) -> Path | None:
        """Take over what an interrupted run left and probe the start of a new one; the checkpoint to go on from."""
        if world.first():
            last_checkpoint(self.out)  # removes what is not whole
        world.wait()
        last = last_checkpoint(self.out)
        self.picker.read(self.out, until=-1 if last is None else int(last.name.rpartition("-")[2]))
        if self.probe is not None and not self.picker.history:
            self.take_probe(0)
        return last

    def fit(self) -> Picker:
        """Train, going on from the output directory's last whole checkpoint, and put the best weights in place."""
        last = self.begin()
        self.balance = settled(self.balance, self.picker.history[0]["presets"] if self.picker.history else {})
        self.train(resume_from_checkpoint=None if last is None else str(last))
        if self.probe is not None and self.picker.best is not None:
            self.put(self.best_weights)
        return self.picker

    def take_probe(self, step: int) -> None:
        """Probe the model now, and keep its weights when they are the best so far."""
        assert self.probe is not None
        self.core.eval()
        with torch.no_grad():
            probed = self.probe(self.core)
        better = self.picker.judge(step, probed)
        if better:
            write_state(self.out / f"{BEST}{step}", self.trainable())
        if world.first():
            self.picker.write(self.out)
            for old in self.out.glob(f"{BEST}*") if better else ():
                if old.name != f"{BEST}{step}":
                    shutil.rmtree(old)
        world.wait()

    def go_back(self) -> None:
        """Take the best weights again and go on from them with smaller steps and without momentum."""
        assert self.optimizer is not None and self.lr_scheduler is not None
        self.put(self.best_weights)
        self.optimizer.state.clear()
        self.lr_scheduler.base_lrs = [rate * SMALLER for rate in self.lr_scheduler.base_lrs]
        for group in self.optimizer.param_groups:
            group["lr"] *= SMALLER


class _Watch(TrainerCallback):
    """Renews material, probes, and stops where the Trainer lets others act."""

    def __init__(self, trainer: PrecisionTrainer) -> None:
        self.trainer = trainer
        self.bar: Iterator[int] = iter(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        left = range(state.global_step, state.max_steps)
        self.bar = iter(track(left, "train", state.max_steps, done=state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        next(self.bar, None)  # the bar goes

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        next(self.bar, None)
        if trainer.renew is not None and trainer.renew_every and state.global_step % trainer.renew_every == 0:
            trainer.core.eval()
            trainer.renew(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        due = trainer.probe_every and state.global_step % trainer.probe_every == 0
        if trainer.probe is not None and (due or state.global_step == state.max_steps):
            trainer.take_probe(state.global_step)
            if trainer.picker.goes_back:
                trainer.go_back()
            control.should_training_stop |= trainer.picker.stopped is not None

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not world.first():
            return
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE
        with atomic_path(path) as staged:
            staged.write_text("")


def both(old: Gradient | None, new: Gradient) -> Gradient:
    """Two gradients added."""
    return new if old is None else [add([a, b]) for a, b in zip(old, new, strict=True)]


def bare(optimizer: Any) -> Any:
    """The optimizer of torch inside what accelerate makes of it."""
    return getattr(optimizer, "optimizer", optimizer)


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that was written to its end; what a kill left half written is removed."""
    while out.is_dir() and (found := get_last_checkpoint(str(out))) is not None:
        if (Path(found) / WHOLE).is_file():
            return Path(found)
        shutil.rmtree(found)
    return None
