"""The data, and how to make this report again."""

from __future__ import annotations

import json

from pellucid.glass.markup import Html, count, folded, number, paragraph, plural, section, table, tag
from pellucid.glass.reading import Bundle, Fields, words

MAX_NAMES = 30
MAX_REJECTS = 50


def data(bundle: Bundle) -> Html:
    """Counts, classes, normalisation and every rejected file."""
    fields = bundle.fields.one("data")
    if not fields:
        return Html("")
    of_text = fields.text("kind") == "text"
    what = "texts" if of_text else "images"
    lead = f"Look at the number of {what} per split, and at the files that could not be used."
    said = _sentences_on_text(fields) if of_text else _sentences(fields)
    return section("data", "The data", lead, paragraph(*said), _classes(fields), _rejects(fields))


def _sentences_on_text(fields: Fields) -> list[str]:
    """Documents, their size, and the words that they were cut into."""
    name, tokenizer = fields.text("name", "The data"), fields.one("tokenizer")
    counts = []
    for split, purpose in (("train", "training"), ("test", "test")):
        n, size = fields.integer(split), fields.number(f"{split}_bytes")
        if n is not None:
            told = f" ({bytes_of(size)})" if size is not None else ""
            counts.append(f"{plural(n, 'document')} for {purpose}{told}")
    has = f"{name}: {' and '.join(counts)}" if counts else name
    classes = fields.values("classes")
    has += f", in {plural(len(classes), 'class', 'classes')}." if classes else "."
    words, each = tokenizer.integer("vocab_size"), tokenizer.number("bytes_per_word")
    read = f"Read by the tokenizer {tokenizer.text('name')}" if tokenizer.text("name") else ""
    read += f", which knows {plural(words, 'word')}" if read and words is not None else ""
    read += f" and makes one of {number(each)} bytes of held-out text, in the mean" if read and each else ""
    digest = tokenizer.text("fingerprint")
    return [has, f"{read}." if read else "", f"Its fingerprint begins with {digest[:12]}." if digest else ""]


def bytes_of(size: float) -> str:
    """``1.2 MB``, in powers of ten."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**power:
            return f"{number(size / 10**power)} {unit}"
    return f"{count(size)} bytes"


def _sentences(fields: Fields) -> list[str]:
    name, train, test = fields.text("name", "The data"), fields.integer("train"), fields.integer("test")
    classes, channels = fields.values("classes"), fields.integer("in_chans")
    size = [count(side) for side in fields.numbers("img_size") if side is not None]
    counts = [
        plural(n, f"image for {split}", f"images for {split}")
        for n, split in ((train, "training"), (test, "test"))
        if n is not None
    ]
    has = f"{name}: {' and '.join(counts)}" if counts else name
    has += f", in {plural(len(classes), 'class', 'classes')}." if classes else ", without classes."
    shape = f"Each is {' × '.join(size)} pixels" if size else ""
    shape += f" with {plural(channels, 'channel')}." if shape and channels else "." if shape else ""
    return [has, shape, _normalised(fields)]


def _normalised(fields: Fields) -> str:
    mean, std = ([number(v) for v in fields.numbers(key)] for key in ("mean", "std"))
    if not mean or not std:
        return ""
    shift, scale = ", ".join(mean), ", ".join(std)
    return f"Pixels were shifted by the mean {shift} and divided by the standard deviation {scale}."


def _classes(fields: Fields) -> Html:
    names = [words(name) for name in fields.values("classes") if name is not None]
    if not names:
        return Html("")
    more = f" and {plural(len(names) - MAX_NAMES, 'more', 'more')}" if len(names) > MAX_NAMES else ""
    return paragraph(
        tag("b", "Classes:"), tag("span", f"{', '.join(names[:MAX_NAMES])}{more}.", class_="names")
    )


def _rejects(fields: Fields) -> Html:
    if fields.raw("rejects") is None:
        return Html("")
    rejects = fields.many("rejects")
    if not rejects:
        return paragraph("No file was rejected.")
    rows = [
        [tag("span", r.text("path", "?"), class_="path"), r.text("reason", "no reason given")]
        for r in rejects[:MAX_REJECTS]
    ]
    said = f"{plural(len(rejects), 'file')} could not be used and took part in nothing."
    more = len(rejects) - MAX_REJECTS
    rest = paragraph(f"{plural(more, 'more file', 'more files')} not listed here.") if more > 0 else ""
    return tag("div", tag("p", said), table("Rejected files", ["file", "reason"], rows), rest)


def reproduce(bundle: Bundle) -> Html:
    """The command, and every setting as it was resolved."""
    fields = bundle.fields
    command, config = fields.text("command"), fields.one("config").items()
    if not command and not config:
        return Html("")
    version = fields.text("version")
    said = f"Made with pellucid {version}" if version else ""
    said += f" on {fields.text('created')}." if said and fields.text("created") else "." if said else ""
    shown = tag("pre", tag("code", command)) if command else ""
    rows = [[name, tag("code", setting(value))] for name, value in config]
    settings = (
        folded(f"All {plural(len(rows), 'setting')}", table("Settings", ["name", "value"], rows))
        if rows
        else ""
    )
    lead = "Run this command with the settings below to make this report again."
    return section("reproduce", "How to reproduce", lead, shown, paragraph(said), settings)


def setting(value: object) -> str:
    """A setting as a person would type it; nested ones as JSON."""
    if isinstance(value, (dict, list, tuple)):
        return words(json.dumps(value, ensure_ascii=False, default=str))
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else words(value, "none")
