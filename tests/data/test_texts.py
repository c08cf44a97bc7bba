"""The text door: whatever the file, UTF-8 comes out or a named rejection."""

import codecs
import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.data.texts import TextRejected, as_text, blocks, parts, read_text

plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=60)


def kept(folder, data):
    path = folder / "x.txt"
    path.write_bytes(data)
    return path


def as_lines(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("door")


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


@given(text=plain, block=st.integers(4, 12), encoding=st.sampled_from(ENCODINGS))
def test_every_encoding_with_a_mark_and_utf8_without(folder, text, block, encoding):
    path = kept(folder, text.encode(encoding))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pellucid.data.texts.BLOCK", block)  # characters and line ends fall across blocks
        assert read_text(path) == as_lines(text).encode()
        assert all(blocks(path))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"ab\xffcd", "not UTF-8: byte 0xff at 2"),
        (codecs.BOM_UTF8 + b"ab\xffcd", "not UTF-8: byte 0xff at 5"),
        ("naïve".encode("latin-1"), "not UTF-8: byte 0xef at 2"),
        (b"cut off in the middle \xe2\x82", "not UTF-8: byte 0xe2 at 22"),
        (b"x" * (2**20 - 1) + "é".encode() + b"\xff", "not UTF-8: byte 0xff at 1,048,577"),
        (codecs.BOM_UTF16_LE + b"abc", "not UTF-16: byte 0x63 at 4"),
        (b"\xed\xa0\x80", "not UTF-8: byte 0xed at 0"),  # half of a surrogate pair
        ("text".encode("utf-16-le"), "binary, or UTF-16 without its mark: it holds a NUL"),
        (b"\x7fELF\0\0", "binary, or UTF-16 without its mark: it holds a NUL"),
    ],
)
def test_what_is_no_text(tmp_path, data, reason):
    with pytest.raises(TextRejected) as caught:
        read_text(kept(tmp_path, data))
    assert caught.value.reason == reason


@given(data=st.binary(max_size=40))
def test_any_bytes_are_text_or_rejected(folder, data):
    try:
        text = read_text(kept(folder, data))
    except TextRejected as error:
        text = error.reason.encode()
    assert text.decode().encode() == text
    assert b"\r" not in text


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "round.txt").symlink_to(tmp_path / "round.txt")
    reasons = {}
    for name in ("pipe.txt", "dangling.txt", "round.txt", "."):
        with pytest.raises(TextRejected) as caught:
            read_text(tmp_path / name)
        reasons[name] = caught.value.reason
    assert reasons == {
        "pipe.txt": "not a regular file (named pipe)",
        "dangling.txt": "no such file",
        "round.txt": "too many levels of symbolic links",
        ".": "not a regular file (folder)",
    }
    with pytest.raises(TextRejected, match=r"device"):
        read_text("/dev/zero")


def test_a_file_that_may_not_be_read(tmp_path):
    path = kept(tmp_path, b"x")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root may read everything")
    with pytest.raises(TextRejected, match="permission denied"):
        read_text(path)
    path.chmod(stat.S_IRWXU)


def test_strings():
    assert as_text("a\r\nb\rc\n") == b"a\nb\nc\n"
    with pytest.raises(TextRejected, match="surrogate"):
        as_text("\ud800")


# --- parts --------------------------------------------------------------------------------------------

PIECES = ["word", "é" * 40, " ", "\n", "\n\n", "\n\n\n", "x" * 700]
words = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


@settings(max_examples=40)
@given(text=words, block=st.integers(50, 400))
def test_parts_are_the_file(folder, text, block):
    path = kept(folder, text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pellucid.data.texts.BLOCK", block)
        found = list(parts(path))
    assert b"".join(found) == text.encode()
    assert all(part.decode() for part in found)
    assert all(len(part) >= 256 for part in found[:-1])
    assert all(len(part.rstrip(b"\n")) <= 516 for part in found)


def test_where_a_part_ends(tmp_path):
    paragraphs = "\n\n".join(f"paragraph {i} " + "with some words " * 5 for i in range(100))
    found = list(parts(kept(tmp_path, paragraphs.encode())))
    assert all(part.endswith(b"\n\n") for part in found[:-1])
    assert len(found) in range(20, 64)
    flat = list(parts(kept(tmp_path, paragraphs.replace("\n\n", "\n").encode())))
    assert all(part.endswith(b"\n") for part in flat[:-1])
    spaced = list(parts(kept(tmp_path, paragraphs.replace("\n\n", " ").encode())))
    assert all(part.endswith(b" ") for part in spaced[:-1])
    large = list(parts(kept(tmp_path, b"a line\n\n" * 2**19)))
    assert {len(part) for part in large[:-1]} == {2**14 + 8}
    assert list(parts(kept(tmp_path, b"short\n\ntext"))) == [b"short\n\ntext"]
    assert list(parts(kept(tmp_path, b""))) == []
