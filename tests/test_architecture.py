"""The arrows between folders, read from the imports; and what importing the library costs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "pellucid"

# Folder -> what of ours it may import, besides itself, errors and regular. A new one must find its place.
MAY_IMPORT = {
    "errors": set(),
    "regular": set(),
    "objectives": set(),
    "data": set(),
    "steps": {"objectives"},
    "models": {"steps", "objectives"},
    "hf": {"models", "steps", "objectives"},
    "analytic": {"models", "steps", "objectives"},
    "training": {"data", "models", "analytic", "steps", "objectives"},
    "measure": {"models", "analytic", "steps", "objectives"},
    "glass": {"measure", "training", "data", "models", "analytic", "steps", "objectives"},
    "comparison": {"glass", "measure", "training", "data", "models"},
    "probing": {"glass", "measure", "training", "data", "models"},
    "embedding": {"glass", "measure", "training", "data", "models"},
    "segmenting": {"glass", "measure", "training", "data", "models"},
    "writing": {"data", "models"},
    "fitting": {"analytic", "glass", "measure", "training", "data", "steps", "objectives"},
    "cli": {
        "comparison",
        "embedding",
        "segmenting",
        "fitting",
        "probing",
        "writing",
        "hf",
        "glass",
        "measure",
        "training",
        "data",
        "models",
        "analytic",
        "steps",
        "objectives",
    },
    "__main__": {"cli"},  # and nothing else imports the command line
}

# Where the files of a machine lie; a slash in front of one is a path, unless it continues an address.
MACHINE_TOPS = ["work", "home", "Users", "root", "tmp"]
MACHINE = re.compile(rf"(?<![\w./~)}}>*-])/(?:{'|'.join(MACHINE_TOPS)})(?![\w-])")

# Optional or slow to import: never before they are needed.
LATE = {"matplotlib", "pyarrow", "transformers"}

# A folder that is about one of them; the folder itself is then what is late.
ABOUT = {"hf": {"transformers"}}


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(code: str, module: str, is_package: bool = False, *, on_load: bool = False) -> set[str]:
    """Every module that this code imports, wherever it stands: at the top, in a function, by name.

    ``on_load`` keeps to those that importing the code itself brings in.
    """
    found = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    tree = ast.parse(code)
    for node in _run_on_load(tree) if on_load else ast.walk(tree):
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


def _run_on_load(node: ast.AST) -> Iterator[ast.AST]:
    """As ``ast.walk``, without the bodies of functions and of ``if TYPE_CHECKING``."""
    yield node
    for child in ast.iter_child_nodes(node):
        later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not later and not typing:
            yield from _run_on_load(child)


def imports_of(path: Path, *, on_load: bool = False) -> set[str]:
    code = path.read_text(encoding="utf-8")
    return imports(code, name_of(path), path.name == "__init__.py", on_load=on_load)


def homes() -> dict[str, str]:
    """Public name -> the module that ``pellucid`` loads it from."""
    for node in ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOMES":
            return ast.literal_eval(node.value)
    raise AssertionError("pellucid/__init__.py has no _HOMES")


def folders_of(names: set[str]) -> set[str]:
    """Which of our folders a set of imported names reaches; a public name reaches its home's."""
    public = {f"pellucid.{name}": home for name, home in homes().items()}
    parts = [public.get(name, name).split(".") for name in names]
    return {part[1] for part in parts if part[0] == "pellucid" and len(part) > 1}


def roots_of(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


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
class Late:
    import transformers
    def method(self):
        import matplotlib.pyplot
try:
    import timm
except ImportError:
    timm = None
if TYPE_CHECKING:
    import lightning.pytorch
"""
    found = imports(code, "pellucid.models.crate")
    assert folders_of(found) == {"training", "measure", "glass", "models", "cli", "data"}
    assert {"lightning.pytorch", "pellucid.models.vit", "matplotlib.pyplot", "timm"} <= found
    loaded = imports(code, "pellucid.models.crate", on_load=True)
    assert folders_of(loaded) == {"training", "measure", "glass", "models"}
    assert {"transformers", "timm"} <= loaded
    assert not {"lightning.pytorch", "matplotlib.pyplot"} & loaded


def test_a_public_name_counts_as_its_home():
    assert folders_of(imports("from pellucid import train, __version__", "pellucid.models.x")) >= {"training"}


def test_every_module_is_looked_at():
    names = {name_of(path) for path in modules()}
    assert len(names) > 20
    assert {"pellucid", "pellucid.errors", "pellucid.steps.mssa", "pellucid.models"} <= names
    folders = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in modules()} - {"__init__"}
    assert folders <= MAY_IMPORT.keys(), "a new folder: say in MAY_IMPORT what it may import"


@pytest.mark.parametrize("path", [p for p in modules() if p != SOURCE / "__init__.py"], ids=name_of)
def test_arrows(path):
    folder = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    allowed = MAY_IMPORT[folder] | {folder, "errors", "regular"}
    wrong = folders_of(imports_of(path)) & MAY_IMPORT.keys() - allowed
    assert not wrong, f"{name_of(path)} imports {', '.join(sorted(wrong))}"


@every_module
def test_nothing_imports_the_command_line(path):
    if name_of(path) != "pellucid.__main__":
        own = {"cli"} if path.relative_to(SOURCE).parts[0].removesuffix(".py") == "cli" else set()
        assert "cli" not in folders_of(imports_of(path)) - own


@every_module
def test_only_training_knows_lightning(path):
    if path.relative_to(SOURCE).parts[0] != "training":
        assert not roots_of(imports_of(path)) & {"lightning", "pytorch_lightning"}


@every_module
def test_slow_libraries_are_imported_where_they_are_needed(path):
    folder, loaded = path.relative_to(SOURCE).parts[0], imports_of(path, on_load=True)
    assert not roots_of(loaded) & LATE - ABOUT.get(folder, set())
    assert not folders_of(loaded) & ABOUT.keys() - {folder}


@every_module
def test_a_helper_lives_with_its_user(path):
    assert not {"utils", "util", "helpers", "misc", "common"} & set(name_of(path).split("."))


def test_the_core_needs_torch_alone():
    allowed = {"torch", "jaxtyping", "pellucid", *sys.stdlib_module_names}
    for path in [p for p in modules() if p.relative_to(SOURCE).parts[0] in ("objectives", "steps")]:
        assert roots_of(imports_of(path)) <= allowed, name_of(path)


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
    assert len(homes()) >= 5
    for name, home in homes().items():
        place = SOURCE.joinpath(*home.split(".")[1:])
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        assert file.exists(), f"pellucid.{name} lives in {home}, which does not exist"
        assert re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")), f"{home} does not name {name}"


def test_kept_files_know_no_machine():
    """No path of a machine that they were written on, in any text that is kept."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    texts = {path: text for path in paths if (text := text_of(path)) is not None}
    assert len(texts) > 20
    assert SOURCE / "__init__.py" in texts
    wrong = {
        str(path.relative_to(ROOT)): hit[0] for path, text in texts.items() if (hit := MACHINE.search(text))
    }
    assert not wrong


@pytest.mark.parametrize("top", MACHINE_TOPS)
def test_a_machine_path_is_recognised(top):
    for text in (f"open('/{top}/x')", f"cd /{top}\n", f"path = /{top}"):
        assert MACHINE.search(text)
    for text in (f"https://example.org/{top}/x", f"./{top}/x", f"a/{top}", f"/{top}shop"):
        assert not MACHINE.search(text)


def text_of(path: Path) -> str | None:
    """The file as text; None where it is gone, a link or binary."""
    if not path.is_file() or path.is_symlink():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
