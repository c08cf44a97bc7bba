"""The code that a saved folder carries, so that transformers loads it where this library is not installed.

It is this library's own: the modules that the models stand on, each in a file of its name in one folder. Of
them only imports are rewritten, to the one kind that transformers' loader of code follows.
"""

from __future__ import annotations

import ast
import os
from functools import cache
from importlib.resources import files
from pathlib import Path

from pellucid import __version__
from pellucid.hf.config import TextConfig

ROOT = "pellucid.hf.modeling"

SHAPES = "jaxtyping"
"""What annotations name and nothing runs: a carried module does without where it is not installed."""

AUTO = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForMaskedLM": "ForMaskedLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
}


def carry_code(config: TextConfig, folder: str | os.PathLike[str]) -> None:
    """Put the code into a folder, and say in its config which class is whose."""
    config.auto_map = auto_map(config)
    for name, text in flattened().items():
        Path(folder, name).write_text(text, encoding="utf-8")


def auto_map(config: TextConfig) -> dict[str, str]:
    """Auto class -> ``file.Class``, of those that this config may become."""
    prefix = type(config).__name__.removesuffix("Config")
    without = "AutoModelForMaskedLM" if getattr(config, "causal", True) else "AutoModelForCausalLM"
    models = {auto: f"{_flat(ROOT)}.{prefix}{kind}" for auto, kind in AUTO.items() if auto != without}
    return {"AutoConfig": f"{_flat('pellucid.hf.config')}.{type(config).__name__}", **models}


@cache
def flattened(root: str = ROOT) -> dict[str, str]:
    """File name -> its text, of a module and all of ours that it needs.

    Raises:
        ValueError: an import that cannot be rewritten.
    """
    found: dict[str, str] = {}
    waiting = [root]
    while waiting:
        module = waiting.pop()
        name = f"{_flat(module)}.py"
        if name not in found:
            found[name], needed = _rewritten(module)
            waiting += needed
    return dict(sorted(found.items()))


def _rewritten(module: str) -> tuple[str, list[str]]:
    """A module's text for the flat folder, and which of ours it needs."""
    text = _source(module)
    lines = text.splitlines()
    if "from __future__ import annotations" not in lines:
        raise ValueError(f"{module} needs 'from __future__ import annotations' to be carried")
    needed: list[str] = []
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in sorted(imports, key=lambda node: -node.lineno):  # from the end, so that lines keep numbers
        if "pellucid" in _roots(node):
            homes = _homes(module, node)
            new = [f"from .{_flat(home)} import {', '.join(names)}" for home, names in sorted(homes.items())]
            needed += homes
        elif SHAPES in _roots(node):
            new = ["try:", f"    {ast.unparse(node)}", "except ImportError:", "    pass"]
        else:
            continue
        lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + line for line in new]
    head = f"# pellucid {__version__}, {module}: written by it, under its license (Apache-2.0)."
    return "\n".join([head, *lines, ""]), needed


def _homes(module: str, node: ast.Import | ast.ImportFrom) -> dict[str, list[str]]:
    """Module that defines it -> names as they are imported, of one import of ours."""
    if isinstance(node, ast.Import) or node.level:
        raise ValueError(f"{module}: '{ast.unparse(node)}' cannot be carried - import names from a module")
    found: dict[str, list[str]] = {}
    for alias in node.names:
        found.setdefault(_home(str(node.module), alias.name), []).append(ast.unparse(alias))
    return found


def _home(module: str, name: str) -> str:
    """The module that a name imported from ``module`` comes from, which may only pass it on."""
    if _path(module).name != "__init__.py":
        return module
    for node in ast.parse(_source(module)).body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return _home(str(node.module), name)
    raise ValueError(f"{module}.{name} cannot be carried: {module} does not import it from a module")


def _roots(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Packages that it imports from; a relative import is of ours."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return {"pellucid"} if getattr(node, "level", 0) else {name.split(".")[0] for name in names}


def _path(module: str) -> Path:
    place = files("pellucid").joinpath(*module.split(".")[1:])
    return Path(str(place), "__init__.py") if place.is_dir() else Path(f"{place}.py")


def _source(module: str) -> str:
    return _path(module).read_text(encoding="utf-8")


def _flat(module: str) -> str:
    """pellucid.steps.mssa -> pellucid_steps_mssa"""
    return module.replace(".", "_")
