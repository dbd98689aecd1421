"""Where the embedded model lies: a chat model of a million parameters, in Hugging Face layout, inside the package."""

from __future__ import annotations

from pathlib import Path

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def path() -> Path:
    """Directory of the embedded model, for `from_pretrained`; FileNotFoundError when the package data is missing."""
    directory = Path(__file__).parent.parent / "assets" / "tinychat"
    missing = [name for name in _FILES if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"The embedded model in {directory} lacks {', '.join(missing)}; it should have {', '.join(_FILES)}: "
            "install polybit again, or run recipes/tinychat/train.py."
        )
    return directory
