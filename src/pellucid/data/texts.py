"""The text door: any bytes become UTF-8 with lines that end in one way, or a named rejection.

A mark in front (BOM) says whether a file is UTF-8, UTF-16 or UTF-32, and is left out; without one a file is
UTF-8. A line that ends in CR LF or CR ends in LF.
"""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Iterator
from typing import BinaryIO

from pellucid.data.images import show_name
from pellucid.errors import DataError
from pellucid.regular import open_regular

BLOCK = 2**20  # bytes that are read at once

# The mark of UTF-32 begins as that of UTF-16 does.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

_PART = 2**14  # bytes of a part of a large file
_LEAST_PART = 2**8
_PARTS = 64  # of a file between the two


class TextRejected(DataError):
    """This one text cannot be used; ``reason`` says why in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"rejected: {reason}")
        self.reason = reason


def read_text(path: str | os.PathLike[str]) -> bytes:
    """A text file as UTF-8. Raises TextRejected, and nothing else, for one that cannot be read whole."""
    return b"".join(blocks(path))


def blocks(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """A text file as UTF-8, piece by piece, none empty; each is whole characters. Raises TextRejected."""
    try:
        with open_regular(path) as file:
            yield from _decoded(file)
    except OSError as error:
        raise TextRejected(lower_reason(error)) from None
    except MemoryError:
        raise TextRejected("too large for memory") from None


def as_text(text: str) -> bytes:
    """A string, of a table or of JSON, as UTF-8 with lines that end in one way. Raises TextRejected."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise TextRejected("half of a surrogate pair stands for no character") from None


def parts(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """A text file cut into pieces that are long enough to read on in; together they are the file.

    A part is 16 KiB - in a file below 1 MiB a 64th of it, but 256 bytes at least - and what follows up to the
    next blank line. If there is none until it is twice as long, it ends behind a line; if it has none, behind
    a space; and if it has none, anywhere between two characters. Raises TextRejected.
    """
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise TextRejected(lower_reason(error)) from None
    least = min(max(size // _PARTS, _LEAST_PART), _PART)
    text = b""
    for block in blocks(path):
        text += block
        at = 0
        while len(text) - at >= 2 * least + 4:
            stop = _stop(text, at + least, at + 2 * least)
            yield text[at:stop]
            at = stop
        text = text[at:]
    if text:
        yield text


def _stop(text: bytes, first: int, last: int) -> int:
    """Where a part ends that is to end between these places."""
    for mark in (b"\n\n", b"\n", b" "):
        at = text.find(mark, first, last)
        if at >= 0:
            stop = at + len(mark)
            while mark == b"\n\n" and text[stop : stop + 1] == b"\n":
                stop += 1
            return stop
    while text[last] & 0xC0 == 0x80:  # in the middle of a character
        last += 1
    return last


def _decoded(file: BinaryIO) -> Iterator[bytes]:
    block = file.read(BLOCK)
    encoding = next((name for mark, name in _MARKS.items() if block.startswith(mark)), "utf-8")
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    read = len(block)
    while True:
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at = read - len(error.object) + error.start
            kind = encoding.removesuffix("-sig").upper()
            raise TextRejected(f"not {kind}: byte 0x{error.object[error.start]:02x} at {at:,}") from None
        if "\0" in text:
            raise TextRejected("binary, or UTF-16 without its mark: it holds a NUL")
        if text:
            yield text.encode()
        if not block:
            return
        block = file.read(BLOCK)
        read += len(block)


def lower_reason(error: OSError) -> str:
    """Why a file cannot be read, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return (error.strerror or show_name(str(error)) or "cannot be read").lower()
