"""A float model whose weights stay in their files: a skeleton that is lent the weights below a path for a while.

    lent = open_lent(name)             # shapes alone; None where the weights cannot be had one by one
    with lent.lend("model.layers.3"):  # this block's weights are there, in float32
        ...
    with lent.calls("model.layers"):   # the whole model can be called, a block of weights there at a time
        ...
    lent.pieces("model.norm.weight")   # any tensor of the model, a piece at a time

What a block is lent is bit for bit what `load_float` would have loaded: names are translated and experts put together
by transformers itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polybit.core.memory import return_freed
from polybit.core.planes import Planes
from polybit.core.runtime import PolybitError
from polybit.hub.files import shards_of
from polybit.hub.lent_calls import head_by_rows, lent_when_called
from polybit.hub.load import check_directory, check_report, fetch, quantization_of
from polybit.hub.pieces import PIECE, Place, raw, read_places
from polybit.hub.skeleton import load_skeleton
from polybit.nn.convert import convert, ends
from polybit.nn.fields import Fields, tensors_of


class Missing:
    """A tensor of a shape and no values, as far as transformers' loader is concerned."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def __getitem__(self, _everything: Any) -> Tensor:
        """The tensor on the meta device."""
        return torch.empty(self.place.shape, dtype=self.place.dtype, device="meta")


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix in a file."""

    place: Place

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.place.shape[0], self.place.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows, in float32."""
        return as_float(self.place.rows(start, stop))


