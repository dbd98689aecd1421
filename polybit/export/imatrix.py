"""What llama-quantize needs for types of its own: an importance matrix in llama.cpp's GGUF form, and a type per tensor.

A width that no block of GGUF holds exactly stands decoded in the file. llama-quantize makes a type of about that width
of it, and weighs the columns of a weight by the mean square of its inputs, which the importance matrix holds as sums.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polybit.export.gguf import library, tensor_names
from polybit.export.table import IMATRIX, TYPES
from polybit.export.weights import Material

FITTING = {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 7: "q8_0", 8: "q8_0"}  # width -> llama.cpp's type
DECODED = ("F16", "F32")


class Squares:
    """Sums over the tokens a layer saw: of the square of each input column [I], float64, and how many they were."""

    def __init__(self, columns: int) -> None:
        self.sum_I = torch.zeros(columns, dtype=torch.float64)
        self.tokens = 0

    def add(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A hook before the layer runs."""
        x_TI = inputs[0].detach().reshape(-1, len(self.sum_I))
        self.sum_I += x_TI.float().square().sum(0).double().cpu()
        self.tokens += len(x_TI)


@contextmanager
def watched(material: Material) -> Iterator[dict[str, Squares]]:
    """Layer -> sums, filled while the model runs; layers without input columns (embeddings) are left out."""
    found = {n: Squares(layer.columns) for n, layer in material.layers.items() if layer.kind in ("linear", "head")}
    with ExitStack() as hooks:
        for name, sums in found.items():
            hooks.enter_context(material.model.get_submodule(name).register_forward_pre_hook(sums.add))
        yield found


def importance(material: Material, windows_NT: Tensor, *, batch: int = 8) -> dict[str, Squares]:
    """Run the model over windows of tokens at the precision it is exported at."""
    model: Any = material.model
    with torch.inference_mode(), watched(material) as found:
        for ids_BT in windows_NT.split(batch):
            model(input_ids=ids_BT, use_cache=False)
    return found


def write_importance(material: Material, stage: Path, windows_NT: Tensor, text: str) -> None:
    """Put the importance matrix and the types of all layers beside the GGUF file."""
    gguf, found = library(), importance(material, windows_NT)
    names = tensor_names(gguf, material.model.config)
    writer = gguf.GGUFWriter(stage / IMATRIX, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [text])
    writer.add_uint32("imatrix.chunk_count", len(windows_NT))
    writer.add_uint32("imatrix.chunk_size", windows_NT.shape[1])
    for name, sums in found.items():
        tensor = names(f"{name}.weight")
        writer.add_tensor(f"{tensor}.in_sum2", sums.sum_I.float().numpy()[None])
        writer.add_tensor(f"{tensor}.counts", torch.tensor([[float(sums.tokens)]]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rows = types_of(material)
    lines = (f"^{re.escape(names(f'{name}.weight'))}$={kind}\n" for name, kind in rows.items())
    (stage / TYPES).write_text("".join(lines), encoding="utf-8")


def types_of(material: Material) -> Mapping[str, str]:
    """Layer -> llama.cpp's type: what holds it already stays, what is decoded gets the type of its width."""
    return {
        name: FITTING[layer.width] if material.held[name] in DECODED else material.held[name].lower()
        for name, layer in material.layers.items()
    }
