"""Adapters on disk as the library peft keeps them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from polybit.core.runtime import PolybitError, atomic_path, write_json
from polybit.hub.directory import ADAPTER_FILES, ADAPTERS, MANIFEST, adapter_of
from polybit.hub.files import read_json
from polybit.nn.adapters import Lora, plug, plugged

CONFIG, WEIGHTS = ADAPTER_FILES
PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def save_peft(adapters: Mapping[str, Lora], out: Path, *, base_model: str) -> Path:
    """Write the adapters of one preset (layer name -> adapter) as peft reads them: a configuration and 16-bit factors.

    `PeftModel.from_pretrained(model, out)` loads them onto the float model or any model with these layer names.
    """
    from safetensors.torch import save_file

    if not adapters:
        raise PolybitError("there is no adapter to save: train with --adapter lora")
    some = next(iter(adapters.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": len(some.down_RI),
        "lora_alpha": some.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(adapters),
    }
    tensors = {}
    for name, lora in adapters.items():
        tensors[f"{PREFIX}{name}{DOWN}"] = lora.down_RI.detach().half()
        tensors[f"{PREFIX}{name}{UP}"] = lora.up_OR.detach().half()
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / WEIGHTS) as staged:
        save_file(tensors, staged, metadata={"format": "pt"})
    write_json(out / CONFIG, config)
    return out


def load_peft(path: Path) -> dict[str, Lora]:
    """The adapters of one preset, layer name -> adapter, from the two files; no other layout is read."""
    from safetensors.torch import load_file

    config = read_json(path / CONFIG)
    alpha = config.get("lora_alpha")
    if config.get("peft_type") != "LORA" or not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise PolybitError(f"{path / CONFIG} describes no plain LoRA adapter: give the directory training wrote")
    try:
        tensors = load_file(path / WEIGHTS)
    except Exception as error:
        raise PolybitError(f"{path / WEIGHTS} cannot be read ({error!s:.100}): train the adapter again") from error
    found = {}
    for key, down_RI in tensors.items():
        if not key.startswith(PREFIX) or not key.endswith(DOWN):
            continue
        name = key[len(PREFIX) : -len(DOWN)]
        up_OR = tensors.get(f"{PREFIX}{name}{UP}")
        if up_OR is None or up_OR.ndim != 2 or down_RI.ndim != 2 or up_OR.shape[1] != down_RI.shape[0]:
            raise PolybitError(f"{path / WEIGHTS} holds no pair of factors for {name!r:.120}: train the adapter again")
        lora = Lora(up_OR.shape[0], down_RI.shape[1], len(down_RI), down_RI.float(), alpha=float(alpha))
        lora.load_state_dict({"down_RI": down_RI.float(), "up_OR": up_OR.float()})
        found[name] = lora.requires_grad_(False)
    if not found:
        raise PolybitError(f"{path / WEIGHTS} holds no LoRA factors: give the directory training wrote")
    return found


def write_adapters(model: nn.Module, directory: Path, *, base_model: str) -> None:
    """The adapters that a model's presets have, as files of its checkpoint, a folder per preset."""
    for preset, loras in plugged(model).items():
        if Path(preset).name != preset or preset in (".", ".."):
            raise PolybitError(
                f"the preset {preset!r:.80} has an adapter and no name that a folder can have: rename it"
            )
        save_peft(loras, directory / ADAPTERS / preset, base_model=base_model)


def read_adapters(model: nn.Module, directory: Path) -> None:
    """Give the presets of a model the adapters that the manifest of its checkpoint lists; others are passed by."""
    manifest = directory / MANIFEST
    listed = read_json(manifest).get("files", {}) if manifest.is_file() else {}
    for preset in sorted({preset for preset in map(adapter_of, listed) if preset is not None}):
        plug(model, {name: {preset: lora} for name, lora in load_peft(directory / ADAPTERS / preset).items()})
