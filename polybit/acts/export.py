"""Write a checkpoint in the format of another engine, and compare what it would read with what polybit reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polybit.compress.plan_files import read_plan
from polybit.compress.sizes import warn_of_width
from polybit.compress.text import window_length
from polybit.core.memory import fits, return_large
from polybit.core.plan import Plan
from polybit.core.precision import FLOAT, Precision
from polybit.core.records import RUN_FILE, Run, read_run
from polybit.core.runtime import PolybitError, warn
from polybit.data.text import read_windows
from polybit.evals.compare import AS_LOADED, EvalMaterial
from polybit.evals.compare import compare as compare_models
from polybit.export.check import compare
from polybit.export.fused import check_fused
from polybit.export.imatrix import write_importance
from polybit.export.weights import Lend, Material, there
from polybit.hub.dense import plain_model
from polybit.hub.directory import absolute, check_output, staged_directory
from polybit.hub.files import read_json
from polybit.hub.lent_checkpoint import open_lent_checkpoint
from polybit.hub.lm import LocalLM
from polybit.hub.load import checkpoint_tokenizer, load_quantized, quantization_of
from polybit.hub.models import own_name, resolve
from polybit.hub.peft import load_peft
from polybit.hub.push import check_repo, push
from polybit.nn.adapters import worn
from polybit.nn.switch import current, use
from polybit.options.checks import plain
from polybit.options.export import ExportOptions
from polybit.options.words import command_line
from polybit.report.exported import export_card

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WINDOW = 128  # tokens of a window on which an export is measured


def export(model: str, options: ExportOptions) -> Run:
    """Write MODEL (a polybit checkpoint) at one precision in the format `options.to` and check what it says."""
    run = Run("export", {"model": model, **plain(options)})
    with run.timed():
        if absolute(options.out) == absolute(Path(resolve(model))):
            raise PolybitError(f"--out {options.out} is MODEL itself, which would be lost: choose another directory")
        check_output(options.out, overwrite=options.overwrite)
        if options.push is not None:
            check_repo(options.push)
        evaluated = None if options.eval is None else read_run(options.eval, "eval")["numbers"]
        material = material_of(model, options)
        if options.exporter.fused:
            check_fused(material.layers, options.to)
        with staged_directory(options.out, overwrite=options.overwrite) as stage:
            options.exporter.writer(material, stage)
            if material.tokenizer is not None and not options.exporter.whole:
                material.tokenizer.save_pretrained(stage)
            if options.imatrix:
                write_importance(material, stage, windows_of(material.model, material.tokenizer, options), options.text)
            run.numbers = checked(material, stage, options)
            left_out = ("overwrite", "push", "private", "push_dry_run")
            command = command_line("export", own_name(model), options, leave_out=left_out)
            record = {**run.to_json(), "command": command, "parent": evaluated or measured_before(model)}
            (stage / "README.md").write_text(
                export_card(parent_of(material), record, options.exporter), encoding="utf-8"
            )
    if options.push is not None:
        sent = push(options.out, options.push, private=options.private, dry_run=options.push_dry_run)
        run.numbers["pushed"] = sent
    return run


def material_of(model: str, options: ExportOptions) -> Material:
    """The checkpoint at the precision that was asked for."""
    if quantization_of(resolve(model), trust_remote_code=options.trust_remote_code) is None:
        raise PolybitError(f"{model} is a float model: quantize it first, with `polybit quantize {model} --out DIR`")
    loaded, tokenizer, lend = opened(resolve(model), options)
    if options.precision is not None:
        path = Path(options.precision)
        if path.suffix == ".json":
            use(loaded, read_plan(path, "--precision"))
        else:
            use(loaded, options.precision)
            warn_of_width(loaded, options.precision)
    check_weights_only(current(loaded))
    adapters = worn(loaded)
    if options.adapter is not None:
        if adapters:
            raise PolybitError(f"preset {options.precision} has an adapter of its own: leave --adapter out")
        adapters = load_peft(options.adapter)
    return Material.of(loaded, DTYPES[options.float_type], adapters, tokenizer, exact=options.exact, lend=lend)


def opened(path: str, options: ExportOptions) -> tuple[nn.Module, Any, Lend]:
    """A checkpoint, its tokenizer, and what lends its tensors a layer at a time; whole where it is to run on a text."""
    trust = options.trust_remote_code
    if options.imatrix:
        return *load_quantized(path, trust_remote_code=trust), there
    return_large()
    lent = open_lent_checkpoint(path, trust_remote_code=trust)
    return lent.model, checkpoint_tokenizer(path, trust_remote_code=trust), lent.lend


def check_weights_only(plan: Plan) -> None:
    """Refuse activation bits: a file of weights cannot tell an engine how to round its inputs."""
    for precision in (plan.default, *plan.layers.values()):
        if precision != Precision(w=precision.w):
            raise PolybitError(
                f"precision {precision} rounds more than weights, and an export holds weights alone: "
                f"give {'float' if precision.w == FLOAT else f'w{precision.w}'}, or serve it with `polybit serve`"
            )


def checked(material: Material, stage: Path, options: ExportOptions) -> dict[str, Any]:
    """The numbers of an export: its size, how each layer is held, and how what is read differs from ours."""
    difference = compare(material, options.exporter.decoder(stage, material))
    files = {path.name: path.stat().st_size for path in sorted(stage.iterdir())}
    numbers: dict[str, Any] = {
        "precision": str(current(material.model)) if options.precision is None else options.precision,
        "bytes": sum(files.values()),
        "files": files,
        "layers": dict(material.held),
        "difference": difference.to_json(),
    }
    asked = difference.differing and options.windows and material.tokenizer is not None
    if asked and may_measure(material, options):
        numbers["measured"] = measured(material, stage, options)
    return numbers


def may_measure(material: Material, options: ExportOptions) -> bool:
    """Whether there is memory for both decoded models; says so where there is none."""
    weights = sum(layer.rows * layer.columns for layer in material.layers.values())
    size = 2 * 4 * (weights + sum(tensor.numel() for _, tensor in material.floats()))
    if fits(size, None):
        return True
    warn(
        f"what {options.out} differs by is not measured on text: the weights of both, decoded, would take "
        f"{size / 1e9:.1f} GB; --windows 0 leaves it out in silence"
    )
    return False


def measured(material: Material, stage: Path, options: ExportOptions) -> dict[str, Any]:
    """What the difference does: the exported weights against ours, both decoded, on some text."""
    weights = ((name, material.decoded(name)) for name in material.layers)
    exact = replace(material, dtype=torch.float32)
    ours = plain_model(material.model, exact.floats(), weights, torch.float32)
    theirs = plain_model(material.model, material.floats(), options.exporter.decoder(stage, material), torch.float32)
    tokenizer = material.tokenizer
    windows_NT = windows_of(ours, tokenizer, options)
    result = compare_models(LocalLM(ours, tokenizer), LocalLM(theirs, tokenizer), [None], EvalMaterial(windows_NT))
    row = result["presets"][AS_LOADED]
    return {"kl": row["kl"], "top1": row["top1"], "tokens": result["text"]["tokens"], "text": options.text}


def windows_of(model: Any, tokenizer: Any, options: ExportOptions) -> torch.Tensor:
    """Token windows [N, T] of the text on which an export is measured."""
    length = min(WINDOW, window_length(model, None))
    return read_windows(options.text, tokenizer, length, count=options.windows, seed=0)[0]


def parent_of(material: Material) -> str:
    """The float model that the checkpoint says it was made from."""
    config: Any = material.model.config
    description = config.to_dict()["quantization_config"]
    return str(description["notes"].get("base_model", "unknown"))


def measured_before(model: str) -> Mapping[str, Any] | None:
    """What the checkpoint itself was measured at against its float model, where its run was kept."""
    path = Path(resolve(model)) / RUN_FILE
    return read_json(path).get("numbers", {}).get("measured") if path.is_file() else None
