"""Imports run one way: no module of the package imports from a layer above its own."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import cjepa_kernels

PACKAGE = Path(cjepa_kernels.__file__).parent
NAME = "cjepa_kernels"

# The lowest layer comes first. A name is a module or a folder directly under cjepa_kernels/, and
# "__init__" is the public face of the package. Modules of one layer may import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("_C", "_version"),
    (
        "environment",
        "error_lines",
        "extras",
        "files",
        "json_values",
        "plot_style",
        "provenance",
        "suggestions",
        "tables",
        "yaml_reader",
    ),
    ("definitions",),
    ("backends",),
    ("reference",),
    ("chunked",),
    ("triton",),
    ("ops",),
    ("distributed",),
    ("functional", "prediction", "tokens"),
    ("modules",),
    ("compat", "config"),
    ("__init__",),
    ("bench", "tune", "train"),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# The layers inside train/. The lowest layer comes first.
TRAIN_LAYERS: tuple[tuple[str, ...], ...] = (
    ("config", "checksummed_json", "reported_error"),
    ("model",),
    ("data",),
    ("evaluation",),
    ("loop",),
    ("report",),
    ("runner",),
    ("compare",),
)
TRAIN_LEVEL = {name: level for level, names in enumerate(TRAIN_LAYERS) for name in names}


class Import(NamedTuple):
    """An import of the package by one of its modules."""

    path: Path  # Path of the module, relative to the package.
    line: int
    imported: str  # The imported part of the package, as in LAYERS.

    @property
    def is_upward(self) -> bool:
        return LEVEL[self.imported] > LEVEL[part_of(self.path)]

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.imported}"


def part_of(path: Path) -> str:
    """The part of the package that a module belongs to.

    ``__main__.py`` belongs to the command line.
    """
    return "cli" if path.name == "__main__.py" else path.parts[0].removesuffix(".py")


def imports_of(path: Path, source: str) -> Iterator[Import]:
    """All imports of the package in a module, also those inside functions.

    Args:
        path: Path of the module, relative to the package.
        source: Text of the module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Call)):
            for name in imported_names(node, path):
                yield Import(path, node.lineno, part_of_name(name))


def imported_names(node: ast.Import | ast.ImportFrom | ast.Call, path: Path) -> list[str]:
    """Dotted names of the package's modules that a statement or a call imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        package = "." * node.level + (node.module or "")
        if node.level:
            folder = ".".join((NAME, *path.parts[:-1]))
            package = importlib.util.resolve_name(package, folder)
        names = [f"{package}.{alias.name}" for alias in node.names]
    else:
        function, arguments = node.func, node.args
        called = getattr(function, "attr", getattr(function, "id", ""))
        if called not in ("import_module", "require", "__import__") or not arguments:
            return []
        text = ast.unparse(arguments[0]) if isinstance(arguments[0], ast.JoinedStr) else ""
        if isinstance(arguments[0], ast.Constant):
            text = str(arguments[0].value)
        names = [text.removeprefix("f").strip("'\"")]
    return [name for name in names if name.split(".")[0] == NAME]


def part_of_name(name: str) -> str:
    """The part of the package that a dotted name belongs to.

    Names that ``cjepa_kernels`` itself binds belong to ``__init__``.
    """
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"


MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def test_every_part_of_the_package_has_a_layer() -> None:
    assert {part_of(path) for path in MODULES} <= set(LEVEL)


def test_no_import_runs_upward() -> None:
    upward = [
        str(one)
        for path in MODULES
        for one in imports_of(path, (PACKAGE / path).read_text(encoding="utf-8"))
        if one.is_upward
    ]
    assert not upward, "\n".join(upward)


def test_no_room_of_the_training_program_imports_upward() -> None:
    upward = []
    for path in sorted((PACKAGE / "train").rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        layer = inside.parts[1].removesuffix(".py")
        if layer == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom, ast.Call)):
                upward += [
                    f"{inside}:{node.lineno} imports {name}"
                    for name in imported_names(node, inside)
                    if name.startswith(f"{NAME}.train.")
                    and TRAIN_LEVEL[name.split(".")[2]] > TRAIN_LEVEL[layer]
                ]
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize(
    ("source", "imported"),
    [
        ("import cjepa_kernels.train.config", "train"),
        ("from cjepa_kernels import functional", "functional"),
        ("from cjepa_kernels import nt_xent", "__init__"),
        ("from cjepa_kernels.ops import call", "ops"),
        ("from ..functional.checks import as_float", "functional"),
        ("from .. import bench", "bench"),
        ("def f():\n    from cjepa_kernels.functional import nt_xent", "functional"),
        ("import importlib\nimportlib.import_module('cjepa_kernels.tune')", "tune"),
        ("import importlib\nimportlib.import_module(f'cjepa_kernels.cli.{name}')", "cli"),
    ],
    ids=[
        "import",
        "from_the_package",
        "public_name",
        "from_a_part",
        "relative",
        "relative_from_the_package",
        "inside_a_function",
        "import_module",
        "import_module_with_a_format_string",
    ],
)
def test_an_upward_import_is_found(source: str, imported: str) -> None:
    (one,) = imports_of(Path("reference/example.py"), source)
    assert one.imported == imported
    assert one.is_upward
