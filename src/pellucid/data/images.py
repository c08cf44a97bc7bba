"""The image door: any bytes become a uint8 tensor or a named rejection, and nothing else comes out.

Only a stated list of raster formats is read. Documents (PDF, PSD) and PostScript, for which Pillow would
start Ghostscript, are not in it; nor is ICO, which hides a second header from the size check. Colour
profiles are not applied. Of an animation or a multi-page file the first frame is read.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from pellucid.errors import ConfigError, DataError
from pellucid.regular import open_regular

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")  # MPO is opened by JPEG
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".bmp", ".tif", ".tiff", ".webp"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx"}
)
KINDS = ("gray", "16-bit gray", "colour", "palette", "CMYK", "alpha")
MAX_PIXELS = 50_000_000
WHITE = (255, 255, 255)

# Pillow reports some damage through logging; without a handler Python prints it on stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_pillow_globals = threading.Lock()


class ImageRejected(DataError):
    """This one picture cannot be used; ``reason`` says why in a few words."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(f"rejected: {reason}" + (f" - {name}" if name else ""))
        self.reason = reason


class Header(NamedTuple):
    """What the first bytes of a picture say, before orientation is applied."""

    kind: str  # one of KINDS
    channels: int  # of the tensor that read_image returns: 1 or 3
    height: int
    width: int


def read_image(
    source: str | os.PathLike[str] | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = WHITE,
) -> torch.Tensor:
    """Decode one picture to uint8 (c, h, w), upright: c is 1 for a gray picture and 3 for any other.

    ``source`` is a path, or the bytes of a file. 16-bit gray is divided by 257, never clipped; an alpha
    channel is laid over ``background`` (RGB, 0..255).

    Raises ImageRejected, and nothing else, for whatever cannot be decoded whole: a missing, unreadable
    or special file, another format, truncation, more than ``max_pixels`` pixels (seen in the header,
    before memory is taken), pixels without a stated range.
    """
    with _rejections(source), _opened(source, max_pixels) as picture:
        picture.load()
        upright = _UPRIGHT.get(_orientation(picture))
        pixels = torch.from_numpy(_pixels(picture, background))
    return pixels if upright is None else upright(pixels).contiguous()


def read_header(source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS) -> Header:
    """What a picture is, without decoding it. Raises ImageRejected for what the header already shows."""
    with _rejections(source), _opened(source, max_pixels) as picture:
        kind = _kind(picture)
        return Header(kind, _channels(picture), picture.height, picture.width)


def too_large(pixels: int, max_pixels: int) -> str | None:
    """Why a picture of so many pixels is rejected, or None."""
    if pixels <= max_pixels:
        return None
    return f"{_megapixels(pixels)} MP > limit {_megapixels(max_pixels)} MP (--max-pixels)"


def file_bytes(path: str | os.PathLike[str]) -> bytes:
    """A picture's file as it is. Raises ImageRejected for one that cannot be read."""
    with _rejections(path), open_regular(path) as file:
        return file.read()


def extension(data: bytes) -> str:
    """What a file of these bytes is called, after what they are: "jpg", "png", ... Raises ImageRejected."""
    with _rejections(data), _opened(data, max_pixels=sys.maxsize) as picture:
        return _EXTENSION_OF[picture.format or ""]


def to_channels(image: torch.Tensor, in_chans: int) -> torch.Tensor:
    """uint8 (..., c, h, w) -> (..., in_chans, h, w), for c = in_chans or one 1 and the other 3.

    Colour becomes gray by the luma of Rec. 601, 0.299 R + 0.587 G + 0.114 B; gray is repeated. Other
    channels mean what their maker says, so nothing is made of them. Raises ConfigError.
    """
    channels = image.shape[-3]
    if channels == in_chans:
        return image
    if (channels, in_chans) == (1, 3):
        return image.expand(*image.shape[:-3], 3, *image.shape[-2:])
    if (channels, in_chans) == (3, 1):
        red, green, blue = image.to(torch.int32).unbind(-3)
        luma = (299 * red + 587 * green + 114 * blue + 500) // 1000
        return luma.to(torch.uint8).unsqueeze(-3)
    raise ConfigError(
        f"{channels} channels cannot become {in_chans} - only gray (1) and RGB (3) become each other;"
        f" give images of {in_chans} channels, or a model for {channels}"
    )


def show_name(path: str | bytes | os.PathLike[str]) -> str:
    """A file name that is safe to print: control, invisible and undecodable characters escaped."""
    text = os.fsdecode(path)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# Pillow modes: gray of at most 8 bits (with or without alpha), and gray of 16 bits.
_GRAY = frozenset({"1", "L", "LA", "La"})
_GRAY_16 = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})

