"""JSON with arrays in it as one run of bytes: what goes from measuring to the page that shows it.

::

    bytes 0-7     "pellucid"
    bytes 8-11    version of the format, uint32
    bytes 12-15   length of the header, uint32
    header        JSON in UTF-8, padded with spaces to a multiple of 8 bytes from the start
    arrays        one after the other, each from a multiple of 8 bytes on, C order

All numbers are little-endian. The header is ``{"arrays": [{"dtype", "shape", "offset"}, ...], "content":
...}`` with offsets from the end of the header; wherever the content holds an array it says ``{"array": i}``.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from pellucid.errors import DataError

MAGIC = b"pellucid"
VERSION = 1
DTYPES = ("float32", "float16", "int32", "uint8")
MEDIA_TYPE = "application/vnd.pellucid"

_PREFIX = struct.Struct("<8sII")
_ALIGN = 8

HALF_MAX = 65504.0
"""The largest number that a float16 holds."""

SOME = 256
"""Floats of an array that is worth halving."""


def pack(content: Any, *, half: bool = False) -> bytes:
    """``content`` as bytes: dicts, lists, text, numbers, and arrays (NumPy's or tensors) among them.

    Numbers that are not finite become null, as in any JSON; arrays keep theirs. float64 arrays become
    float32, bool becomes uint8, other integers int32.

    Args:
        content: what to pack.
        half: arrays of at least 256 floats as float16, where that holds them: half the bytes, three digits.

    Raises:
        DataError: an integer that 32 bits do not hold, or a dict that would read as an array.
    """
    entries: list[dict[str, Any]] = []
    pieces: list[bytes] = []
    at = 0

    def place(array: np.ndarray) -> dict[str, int]:
        nonlocal at
        array = _narrowed(array)
        if half and array.dtype == np.float32 and array.size >= SOME and _fits_half(array):
            array = array.astype(np.float16)
        data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        entries.append({"dtype": array.dtype.name, "shape": list(array.shape), "offset": at})
        pieces.append(data + bytes(-len(data) % _ALIGN))
        at += len(pieces[-1])
        return {"array": len(entries) - 1}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.detach().cpu().float().numpy() if value.is_floating_point() else value.cpu().numpy()
        if isinstance(value, np.ndarray):
            return place(value)
        if isinstance(value, Mapping):
            if value.keys() == {"array"}:
                raise DataError("a dict of the one key 'array' stands for an array in a bundle - rename it")
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        return value

    tree = plain(content)
    # ASCII with escapes: a file name that is no UTF-8 holds lone surrogates, which UTF-8 cannot.
    header = json.dumps({"arrays": entries, "content": tree}, separators=(",", ":"), allow_nan=False).encode()
    header += b" " * (-(_PREFIX.size + len(header)) % _ALIGN)
    return b"".join([_PREFIX.pack(MAGIC, VERSION, len(header)), header, *pieces])


def unpack(data: bytes) -> Any:
    """What :func:`pack` was given, arrays as NumPy's.

    Raises:
        DataError: other bytes, a later version, or a file that is damaged.
    """
    if len(data) < _PREFIX.size or not data.startswith(MAGIC):
        raise DataError("not a bundle of pellucid - write one with pellucid audit --bundle")
    _, version, length = _PREFIX.unpack_from(data)
    if version != VERSION:
        raise DataError(
            f"a bundle of version {version}; this pellucid reads version {VERSION} - write it again"
        )
    start = _PREFIX.size + length
    try:
        header = json.loads(data[_PREFIX.size : start])
        arrays = [_array(data, start, entry) for entry in header["arrays"]]
        return _filled(header["content"], arrays)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise DataError(f"the bundle is damaged ({type(error).__name__}) - write it again") from error


def _narrowed(array: np.ndarray) -> np.ndarray:
    if array.dtype.name in DTYPES:
        return array
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.size and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31:
        raise DataError("an integer in the bundle needs more than 32 bits")
    return array.astype(np.int32)


def _fits_half(array: np.ndarray) -> bool:
    sizes = np.abs(array[np.isfinite(array)])
    return sizes.size == 0 or float(sizes.max()) < HALF_MAX


def _array(data: bytes, start: int, entry: dict[str, Any]) -> np.ndarray:
    dtype, shape, offset = entry["dtype"], entry["shape"], entry["offset"]
    if dtype not in DTYPES or any(type(side) is not int or side < 0 for side in [*shape, offset]):
        raise ValueError(dtype)
    kind = np.dtype(dtype).newbyteorder("<")
    count = math.prod(shape)
    if start + offset + count * kind.itemsize > len(data):
        raise ValueError("ends early")
    return np.frombuffer(data, kind, count, start + offset).reshape(shape)


def _filled(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"array"}:
            return arrays[value["array"]]
        return {key: _filled(item, arrays) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, arrays) for item in value]
    return value


__all__ = ["DTYPES", "MEDIA_TYPE", "VERSION", "pack", "unpack"]
