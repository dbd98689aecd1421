"""GGUF, the one file that llama.cpp reads: weights in blocks of 32, the tokenizer and the chat template.

Q4_1 and Q5_1 hold `scale · code + minimum` and so every width of a nested file up to 5 bits; Q4_0, Q5_0 and Q8_0 hold
`scale · (code − zero)` for one zero of all weights. What fits none is written decoded, as a 16-bit float.
Scales and minima are float16, whose least is 6e-8: layers with smaller ones are written in 32 bits where `exact`.
llama.cpp turns neighbouring pairs of a head by position, Hugging Face halves: rows of q and k are reordered for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polybit.core.runtime import PolybitError
from polybit.export.check import moves
from polybit.export.gguf_words import write_words
from polybit.export.table import EXPORTERS
from polybit.export.weights import Material, ReadWeight

NAME, FILE = "gguf", "model.gguf"
BLOCK = 32
ARCHITECTURES = {"llama": "llama", "mistral": "llama"}  # model_type of a configuration -> what llama.cpp calls it
TURNED = ("q_proj", "k_proj")


def library() -> Any:
    """The gguf package."""
    try:
        import gguf
    except ImportError as error:
        raise PolybitError("--to gguf needs the package gguf: run pip install 'polybit[export]'") from error
    return gguf


def write(material: Material, stage: Path) -> None:
    """Fill a directory with one GGUF file."""
    gguf, config = library(), material.model.config
    architecture = check_model(config)
    writer = gguf.GGUFWriter(stage / FILE, architecture)
    write_numbers(writer, config)
    write_words(writer, material.tokenizer, config)
    names = tensor_names(gguf, config)
    for name, tensor in material.floats():
        kind, data = floats(gguf, tensor)
        writer.add_tensor(names(name), rows_for(name, data, config), raw_dtype=kind)
    for name in material.layers:
        kind, data = layer(gguf, material, name)
        writer.add_tensor(names(f"{name}.weight"), rows_for(name, data, config), raw_dtype=kind)
        material.held[name] = kind.name
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def layer(gguf: Any, material: Material, name: str) -> tuple[Any, np.ndarray]:
    """The type that holds a quantized layer, with its bytes: blocks, a 16-bit float, or 32 bits where it must be."""
    weight = material.fit(name, EXPORTERS[NAME], NAME)
    found = None if weight is None else blocks(gguf, weight)
    if found is None:
        found = floats(gguf, material.decoded(name, material.dtype))
    if material.exact and moves(material, name, as_floats(gguf, *found)):
        return floats(gguf, material.decoded(name))
    return found


def check_model(config: Any) -> str:
    """llama.cpp's name of the architecture; refused when it is another, or turns positions in a way of its own."""
    if config.model_type not in ARCHITECTURES:
        raise PolybitError(
            f"--to gguf knows the architectures {', '.join(ARCHITECTURES)}, this model is {config.model_type}: use "
            "--to dense and llama.cpp's convert_hf_to_gguf.py"
        )
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") not in ("default", "linear"):
        raise PolybitError(
            f"--to gguf writes positions of type default or linear, this model has {rope['rope_type']}: use "
            "--to dense and llama.cpp's convert_hf_to_gguf.py"
        )
    return ARCHITECTURES[config.model_type]


def write_numbers(writer: Any, config: Any) -> None:
    """Sizes of the model, as its configuration has them."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(str(getattr(config, "_name_or_path", "") or "model").rpartition("/")[2])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def tensor_names(gguf: Any, config: Any) -> Any:
    """A function from a tensor's name in the model to its name in a GGUF file."""
    known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(known[ARCHITECTURES[config.model_type]], config.num_hidden_layers)

    def name_of(name: str) -> str:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise PolybitError(f"--to gguf has no place for the tensor {name!r:.120}: use --to dense")
        return found

    return name_of


