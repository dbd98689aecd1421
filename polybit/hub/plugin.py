"""The transformers quantizer "polybit": from_pretrained loads our checkpoints, wholly or not at all.

Registered when torch is imported (polybit/autoload.py). The weights carry our own file name, so that transformers
without polybit finds none and says so instead of inventing random ones.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from polybit.core.runtime import PolybitError

METHOD = "polybit"
SEEN: dict[Path, list[tuple[str, int, int]]] = {}  # directories validated by this process


class PolybitConfig(QuantizationConfigMixin):
    """The `quantization_config` of a polybit checkpoint, kept as it was read."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)
        self.quant_method = METHOD  # type: ignore[assignment]


class PolybitQuantizer(HfQuantizer):
    """Puts empty quantized modules in place, lets transformers fill them, and refuses a model that is not whole."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.directory: Path | None = None  # the files come from, where it is known
        if not self.pre_quantized:
            raise PolybitError("polybit does not quantize while loading: run `polybit quantize MODEL --out DIR` first")

    def update_attn_implementation(self, config: Any) -> Any:
        """Sees the configuration before the model is built (transformers >= 5.2x)."""
        return self.prepare(config)

    def update_tp_plan(self, config: Any) -> Any:
        """Sees the configuration before the model is built (transformers 5.3 to 5.1x)."""
        return self.prepare(config)

    def update_device_map(self, device_map: Any) -> Any:
        """As the caller says."""
        return device_map

    def prepare(self, config: Any) -> Any:
        """Validate a local directory before anything of the size its numbers claim is built; name our weights file."""
        from polybit.hub.checkpoint import Description

        directory = Path(str(getattr(config, "_name_or_path", "") or ""))
        if (directory / "config.json").is_file():
            validate_once(directory)
        config.transformers_weights = Description.from_json(self.quantization_config.to_dict()).weights
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Swap modules on the meta device, and compare the files with every name and shape the model now has."""
        from polybit.hub.checkpoint import Description
        from polybit.hub.files import read_headers
        from polybit.nn.convert import install, targets

        description = Description.from_json(self.quantization_config.to_dict())
        known = {target.name: target for target in targets(model, include_embeddings=True)}
        unknown = sorted(set(description.layers) - set(known))
        if unknown and all(name.removeprefix(f"{model.base_model_prefix}.") in known for name in unknown):
            raise PolybitError(
                f"{type(model).__name__} lacks the head that this checkpoint has: load it by AutoModelForCausalLM and "
                f"take its `.{model.base_model_prefix}`, or give output_hidden_states=True"
            )
        if unknown:
            raise PolybitError(
                f"the checkpoint quantizes {unknown[0]!r:.120}, which {type(model).__name__} does not have: "
                "its config.json belongs to another model"
            )
        install(model, {name: (known[name], fields, None) for name, fields in description.layers.items()})
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        if files and (files[0].parent / "manifest.json").is_file():
            validate_once(files[0].parent)
        if files:
            self.directory = files[0].parent
            check_names(model, read_headers(files))
        skip_initialization(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Check that every stored tensor arrived as declared; give the model its presets and our save_pretrained."""
        from polybit.core.records import Rotation
        from polybit.hub.cache import keep_packed
        from polybit.hub.checkpoint import Description
        from polybit.hub.peft import read_adapters
        from polybit.nn.board import board_of
        from polybit.nn.linear import QuantWeight
        from polybit.nn.switch import multiply_by, set_presets

        for name, layer in model.named_modules():
            if isinstance(layer, QuantWeight):
                check_layer(name, layer)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.device.type == "meta" and not getattr(model, "hf_device_map", None):
                raise PolybitError(
                    f"the weight {name!r:.120} was not in the checkpoint: it is incomplete, fetch it again"
                )
        description = Description.from_json(self.quantization_config.to_dict())
        set_presets(model, description.presets)
        if self.directory is not None:
            read_adapters(model, self.directory)
        if "rotation" in description.notes:
            board_of(model).rotation = Rotation.from_json(description.notes["rotation"])
        multiply_by(model)  # several times faster than in float and within 1e-4 of it; gradients stay exact
        model.save_pretrained = types.MethodType(save_pretrained, model)
        keep_packed(model)
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Nothing is quantized while loading; transformers compares every shape."""
        return False

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """False: transformers' own writer would leave a mixed directory, so the model's save_pretrained is ours."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters and the float parts can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """transformers' Trainer refuses models that say no."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Switching changes what a layer computes, so `generate` must not freeze it."""
        return False


def validate_once(directory: Path) -> None:
    """Full validation of a directory, not repeated while its files have the same sizes and times."""
    from polybit.hub.checkpoint import validate
    from polybit.hub.directory import files_of

    def signature() -> list[tuple[str, int, int]]:
        found = ((name, path.stat()) for name, path in files_of(directory).items())
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]

    if not directory.is_dir() or SEEN.get(directory.resolve()) != signature():
        validate(directory)
        SEEN[directory.resolve()] = signature()


def check_names(model: Any, header: Any) -> None:
    """Every tensor of the model must be in the files with its shape, and the files must hold nothing else."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    partners = {**ties, **{source: target for target, source in ties.items()}}
    for name, shape in shapes.items():
        if name not in header and partners.get(name) not in header:
            raise PolybitError(f"the weight {name!r:.120} is missing from the checkpoint: fetch or make it again")
        if name in header and header[name][1] != shape:
            raise PolybitError(
                f"the weight {name!r:.120} has shape {header[name][1]} in the file and {shape} by config.json: "
                "one of them was edited, fetch the checkpoint again"
            )
    extra = sorted(set(header) - set(shapes))
    if extra:
        raise PolybitError(f"the checkpoint holds {extra[0]!r:.120}, for which {type(model).__name__} has no place")


def skip_initialization(model: Any) -> None:
    """Mark the parents of quantized layers as initialized: GPT-2's and others would fill a child's float weight.

    A parent with buffers that no file holds (rotary frequencies, masks) is left alone, since these are computed there.
    """
    from polybit.nn.linear import QuantWeight

    for module in model.modules():
        if (
            any(isinstance(child, QuantWeight) for child in module.children())
            and not module._non_persistent_buffers_set
        ):
            module._is_hf_initialized = True


def check_layer(name: str, layer: Any) -> None:
    """The tensors of one layer against its declared numbers."""
    for leaf, (shape, dtype) in layer.fields.tensors().items():
        tensor = getattr(layer, leaf)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise PolybitError(
                f"the tensor {name}.{leaf} was loaded as {tensor.dtype} {tuple(tensor.shape)} instead of {dtype} "
                f"{shape}: fetch the checkpoint again"
            )
        tensor.requires_grad_(False)


def save_pretrained(model: Any, save_directory: Any, **kwargs: Any) -> None:
    """Write a whole polybit checkpoint where transformers would have written its files.

    An existing polybit checkpoint is replaced, as transformers does; pushing to the hub is refused.
    """
    from polybit.hub.checkpoint import save

    if kwargs.get("push_to_hub"):
        raise PolybitError("a polybit model is saved first and uploaded as a folder afterwards: leave push_to_hub out")
    config = model.config.quantization_config
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    save(model, save_directory, widths=tuple(values["widths"]), notes=values["notes"], overwrite=True)


def register() -> None:
    """Make the quantizer known to transformers; calling it again changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(PolybitConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(PolybitQuantizer)


register()
