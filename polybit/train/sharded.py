"""A trainable model spread over the processes of a run by FSDP2, and its states as sharded checkpoints (torch DCP).

Every process holds its rows of each weight, gradient and moment; a decoder block is whole while it runs. What a
checkpoint holds does not depend on how many processes wrote it, so that any number goes on from it.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from polybit.core.runtime import PolybitError
from polybit.hub.directory import disk_errors
from polybit.train import world
from polybit.train.cascade import decoder_blocks
from polybit.train.latent import LatentLinear, latent_layers

SOURCE = "source_OI"


def shard(model: nn.Module) -> None:
    """Spread a trainable model over all processes, in place; its blocks are then whole only while they run.

    The float weights of a layer, which no step moves, are spread too. Weights decoded for a pass are let go after it:
    kept, they would be the whole model again.
    """
    for layer in latent_layers(model).values():
        source_OI = layer.source_OI
        del layer._buffers[SOURCE]
        layer.register_parameter(SOURCE, nn.Parameter(source_OI, requires_grad=False))
        layer._let_go = layer.register_forward_hook(let_go)  # type: ignore[assignment]
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (world.size(),))
    for block in decoder_blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    # what a pass decodes of a block is made again for its backward pass: kept for it, it would be the whole model
    checkpointing(model, "enable")({"use_reentrant": False})
    model._is_accelerate_prepared = True  # type: ignore[assignment]  # or accelerate would want to replicate it


def checkpointing(model: nn.Module, what: str) -> Any:
    """How transformers is told to compute blocks again; the first name is that of its newer versions."""
    return getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}")


def let_go(layer: nn.Module, _inputs: Any, _output: Any) -> None:
    """Forget what a layer decoded; the backward pass has what it needs."""
    codes: Any = layer.codes
    for code in codes.values():
        code.forget()


def is_sharded(model: nn.Module) -> bool:
    """Whether it is spread."""
    return isinstance(model, FSDPModule)


@torch.no_grad()
def gather(model: nn.Module) -> None:
    """The inverse of `shard`: every process has the whole model again."""
    whole: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                if id(parameter) not in whole:
                    moved = parameter.full_tensor().clone()
                    whole[id(parameter)] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
                module._parameters[name] = whole[id(parameter)]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            state._pre_forward_hook_handle.remove()
            state._post_forward_hook_handle.remove()
            module.__class__ = type(module).__mro__[2]  # it was (FSDPModule, the class it had)
        if isinstance(module, LatentLinear):
            source: Any = module._parameters.pop(SOURCE)
            module.register_buffer(SOURCE, source.data, persistent=False)
            module._let_go.remove()  # type: ignore[operator, union-attr]
    checkpointing(model, "disable")()
    del model._is_accelerate_prepared


def local_bytes(tensors: Any) -> int:
    """Bytes of tensors in this process: of a spread one, those of its own rows."""
    parts = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(part.numel() * part.element_size() for part in parts)


def write_state(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors, or a state of an optimizer, each process its own rows; whole once this returns."""
    if world.first():
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
    world.wait()
    with disk_errors(path), quiet():
        try:
            dcp.save(dict(tensors), checkpoint_id=path, no_dist=world.size() == 1)
        except dcp.CheckpointException as error:  # no Exception, and its words are tracebacks
            if world.first():
                shutil.rmtree(path, ignore_errors=True)
            raise next(iter(error.failures.values()))[0] from error
    world.wait()


@torch.no_grad()
def read_state(path: Path, tensors: Mapping[str, Any]) -> None:
    """Read what `write_state` wrote into these tensors, however many processes wrote it; another run's is refused."""
    try:
        found = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        shapes = {name: tuple(entry.size) for name, entry in found.items() if hasattr(entry, "size")}
        wanted = {name: tuple(t.shape) for name, t in tensors.items() if isinstance(t, Tensor)}
        if wanted and shapes != wanted:
            raise PolybitError(f"{path} holds the weights of another run: remove its directory or choose another --out")
        with quiet():
            dcp.load(dict(tensors), checkpoint_id=path, no_dist=world.size() == 1)
    except (OSError, dcp.CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise PolybitError(f"{path} cannot be read ({error!s:.100}): remove it and run the command again") from error


def write_moments(path: Path, model: nn.Module, optimizer: Any) -> None:
    """The optimizer's state; nothing where it has none yet, or none any more."""
    if optimizer.state:
        write_state(path, {"moments": get_optimizer_state_dict(model, optimizer)})


def read_moments(path: Path, model: nn.Module, optimizer: Any) -> None:
    """The inverse of write_moments."""
    if not path.is_dir():
        return
    state = {"moments": get_optimizer_state_dict(model, optimizer)}  # begun where it was empty
    read_state(path, state)
    set_optimizer_state_dict(model, optimizer, state["moments"])


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, torch does not warn that a world of one is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
