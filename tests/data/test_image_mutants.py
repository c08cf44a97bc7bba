"""Ten thousand spoilt pictures at the image door: each becomes a tensor of its size or is refused by name.

All are decoded in one forked process, which writes down what came of each, how long it took and how much
memory it needed at most. ``PELLUCID_MUTANTS=1000000`` makes a million, in some twenty-five minutes; the
seed of each is its number, so that whatever is found can be found again. Among a million some claim nearly
as many pixels as are allowed and do have them, so the memory held then is that of a whole large picture: four
bytes of a pixel as Pillow has it, and three as it is given.
"""

import functools
import io
import json
import os
import random
import signal
import struct
import tempfile
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pellucid.data import images
from pellucid.data.images import MAX_PIXELS, ImageRejected, read_header, read_image

MUTANTS = int(os.environ.get("PELLUCID_MUTANTS", "10000"))
SECONDS = 1.0
MEMORY = 300_000_000 if MUTANTS <= 10_000 else 8 * MAX_PIXELS
SIDE = 24

# --- good ones --------------------------------------------------------------------------------------------


def picture(mode: str, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    if mode in ("I;16", "I;16B"):
        levels = rng.integers(0, 1 << 16, (SIDE, SIDE)).astype("<u2" if mode == "I;16" else ">u2")
        return Image.frombytes(mode, (SIDE, SIDE), levels.tobytes())
    if mode == "I":
        return Image.fromarray(rng.integers(0, 1 << 16, (SIDE, SIDE), dtype=np.int32))
    if mode == "LAB":
        return Image.frombytes("LAB", (SIDE, SIDE), rng.bytes(3 * SIDE * SIDE))
    colour = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    return colour.convert("RGBA").convert("PA") if mode == "PA" else colour.convert(mode)


FRAMES = {"save_all": True, "append_images": [picture("RGB", 1)]}
FORMS = [
    *(("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK", "YCbCr")),
    ("JPEG", "RGB", {"progressive": True}),
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B")),
    ("PNG", "P", {"transparency": 3}),
    ("PNG", "RGB", FRAMES),
    *(("GIF", mode, {}) for mode in ("1", "L", "P")),
    ("GIF", "RGB", FRAMES),
    *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
    *(
        ("TIFF", mode, {})
        for mode in (
            *("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I"),
        )
    ),
    *(("TIFF", "RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")),
    *(("WEBP", mode, {}) for mode in ("RGB", "RGBA")),
    ("WEBP", "RGB", {"lossless": True, **FRAMES}),
    *(("PPM", mode, {}) for mode in ("1", "L", "RGB", "I", "I;16")),
    *(("JPEG2000", mode, {}) for mode in ("L", "LA", "RGB", "RGBA", "I;16")),
    ("MPO", "RGB", FRAMES),
]


@functools.cache
def good(form: int) -> bytes:
    fmt, mode, options = FORMS[form]
    file = io.BytesIO()
    picture(mode).save(file, fmt, **options)
    return file.getvalue()


# --- and what is done to them -----------------------------------------------------------------------------

EXTREMES = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 2, 8, 40])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(data: bytearray, rng: random.Random) -> None:
    """The end, or a piece out of the middle."""
    start = rng.randrange(1, len(data))
    del data[start : len(data) if rng.random() < 0.5 else start + rng.randrange(1, 40)]


def splice(data: bytearray, rng: random.Random) -> None:
    """A piece of another file, of any format, put in or laid over."""
    other = good(rng.randrange(len(FORMS)))
    start, size = rng.randrange(len(other)), rng.randrange(1, 200)
    place = rng.randrange(len(data))
    data[place : place + size * (rng.random() < 0.5)] = other[start : start + size]


def header_fields(data: bytearray, rng: random.Random) -> None:
    """Bytes where formats say what they are: width, height, depth, kind, tags."""
    for _ in range(rng.choice([1, 1, 3])):
        data[rng.randrange(min(len(data), 64))] = rng.choice([0, 1, 2, 3, 4, 8, 16, 32, 127, 128, 255])


def length_fields(data: bytearray, rng: random.Random) -> None:
    """Numbers of two or four bytes, in either order, anywhere."""
    kind = rng.choice([">H", "<H", ">I", "<I"])
    place = rng.randrange(max(1, min(len(data) - 4, rng.choice([64, len(data)]))))
    number = rng.choice(EXTREMES) if rng.random() < 0.8 else len(data) + rng.randrange(-2, 3)
    data[place : place + struct.calcsize(kind)] = struct.pack(kind, number % (1 << 8 * struct.calcsize(kind)))


def zero_run(data: bytearray, rng: random.Random) -> None:
    start, size = rng.randrange(len(data)), rng.choice([1, 8, 64, 512])
    data[start : start + size] = bytes(len(data[start : start + size]))


def duplicate(data: bytearray, rng: random.Random) -> None:
    """A piece once more, or very often."""
    start, size = rng.randrange(len(data)), rng.choice([1, 4, 16, 64])
    place = rng.randrange(len(data))
    data[place:place] = data[start : start + size] * rng.choice([1, 2, 100])


KINDS = (flip_bits, cut, splice, header_fields, length_fields, zero_run, duplicate)


