"""The arrows between folders, read from the imports; and what importing the library costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "pellucid"

# Folder -> what of ours it may import, besides itself and errors. A new folder must find its place here.
MAY_IMPORT = {
    "errors": set(),
    "objectives": set(),
    "data": set(),
    "steps": {"objectives"},
    "models": {"steps", "objectives"},
    "analytic": {"steps", "objectives"},
    "training": {"data", "models", "analytic", "steps", "objectives"},
    "measure": {"data", "models", "analytic", "steps", "objectives"},
    "glass": {"measure", "training", "data", "models", "analytic", "steps", "objectives"},
    "cli": {"glass", "measure", "training", "data", "models", "analytic", "steps", "objectives"},
    "__main__": {"cli"},  # and nothing else imports the command line
}


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(code: str, module: str, is_package: bool = False) -> set[str]:
    """Every module that this code imports, wherever it stands: at the top, in a function, by name."""
    found = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
    return found


def imports_of(path: Path) -> set[str]:
    return imports(path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py")


def folders_of(names: set[str]) -> set[str]:
    """Which of our folders a set of imported names reaches."""
    return {parts[1] for parts in (n.split(".") for n in names) if parts[0] == "pellucid" and len(parts) > 1}


every_module = pytest.mark.parametrize("path", modules(), ids=name_of)


def test_the_reader_sees_every_form_of_import():
    code = """
import pellucid.training.run as run
from pellucid import measure
from ..glass import report
from . import vit
def later():
    from pellucid.cli import main
    import_module("pellucid.data")
if TYPE_CHECKING:
    import lightning.pytorch
"""
    found = imports(code, "pellucid.models.crate")
    assert folders_of(found) == {"training", "measure", "glass", "models", "cli", "data"}
    assert "lightning.pytorch" in found
    assert "pellucid.models.vit" in found


def test_every_module_is_looked_at():
    names = {name_of(path) for path in modules()}
    assert {"pellucid", "pellucid.errors", "pellucid.steps.mssa", "pellucid.models"} <= names
    folders = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in modules()} - {"__init__"}
    assert folders <= MAY_IMPORT.keys(), "a new folder: say in MAY_IMPORT what it may import"


@pytest.mark.parametrize("path", [p for p in modules() if p != SOURCE / "__init__.py"], ids=name_of)
def test_arrows(path):
    folder = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    allowed = MAY_IMPORT[folder] | {folder, "errors"}
    wrong = folders_of(imports_of(path)) & MAY_IMPORT.keys() - allowed
    assert not wrong, f"{name_of(path)} imports {', '.join(sorted(wrong))}"


@every_module
def test_only_training_knows_lightning(path):
    if path.relative_to(SOURCE).parts[0] != "training":
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert not roots & {"lightning", "pytorch_lightning"}


@every_module
def test_a_helper_lives_with_its_user(path):
    assert not {"utils", "util", "helpers", "misc", "common"} & set(name_of(path).split("."))


def test_the_core_needs_torch_alone():
    allowed = {"torch", "jaxtyping", "pellucid", *sys.stdlib_module_names}
    for path in [p for p in modules() if p.relative_to(SOURCE).parts[0] in ("objectives", "steps")]:
        assert {name.split(".")[0] for name in imports_of(path)} <= allowed, name_of(path)


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SOURCE.parent
    )
    return result.stdout.strip()


def test_importing_the_library_is_nothing():
    code = (
        "import sys, time; sys.path.insert(0, '.'); t = time.perf_counter(); import pellucid; "
        "print(time.perf_counter() - t, *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    runs = [run_python(code).split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in runs) < 0.3
    heavy = {"torch", "timm", "lightning", "numpy", "sklearn", "transformers", "PIL"}
    assert "pellucid" in runs[0]
    assert not heavy & set(runs[0])


def test_every_public_name_has_a_home_that_holds_it():
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    homes = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOMES"
    )
    assert len(homes) >= 5
    for name, home in homes.items():
        init = SOURCE.joinpath(*home.split(".")[1:], "__init__.py")
        assert init.exists(), f"pellucid.{name} lives in {home}, which does not exist"
        assert re.search(rf"\b{name}\b", init.read_text()), f"{home} does not name {name}"


def test_sources_know_no_machine():
    """No path of the machine they were written on, in anything that is kept."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    kept = [ROOT / line for line in listed.stdout.splitlines()]
    texts = [
        p for p in kept if p.suffix in {".py", ".md", ".toml", ".yml", ".yaml", ".ts", ".tsx", ".css", ".js"}
    ]
    assert len(texts) > 20
    machine = re.compile("|".join(["/" + "work/", "/" + "home/", "/" + "Users/", "/" + "root/"]))
    wrong = {}
    for path in texts:
        if path.exists() and (hit := machine.search(path.read_text(encoding="utf-8"))):
            wrong[str(path.relative_to(ROOT))] = hit[0]
    assert not wrong
