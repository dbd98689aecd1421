"""Find the weights of a model that can be quantized, name what stays in float, put quantized modules in their place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor, nn

from polybit.core.planes import Planes
from polybit.core.runtime import PolybitError
from polybit.nn.board import board_of
from polybit.nn.fields import Fields, tensors_of
from polybit.nn.linear import QuantEmbedding, QuantExperts, QuantLinear, QuantWeight, TiedHead

Kind = Literal["linear", "conv1d", "experts", "embedding", "head"]
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
ROUTERS = ("gate", "router", "shared_expert_gate")
TRIED: dict[Any, bool] = {nn.Linear: True}  # subclasses of nn.Linear, and whether they compute the same
UNFIT = {"rwkv": "divides the weights of its projections in place while it runs"}  # model_type -> why


@dataclass(frozen=True, slots=True)
class Target:
    """One weight matrix that can be quantized.

    name: path of its module; for fused experts the path of the parameter · kind: how the module stores it · rows O and
    columns I of the matrix y = W x; the E experts of a fused tensor are stacked, O = E * rows per expert ·
    tied: modules that read the same weight (a tied output head), stored once.
    """

    name: str
    kind: Kind
    rows: int
    columns: int
    experts: int = 1
    tied: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    @property
    def module_name(self) -> str:
        """Path of the module that owns the weight (the Experts module for fused experts)."""
        return self.name.rpartition(".")[0] if self.kind == "experts" else self.name

    def parameter(self, model: nn.Module) -> nn.Parameter:
        """The parameter itself, in the module's own layout and dtype."""
        owner = model.get_submodule(self.module_name)
        return getattr(owner, self.name.rpartition(".")[2] if self.kind == "experts" else "weight")

    def weight_OI(self, model: nn.Module) -> Tensor:
        """The weight in float32 as [output rows, input columns], whatever the module's own layout; no gradient."""
        weight = self.parameter(model).detach().float()
        return weight.T.contiguous() if self.kind == "conv1d" else weight.reshape(self.rows, self.columns)


def targets(model: nn.Module, *, include_embeddings: bool = False) -> list[Target]:
    """Every weight of `model` that can be quantized, in the order the modules are registered.

    nn.Linear and subclasses that compute the same, GPT-2's Conv1D and the fused expert tensors of transformers 5
    (Mixtral, Qwen-MoE and their kin). The input embedding and the output head are added with `include_embeddings`, once
    when they are tied. Routers stay in float: they are tiny and choose which experts run.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family in UNFIT:
        raise PolybitError(
            f"{type(model).__name__} ({family}) {UNFIT[family]}: it cannot be quantized, give another model"
        )
    embedding, head = ends(model)
    found: list[Target] = []
    for name, module in model.named_modules():
        if module is embedding or module is head:
            if include_embeddings:
                found += end_target(model, name, module)
        elif is_router(model, name):
            continue
        elif is_linear(module) and module.weight.numel():
            found.append(Target(name, "linear", module.out_features, module.in_features))
        elif is_conv1d(module):
            columns, rows = module.weight.shape
            found.append(Target(name, "conv1d", rows, columns))
        elif is_experts(module):
            for leaf in EXPERT_WEIGHTS:
                experts, rows, columns = getattr(module, leaf).shape
                found.append(Target(f"{name}.{leaf}".lstrip("."), "experts", experts * rows, columns, experts))
    return found


def ends(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """(input embedding, output head) as the model itself names them, None where it has none."""
    ask_in = getattr(model, "get_input_embeddings", None)
    ask_out = getattr(model, "get_output_embeddings", None)
    return (ask_in() if ask_in else None), (ask_out() if ask_out else None)


def is_tied(model: nn.Module) -> bool:
    """True when the output head reads the input embedding's weight (also before weights are loaded)."""
    embedding, head = ends(model)
    if embedding is None or head is None:
        return False
    if getattr(embedding, "weight", None) is getattr(head, "weight", 0):
        return True
    names = {module: name for name, module in model.named_modules()}
    pair = {f"{names.get(embedding)}.weight", f"{names.get(head)}.weight"}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return any({key, source} == pair for key, source in dict(tied).items())


