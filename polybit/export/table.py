"""The formats of other engines by name, and what each can hold; a new one is a file and a line below."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from polybit.core.parts import listed, load

if TYPE_CHECKING:  # the table is read where no torch is loaded
    from pathlib import Path

    from torch import Tensor

Dtype = Literal["bf16", "fp16", "fp32"]
IMATRIX, TYPES = "imatrix.gguf", "tensor-types.txt"  # what llama-quantize is given beside a GGUF file
IMATRIX_COMMAND = (
    f"llama-quantize --imatrix {{path}}/{IMATRIX} --tensor-type-file {{path}}/{TYPES} --token-embedding-type f16 "
    "--output-tensor-type f16 {path}/model.gguf {path}/quantized.gguf Q6_K"
)


@dataclass(frozen=True, slots=True)
class Exporter:
    """One format: `write(material, stage)` fills a directory with it, `decode(stage)` reads what an engine would see.

    write, decode: dotted paths · summary: half a sentence for `--help` · engines: who runs it · file: what the engine
    reads · run: one line that runs it, with {path} · also:
    lines of its other engines · dtypes: float types of scales and of
    weights without codes, the format's own first ·
    widths: bits of the codes it can hold, none = it holds decoded weights · groups: group sizes, none = any · rows:
    whether it holds one group per row · zero:
    which zero points it can hold · kinds: the kinds of layer it holds as codes, the others are decoded · fused: engines
    multiply q, k, v together and gate with up, so that these must share a width and a group size · else_decoded: what
    it cannot hold as codes is decoded, where the other formats refuse · whole: the file holds the tokenizer too · wide:
    a single layer may have 32 bits where the others have 16.
    """

    write: str
    decode: str
    summary: str
    engines: str
    file: str
    run: str
    also: tuple[str, ...] = ()
    dtypes: tuple[Dtype, ...] = ("fp16", "bf16")
    widths: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    rows: bool = False
    zero: Literal["any", "integer"] = "any"
    kinds: tuple[str, ...] = ("linear",)
    fused: bool = False
    else_decoded: bool = False
    whole: bool = False
    wide: bool = False

    @property
    def dtype(self) -> Dtype:
        """The float type taken unless told otherwise."""
        return self.dtypes[0]

    @property
    def writer(self) -> Callable[[Any, Path], None]:
        """The function that fills a directory with a Material (export/weights.py)."""
        return load(self.write)

    @property
    def decoder(self) -> Callable[[Path, Any], Iterator[tuple[str, Tensor]]]:
        """The function that reads it back: (layer, weight in float32 [O, I]) of every quantized layer."""
        return load(self.decode)


EXPORTERS: dict[str, Exporter] = {
    "dense": Exporter(
        "polybit.export.dense:write",
        "polybit.export.dense:decode",
        "decoded weights for whatever reads Hugging Face models",
        "transformers, vLLM, SGLang, TGI and all that read Hugging Face models",
        "model.safetensors",
        'python -c "from transformers import pipeline; '
        "print(pipeline('text-generation', '{path}')('Hello', max_new_tokens=20))\"",
        also=("vllm serve {path}", "python -m sglang.launch_server --model-path {path}"),
        dtypes=("bf16", "fp16", "fp32"),
    ),
    "mlx": Exporter(
        "polybit.export.mlx:write",
        "polybit.export.mlx:decode",
        "codes for Apple silicon",
        "mlx-lm, LM Studio",
        "model.safetensors",
        'mlx_lm.generate --model {path} --prompt "Hello"',
        dtypes=("fp16", "bf16", "fp32"),
        widths=(2, 3, 4, 5, 6, 8),
        groups=(32, 64, 128),
        kinds=("linear", "embedding", "head"),
        wide=True,
    ),
    "gguf": Exporter(
        "polybit.export.gguf:write",
        "polybit.export.gguf:decode",
        "one file for llama.cpp",
        "llama.cpp, Ollama, LM Studio",
        "model.gguf",
        'llama-cli -m {path}/model.gguf -p "Hello"',
        also=("echo FROM {path}/model.gguf > Modelfile && ollama create my-model && ollama run my-model",),
        dtypes=("fp16", "fp32"),
        widths=(4, 5, 8),
        groups=(32,),
        kinds=("linear", "embedding", "head"),
        else_decoded=True,
        whole=True,
        wide=True,
    ),
    "humming": Exporter(
        "polybit.export.humming:write",
        "polybit.export.humming:decode",
        "codes of every width on GPUs, zero points any number",
        "vLLM and SGLang with humming-kernels",
        "model.safetensors",
        "vllm serve {path}",
        also=("python -m sglang.launch_server --model-path {path}",),
        dtypes=("fp16", "bf16"),
        widths=(2, 3, 4, 5, 6, 7, 8),
        groups=(32, 64, 128),
        rows=True,
        fused=True,
    ),
    "compressed-tensors": Exporter(
        "polybit.export.compressed:write",
        "polybit.export.compressed:decode",
        "packed codes with whole zero points, for files made with --bits",
        "vLLM, SGLang, transformers with compressed-tensors",
        "model.safetensors",
        "vllm serve {path}",
        also=("python -m sglang.launch_server --model-path {path}",),
        dtypes=("fp16", "bf16", "fp32"),
        widths=(2, 3, 4, 5, 6, 7, 8),
        groups=(32, 64, 128),
        rows=True,
        zero="integer",
        fused=True,
    ),
    "gptq": Exporter(
        "polybit.export.gptq:write",
        "polybit.export.gptq:decode",
        "the layout of GPTQ, for files made with --bits 4 or 8",
        "vLLM, SGLang, GPTQModel, ExLlama",
        "model.safetensors",
        "vllm serve {path}",
        also=("python -m sglang.launch_server --model-path {path}",),
        dtypes=("fp16",),
        widths=(4, 8),
        groups=(32, 64, 128),
        rows=True,
        zero="integer",
        fused=True,
    ),
}


def holders(*, zero: str = "any") -> str:
    """Formats that hold such zero points, as a sentence lists them."""
    return listed(name for name, part in EXPORTERS.items() if not part.widths or part.zero in ("any", zero))
