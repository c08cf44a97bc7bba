"""A bundle of measurements as one HTML file that explains the model: no other file, no request."""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from pellucid.glass.markup import Html, section, tag
from pellucid.glass.reading import Bundle
from pellucid.glass.sections.accuracy import accuracy
from pellucid.glass.sections.atoms import atoms
from pellucid.glass.sections.attention import attention
from pellucid.glass.sections.audit import audit
from pellucid.glass.sections.compare import compared, cost, descent, precision
from pellucid.glass.sections.data import data, reproduce
from pellucid.glass.sections.features import feature_map, neighbours
from pellucid.glass.sections.fitted import fitted, pictures
from pellucid.glass.sections.gaze import gaze
from pellucid.glass.sections.headline import headline
from pellucid.glass.sections.health import health
from pellucid.glass.sections.language import context, text_headline
from pellucid.glass.sections.learning import learning
from pellucid.glass.sections.model import model
from pellucid.glass.sections.tokens import tokens
from pellucid.glass.sections.views import views
from pellucid.glass.sections.words import surprises, written

Maker = Callable[[Bundle], Html]

SECTIONS = {
    "model": ("the model", model),
    "audit": ("the audit", audit),
    "tokens": ("the tokens", tokens),
    "attention": ("attention", attention),
    "learning": ("learning", learning),
    "accuracy": ("accuracy", accuracy),
    "data": ("the data", data),
    "reproduce": ("reproduce", reproduce),
}
"""Anchor, name in the contents, and maker of every section, in reading order."""

UNLABELLED_SECTIONS = {
    "views": ("what it learnt from", views),
    "learning": ("learning", health),
    "neighbours": ("neighbours", neighbours),
    "map": ("the map", feature_map),
    "accuracy": ("accuracy", accuracy),
    **{name: SECTIONS[name] for name in ("model", "audit", "tokens", "attention", "data", "reproduce")},
}
"""The same where the subject learnt without labels."""

TEXT_SECTIONS = {
    "words": ("what surprises it", surprises),
    "writing": ("what it writes", written),
    "context": ("context", context),
    "model": SECTIONS["model"],
    "audit": SECTIONS["audit"],
    "atoms": ("the atoms", atoms),
    "attention": ("attention", gaze),
    **{name: SECTIONS[name] for name in ("tokens", "learning", "accuracy", "data", "reproduce")},
}
"""The same where the subject reads text."""

COMPARISON_SECTIONS = {
    "accuracy": ("accuracy", precision),
    "cost": ("the cost", cost),
    "audit": ("the audit", descent),
    "data": ("the data", data),
    "reproduce": ("reproduce", reproduce),
}
"""The same for the page on several models, each trained from several seeds."""

FIT_SECTIONS = {
    "pictures": ("what it found", pictures),
    "data": ("the data", data),
    "reproduce": ("reproduce", reproduce),
}
"""The same for the page on one fitted estimator."""


def render(bundle: dict, inside: bytes | None = None) -> str:
    """The report on the models of ``bundle`` as the text of one HTML file (write it as UTF-8).

    Any field of the bundle may be missing or ``None``, any number NaN: what needs it is left out.
    Every string is shown as text; no string of the bundle becomes markup. The only scripts and styles are
    those beside this module and in ``static/``; the page's own policy forbids any other and any request.
    The first model is the subject, the others stand beside it. Typically 0.1 to 1 MB.

    Args:
        bundle: see ``docs/bundle.md``.
        inside: answers as :func:`pellucid.glass.answers.bundle` packs them; with them the report holds the
            page of ``pellucid view``, to click through. Typically 1 to 2 MB more.
    """
    read = Bundle.read(bundle)
    title = read.fields.text("title", read.subject.label)
    if read.subject.text:
        return _page(title, text_headline(read), read, TEXT_SECTIONS, inside)
    sections = UNLABELLED_SECTIONS if read.subject.unlabelled else SECTIONS
    return _page(title, headline(read), read, sections, inside)


def render_comparison(bundle: dict) -> str:
    """The report on ``bundle["comparison"]``, under the same promises as :func:`render`."""
    read = Bundle.read(bundle)
    title = read.fields.text("title", "comparison")
    return _page(title, compared(read), read, COMPARISON_SECTIONS)


def render_fit(bundle: dict) -> str:
    """The report on ``bundle["fit"]``, under the same promises as :func:`render`."""
    read = Bundle.read(bundle)
    return _page(read.fields.text("title", "fit"), fitted(read), read, FIT_SECTIONS)


def _page(
    title: str,
    header: Html,
    read: Bundle,
    sections: Mapping[str, tuple[str, Maker]],
    inside: bytes | None = None,
) -> str:
    made: dict[str, tuple[str, Html]] = {}
    for anchor, (name, make) in sections.items():
        if anchor == "data" and inside is not None:
            made["inside"] = ("look inside", _glass(inside, "word" if read.subject.text else "patch"))
        made[anchor] = (name, make(read))
    shown = {anchor: (name, body) for anchor, (name, body) in made.items() if body}
    contents = tag(
        "nav",
        *(tag("a", name, href=f"#{anchor}") for anchor, (name, _) in shown.items()),
        aria_label="Contents",
    )
    main = tag("main", header, contents if shown else "", *(body for _, body in shown.values()))
    return _document(title, main, interactive=inside is not None)


def _glass(inside: bytes, token: str) -> Html:
    """The page of ``pellucid view`` with its answers, which the browser unpacks itself."""
    lead = (
        f"Click a {token}, a head, an atom: this shows what a step does with it. The address keeps the "
        "choice."
    )
    data = base64.b64encode(gzip.compress(inside, 9, mtime=0)).decode("ascii")
    waiting = tag("p", "This part needs a script. Everything else in this report does not.", class_="note")
    return section(
        "inside",
        "Look inside",
        lead,
        tag("div", waiting, id="glass", class_="glass"),
        tag("script", Html(data), type="application/gzip", id="glass-data"),
    )


def render_page(title: str, *body: str) -> str:
    """Any markup as a page of its own, under the same promises as :func:`render`."""
    return _document(title, tag("main", *body))


def _document(title: str, main: Html, *, interactive: bool = False) -> str:
    own = ["report", *(["static/glass"] if interactive else [])]
    head = _head(f"{title} – pellucid report", own)
    scripts = [tag("script", Html(_file(f"{name}.js"))) for name in own]
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", main, *scripts), lang="en") + "\n"


def _head(title: str, own: list[str]) -> Html:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(own)),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", title),
        *(tag("style", Html(_file(f"{name}.css"))) for name in own),
    )


def _policy(own: list[str]) -> str:
    """Nothing from any host; our styles and scripts, each named by its hash; pictures inside the file."""
    hashed = [
        f"{kind} " + " ".join(f"'sha256-{_digest(_file(name + suffix))}'" for name in own)
        for kind, suffix in {"script-src": ".js", "style-src": ".css"}.items()
    ]
    return "; ".join(
        ["default-src 'none'", *hashed, "img-src data:", "base-uri 'none'", "form-action 'none'"]
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


@cache
def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


__all__ = ["render", "render_comparison", "render_fit", "render_page"]