def end_target(model: nn.Module, name: str, module: nn.Module | None) -> list[Target]:
    """Target of the embedding or the head; a tied head is listed with its embedding, not by itself."""
    embedding, head = ends(model)
    tied = is_tied(model)
    if module is embedding and type(module) is nn.Embedding:
        names = tuple(other for other, found in model.named_modules() if found is head) if tied else ()
        return [Target(name, "embedding", module.num_embeddings, module.embedding_dim, tied=names)]
    if module is head and is_linear(module) and not tied:
        return [Target(name, "head", module.out_features, module.in_features)]
    return []


def is_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """nn.Linear, or a subclass that computes the same, as Falcon's does."""
    kind: Any = type(module)
    if kind not in TRIED:
        TRIED[kind] = issubclass(kind, nn.Linear) and computes_linear(kind)
    return TRIED[kind]


def computes_linear(kind: Any) -> bool:
    """Whether a subclass of nn.Linear computes what nn.Linear does: a small one is made and tried.

    Routers that return several tensors, grouped or low-rank layers are subclasses too, and are told apart by that.
    """
    if kind.forward is nn.Linear.forward:
        return True
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        try:
            layer, x_25 = kind(5, 3), torch.randn(2, 5)
            found, wanted = layer(x_25), nn.functional.linear(x_25, layer.weight, layer.bias)
            return isinstance(found, Tensor) and torch.allclose(found, wanted, atol=1e-5)
        except Exception:  # needs other arguments or other inputs: no plain linear layer
            return False


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Conv1D, a linear layer whose weight is stored as [columns, rows]; recognised without transformers."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, Tensor) and weight.ndim == 2
    )


def is_experts(module: nn.Module) -> bool:
    """Fused experts stored as [experts, rows, columns] with a gated activation and without bias."""
    weights = [getattr(module, leaf, None) for leaf in EXPERT_WEIGHTS]
    if not all(isinstance(weight, nn.Parameter) and weight.ndim == 3 for weight in weights):
        return False
    unusual = ("is_transposed", "has_bias", "has_post_expert_norm")
    biased = any(name.endswith("_bias") for name, _ in module.named_parameters(recurse=False))
    interleaved = not getattr(module, "is_concatenated", True)
    wide, narrow = weights
    assert wide is not None and narrow is not None
    fits = wide.shape[2] == narrow.shape[1] and wide.shape[1] == 2 * narrow.shape[2]
    return fits and not biased and not interleaved and not any(getattr(module, flag, False) for flag in unusual)


def is_router(model: nn.Module, name: str) -> bool:
    """A layer beside an `experts` module that chooses or weighs experts."""
    parent, _, leaf = name.rpartition(".")
    return leaf in ROUTERS and hasattr(model.get_submodule(parent), "experts")


@dataclass(frozen=True, slots=True)
class Leftover:
    """Weights that stay in float: name with layer numbers as `*`, how many, their share of the model, and why."""

    name: str
    parameters: int
    share: float
    reason: str


def left_in_float(model: nn.Module, quantized: Iterable[Target]) -> list[Leftover]:
    """Everything of `model` that `quantized` does not cover, largest first; shares are of all the model's weights."""
    covered = {id(target.parameter(model)) for target in quantized}
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes: dict[tuple[str, str], int] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in covered:
            key = re.sub(r"\.\d+(?=\.)", ".*", name), leftover_reason(model, name)
            sizes[key] = sizes.get(key, 0) + parameter.numel()
    rows = [Leftover(name, size, size / max(total, 1), reason) for (name, reason), size in sizes.items()]
    return sorted(rows, key=lambda row: -row.parameters)


def leftover_reason(model: nn.Module, parameter_name: str) -> str:
    """Why a parameter stays in float, in a few words."""
    owner_name, _, leaf = parameter_name.rpartition(".")
    owner = model.get_submodule(owner_name)
    embedding, head = ends(model)
    kind = type(owner).__name__
    if owner is embedding:
        return "input embedding, tied to the output head" if is_tied(model) else "input embedding"
    if owner is head:
        return "output head"
    if "bias" in leaf:
        return "bias"
    if is_router(model, owner_name):
        return "router of the experts"
    if isinstance(owner, nn.Embedding) or "Embedding" in kind:
        return "position or type embedding"
    if "norm" in kind.lower() or getattr(owner, leaf).ndim == 1:
        return "norm or per-channel vector"
    if getattr(owner, leaf).ndim == 3:
        return f"fused experts in a layout of {kind} that is not supported"
    if is_linear(owner) or is_conv1d(owner):
        return "not chosen"
    return f"{kind} is not a supported kind of layer"


