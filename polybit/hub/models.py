"""What a MODEL argument may be: a path, a hub id, a polybit directory, or the name of the embedded model."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = "tinychat"


def resolve(model: str) -> str:
    """Turn `tinychat` into the path of the embedded model, unless a directory of that name lies here."""
    if model == EMBEDDED and not Path(model).exists():
        from polybit.hub.tiny import path

        return str(path())
    return model


def is_embedded(model: str) -> bool:
    """Whether a MODEL argument means the embedded model, by its name or by any path to it."""
    return Path(resolve(model)).resolve() == Path(resolve(EMBEDDED)).resolve()


def own_name(model: str) -> str:
    """How a record names a model: as the user did, the embedded one always by its own name."""
    return EMBEDDED if is_embedded(model) else model


def open_model(model: str, *, trust_remote_code: bool = False, device: str = "cpu"):
    """Load a float model or a polybit checkpoint onto a device (`device_of`): (model in eval mode, tokenizer)."""
    from polybit.hub.load import load

    place = device_of(device)  # refused before anything is loaded
    loaded, tokenizer = load(resolve(model), trust_remote_code=trust_remote_code)
    return loaded.to(place), tokenizer


def device_of(name: str):
    """The device a --device flag means: auto = a GPU where there is one."""
    import torch

    from polybit.core.runtime import PolybitError

    if name == "cuda" and not torch.cuda.is_available():
        raise PolybitError("--device cuda: torch sees no GPU here; leave it out, or install a torch with CUDA")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