def floats(gguf: Any, tensor: Tensor) -> tuple[Any, np.ndarray]:
    """A tensor without codes: vectors in 32 bits, as llama.cpp wants them, matrices as they are."""
    kinds = gguf.GGMLQuantizationType
    if tensor.ndim < 2 or tensor.dtype == torch.float32:
        return kinds.F32, tensor.float().numpy()
    return kinds.F16, tensor.half().numpy()


def blocks(gguf: Any, weight: ReadWeight) -> tuple[Any, np.ndarray] | None:
    """The narrowest block type that holds a weight, with its bytes [O, bytes]; None where none does."""
    kinds = gguf.GGMLQuantizationType
    if weight.bits <= 5:
        wide = weight.bits == 5
        if bool((weight.zero_OG == (16 if wide else 8)).all()):
            scale = half_bytes(weight.step_OG)
            return (kinds.Q5_0 if wide else kinds.Q4_0), together(scale, *nibbles(weight, wide=wide))
        scale_OG, minimum_OG = weight.rounded(torch.float16)
        pair = half_bytes(scale_OG), half_bytes(minimum_OG)
        return (kinds.Q5_1 if wide else kinds.Q4_1), together(*pair, *nibbles(weight, wide=wide))
    times = 1 if bool((weight.zero_OG == weight.zero_OG.round()).all()) else 2  # a half-integer centre is one of 2 q
    signed_OI = times * (weight.codes_OI.double() - weight.zero_OG.repeat_interleave(BLOCK, dim=1))
    if bool(((signed_OI != signed_OI.round()) | (signed_OI < -127) | (signed_OI > 127)).any()):
        return None
    codes = signed_OI.to(torch.int8).numpy().reshape(len(signed_OI), -1, BLOCK).view(np.uint8)
    return kinds.Q8_0, together(half_bytes(weight.step_OG / times), codes)


def half_bytes(values_OG: Tensor) -> np.ndarray:
    """One float16 per block as bytes [O, G, 2]."""
    return values_OG.half().numpy()[..., None].view(np.uint8)


def nibbles(weight: ReadWeight, *, wide: bool) -> list[np.ndarray]:
    """Codes [O, G, 16]: column i of a block in the low half of byte i, column i + 16 in the high; fifth bits first."""
    codes = weight.codes_OI.numpy().reshape(len(weight.codes_OI), -1, BLOCK)
    low = (codes[..., :16] & 15) | ((codes[..., 16:] & 15) << 4)
    return [np.packbits(codes >> 4, axis=-1, bitorder="little"), low] if wide else [low]


def together(*parts: np.ndarray) -> np.ndarray:
    """Bytes of a block one after another, blocks of a row one after another: [O, bytes]."""
    joined = np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(joined.reshape(len(joined), -1))


def rows_for(name: str, data: np.ndarray, config: Any, *, back: bool = False) -> np.ndarray:
    """Rows of q and k in llama.cpp's order: of each head, halves become neighbouring pairs; all others as they are."""
    leaf = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if leaf not in TURNED:
        return data
    heads = config.num_attention_heads
    if leaf == "k_proj":
        heads = getattr(config, "num_key_value_heads", None) or heads
    shape = (heads, -1, 2) if back else (heads, 2, len(data) // heads // 2)
    return np.ascontiguousarray(data[np.arange(len(data)).reshape(shape).swapaxes(1, 2).reshape(-1)])


def decode(stage: Path, material: Material) -> Iterator[tuple[str, Tensor]]:
    """Every layer as the gguf package decodes its blocks."""
    gguf, config = library(), material.model.config
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(stage / FILE).tensors}
    names = tensor_names(gguf, config)
    for name in material.layers:
        held = tensors[names(f"{name}.weight")]
        weight_OI = as_floats(gguf, held.tensor_type, held.data)
        yield name, torch.from_numpy(rows_for(name, weight_OI.numpy(), config, back=True))


def as_floats(gguf: Any, kind: Any, data: np.ndarray) -> Tensor:
    """What the gguf package reads in the bytes of a tensor, in float32."""
    return torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32))
