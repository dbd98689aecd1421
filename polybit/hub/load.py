"""Load a float model or a polybit checkpoint: the one door through which the project calls from_pretrained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polybit.core.runtime import PolybitError, check_spelling
from polybit.hub.checkpoint import METHOD
from polybit.hub.directory import restore
from polybit.hub.files import check_sizes, read_headers, read_json, shards_of
from polybit.hub.gguf_file import is_gguf, open_gguf
from polybit.hub.quiet import calling_hub, quiet

HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # in folders too
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


def load(
    name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """A float model or a polybit checkpoint, by local path or hub id: (model in evaluation mode, tokenizer).

    Raises PolybitError with one sentence for everything a user can get wrong.
    """
    name = str(name_or_path)
    if is_gguf(name):
        return load_float(name, dtype=dtype)
    if quantization_of(name, trust_remote_code=trust_remote_code) == METHOD:
        return load_quantized(name, dtype=dtype, trust_remote_code=trust_remote_code)
    return load_float(name, dtype=dtype, trust_remote_code=trust_remote_code)


def load_float(
    name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """A float causal LM and its tokenizer, from safetensors or one GGUF file, and never with code from the model's own
    files unless `trust_remote_code`.

    Refused, naming the cause: a missing path or configuration, another kind of model, weights that are missing,
    unexpected, truncated, pickled, quantized by other software, NaN or infinite, and a missing tokenizer.
    """
    name = str(name_or_path)
    if is_gguf(name):
        model, tokenizer = open_gguf(name, dtype=dtype)
        check_weights(model, name)
        return model, tokenizer
    method = quantization_of(name, trust_remote_code=trust_remote_code)
    if method is not None:
        raise PolybitError(f"{name} is quantized already ({method!s:.40}): give the float model it was made from")
    if Path(name).is_dir():
        check_directory(Path(name))
    model = open_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
    check_weights(model, name)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    return guarded(model, tokenizer), tokenizer


def load_quantized(
    name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """A polybit checkpoint: (model in evaluation mode at all stored bits, tokenizer or None when none was saved).

    One named by a hub id is fetched whole first, so that its manifest can be checked like that of a local one.
    """
    from polybit.hub import plugin

    path = Path(name_or_path)
    if not path.is_dir():
        path = fetch(str(name_or_path))
    plugin.validate_once(path)
    plugin.register()
    model = open_model(str(path), dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = checkpoint_tokenizer(str(path), trust_remote_code=trust_remote_code)
    return guarded(model, tokenizer), tokenizer


def checkpoint_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a polybit checkpoint, None when none was saved."""
    path = Path(name) if Path(name).is_dir() else fetch(name)
    if not any((path / file).is_file() for file in TOKENIZER_FILES):
        return None
    return load_tokenizer(str(path), trust_remote_code=trust_remote_code)


def fetch(name: str) -> Path:
    """Every file of a checkpoint on the hub, in its cache."""
    import huggingface_hub

    try:
        with calling_hub(name):
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=FETCHED))
    except Exception as error:
        raise PolybitError(f"{name} could not be fetched ({first_line(error)}): check the connection") from error


