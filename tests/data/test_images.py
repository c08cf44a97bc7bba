"""The image door: any bytes become a tensor or a named rejection."""

import io
import os
import socket
import struct
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from pellucid.data import images
from pellucid.data.images import ImageRejected, read_header, read_image, show_name, to_channels
from pellucid.errors import ConfigError, DataError

RAMP = np.tile(np.arange(256, dtype=np.uint8), (16, 1))  # a gray ramp, 16 x 256


def encoded(picture, fmt, **options):
    buffer = io.BytesIO()
    picture.save(buffer, fmt, **options)
    return buffer.getvalue()


def reason_for(source, **options):
    with pytest.raises(ImageRejected) as caught:
        read_image(source, **options)
    return caught.value.reason


def noise(seed=0, size=(40, 48)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def gray_palette():
    picture = Image.fromarray(RAMP).copy()
    picture.putpalette([level for level in range(256) for _ in range(3)])
    return picture


def ramp_in(mode):
    gray = Image.fromarray(RAMP)
    if mode == "I;16":
        return Image.fromarray(RAMP.astype(np.uint16) * 257)
    if mode == "I;16B":
        return Image.frombytes("I;16B", gray.size, (RAMP.astype(">u2") * 257).tobytes())
    if mode == "I":
        return Image.fromarray(RAMP.astype(np.int32) * 257)
    if mode == "P":
        return gray_palette()
    if mode == "PA":
        return gray_palette().convert("PA")
    if mode == "LAB":  # L is perceptual lightness: a ramp in L is not one in gray, so let Pillow convert
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(gray.convert("RGB"), srgb, lab, outputMode="LAB")
    return gray.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr") else gray.convert(mode)


@pytest.mark.parametrize(
    ("mode", "fmt", "channels", "tolerance"),
    [
        ("L", "PNG", 1, 0),
        ("L", "BMP", 1, 0),
        ("L", "TIFF", 1, 0),
        ("L", "PPM", 1, 0),
        ("L", "JPEG2000", 1, 0),
        ("L", "JPEG", 1, 2),
        ("L", "GIF", None, 0),
        ("LA", "PNG", 1, 0),
        ("P", "PNG", 3, 0),
        ("P", "GIF", None, 0),
        ("PA", "TIFF", 3, 0),
        ("RGB", "PNG", 3, 0),
        ("RGB", "JPEG", 3, 2),
        ("RGB", "WEBP", 3, 2),
        ("RGBA", "PNG", 3, 0),
        ("YCbCr", "TIFF", 3, 2),
        ("YCbCr", "JPEG", 3, 2),
        ("LAB", "TIFF", 3, 2),
        ("CMYK", "TIFF", 3, 10),
        ("CMYK", "JPEG", 3, 10),
        ("I;16", "PNG", 1, 0),
        ("I;16", "TIFF", 1, 0),
        ("I;16B", "TIFF", 1, 0),
        ("I;16B", "PNG", 1, 0),
        ("I;16", "JPEG2000", 1, 0),
        ("I;16", "PPM", 1, 0),
        ("I", "TIFF", 1, 0),
        ("I", "PPM", 1, 0),
    ],
)
def test_a_gray_ramp_comes_back_in_every_mode(mode, fmt, channels, tolerance):
    options = {"quality": 95} if fmt in ("JPEG", "WEBP") else {}
    pixels = read_image(encoded(ramp_in(mode), fmt, **options))
    assert pixels.dtype == torch.uint8
    assert pixels.shape[1:] == (16, 256)
    if channels is not None:
        assert len(pixels) == channels
    error = (pixels.int() - torch.from_numpy(RAMP).int()).abs().max()
    assert error <= tolerance


def test_one_bit_is_black_and_white():
    black_left = np.zeros((8, 8), dtype=bool)
    black_left[:, 4:] = True
    pixels = read_image(encoded(Image.fromarray(black_left), "PNG"))
    assert torch.equal(pixels[0], torch.from_numpy(black_left).to(torch.uint8) * 255)


def test_16_bit_is_scaled_not_clipped():
    values = np.array([[0, 256, 257, 32896, 65278, 65535]], dtype=np.uint16)
    assert read_image(encoded(Image.fromarray(values), "PNG"))[0, 0].tolist() == [0, 1, 1, 128, 254, 255]


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_32_bit_pixels_outside_16_bit_are_refused(value):
    picture = Image.fromarray(np.array([[0, value]], dtype=np.int32))
    assert "outside 0..65535" in reason_for(encoded(picture, "TIFF"))


def test_float_is_refused():
    assert "floating-point" in reason_for(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_over_the_background(mode):
    half = Image.new("LA", (2, 1), (100, 0))
    half.putpixel((1, 0), (100, 51))  # a fifth opaque
    data = encoded(half.convert(mode), "PNG")
    white, black = read_image(data), read_image(data, background=(0, 0, 0))
    assert white[0, 0].tolist() == [255, 224]  # 0.2 * 100 + 0.8 * 255
    assert black[0, 0].tolist() == [0, 20]
    assert len(white) == (1 if mode == "LA" else 3)


def test_a_transparent_palette_entry_lies_over_the_background():
    picture = gray_palette()
    pixels = read_image(encoded(picture, "PNG", transparency=7), background=(9, 8, 6))
    assert pixels[:, 0, 7].tolist() == [9, 8, 6]
    assert pixels[:, 0, 8].tolist() == [8, 8, 8]


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, fmt):
    upright = np.zeros((16, 24), dtype=np.uint8)
    upright[:8, :8] = 80
    upright[:8, 16:] = 160
    upright[8:, :8] = 240
    as_stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if fmt == "TIFF" else {"quality": 100}
    data = encoded(Image.fromarray(np.ascontiguousarray(as_stored)).convert("RGB"), fmt, exif=exif, **options)
    pixels = read_image(data)
    assert pixels.shape == (3, 16, 24)
    assert np.abs(pixels[0].numpy().astype(int) - upright).max() <= 12


def test_damaged_exif_does_not_spoil_the_picture():
    picture = noise()
    data = encoded(picture, "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff garbage")
    assert np.array_equal(read_image(data).permute(1, 2, 0).numpy(), np.asarray(picture))


@pytest.mark.parametrize("fmt", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first(fmt):
    frames = [Image.new("RGB", (16, 16), color) for color in [(200, 0, 0), (0, 0, 200)]]
    data = encoded(frames[0], fmt, save_all=True, append_images=frames[1:])
    red, _, blue = read_image(data).float().mean((1, 2)).tolist()
    assert red > 190
    assert blue < 10


def test_header_says_what_the_tensor_will_be():
    kinds = {}
    for mode, fmt in [
        ("L", "PNG"),
        ("I;16", "PNG"),
        ("RGB", "JPEG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("CMYK", "JPEG"),
    ]:
        data = encoded(ramp_in(mode), fmt)
        header = read_header(data)
        assert (header.channels, header.height, header.width) == tuple(read_image(data).shape)
        kinds[mode] = header.kind
    assert list(kinds.values()) == ["gray", "16-bit gray", "colour", "alpha", "palette", "CMYK"]


def png_header(width, height):
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    idat = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (ihdr, idat, b"IEND")
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_bomb_is_refused_from_its_header(monkeypatch):
    def decode(self):
        raise AssertionError("decoded")

    limit = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason_for(png_header(20_000, 20_000)) == "400 MP > limit 50 MP (--max-pixels)"
        assert reason_for(png_header(10_000, 10_000)) == "100 MP > limit 50 MP (--max-pixels)"
    assert "decoded" in reason_for(png_header(10, 10))  # the trap above does spring
    assert limit == Image.MAX_IMAGE_PIXELS


def test_max_pixels_is_inclusive():
    data = encoded(noise(size=(10, 10)), "PNG")
    assert read_image(data, max_pixels=100).shape == (3, 10, 10)
    assert "limit" in reason_for(data, max_pixels=99)


def test_pillow_limit_does_not_stand_in_the_way():
    data = png_header(14_000, 14_000)  # beyond Pillow's own hard limit of 179 MP
    assert reason_for(data, max_pixels=200_000_000) == "truncated"


def test_no_memory_is_a_rejection(monkeypatch):
    def starve(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", starve)
    assert reason_for(encoded(noise(), "PNG")) == "too large for memory"


def test_ctrl_c_goes_through(monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageFile.ImageFile, "load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_image(encoded(noise(), "PNG"))


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_truncated_file_is_refused(fmt, share):
    data = encoded(noise(), fmt)
    assert "truncated" in reason_for(data[: int(share * len(data))])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file (0 bytes)"),
        (b"<!DOCTYPE html><html>404</html>", "an HTML page, not an image"),
        (b"\xef\xbb\xbf\n <HTML>", "an HTML page, not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG or XML, not a raster image"),
        (b"just words\n", "text, not an image"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a Git LFS pointer, not the image: run git lfs pull",
        ),
        (b"%PDF-1.7", "a PDF document, not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript, which is not read"),
        (b"8BPS\0\1", "a Photoshop document, which is not read"),
        (b"PK\x03\x04", "a zip archive, not an image"),
        (b"\x89PNG\r\n\x1a\n", "damaged or truncated PNG"),
        (b"\x00\x01\x02\x03", f"not one of the formats read ({', '.join(images.FORMATS)})"),
    ],
)
def test_what_is_no_image_is_named(data, reason):
    assert reason_for(data) == reason


def test_formats_left_out_are_refused():
    for fmt in ["ICO", "TGA", "EPS", "PDF", "PCX"]:
        assert reason_for(encoded(noise(), fmt))


def test_files(tmp_path):
    picture = noise()
    good = tmp_path / "good.png"
    good.write_bytes(encoded(picture, "PNG"))
    assert torch.equal(read_image(good), read_image(str(good)))
    assert np.array_equal(read_image(good).permute(1, 2, 0).numpy(), np.asarray(picture))
    assert reason_for(tmp_path / "missing.png") == "no such file"
    assert reason_for(tmp_path) == "not a regular file (folder)"
    assert reason_for("/dev/null") == "not a regular file (device)"
    assert reason_for("nul\0.png") == "cannot be decoded: embedded null byte"
    assert reason_for("x" * 5000 + ".png") == "file name too long"


def test_the_message_names_file_and_reason(tmp_path):
    path = tmp_path / "bad\x1b[31m.png"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"^rejected: empty file \(0 bytes\) - .*bad\\x1b\[31m\.png$"):
        read_image(path)


def test_special_files_do_not_block(tmp_path):
    fifo, sock = tmp_path / "fifo.png", tmp_path / "socket.png"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(sock))
        begin = time.monotonic()
        assert reason_for(fifo) == "not a regular file (named pipe)"
        assert reason_for(sock) == "not a regular file (socket)"
    assert time.monotonic() - begin < 2


def test_a_file_that_becomes_a_pipe_after_stat_does_not_block(tmp_path, monkeypatch):
    fifo, plain = tmp_path / "fifo.png", tmp_path / "plain.png"
    os.mkfifo(fifo)
    plain.write_bytes(b"x")
    regular = os.stat(plain)
    monkeypatch.setattr(images.os, "stat", lambda path: regular)
    assert reason_for(fifo) == "not a regular file (named pipe)"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(noise(), "PNG"))
    path.chmod(0)
    assert reason_for(path) == "permission denied"


