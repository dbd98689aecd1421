"""Where the embedded model lies: a chat model of a million parameters, in Hugging Face layout, inside the package.

A wheel holds its weights with the bytes of all floats sorted by place, which is a tenth less when compressed
(packaging/squeeze.py). They are put back at the first use, in a folder of ~/.cache/polybit, or of this process where
that cannot be written.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

WEIGHTS = "model.safetensors"
SORTED = f"{WEIGHTS}.sorted"
_FILES = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_PLACES = 4  # bytes of a float


def path() -> Path:
    """Directory of the embedded model, for `from_pretrained`; FileNotFoundError when the package data is missing."""
    directory = Path(__file__).parent.parent / "assets" / "tinychat"
    if not (directory / WEIGHTS).is_file() and (directory / SORTED).is_file():
        directory = whole(directory)
    missing = [name for name in _FILES if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"The embedded model in {directory} lacks {', '.join(missing)}; it should have {', '.join(_FILES)}: "
            "install polybit again, or run recipes/tinychat/train.py."
        )
    return directory


def sorted_bytes(data: bytes) -> bytes:
    """First bytes of all groups of four, then the second ones, and so on; what is left over at the end."""
    even = len(data) // _PLACES * _PLACES
    return b"".join(data[place:even:_PLACES] for place in range(_PLACES)) + data[even:]


def joined_bytes(data: bytes) -> bytes:
    """The inverse of sorted_bytes."""
    count = len(data) // _PLACES
    found = bytearray(data)
    for place in range(_PLACES):
        found[place : count * _PLACES : _PLACES] = data[place * count : (place + 1) * count]
    return bytes(found)


@functools.cache
def whole(directory: Path) -> Path:
    """A copy of a wheel's model with its weights as they were, made once for every version of them."""
    data = (directory / SORTED).read_bytes()
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polybit"
        out = cache / f"tinychat-{hashlib.sha256(data).hexdigest()[:16]}"
        if (out / WEIGHTS).is_file() and (out / WEIGHTS).stat().st_size == len(data):
            return out
        cache.mkdir(parents=True, exist_ok=True)
        made = fill(kept(Path(tempfile.mkdtemp(prefix=".tinychat-", dir=cache))), directory, data)
        try:
            return made.rename(out)  # whole or not at all
        except OSError:  # another process was faster, or something else is there
            return made
    except (OSError, RuntimeError):  # no home, or none that can be written
        return fill(kept(Path(tempfile.mkdtemp(prefix="polybit-tinychat-"))), directory, data)


def fill(out: Path, directory: Path, data: bytes) -> Path:
    """Write the files of the model; returns their folder."""
    for source in directory.iterdir():
        if source.is_file() and source.name != SORTED:
            shutil.copyfile(source, out / source.name)
    (out / WEIGHTS).write_bytes(joined_bytes(data))
    return out


def kept(folder: Path) -> Path:
    """A folder that goes with this process, unless it gets another name."""
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
