"""Pictures and those nearest to them on one sheet: a row for each query, itself first."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pellucid.glass.markup import Html, figure, join, number, section, tag
from pellucid.glass.report import render_page
from pellucid.glass.sheets import PAGE, RISE, RULE

INK, QUIET = (29, 28, 26), (102, 98, 91)

BOX, GAP, MARGIN, CAPTION = 112, 14, 20, 40
"""Pixels: side of a picture, between pictures, around the sheet, below each picture."""

FONT = 13


class Found(Protocol):
    """A picture that was found; see :class:`pellucid.embedding.Hit`."""

    @property
    def path(self) -> str: ...
    @property
    def class_name(self) -> str | None: ...
    @property
    def cosine(self) -> float: ...
    @property
    def image(self) -> Tensor: ...


class Asked(Protocol):
    """A picture and what was found for it; see :class:`pellucid.embedding.Query`."""

    @property
    def path(self) -> str: ...
    @property
    def image(self) -> Tensor: ...
    @property
    def hits(self) -> Sequence[Found]: ...


def neighbour_sheet(queries: Sequence[Asked]) -> bytes:
    """A PNG: each row a query, then its neighbours with their cosine and class (or name)."""
    columns = 1 + max(len(query.hits) for query in queries)
    step = BOX + GAP
    size = (2 * MARGIN + columns * step, 2 * MARGIN + len(queries) * (BOX + CAPTION + GAP) - GAP)
    canvas = Image.new("RGB", size, PAGE)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT)

    def put(column: int, top: int, image: Tensor, lines: Sequence[tuple[str, tuple[int, int, int]]]) -> None:
        # The gap behind the query is twice as wide, with a rule in it.
        left = MARGIN + column * step + (GAP if column else 0)
        shown = _fitted(image)
        canvas.paste(shown, (left + (BOX - shown.width) // 2, top + (BOX - shown.height) // 2))
        for i, (text, colour) in enumerate(lines):
            pen.text((left, top + BOX + 4 + i * (FONT + 4)), _cut(text, font), colour, font)

    for row, query in enumerate(queries):
        top = MARGIN + row * (BOX + CAPTION + GAP)
        put(0, top, query.image, [("query", QUIET), (os.path.basename(query.path), INK)])
        pen.line([(MARGIN + step, top), (MARGIN + step, top + BOX)], RULE, 1)
        for column, hit in enumerate(query.hits, start=1):
            put(column, top, hit.image, [(f"{hit.cosine:.3f}", RISE), (_called(hit), INK)])
    file = io.BytesIO()
    canvas.save(file, "PNG", optimize=True)
    return file.getvalue()


def neighbour_page(queries: Sequence[Asked], title: str) -> str:
    """The same as one HTML file, pictures inside; names in any script, full paths on hovering."""
    sections = []
    for i, query in enumerate(queries):
        figures = [
            figure(
                number(hit.cosine),
                _img(hit.image, hit.path),
                _called(hit) if hit.class_name is None else f"{hit.class_name}, {os.path.basename(hit.path)}",
            )
            for hit in query.hits
        ]
        shown = [figure("query", _img(query.image, query.path)), *figures]
        panels = tag("div", *shown, class_="panels small")
        sections.append(section(f"query-{i}", os.path.basename(query.path), query.path, panels))
    lead = tag("p", "By the cosine of their features, the nearest first.", class_="lead")
    return render_page(title, tag("header", tag("h1", title), lead), join(sections))


def _called(hit: Found) -> str:
    return os.path.basename(hit.path) if hit.class_name is None else hit.class_name


def _img(image: Tensor, path: str) -> Html:
    file = io.BytesIO()
    _fitted(image).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return tag("img", src=f"data:image/png;base64,{data}", alt=path, title=path)


def _fitted(image: Tensor) -> Image.Image:
    """Inside the box: small pictures by whole multiples of a pixel, large ones made smaller."""
    if image.shape[0] not in (1, 3):
        image = image[:1]
    picture = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().to(torch.uint8).numpy())
    longest = max(picture.size)
    if longest <= BOX:
        zoom = BOX // longest
        return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    picture.thumbnail((BOX, BOX), Image.Resampling.LANCZOS)
    return picture


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """What fits below a picture; the beginning, as the end of a name is mostly its kind of file."""
    if font.getlength(text) <= BOX:
        return text
    while text and font.getlength(text + "...") > BOX:
        text = text[:-1]
    return text + "..."


__all__ = ["neighbour_page", "neighbour_sheet"]