def test_no_permission_as_told_by_open(tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(noise(), "PNG"))

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images.os, "open", refuse)
    assert reason_for(path) == "permission denied"


def test_a_name_that_is_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9\xff.png"
    with open(path, "wb") as file:
        file.write(encoded(noise(), "PNG"))
    assert read_image(os.fsdecode(path)).shape == (3, 40, 48)
    show_name(path).encode("utf-8")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name.png", "plain name.png"),
        ("grün-画像-🐈.png", "grün-画像-🐈.png"),
        ("new\nline\r\t.png", "new\\nline\\r\\t.png"),
        ("\x1b[31mred\x07.png", "\\x1b[31mred\\x07.png"),
        ("\x9b2J\u2028\u202egnp.png", "\\x9b2J\\u2028\\u202egnp.png"),
        ("caf\udce9.png", "caf\\udce9.png"),
        (b"caf\xe9.png", "caf\\udce9.png"),
    ],
)
def test_show_name(name, shown):
    assert show_name(name) == shown


@given(st.text(st.characters(exclude_categories=[])))
def test_a_shown_name_is_one_printable_line(text):
    shown = show_name(text)
    assert shown.isprintable()
    shown.encode("utf-8")


def tensor_or_reason(data):
    try:
        return read_image(data)
    except ImageRejected as error:
        return error.reason


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes_become_a_tensor_or_a_rejection(data):
    outcome = tensor_or_reason(data)
    assert outcome if isinstance(outcome, str) else outcome.dtype == torch.uint8


def test_threads_leave_pillow_as_it_was():
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    data = encoded(noise(), "PNG")
    threads = [threading.Thread(target=lambda: [read_image(data) for _ in range(30)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert limit == Image.MAX_IMAGE_PIXELS
    assert filters == warnings.filters


def test_to_channels():
    rgb = torch.tensor([255, 0, 0, 0, 255, 0, 0, 0, 255, 7, 7, 7], dtype=torch.uint8).view(4, 3, 1, 1)
    assert to_channels(rgb, 1).flatten().tolist() == [76, 150, 29, 7]  # 0.299, 0.587, 0.114
    gray = torch.tensor([[[5]]], dtype=torch.uint8)
    assert to_channels(gray, 3).flatten().tolist() == [5, 5, 5]
    assert to_channels(rgb, 3) is rgb
    with pytest.raises(ConfigError, match="2 channels cannot become 3"):
        to_channels(torch.zeros(2, 1, 1, dtype=torch.uint8), 3)


def test_every_extension_is_one_pillow_would_open():
    Image.init()
    for extension in images.EXTENSIONS:
        assert Image.EXTENSION.get(extension, "PPM") in (*images.FORMATS, "MPO")
