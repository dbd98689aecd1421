"""What `pairs` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from polybit.core.runtime import PolybitError
from polybit.options.checks import Device, EndpointOptions, WorkerOptions, at_least

SHARD = 512  # prompts of a file
GROUP_SIZE = 64
MAX_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class PairsOptions(EndpointOptions, WorkerOptions):
    """What is asked, of which two models, and where their answers go."""

    prompts: str
    """A file (.txt with one per line, .jsonl, .json, .csv, .tsv, .parquet, also as .gz), a named set, or a dataset id
    (owner/name:config:split)."""
    out: Path
    """Directory of the pairs."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server of the float model, as vLLM is, which then writes the float answers: it
    is asked for completions of token ids, and this machine only scores what it says."""
    endpoint_model: str | None = None
    """Name of the float model at the endpoint (default: as MODEL, or the checkpoint, calls it)."""
    precision: str | None = None
    """Precision of the quantized model, as in w3 (default: a checkpoint's narrowest width, w4 for a float model)."""
    reference: str | None = None
    """The float model of a polybit checkpoint (default: the one it says it was made from)."""
    group_size: int = GROUP_SIZE
    """Weights that share a scale where MODEL is a float model: it is then rounded to nearest."""
    limit: int | None = None
    """At most so many prompts."""
    max_tokens: int = MAX_TOKENS
    """Longest answer."""
    top: int | None = None
    """Likeliest tokens of the float model to keep per token (default: all of a vocabulary up to 1024, else 64)."""
    float_only: bool = False
    """Leave out the quantized model's answers: half the time, and enough for every method of align but qdpo that never
    renews them (--refresh-every 0)."""
    shard: int = SHARD
    """Prompts per file; a run that is interrupted goes on after its last file."""
    device: Device = "auto"
    """Where both models answer (auto: a GPU where there is one)."""
    overwrite: bool = False
    """Replace existing pairs at --out."""
    restart: bool = False
    """Forget what an interrupted run has finished instead of going on from there."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""

    def __post_init__(self) -> None:
        EndpointOptions.__post_init__(self)
        WorkerOptions.__post_init__(self)
        if self.endpoint_model is not None and self.endpoint is None:
            raise PolybitError(f"--endpoint-model {self.endpoint_model} needs --endpoint URL")
        at_least(self, max_tokens=1, shard=1, limit=2, top=2)
