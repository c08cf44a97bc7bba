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
    lead = "Look at the number of images per split, and at the files that could not be used."
    return section(
        "data", "The data", lead, paragraph(*_sentences(fields)), _classes(fields), _rejects(fields)
    )


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
