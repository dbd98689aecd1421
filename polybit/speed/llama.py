"""llama.cpp beside our own: GGUF files through llama_cpp where it is installed, random ones of any size if asked."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from polybit.core.runtime import PolybitError, atomic_path
from polybit.hub.random_model import Shape
from polybit.speed.timing import Job

TYPES = {"Q8_0": 7, "Q6_K": 18, "Q5_K": 16, "Q4_K": 14, "Q4_0": 2, "Q3_K": 11, "Q2_K": 10}  # name -> llama_ftype


def available() -> bool:
    """Whether llama_cpp can be imported."""
    return importlib.util.find_spec("llama_cpp") is not None


def library() -> Any:
    """The llama_cpp bindings, quiet."""
    import llama_cpp

    if not hasattr(library, "quiet"):
        library.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # type: ignore[attr-defined]
        llama_cpp.llama_log_set(library.quiet, ctypes.c_void_p(0))  # type: ignore[attr-defined]
        llama_cpp.llama_backend_init()
    return llama_cpp


class Session:
    """One GGUF model in memory, decoding greedily on a number of threads."""

    def __init__(self, path: Path, *, threads: int, room: int) -> None:
        self.llama = llama = library()
        self.path = path
        options = llama.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise PolybitError(f"{path} could not be loaded by llama.cpp: give a GGUF file of a text model")
        context = llama.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = max(room, 64)
        context.n_threads = context.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, context)
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def clear(self) -> None:
        """Forget the text."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)

    def read(self, tokens: list[int]) -> int:
        """Read tokens; the likeliest next one."""
        held = (self.llama.llama_token * len(tokens))(*tokens)  # the batch keeps its address only
        batch = self.llama.llama_batch_get_one(held, len(tokens))
        if self.llama.llama_decode(self.context, batch):
            raise PolybitError(f"llama.cpp could not read {len(tokens)} tokens with {self.path}: leave this file out")
        logits = self.llama.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def decode(self, count: int) -> None:
        """Greedy tokens from an empty text."""
        self.clear()
        token = 1
        for _ in range(count):
            token = self.read([token])

    def prompt(self, tokens: list[int]) -> None:
        """One pass over a prompt."""
        self.clear()
        self.read(tokens)

    def size(self) -> tuple[int, float]:
        """Bytes one decoding step reads (all tensors but the embedding), bits per weight of the whole file."""
        whole = int(self.llama.llama_model_size(self.model))
        count = int(self.llama.llama_model_n_params(self.model))
        looked_up = self.vocabulary * int(self.llama.llama_model_n_embd(self.model))
        return int(whole * (count - looked_up) / count), 8 * whole / count

    def close(self) -> None:
        """Give the memory back."""
        self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)


def jobs(path: Path, name: str, *, threads: int, prompt: list[int], tokens: int) -> list[Job]:
    """Decoding and reading a prompt with one GGUF file."""
    session = Session(path, threads=threads, room=max(len(prompt), tokens) + 1)
    size, bits = session.size()
    return [
        Job(f"llama.cpp {name}", "llama.cpp", lambda _: session.decode(tokens), 1, size * tokens, 0, bits, tokens),
        Job(f"prompt {name}", "llama.cpp prompt", lambda _: session.prompt(prompt), 1, 0, 0, bits, len(prompt)),
    ]


def random_files(shape: Shape, names: list[str], cache: Path, *, threads: int, pure: bool) -> dict[str, Path]:
    """GGUF files of a random Llama, kept in `cache` for the next run.

    Types are mixed as llama.cpp does by itself (the smallest mixture of that name), or `pure`: one type throughout.
    """
    found = {}
    for name in names:
        if name not in TYPES:
            raise PolybitError(f"llama.cpp type {name!r} is not known here: choose from {', '.join(TYPES)}")
        path = cache / f"{label(shape)}-{name}{'-pure' if pure else ''}.gguf"
        if not path.is_file():
            source = cache / f"{label(shape)}-F16.gguf"
            if not source.is_file():
                with atomic_path(source) as staged:
                    write_random(shape, staged)
            with atomic_path(path) as staged:
                quantize(source, staged, TYPES[name], threads, pure=pure)
        found[name] = path
    (cache / f"{label(shape)}-F16.gguf").unlink(missing_ok=True)
    return found


def label(shape: Shape) -> str:
    """A file name that tells sizes apart."""
    sizes = (shape.layers, shape.hidden, shape.intermediate, shape.vocabulary, shape.heads, shape.kv_heads)
    return "random-llama-" + "x".join(map(str, sizes))


def write_random(shape: Shape, path: Path) -> None:
    """A float16 GGUF file of a Llama with random weights and no vocabulary."""
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise PolybitError("random GGUF files need the gguf package: run pip install gguf") from error

    draw = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    narrow = shape.hidden // shape.heads * shape.kv_heads

    def matrix(name: str, rows: int, columns: int) -> None:
        values = draw.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)
        writer.add_tensor(name, values.astype(np.float16))

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(shape.hidden, dtype=np.float32))

    matrix("token_embd.weight", shape.vocabulary, shape.hidden)
    matrix("output.weight", shape.vocabulary, shape.hidden)
    norm("output_norm.weight")
    for block in range(shape.layers):
        place = f"blk.{block}."
        norm(place + "attn_norm.weight")
        norm(place + "ffn_norm.weight")
        matrix(place + "attn_q.weight", shape.hidden, shape.hidden)
        matrix(place + "attn_k.weight", narrow, shape.hidden)
        matrix(place + "attn_v.weight", narrow, shape.hidden)
        matrix(place + "attn_output.weight", shape.hidden, shape.hidden)
        matrix(place + "ffn_gate.weight", shape.intermediate, shape.hidden)
        matrix(place + "ffn_up.weight", shape.intermediate, shape.hidden)
        matrix(place + "ffn_down.weight", shape.hidden, shape.intermediate)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, path: Path, kind: int, threads: int, *, pure: bool) -> None:
    """A float GGUF file in another type, by llama.cpp itself."""
    llama = library()
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.pure = kind, threads, pure
    if llama.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(options)):
        raise PolybitError(f"llama.cpp could not quantize {source}: leave llama.cpp out with --no-peers")
