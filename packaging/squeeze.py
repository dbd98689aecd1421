"""Compress the files of a wheel again, as tightly as its format allows; what is in it stays the same.

    python packaging/squeeze.py wheels/polybit-*.whl

Needs the package zopfli, which looks longer for the shortest deflate stream than zlib does: 1 % less, and most of
a wheel is the embedded model's float weights, which hardly compress.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

from zopfli import zopfli

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


def squeeze(path: Path) -> None:
    """Write a wheel again, in its place."""
    tight = path.with_suffix(".squeezed")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tight, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            data, before = old.read(entry), entry.compress_size
            kept = zipfile.ZipInfo(entry.filename, entry.date_time)
            kept.external_attr, kept.compress_type = entry.external_attr, entry.compress_type
            with new.open(kept, "w") as out:
                stream = deflated(data) if data and entry.compress_type == zipfile.ZIP_DEFLATED else b""
                if stream and len(stream) < before:
                    out._compressor = Zopfli(stream)  # zipfile takes no compressor of others by a public way
                out.write(data)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tight) as new:
        assert old.namelist() == new.namelist() and all(old.read(n) == new.read(n) for n in old.namelist()), path
    before, after = path.stat().st_size, tight.stat().st_size
    tight.replace(path)
    print(f"{path.name}: {before:,} bytes, {after:,} after")


if __name__ == "__main__":
    for word in sys.argv[1:]:
        squeeze(Path(word))