def open_model(name: str, *, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """Call from_pretrained and refuse a model of which any weight did not come from the files."""
    from transformers import AutoModelForCausalLM

    check_architecture(name, trust_remote_code=trust_remote_code)
    open_pretrained: Any = AutoModelForCausalLM.from_pretrained
    try:
        with quiet(name), calling_hub(name):
            model, report = open_pretrained(
                name,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
    except PolybitError:
        raise
    except Exception as error:
        raise PolybitError(
            f"the weights of {name} could not be loaded ({first_line(error)}): check that its files are complete"
        ) from error
    check_report(name, report)
    return model.eval()


def check_report(name: str, report: Mapping[str, Any]) -> None:
    """Refuse a model of which any weight did not come from the files, or whose files hold more."""
    for key, fault in (
        ("missing_keys", "does not hold the weight"),
        ("mismatched_keys", "holds in another shape the weight"),
        ("unexpected_keys", "holds, for another architecture, the weight"),
    ):
        names = sorted(str(entry) for entry in report.get(key) or ())
        if names:
            raise PolybitError(
                f"{name} {fault} {names[0]!r:.120} ({len(names)} in all): its configuration and weights do not belong "
                "together, fetch it again"
            )


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration, after the checks a path or an id can fail."""
    from transformers import AutoConfig

    check_name(name)
    try:
        with calling_hub(name):
            return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        remedy = "give a local model directory, or a hub id that can be reached"
        if "trust_remote_code" in str(error):
            remedy = "allow its own code to run only if you trust its authors"
        elif Path(name).is_dir():
            remedy = "its architecture may be unknown to the installed transformers, or config.json damaged"
        raise PolybitError(f"the configuration of {name} cannot be used ({first_line(error)}): {remedy}") from error


def check_name(name: str) -> None:
    """Refuse what is neither a model directory nor a hub id, before anything is fetched."""
    check_spelling(name)
    path = Path(name)
    try:
        restore(path)
        if path.is_file():
            raise PolybitError(f"{name:.200} is a file: give the directory that holds config.json, or a hub id")
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise PolybitError(f"{name:.200} has no config.json: {what_else(path)}")
            read_json(path / "config.json")
            return
    except (OSError, ValueError) as error:
        raise PolybitError(f"{name!r:.80} is no path and no hub id ({error!s:.60}): check the spelling") from None
    if name.startswith(("http://", "https://")):
        raise PolybitError(f"{name!r:.200} is an address: give the hub id alone, as in owner/name")
    if name.lower().endswith(".gguf"):
        raise PolybitError(
            f"there is no file {name!r:.200}: give an existing GGUF file, a model directory, or a hub id"
        )
    if not HUB_ID.fullmatch(name) or name.startswith(".") or ".." in name:
        raise PolybitError(f"there is no directory {name!r:.200}: give an existing model directory, or a hub id")


def what_else(path: Path) -> str:
    """What to give instead of a directory that is no model."""
    if (path / "adapter_config.json").is_file():
        return "it holds only an adapter, give the merged model"
    if files := sorted(path.glob("*.gguf")):
        return f"give the GGUF file itself, {files[0]}"
    return "give a model directory"


def quantization_of(name: str, *, trust_remote_code: bool = False) -> str | None:
    """The quantization method a model declares, None for a float model."""
    check_name(name)
    if Path(name).is_dir():
        found = read_json(Path(name) / "config.json").get("quantization_config")
    else:
        found = getattr(load_config(name, trust_remote_code=trust_remote_code), "quantization_config", None)
    if found is None:
        return None
    if not isinstance(found, Mapping):
        found = found.to_dict() if hasattr(found, "to_dict") else {}
    return str(found.get("quant_method", "unnamed"))


def check_directory(path: Path) -> None:
    """The weights of a local float model: safetensors, whole, and enough for what the configuration says."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if not single.is_file() and not index.is_file():
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        if pickles:
            raise PolybitError(
                f"{path} offers only {pickles[0]}, which can run code when opened: convert it to safetensors first"
            )
        raise PolybitError(f"{path} has no model.safetensors: give a complete model directory")
    shards = [single] if single.is_file() else shards_of(index)
    check_sizes(path / "config.json", read_json(path / "config.json"), len(read_headers(shards)))


def check_architecture(name: str, *, trust_remote_code: bool) -> None:
    """Refuse a configuration that describes no causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = load_config(name, trust_remote_code=trust_remote_code)
    if trust_remote_code and getattr(config, "auto_map", None):
        return
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    named = getattr(config, "architectures", None) or []
    declared = [named] if isinstance(named, str) else list(named)
    allowed = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if known is None or (declared and not allowed & set(declared)):
        kind = declared[0] if declared else config.model_type
        raise PolybitError(f"{name} is a {kind!s:.60}, not a causal language model: give a model that generates text")


def check_weights(model: nn.Module, name: str) -> None:
    """Refuse NaN and infinity, naming the layer."""
    for layer, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise PolybitError(
                f"the weight {layer!r} of {name} holds NaN or infinity: repair or fetch the model again, "
                "quantizing it would spoil every answer"
            )


LONGEST_SAID = 160  # characters of somebody else's error
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    remedy = "put its tokenizer files beside the weights"
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        raise PolybitError(f"{name} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}): {remedy}")
    try:
        with calling_hub(name):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            entries = tokenizer.vocab_size
    except Exception as error:
        raise PolybitError(f"the tokenizer of {name} could not be loaded ({first_line(error)}): {remedy}") from error
    if not entries:  # any text would be no tokens
        raise PolybitError(f"the tokenizer of {name} has an empty vocabulary: {remedy}")
    return tokenizer


def guarded(model: nn.Module, tokenizer: Any) -> nn.Module:
    """The model, which refuses tokens it has no embedding of, where its tokenizer has more entries than it has rows.

    Some such models are fine (Gemma 3 has a token for pictures), so only a text with such a token is refused.
    """
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    if tokenizer is not None and isinstance(rows, int) and len(tokenizer) > rows:
        model.register_forward_pre_hook(refuse_unknown_tokens, with_kwargs=True)
    return model


def refuse_unknown_tokens(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """One sentence in place of an IndexError, or of a GPU that stops."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    rows = model.get_input_embeddings().num_embeddings
    if isinstance(ids, torch.Tensor) and ids.numel() and int(ids.max()) >= rows:
        raise PolybitError(
            f"the text has the token {int(ids.max())}, and the model's embedding has {rows} rows: its tokenizer "
            "belongs to another model, put the right one beside the weights"
        )


def first_line(error: Exception) -> str:
    """How somebody else's error begins, in one line: whole sentences where one ends in time."""
    said = " ".join(str(error).split())
    if len(said) > LONGEST_SAID:
        said = said[:LONGEST_SAID].rpartition(". ")[0] or said[:LONGEST_SAID]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
