"""Compress the files of a wheel again, as tightly as its format allows; what is in it stays the same but for the
embedded model's weights, whose bytes are sorted by place (polybit/hub/tiny.py puts them back).

    python packaging/squeeze.py wheels/polybit-*.whl

Needs the package zopfli, which looks longer for the shortest deflate stream than zlib does: 1 % less, and most of
a wheel is the embedded model's float weights, which hardly compress.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType

from zopfli import zopfli

ROOT = Path(__file__).parent.parent
MODEL = "polybit/assets/tinychat/model.safetensors"
ROUNDS = 5  # more gain nothing that shows


class Zopfli:
    """What zipfile wants of a compressor: everything is kept and comes out at the end, or zlib's stream if shorter."""

    def __init__(self, ready: bytes) -> None:
        self.ready = ready

    def compress(self, data: bytes) -> bytes:
        """Nothing yet."""
        return b""

    def flush(self) -> bytes:
        """The stream of the whole file."""
        return self.ready


def deflated(data: bytes) -> bytes:
    """A raw deflate stream of `data`: a zlib stream without its two bytes of header and four of checksum."""
    return zopfli.compress(data, numiterations=ROUNDS, gzip_mode=0)[2:-4]


def tiny() -> ModuleType:
    """polybit/hub/tiny.py by itself: the package is not installed here."""
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "polybit" / "hub" / "tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rearranged(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a wheel with the model's bytes sorted, and RECORD as it then is."""
    sort = tiny()
    if MODEL not in files:
        return files
    weights = sort.sorted_bytes(files[MODEL])
    assert sort.joined_bytes(weights) == files[MODEL]
    name = MODEL.rpartition("/")[0] + "/" + sort.SORTED
    found = {name if key == MODEL else key: weights if key == MODEL else data for key, data in files.items()}
    [record] = [key for key in files if key.endswith(".dist-info/RECORD")]
    digest = base64.urlsafe_b64encode(hashlib.sha256(weights).digest()).rstrip(b"=").decode()
    lines = files[record].decode().splitlines()
    kept = [f"{name},sha256={digest},{len(weights)}" if line.startswith(f"{MODEL},") else line for line in lines]
    found[record] = ("\n".join(kept) + "\n").encode()
    return found


def squeeze(path: Path) -> None:
    """Write a wheel again, in its place."""
    tight = path.with_suffix(".squeezed")
    with zipfile.ZipFile(path) as old:
        entries = old.infolist()
        files = rearranged({entry.filename: old.read(entry) for entry in entries})
    with zipfile.ZipFile(tight, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for entry, (name, data) in zip(entries, files.items(), strict=True):
            kept = zipfile.ZipInfo(name, entry.date_time)
            kept.external_attr, kept.compress_type = entry.external_attr, entry.compress_type
            with new.open(kept, "w") as out:
                stream = deflated(data) if data and entry.compress_type == zipfile.ZIP_DEFLATED else b""
                if stream and (len(stream) < entry.compress_size or name != entry.filename):
                    out._compressor = Zopfli(stream)  # zipfile takes no compressor of others by a public way
                out.write(data)
    with zipfile.ZipFile(tight) as new:
        assert new.namelist() == list(files) and all(new.read(name) == data for name, data in files.items()), path
    before, after = path.stat().st_size, tight.stat().st_size
    tight.replace(path)
    print(f"{path.name}: {before:,} bytes, {after:,} after")


if __name__ == "__main__":
    for word in sys.argv[1:]:
        squeeze(Path(word))