_EXTENSION_OF = {
    **{"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "GIF": "gif", "BMP": "bmp"},
    **{"TIFF": "tif", "WEBP": "webp", "PPM": "ppm", "JPEG2000": "jp2"},
}

_UPRIGHT: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {  # EXIF orientation -> what undoes it
    2: lambda pixels: pixels.flip(-1),
    3: lambda pixels: pixels.flip(-1, -2),
    4: lambda pixels: pixels.flip(-2),
    5: lambda pixels: pixels.mT,
    6: lambda pixels: pixels.rot90(-1, (-2, -1)),
    7: lambda pixels: pixels.mT.flip(-1, -2),
    8: lambda pixels: pixels.rot90(1, (-2, -1)),
}

_BAND = 1 << 20
"""Pixels that are made 8-bit at once: a large picture stands in memory as Pillow has it and as it is given,
and not at every stage between them."""


@contextmanager
def _rejections(source: str | os.PathLike[str] | bytes) -> Iterator[None]:
    """Whatever goes wrong inside leaves as ImageRejected with a short reason."""
    name = f"{len(source)} bytes" if isinstance(source, bytes) else show_name(source)
    try:
        yield
    except ImageRejected as error:
        raise ImageRejected(error.reason, name) from None
    except MemoryError:
        raise ImageRejected("too large for memory", name) from None
    except Exception as error:  # decoders raise nearly everything: zlib.error, KeyError, RecursionError, ...
        raise ImageRejected(_reason(error), name) from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return "truncated"
    detail = show_name(str(error) or type(error).__name__)[:80]
    if detail.startswith(_DAMAGE):
        return "damaged or truncated"
    return f"cannot be decoded: {detail}"


# What Pillow says of incomplete WebP, JPEG, JPEG 2000 and compressed TIFF data.
_DAMAGE = (
    "could not create decoder object",
    "broken data stream",
    "unrecognized data stream",
    "decoder error",
)


@contextmanager
def _opened(source: str | os.PathLike[str] | bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The picture with its header read and held to ``max_pixels``, nothing decoded yet."""
    with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
        head = file.read(512)
        if not head:
            raise ImageRejected("empty file (0 bytes)")
        try:
            with _quiet_pillow():
                picture = Image.open(file, formats=FORMATS)
                if picture.format == "TIFF":  # would otherwise read its tags, and warn, while decoding
                    picture.getexif()
        except UnidentifiedImageError:
            raise ImageRejected(_why_unidentified(head)) from None
        if reason := too_large(picture.width * picture.height, max_pixels):
            raise ImageRejected(reason)
        if picture.mode.startswith("F"):
            raise ImageRejected("floating-point pixels have no stated range; save it as 8 or 16 bit")
        yield picture


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Pillow's own size limit and its warnings, off while a header or an EXIF block is read.

    The limit is ours to hold (``max_pixels``), and a warning about one file of fifty thousand helps
    nobody. Both switches are process-wide, hence the lock; decoding runs outside of it, in parallel.
    """
    with _pillow_globals, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation, 1..8. Called after decoding: PNG keeps it behind the pixels, TIFF applies it."""
    try:
        with _quiet_pillow():
            return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block does not make the pixels wrong
        return 1


def _pixels(picture: Image.Image, background: tuple[int, int, int]) -> np.ndarray:
    """uint8 (c, h, w) of a picture that is loaded, not turned."""
    if picture.mode in _GRAY_16:
        _check_16_bit(picture)
    pixels = np.empty((_channels(picture), picture.height, picture.width), np.uint8)
    rows = max(1, _BAND // max(1, picture.width))
    for top in range(0, picture.height, rows):
        bottom = min(top + rows, picture.height)
        band = picture if rows >= picture.height else picture.crop((0, top, picture.width, bottom))
        flat = np.asarray(_to_8_bit(band, background))
        pixels[:, top:bottom] = flat if flat.ndim == 2 else flat.transpose(2, 0, 1)
    return pixels


def _channels(picture: Image.Image) -> int:
    return 1 if picture.mode in _GRAY or picture.mode in _GRAY_16 else 3


def _to_8_bit(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Mode L or RGB, in the range 0..255, nothing transparent."""
    if picture.mode in _GRAY_16:
        values = np.asarray(picture).astype(np.int64)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    target = "L" if picture.mode in _GRAY else "RGB"
    if picture.has_transparency_data:
        paper = Image.new("RGBA", picture.size, (*background, 255))
        picture = Image.alpha_composite(paper, picture.convert("RGBA"))
    return picture if picture.mode == target else picture.convert(target)  # which copies even then


def _check_16_bit(picture: Image.Image) -> None:
    values = np.asarray(picture)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageRejected(f"32-bit pixels {low}..{high} are outside 0..65535; save it as 16 bit")


def _kind(picture: Image.Image) -> str:
    if picture.mode in _GRAY_16:
        return "16-bit gray"
    if picture.has_transparency_data:
        return "alpha"
    if picture.mode in _GRAY:
        return "gray"
    return {"P": "palette", "CMYK": "CMYK"}.get(picture.mode, "colour")


def _megapixels(pixels: int) -> str:
    millions = pixels / 1e6
    return f"{millions:,.1f}".removesuffix(".0") if millions >= 1 else f"{millions:.2g}"


_SIGNATURES = {  # first bytes -> what the file is, when Pillow's readers above do not know it
    b"version https://git-lfs": "a Git LFS pointer, not the image: run git lfs pull",
    b"%PDF": "a PDF document, not an image",
    b"%!PS": "PostScript, which is not read",
    b"8BPS": "a Photoshop document, which is not read",
    b"PK\x03\x04": "a zip archive, not an image",
    b"\x1f\x8b": "a gzip archive, not an image",
    b"\x89PNG": "damaged or truncated PNG",
    b"\xff\xd8\xff": "damaged or truncated JPEG",
    b"GIF8": "damaged or truncated GIF",
    b"RIFF": "damaged or truncated WebP",
    b"II*\0": "damaged or truncated TIFF",
    b"MM\0*": "damaged or truncated TIFF",
    b"BM": "damaged or truncated BMP",
}


def _why_unidentified(head: bytes) -> str:
    for signature, reason in _SIGNATURES.items():
        if head.startswith(signature):
            return reason
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page, not an image"
    if start.startswith((b"<svg", b"<?xml")):
        return "SVG or XML, not a raster image"
    if all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head):
        return "text, not an image"
    return f"not one of the formats read ({', '.join(FORMATS)})"