class LentModel:
    """A skeleton and the files its weights come from.

    model: a module tree like any other, its weights on the meta device but for those that are lent just now
    mapping: how the files' names and layouts become the model's; None = they are the model's own
    """

    def __init__(self, name: str, model: nn.Module, places: Mapping[str, Place], mapping: Sequence[Any] | None) -> None:
        self.name, self.model, self.places, self.mapping = name, model, places, mapping
        self.held: set[str] = set()
        self.surrounded = False
        self.device = torch.device("cpu")
        state = model.state_dict()
        self.sources: dict[str, list[str]] = {}  # tensor of the model -> tensors of the files
        self.copied: set[str] = set()  # those that are one tensor of the files, at most renamed
        for key in places:
            known, converted = (key, False) if mapping is None else rename(key, mapping, model, state)
            self.sources.setdefault(known, []).append(key)
            if not converted and known in state and tuple(state[known].shape) == places[key].shape:
                self.copied.add(known)
        self.tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self.files = {path: state_of(path) for path in {place.path for place in places.values()}}

    def on(self, device: torch.device) -> LentModel:
        """Lend weights on a device from now on, where a call of the model computes then."""
        self.device = device
        for module in self.model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[leaf] = buffer.to(device)
        return self

    @contextmanager
    def lend(self, path: str) -> Iterator[None]:
        """While inside, every weight below `path` (a module's or a parameter's) is there, in float32."""
        if any(path == held or path.startswith(f"{held}.") for held in self.held):
            yield
            return
        self.held.add(path)
        try:
            self._load(lambda key: key == path or key.startswith(f"{path}."))
            yield
        finally:
            self.held.discard(path)
            self._take_back(path)
            return_freed()

    @contextmanager
    def entry(self, blocks: str, first: str) -> Iterator[None]:
        """While inside, the model can be called up to its blocks: all small weights outside them are there, the block
        `first` as well, and rows of the embedding are read as they are looked up."""
        with self._around(blocks), self.lend(first):
            yield

    @contextmanager
    def calls(self, blocks: str) -> Iterator[None]:
        """While inside, the model can be called as a whole: each block's weights come when it is called and go after
        it, and a float head is read some rows at a time. Gradients reach hidden states, not weights."""
        with ExitStack() as stack:
            stack.enter_context(self._around(blocks))
            stack.enter_context(head_by_rows(self.model, self))
            for name, module in self.model.get_submodule(blocks).named_children():
                stack.enter_context(lent_when_called(module, partial(self.lend, f"{blocks}.{name}")))
            yield

    @contextmanager
    def _around(self, blocks: str) -> Iterator[None]:
        """All small weights outside the blocks, and an embedding that reads the rows it looks up."""
        if self.surrounded:
            yield
            return
        embedding, head = ends(self.model)
        paths = {module: name for name, module in self.model.named_modules()}
        looked_up = isinstance(embedding, nn.Embedding)
        key = f"{paths.get(embedding)}.weight"
        apart = {f"{paths.get(head)}.weight", *((key,) if looked_up and key in self.copied else ())}
        before = {name for name, parameter in self.model.named_parameters() if not parameter.is_meta}
        self._load(lambda found: not found.startswith(f"{blocks}.") and found not in apart)
        handles: list[Any] = []
        if key in apart and isinstance(embedding, nn.Embedding):
            handles = self._look_up(embedding, self.places[self.sources[key][0]])
        self.surrounded = True
        try:
            yield
        finally:
            self.surrounded = False
            for handle in handles:
                handle.remove()
            for name, parameter in list(self.model.named_parameters()):
                if not parameter.is_meta and name not in before:
                    self._forget(name)

    def place(self, model: nn.Module, planes: Mapping[str, Planes]) -> None:
        """Put quantized modules in the place of weights; what they store is not kept in memory."""
        empty = {
            name: Fields.of(p).planes({leaf: tensor.to("meta") for leaf, tensor in tensors_of(p).items()})
            for name, p in planes.items()
        }
        convert(model, empty)

    def matrix(self, key: str) -> StoredMatrix | None:
        """A matrix of the model to read by rows; None when it does not lie in one piece."""
        key = key if key in self.sources else self.tied.get(key, key)
        if key not in self.copied or len(self.places[self.sources[key][0]].shape) != 2:
            return None
        return StoredMatrix(self.places[self.sources[key][0]])

    def pieces(self, key: str) -> Iterator[Tensor]:
        """The values of one tensor of the model in order, in float32 where they are floats."""
        self._check_files()
        key = key if key in self.sources else self.tied.get(key, key)
        if key in self.copied:
            yield from (as_float(piece) for piece in self.places[self.sources[key][0]].pieces())
            return
        owner, _, leaf = key.rpartition(".")
        if key not in self.sources and not any(name.startswith(f"{owner}.") for name in self.sources):
            yield getattr(self.model.get_submodule(owner), leaf).detach().cpu().flatten()  # a buffer it computes
            return
        with self.lend(owner):
            whole = getattr(self.model.get_submodule(owner), leaf).detach().cpu().flatten()
        yield from whole.split(PIECE // whole.element_size())

    def digest(self) -> str:
        """What `workspace.model_digest` says of the model in memory; refuses NaN and infinity on the way."""
        digest = hashlib.sha256()
        for key in self.model.state_dict():
            digest.update(key.encode())
            for piece in self.pieces(key):
                if piece.is_floating_point() and not bool(torch.isfinite(piece).all()):
                    raise PolybitError(
                        f"the weight {key!r} of {self.name} holds NaN or infinity: repair or fetch the model again, "
                        "quantizing it would spoil every answer"
                    )
                digest.update(raw(piece))
        return_freed()
        return digest.hexdigest()

    def _check_files(self) -> None:
        """Refuse to go on with files that are not those that were opened."""
        for path, before in self.files.items():
            if path.is_file() and state_of(path) != before:
                raise PolybitError(
                    f"{path} was changed while it was read: run the command again, with --restart where it is another "
                    "model now"
                )

    def _load(self, wanted: Callable[[str], bool]) -> None:
        self._check_files()
        found = {key: self.places[key] for known, keys in self.sources.items() if wanted(known) for key in keys}
        if self.mapping is None:
            for key, place in found.items():
                put(self.model, key, as_float(place[...]).to(self.device))
        elif found:
            load_into(self.model, found, self.mapping, device=None if self.device.type == "cpu" else str(self.device))
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def _take_back(self, path: str) -> None:
        for name, parameter in list(self.model.named_parameters()):
            if not parameter.is_meta and (name == path or name.startswith(f"{path}.")):
                self._forget(name)

    def _forget(self, name: str) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        parameter = getattr(module, leaf)
        module._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)

    def _look_up(self, embedding: nn.Embedding, place: Place) -> list[Any]:
        """Hooks that give an embedding the rows of each call, and tokens their places among them."""
        empty, padding = embedding.weight, embedding.padding_idx

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            ids = args[0] if args else kwargs["input"]
            unique_U, at = ids.unique(return_inverse=True)
            rows = [place.rows(row, row + 1) for row in unique_U.tolist()]
            embedding.weight = nn.Parameter(as_float(torch.cat(rows)).to(ids.device), requires_grad=False)
            embedding.padding_idx = None
            return (at, *args[1:]), {name: value for name, value in kwargs.items() if name != "input"}

        def after(*_: Any) -> None:
            embedding.weight, embedding.padding_idx = empty, padding

        return [
            embedding.register_forward_pre_hook(before, with_kwargs=True),
            embedding.register_forward_hook(after, always_call=True),
        ]


