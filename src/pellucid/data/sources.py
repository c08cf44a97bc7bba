"""Where texts come from: files, parts of one, lines of JSON, rows of a table; read anew when asked for."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple, final

from pellucid.data.images import show_name
from pellucid.data.texts import TextRejected, as_text, lower_reason, parts, read_text
from pellucid.regular import open_regular

Label = str | int

_SHOWN_FIELDS = 5
_ROWS = 64  # of a table, at once; one may be a book


class Entry(NamedTuple):
    """One text of a source: where in it, what, of which class, or why it is rejected.

    A row of a table or a line of JSON may hold no text: then ``text`` is empty, and no reason is given.
    """

    place: int
    text: bytes = b""
    label: Label | None = None
    reason: str = ""


class Source(ABC):
    """Texts in an order, the same every time. ``path`` and ``title`` are as the file system has them."""

    path: str
    title: str

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """Every text of the source, those among them that are rejected."""

    def place_name(self, place: int) -> str:
        """What follows the source's own name in that of a text."""
        return ""


@final
class WholeFile(Source):
    """A file that is one text."""

    def __init__(self, path: str, title: str, label: Label | None = None) -> None:
        self.path, self.title, self.label = path, title, label

    def entries(self) -> Iterator[Entry]:
        try:
            text = read_text(self.path)
        except TextRejected as error:
            yield Entry(0, reason=error.reason)
            return
        blank = not text.strip()
        yield Entry(0, text, self.label, ("nothing but space" if text else "empty file") if blank else "")


@final
class PartsOfFile(Source):
    """A file that is cut, see :func:`~pellucid.data.texts.parts`."""

    def __init__(self, path: str, title: str) -> None:
        self.path, self.title = path, title

    def entries(self) -> Iterator[Entry]:
        number = 0
        try:
            for number, part in enumerate(parts(self.path), start=1):
                yield Entry(number, part)
        except TextRejected as error:
            yield Entry(number + 1, reason=error.reason)

    def place_name(self, place: int) -> str:
        return f", part {place}"


@final
class JsonLines(Source):
    """Objects with the fields ``text`` and, where they have one, ``label``; one a line."""

    def __init__(self, path: str, title: str) -> None:
        self.path, self.title = path, title

    def entries(self) -> Iterator[Entry]:
        number = 0
        try:
            with open_regular(self.path) as file:
                for number, line in enumerate(file, start=1):
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    if line.strip():
                        yield self._entry(number, line)
        except OSError as error:
            yield Entry(number + 1, reason=lower_reason(error))

    def place_name(self, place: int) -> str:
        return f", line {place}"

    def _entry(self, number: int, line: bytes) -> Entry:
        try:
            found = json.loads(line.decode())
            return _of_object(number, found)
        except UnicodeDecodeError as error:
            return Entry(number, reason=f"not UTF-8: byte 0x{line[error.start]:02x}")
        except TextRejected as error:
            return Entry(number, reason=error.reason)
        except (ValueError, RecursionError) as error:
            detail = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            return Entry(number, reason=f"no JSON: {detail.lower()}")


@final
class Rows(Source):
    """Rows of a table: its column of text, and that of classes, in which ``unknown`` stands for none."""

    def __init__(
        self, table: Any, text: str, label: str | None, path: str, unknown: Label | None = None
    ) -> None:
        columns = [text] if label is None else [text, label]
        self._table = table.select_columns(columns).with_format("arrow")
        self._text, self._label, self._unknown = text, label, unknown
        self.path = self.title = path

    def entries(self) -> Iterator[Entry]:
        for first in range(0, len(self._table), _ROWS):
            rows = self._table[first : first + _ROWS]
            texts = rows[self._text].to_pylist()
            labels = [None] * len(texts) if self._label is None else rows[self._label].to_pylist()
            for place, (text, label) in enumerate(zip(texts, labels, strict=True), start=first):
                try:
                    yield Entry(place, as_text(text or ""), None if label == self._unknown else label)
                except TextRejected as error:
                    yield Entry(place, reason=error.reason)

    def place_name(self, place: int) -> str:
        return f"[{place}]"


def path_of(source: Source, place: int) -> str:
    """Where a text is, as the file system has it: print it with show_name."""
    return source.path + source.place_name(place)


def name_of(source: Source, place: int) -> str:
    """What to call a text in a message; safe to print."""
    return show_name(source.title + source.place_name(place))


def _of_object(number: int, found: Any) -> Entry:
    if not isinstance(found, dict):
        raise TextRejected(f"no object, but {_kind(found)}")
    if "text" not in found:
        names = ", ".join(show_name(str(key))[:40] for key in list(found)[:_SHOWN_FIELDS])
        raise TextRejected(f"no field 'text', but {names or 'none at all'}")
    text, label = found["text"], found.get("label")
    if text is not None and not isinstance(text, str):
        raise TextRejected(f"'text' is {_kind(text)}")
    if not (label is None or (isinstance(label, str | int) and not isinstance(label, bool))):
        raise TextRejected(f"'label' is {_kind(label)}, not text or a whole number")
    return Entry(number, as_text(text or ""), label)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