Stored = Mapping[str, tuple[Target, Fields, Mapping[str, Tensor] | None]]


def convert(model: nn.Module, planes: Mapping[str, Planes]) -> nn.Module:
    """Replace the named weights of `model` in place by quantized modules that read `planes`, and return the model.

    Names are those of `targets(model, include_embeddings=True)`. The planes' memory is shared, the float weights are
    let go. Both tensors of a layer's fused experts must be given. Raises PolybitError for a name or a shape that does
    not fit; the model is then unchanged.
    """
    known = {target.name: target for target in targets(model, include_embeddings=True)}
    unknown = sorted(set(planes) - set(known))
    if unknown:
        raise PolybitError(
            f"{len(unknown)} of the quantized weights are no weights of this model, first {unknown[0]!r}: "
            "use the model they were made from"
        )
    install(model, {name: (known[name], Fields.of(p), tensors_of(p)) for name, p in planes.items()})
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = refuse_save  # type: ignore[assignment]
    return model


def refuse_save(*_: object, **__: object) -> None:
    """transformers would write the stored tensors without the numbers that give them their meaning."""
    raise PolybitError("a quantized model is saved with polybit.hub.checkpoint.save(model, tokenizer, directory)")


def install(model: nn.Module, stored: Stored) -> None:
    """Put quantized modules in place: name -> (target, numbers, tensors, or None for empty ones to be loaded)."""
    for name, (target, fields, _) in stored.items():
        if fields.shape != (target.rows, target.columns):
            raise PolybitError(
                f"layer {name!r} has shape {(target.rows, target.columns)}, the quantized weight has {fields.shape}: "
                "use the model it was made from"
            )
    for group in experts_together(stored):
        place_experts(model, group, stored)
    for name, (target, fields, tensors) in stored.items():
        module = model.get_submodule(target.module_name)
        if target.kind == "embedding":
            place_embedding(model, target, QuantEmbedding(fields, tensors, module.weight))  # type: ignore[arg-type]
        elif target.kind != "experts":
            place(model, name, QuantLinear(fields, tensors, getattr(module, "bias", None)))
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantWeight)
        layer.kind = target.kind
    board_of(model).converted(stored)


def place(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` at every path where the module called `name` is used."""
    old = model.get_submodule(name)
    new.train(old.training)
    for path in [path for path, module in model.named_modules(remove_duplicate=False) if module is old]:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


def experts_together(stored: Stored) -> list[str]:
    """Paths of the Experts modules; refused when only one of the two tensors is there."""
    paths = sorted({target.module_name for target, _, _ in stored.values() if target.kind == "experts"})
    for path in paths:
        missing = [leaf for leaf in EXPERT_WEIGHTS if f"{path}.{leaf}" not in stored]
        if missing:
            raise PolybitError(f"{path!r} lacks {missing[0]}: quantize both tensors of the experts or neither")
    return paths


def place_experts(model: nn.Module, path: str, stored: Stored) -> None:
    """Replace one Experts module."""
    halves = []
    for leaf in EXPERT_WEIGHTS:
        _, fields, tensors = stored[f"{path}.{leaf}"]
        halves.append(QuantWeight(fields, tensors))
    experts = stored[f"{path}.{EXPERT_WEIGHTS[0]}"][0].experts
    place(model, path, QuantExperts(halves[0], halves[1], experts, model.get_submodule(path)))


def place_embedding(model: nn.Module, target: Target, new: QuantEmbedding) -> None:
    """Replace the input embedding and the heads tied to it, and take the pair off transformers' list of ties."""
    heads = {name: model.get_submodule(name) for name in target.tied}
    place(model, target.name, new)
    for name, head in heads.items():
        place(model, name, TiedHead(new, getattr(head, "bias", None)))
    ends_named = {f"{name}.weight" for name in (target.name, *target.tied)}
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied:
        model.all_tied_weights_keys = {a: b for a, b in tied.items() if not {a, b} <= ends_named}  # type: ignore


def is_kind(value: object) -> bool:
    """True for the name of a kind of target."""
    return value in get_args(Kind)