def state_of(path: Path) -> tuple[int, int]:
    """What changes with a file: its size, and the time of its last change."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def put(model: nn.Module, key: str, value: Tensor) -> None:
    """Make a tensor the parameter or buffer of that name."""
    owner, _, leaf = key.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def as_float(tensor: Tensor) -> Tensor:
    """In float32, the precision everything is computed in; whole numbers stay."""
    return tensor.float() if tensor.is_floating_point() else tensor


def open_lent(name: str, *, trust_remote_code: bool = False) -> LentModel | None:
    """The float model of a local path or hub id without its weights; None where only the whole can be loaded: weights
    of a kind that is not read in pieces, two tied weights stored apart, a transformers that loads otherwise.

    Refuses what `load_float` refuses, but for weights that are not finite, which `digest` and `lend` meet.
    """
    method = quantization_of(name, trust_remote_code=trust_remote_code)
    if method is not None:
        raise PolybitError(f"{name} is quantized already ({method!s:.40}): give the float model it was made from")
    directory = Path(name) if Path(name).is_dir() else fetch(name)
    check_directory(directory)
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    places = read_places([single] if single.is_file() else shards_of(index))
    model: Any = load_skeleton(name, dtype=torch.float32, trust_remote_code=trust_remote_code)
    mapping = conversions(model)
    if places is None or mapping is None:
        return None
    report = load_into(model, {key: Missing(place) for key, place in places.items()}, mapping, device="meta")
    if not tied_as_stored(model, places):
        return None
    finish(model, report)
    check_report(name, report.to_dict())
    add_generation(model, str(directory))
    return LentModel(name, model.eval(), places, mapping)


def conversions(model: Any) -> list[Any] | None:
    """How names and layouts of the files become those of the model; None where transformers does not say."""
    try:
        from transformers import conversion_mapping, core_model_loading, modeling_utils
    except ImportError:
        return None
    needed = (
        (core_model_loading, "convert_and_load_state_dict_in_model"),
        (core_model_loading, "rename_source_key"),
        (modeling_utils, "LoadStateDictConfig"),
    )
    if not all(hasattr(module, name) for module, name in needed):
        return None
    return list(conversion_mapping.get_model_conversion_mapping(model))


def load_into(model: Any, tensors: Mapping[str, Any], mapping: Sequence[Any], *, device: str | None) -> Any:
    """Let transformers put some tensors of the files into the model; its report."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging

    config = LoadStateDictConfig(
        dtype=torch.float32, weight_mapping=list(mapping), device_map={"": device} if device else None
    )
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would draw a bar for every block
    try:
        with torch.no_grad():
            report, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
    finally:
        if shown:
            logging.enable_progress_bar()
    if report.conversion_errors or report.error_msgs:
        raise PolybitError(f"the weights of {model.config.model_type} could not be put together: report this as a bug")
    return report


def finish(model: Any, report: Any) -> None:
    """What from_pretrained does once all weights are there: buffers that no file holds are computed, weights tied."""
    model.mark_tied_weights_as_initialized(report)
    compute_buffers(model)
    model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(report)


def compute_buffers(model: Any) -> None:
    """Fill the buffers of a skeleton that no file holds: rotary frequencies, masks."""
    model._move_missing_keys_from_meta_to_device(set(), None, None, None)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model._initialize_missing_keys(False)


def tied_as_stored(model: Any, places: Mapping[str, Place]) -> bool:
    """Whether no two weights that the configuration ties are stored apart."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return not any(one in places and other in places for one, other in tied.items())


def add_generation(model: Any, directory: str) -> None:
    """The generation settings beside the weights, where there are any."""
    from transformers import GenerationConfig

    if model.can_generate() and (Path(directory) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)


def rename(key: str, mapping: Sequence[Any], model: Any, state: dict[str, Tensor]) -> tuple[str, bool]:
    """(name in the model of a tensor in the files, whether it is converted on its way)."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    renamed, pattern = rename_source_key(key, renamings, converters, prefix, state)
    if renamed not in state and key in state:
        renamed, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
    return renamed, pattern is not None
