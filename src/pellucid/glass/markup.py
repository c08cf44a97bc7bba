"""HTML that is safe by construction, and numbers as a reader wants them.

``tag`` escapes every child that is not ``Html`` already, and every attribute. A string from a bundle
therefore reaches the page as text whatever it contains, without anybody having to remember to escape it.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

NBSP = "\u00a0"
THIN = "\u202f"
MINUS = "\u2212"
NONE = "\u2013"
"""What stands where a number is missing."""

MAX_SHOT = 100_000
"""Characters of one of several pictures in a row; a larger one is left out."""

_VOID = {"img", "meta", "br"}
# Controls break parsers, lone surrogates (undecodable file names) break the encoder, and the
# bidirectional overrides can make a file name read as another one.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_PICTURE = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+={0,2}")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Attribute = str | int | float | bool | None


class Html(str):
    """Text that is markup already and is not escaped again."""

    __slots__ = ()


def escape(text: str) -> Html:
    """``text`` as markup that shows exactly it; unprintable characters show as U+FFFD."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(_UNPRINTABLE.sub("\ufffd", text), quote=True))


def join(parts: Iterable[str], separator: str = "") -> Html:
    """The parts one after the other, each escaped unless it is markup."""
    return Html(escape(separator).join(escape(part) for part in parts))


def tag(name: str, *children: str, **attributes: Attribute) -> Html:
    """One element. ``class_`` is ``class``, ``stroke_width`` is ``stroke-width``; ``None`` leaves one out."""
    shown = [
        _attribute(key, value)
        for key, value in attributes.items()
        if value is not None and value is not False
    ]
    opening = f"<{name}{''.join(shown)}>"
    return Html(opening if name in _VOID else f"{opening}{join(children)}</{name}>")


def _attribute(key: str, value: Attribute) -> str:
    key = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {key}"
    shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {key}="{escape(shown)}"'


def paragraph(*sentences: str, class_: str | None = None) -> Html:
    """The sentences that are not empty, as one paragraph; nothing if none is left."""
    kept = [sentence for sentence in sentences if sentence]
    return tag("p", join(kept, " "), class_=class_) if kept else Html("")


def formula(text: str) -> Html:
    """``R^c(Z | U)`` with its one-letter superscripts raised."""
    return Html(re.sub(r"\^(\w)", r"<sup>\1</sup>", escape(text)))


def section(anchor: str, heading: str, lead: str, *body: str) -> Html:
    """One section: heading, the sentence that says what to look for, then the rest."""
    opening = tag("div", tag("h2", heading), tag("p", lead, class_="lead"), class_="opening")
    return tag("section", opening, *body, id=anchor)


def folded(summary: str, *body: str, open_: bool = False) -> Html:
    """Something for whoever wants it: closed on the screen, open in print."""
    return tag("details", tag("summary", summary), *body, open=open_)


def figure(heading: str, picture: str, *sentences: str, wide: bool = False) -> Html:
    """A picture with its heading above and, in words, what it shows below."""
    caption = (
        tag("figcaption", join([sentence for sentence in sentences if sentence], " "))
        if any(sentences)
        else ""
    )
    return tag("figure", tag("h3", heading), picture, caption, class_="wide" if wide else None)


def panels(*figures: str) -> Html:
    """Figures side by side where there is room, below each other where there is not."""
    return tag("div", *figures, class_="panels")


def is_picture(uri: object, most: int) -> TypeGuard[str]:
    """Whether ``uri`` is a picture inside the page, of at most so many characters."""
    return isinstance(uri, str) and len(uri) <= most and _PICTURE.fullmatch(uri) is not None


def is_coarse(uri: str) -> bool:
    """Whether a picture is so small that its pixels should stay squares (width of the PNG header)."""
    kind, _, data = uri.partition(",")
    if "png" not in kind or len(data) < 64:
        return False
    return int.from_bytes(base64.b64decode(data[:32])[16:20], "big") <= 64


def shot(uri: object, name: str, *lines: str, class_: str = "") -> Html:
    """One of several pictures in a row, with a few words below; nothing if ``uri`` is no picture."""
    if not is_picture(uri, MAX_SHOT):
        return Html("")
    coarse = "coarse" if is_coarse(uri) else None
    said = [tag("span", line) for line in lines if line]
    return tag(
        "figure",
        tag("img", src=uri, alt=name, title=name, class_=coarse),
        tag("figcaption", *said) if said else "",
        class_=f"shot {class_}".strip(),
    )


def strip(label: str, shots: Sequence[str]) -> Html:
    """Pictures in a row that wraps; nothing if there are none."""
    kept = [each for each in shots if each]
    return tag("div", *kept, class_="strip", role="group", aria_label=label) if kept else Html("")


