"""Sphinx: the pages of this folder as a site. Nothing is fetched, neither to build it nor to read it.

``pip install -e '.[docs]' && sphinx-build -W -b html docs docs/_build`` writes ``docs/_build/index.html``.
Formulas become MathML, which browsers draw themselves. What the program can say of itself, it says at build
time: a line ``<!-- commands -->`` or ``<!-- architectures -->`` in a page is replaced by what it has.
"""

from __future__ import annotations

import io
import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

from pellucid import __version__

project = "pellucid"
author = "the pellucid authors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
highlight_language = "text"
pygments_style = pygments_dark_style = "bw"  # coloured in site.css

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "smartquotes"]
myst_heading_anchors = 3

napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "pellucid"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = html_copy_source = False
html_math_renderer = "mathml"

SERIF = '"Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia, "Liberation Serif", serif'
SANS = 'system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, "Liberation Sans", sans-serif'
MONO = 'ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace'
FONTS = {"font-stack": SERIF, "font-stack--headings": SERIF, "font-stack--monospace": MONO, "sans": SANS}


def _palette(page: str, raised: str, ink: str, quiet: str, rule: str, accent: str) -> dict[str, str]:
    """The report's colours (``glass/report.css``) under furo's names."""
    return FONTS | {
        "color-background-primary": page,
        "color-background-secondary": raised,
        "color-background-hover": raised,
        "color-background-border": rule,
        "color-sidebar-background": raised,
        "color-sidebar-background-border": rule,
        "color-code-background": raised,
        "color-foreground-primary": ink,
        "color-foreground-secondary": quiet,
        "color-foreground-muted": quiet,
        "color-foreground-border": quiet,
        "color-brand-primary": accent,
        "color-brand-content": accent,
        "color-brand-visited": accent,
        "color-api-name": accent,
        "color-api-pre-name": quiet,
        "color-inline-code-background": raised,
    }


html_theme_options = {
    "light_css_variables": _palette("#fdfcfa", "#f6f4ef", "#1d1c1a", "#66625b", "#e2ded6", "#1f5f99"),
    "dark_css_variables": _palette("#16171a", "#1d1f23", "#e5e2db", "#a09b92", "#34353a", "#7db3e4"),
    "navigation_with_keys": True,
}

_log = logging.getLogger(__name__)


def commands() -> str:
    """Every command of the program with its own help."""
    from rich.console import Console

    from pellucid.cli import app

    pages = []
    for name in app:
        if name.startswith("-"):
            continue
        text = io.StringIO()
        app.help_print([name], console=Console(file=text, width=92, color_system=None))
        pages.append(f"## {name}\n\n```text\n{text.getvalue().strip()}\n```\n")
    return "\n".join(pages)


def architectures() -> str:
    """Every name that ``create_model`` knows of ours, by family, with its size."""
    import torch
    from timm.models import model_entrypoint

    from pellucid.models import create_model, list_models

    rows = ["| name | | parameters | picture |", "|---|---|--:|--:|"]
    for name in list_models():
        with torch.device("meta"):
            model: Any = create_model(name)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        channels, height, width = model.pretrained_cfg["input_size"]
        meaning = (model_entrypoint(name).__doc__ or "").rstrip(".").replace("``", "`")
        rows.append(f"| `{name}` | {meaning} | {millions:.3f} M | {height} × {width} × {channels} |")
    return "\n".join(rows)


SPELLINGS = (
    (r"\\[td]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*([0-9]|\b[A-Za-z])", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\})\s*([0-9A-Za-z])", r"\1{\2}"),
    (r"(\\(?:bar|hat|tilde|vec)\s*(?:\\[A-Za-z]+|\{[^{}]*\}|[A-Za-z]))(?=[_^])", r"{\1{}}"),
    (r"\\dots(?![A-Za-z])", r"\\ldots"),
    (r"\\(text|display)style(?![A-Za-z])\s*", ""),
    (
        r"(\\(?:arg|det|dim|exp|ln|log|max|min)(?![A-Za-z]))(?=\s*(?:[0-9A-Za-z|]|\\(?!left|[Bb]ig|,|;)))",
        r"\1\\,",
    ),
)
"""LaTeX as the renderer reads it: no short fractions, accents apart, a gap behind the name of a function."""

GENERATED = {"commands": commands, "architectures": architectures}


def _generate(app: Any, page: str, source: list[str]) -> None:
    source[0] = re.sub(
        rf"^<!-- ({'|'.join(GENERATED)}) -->$", lambda m: GENERATED[m[1]](), source[0], flags=re.MULTILINE
    )


def _visit_math(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """A formula as MathML; one that cannot be read is a warning, and with ``-W`` an error."""
    block = isinstance(node, nodes.math_block)
    text = node.astext()
    for pattern, plain in SPELLINGS:
        text = re.sub(pattern, plain, text)
    try:
        shown = tex2mathml(text, as_block=block)
    except MathError as error:
        _log.warning("formula %r: %s", text, error, location=node)
        shown = f"<code>{translator.encode(text)}</code>"
    translator.body.append(f'<div class="math">{shown}</div>' if block else shown)
    raise nodes.SkipNode


def _leave_out(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """scikit-learn gives every estimator methods for routing metadata, which belong to its own pages."""
    return True if re.fullmatch(r"set_\w+_request|get_metadata_routing", name) else None


def setup(app: Any) -> None:
    app.connect("source-read", _generate)
    app.connect("autodoc-skip-member", _leave_out)
    app.add_html_math_renderer(
        "mathml", inline_renderers=(_visit_math, None), block_renderers=(_visit_math, None)
    )