def mutant(number: int) -> tuple[int, str, bytes]:
    """The form, what was done to it, and the bytes: a function of the number."""
    rng = random.Random(number)
    form, kind = number % len(FORMS), KINDS[number // len(FORMS) % len(KINDS)]
    data = bytearray(good(form))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if len(data) > 8:
            kind(data, rng)
    if FORMS[form][0] == "PNG" and rng.random() < 0.7:
        _mend_checksums(data)  # else little of a PNG gets past its CRC-32
    return form, kind.__name__, bytes(data)


def _mend_checksums(data: bytearray) -> None:
    at = 8
    while at + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        end = at + 8 + size
        if end + 4 > len(data):
            return
        struct.pack_into(">I", data, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4


# --- all of them ------------------------------------------------------------------------------------------


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def fault(path: Path, data: bytes) -> tuple[str, str]:
    """("decoded" or "refused", what is wrong with that or "")."""
    path.write_bytes(data)
    try:
        pixels = read_image(path)
    except ImageRejected as error:
        short = 0 < len(error.reason) < 120 and error.reason.isprintable()
        named = str(error) == f"rejected: {error.reason} - {path}"
        return "refused", "" if short and named else f"refused in the words: {error}"
    except BaseException as error:
        return "refused", f"{type(error).__name__}: {error}"
    header = read_header(path)
    size = {(header.height, header.width), (header.width, header.height)}  # it may have been turned
    fits = pixels.dtype == torch.uint8 and pixels.ndim == 3 and len(pixels) in (1, 3)
    fits = fits and tuple(pixels.shape[1:]) in size and pixels.shape[1:].numel() <= MAX_PIXELS
    return "decoded", "" if fits else f"{header} became {tuple(pixels.shape)} {pixels.dtype}"


def decode_all(folder: Path) -> dict:
    """What came of all of them. Ends with the process where one takes twenty seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory is that of now
    before, counts, faults, slowest = peak(), Counter(), [], (0.0, 0)
    for number in range(MUTANTS):
        form, kind, data = mutant(number)
        signal.alarm(20)
        start = time.process_time()
        outcome, wrong = fault(folder / f"{FORMS[form][0]} {form}.png", data)
        slowest = max(slowest, (time.process_time() - start, number))
        counts[f"{outcome} {form}"] += 1
        counts[f"{outcome} {kind}"] += 1
        if wrong:
            faults.append([number, wrong])
    return {"counts": counts, "faults": faults, "slowest": slowest, "grown": peak() - before}


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    with tempfile.TemporaryFile() as told:
        pid = os.fork()
        if not pid:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff complains there
                warnings.simplefilter("ignore")
                os.write(told.fileno(), json.dumps(decode_all(folder)).encode())
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        told.seek(0)
        found = told.read()
    assert found, f"the process ended with {status}"
    return json.loads(found)


def test_the_good_ones_are_good():
    pairs = {(fmt, mode) for fmt, mode, _ in FORMS}
    assert len(pairs) >= 22
    assert {fmt for fmt, _ in pairs} == {
        *["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "MPO"]
    }
    for form in range(len(FORMS)):
        assert read_image(good(form)).shape[1:] == (SIDE, SIDE), FORMS[form]


@pytest.mark.parametrize("rows", [1, 5, 12, 23])
def test_bands_leave_no_seam(rows, monkeypatch):
    whole = [read_image(good(form)) for form in range(len(FORMS))]
    monkeypatch.setattr(images, "_BAND", rows * SIDE)
    for form, expected in enumerate(whole):
        assert torch.equal(read_image(good(form)), expected), FORMS[form]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_a_large_picture_is_held_twice(mode):
    """In four bytes of a pixel as Pillow has it, in three as it is given; the rest is what a band takes."""
    file = io.BytesIO()
    Image.new(mode, (5000, 4000)).save(file, "PNG", compress_level=1)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    assert read_image(file.getvalue()).shape[1:] == (4000, 5000)
    assert peak() - before < 7 * 20e6 + 40e6


def test_every_mutant_is_a_tensor_or_refused_by_name(decoded):
    assert not decoded["faults"]
    counted = sum(decoded["counts"].values())
    assert counted == 2 * MUTANTS


def test_no_mutant_takes_a_second(decoded):
    seconds, number = decoded["slowest"]
    assert seconds < SECONDS, f"mutant {number}"


def test_no_mutant_takes_much_memory(decoded):
    assert decoded["grown"] < MEMORY


def test_the_mutants_are_neither_all_bad_nor_all_good(decoded):
    """Else they would say nothing of the decoders, or nothing of refusals."""
    for what in [kind.__name__ for kind in KINDS] + [str(form) for form in range(len(FORMS))]:
        good, bad = (decoded["counts"].get(f"{outcome} {what}", 0) for outcome in ("decoded", "refused"))
        assert good + bad >= MUTANTS / 100, what
        assert bad >= 0.02 * (good + bad), what
    totals = [
        sum(decoded["counts"].get(f"{outcome} {kind.__name__}", 0) for kind in KINDS)
        for outcome in ("decoded", "refused")
    ]
    assert min(totals) > MUTANTS / 10, totals