@dataclass(frozen=True)
class Cell:
    """One cell of a table: what it shows, the number it is sorted by, and how it is set."""

    shown: str
    key: float | None = None
    class_: str | None = None

    def __str__(self) -> str:
        return self.shown


def numeric(value: float | None, digits: int = 3) -> Cell:
    """A number as a cell, sorted by its full value."""
    return Cell(number(value, digits), value, "n")


def shared(value: float | None, decimals: int = 0) -> Cell:
    """A share in percent as a cell, sorted by its full value."""
    return Cell(percent(value, decimals), value, "n")


def table(
    caption: str, heads: Sequence[str], rows: Sequence[Sequence[Cell | str]], *, sort: bool = True
) -> Html:
    """A table in a box of its own that scrolls sideways when it must; the first column names the row.

    A column is set as numbers when a cell of it is; with ``sort`` its headings sort it (by script).
    """
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    is_number = [any(row[i].class_ == "n" for row in cells if i < len(row)) for i in range(len(heads))]
    head = [
        tag("th", h, scope="col", class_="n" if n else None) for h, n in zip(heads, is_number, strict=True)
    ]
    grid = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *head)),
        tag("tbody", *(_row(row) for row in cells)),
        class_="sortable" if sort and len(rows) > 1 else None,
    )
    return tag("div", grid, class_="scroll", role="region", tabindex=0, aria_label=plain(caption))


def _row(cells: Sequence[Cell]) -> Html:
    first, *rest = cells
    key = None if first.key is None else repr(first.key)
    body = [
        tag("td", cell.shown, class_=cell.class_, data_key=None if cell.key is None else repr(cell.key))
        for cell in rest
    ]
    return tag("tr", tag("th", first.shown, scope="row", class_=first.class_, data_key=key), *body)


def plain(text: str) -> str:
    """The text of a piece of markup, for labels that cannot hold markup."""
    return html.unescape(re.sub(r"<[^>]*>", "", text)) if isinstance(text, Html) else text


def number(value: float | None, digits: int = 3) -> str:
    """``value`` to so many significant digits; whole thousands in groups; powers of ten below 0.001."""
    if value is None or not math.isfinite(value):
        return NONE
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        shown = f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    elif size == round(size) and (size >= 10 ** (digits - 1) or size == 0):
        shown = f"{value:,.0f}".replace(",", THIN)
    else:
        decimals = max(0, digits - 1 - math.floor(math.log10(size)))
        shown = f"{value:,.{decimals}f}".replace(",", THIN)
    return shown.replace("-", MINUS)


def count(value: float | None) -> str:
    """A whole number in groups of three digits."""
    return NONE if value is None else f"{round(value):,}".replace(",", THIN).replace("-", MINUS)


def percent(share: float | None, decimals: int = 0) -> str:
    """A share as a percentage that never rounds up to all nor down to none."""
    if share is None:
        return NONE
    unit = 10.0**-decimals
    value = 100 * share
    if 0 < value < unit / 2:
        return f"<{THIN}{unit:.{decimals}f}{NBSP}%"
    if 100 - unit / 2 <= value < 100:
        return f">{THIN}{100 - unit:.{decimals}f}{NBSP}%"
    return f"{value:.{decimals}f}{NBSP}%".replace("-", MINUS)


def change(relative: float | None) -> str:
    """A relative change with its sign, in percent."""
    if relative is None:
        return NONE
    value = 100 * relative
    decimals = 1 if abs(value) < 99.95 else 0
    sign = "+" if value > 0 else MINUS if value < 0 else ""
    return f"{sign}{abs(value):.{decimals}f}{NBSP}%"


def duration(seconds: float | None) -> str:
    """Seconds as ``25 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    if seconds is None or seconds < 0:
        return NONE
    if seconds < 59.5:
        return f"{seconds:.3g}{NBSP}s" if seconds < 10 else f"{seconds:.0f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest}{NBSP}s" if rest else f"{minutes}{NBSP}min"
    hours, minutes = divmod(minutes, 60)
    return f"{count(hours)}{NBSP}h {minutes}{NBSP}min" if minutes else f"{count(hours)}{NBSP}h"


def listed(names: Sequence[str], conjunction: str = "and") -> str:
    """``a``, ``a and b``, ``a, b and c``; of more than seven the first six and how many more."""
    if len(names) > 7:
        names = [*names[:6], f"{len(names) - 6} more"]
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {conjunction} {names[-1]}"


def plural(amount: int, one: str, several: str | None = None) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count(amount)} {one if amount == 1 else several or one + 's'}"
