"""The documents: their code runs, and their links, commands and keys exist."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bench_scripts
import peers
import pytest
import typer
from documents import DOCS, FENCED, ROOT, python_blocks, run_block

from cjepa_kernels.cli.application import app
from cjepa_kernels.config import LOSS_KEYS
from cjepa_kernels.train.config import load_config

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def prose(document: Path) -> str:
    """The text without its blocks of code."""
    return FENCED.sub("", document.read_text(encoding="utf-8"))


def commands(document: Path) -> Iterator[str]:
    """The code of a document that is not Python: lines of code blocks, and code in the text."""
    text = document.read_text(encoding="utf-8")
    for match in FENCED.finditer(text):
        if match[2] != "python":
            yield from match[3].splitlines()
    rest = FENCED.sub("", text)
    yield from re.findall(r"^(?: {4}|\t)(\S.*)$", rest, re.MULTILINE)
    yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest))


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


WITH_CODE = [document for document in DOCUMENTS if python_blocks(document)]


@pytest.mark.parametrize("document", WITH_CODE, ids=name_of)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_code_runs(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # Readers run the documents' commands in this directory.
    for name, module in peers.stand_ins().items():
        monkeypatch.setitem(sys.modules, name, module)
    namespace: dict[str, Any] = {"__name__": "document"}
    for block in python_blocks(document):
        run_block(block, namespace)


def test_most_pages_have_code() -> None:
    pages = {name_of(document) for document in WITH_CODE}
    assert {"README.md", "docs/index.md", "docs/start.md", "docs/faq.md"} <= pages
    assert sum(name.startswith("docs/migrate/") for name in pages) == 6


def slugs(heading: str) -> set[str]:
    """The anchor of a heading on GitHub, and the one on the site."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    ascii_words = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode()
    github = re.sub(r"[^\w\s-]", "", words.lower()).strip().replace(" ", "-")
    site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_words).strip().lower())
    return {github, site}


@cache
def anchors(document: Path) -> frozenset[str]:
    """The anchors of a document that are the same on GitHub and on the site."""
    headings = re.findall(r"^#+ +(.*)$", prose(document), re.MULTILINE)
    return frozenset(slug for h in headings for slug in slugs(h) if len(slugs(h)) == 1)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{name_of(document)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{name_of(document)}: {link}"


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = re.findall(r"^([a-z][a-z0-9 -]*):(?!=)", makefile, re.MULTILINE)
    return {target for rule in rules for target in rule.split()}


def test_make_targets_exist() -> None:
    targets = make_targets()
    mentioned = {
        (name_of(document), target)
        for document in DOCUMENTS
        for command in commands(document)
        for target in re.findall(r"^make ([a-z][\w-]*)", command)
    }
    assert len(mentioned) > 10
    assert not {entry for entry in mentioned if entry[1] not in targets}


def test_contributing_points_to_make_help() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^    make ([\w-]+)", page, re.MULTILINE))
    assert "help" in named
    assert named <= make_targets()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_names_every_target() -> None:
    printed = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    named = re.findall(r"^make ([a-z][\w-]*) +\S", printed, re.MULTILINE)
    assert set(named) == make_targets()
    assert len(named) == len(set(named))


def test_install_commands_agree_with_the_build() -> None:
    """The commands replace an old setuptools, and none takes the package from an index by name."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    setuptools = re.search(r'requires = \["(setuptools>=\d+)"', pyproject)
    assert setuptools is not None
    installs = [
        (name_of(document), command)
        for document in DOCUMENTS
        for command in commands(document)
        if "pip install" in command
    ]
    tools = [(page, command) for page, command in installs if "setuptools" in command]
    assert {page for page, _ in tools} >= {"docs/start.md", *migration_pages()}
    assert not [entry for entry in tools if f"'{setuptools[1]}'" not in entry[1]]
    assert not [entry for entry in installs if re.search(r"install .*cjepa[_-]kernels", entry[1])]


def migration_pages() -> set[str]:
    return {name_of(page) for page in (DOCS / "migrate").glob("*.md")}


def test_scripts_exist() -> None:
    for document in DOCUMENTS:
        for command in commands(document):
            for script in re.findall(r"python3? ((?:bench|docs|examples)/[\w/]+\.py)", command):
                assert (ROOT / script).exists(), f"{name_of(document)}: {command}"


def test_cjepa_commands_and_options_exist() -> None:
    group: Any = typer.main.get_command(app)
    checked = 0
    for document in DOCUMENTS:
        for command in commands(document):
            match = re.match(r"cjepa (\w+)(.*)", command)
            if match is None:
                continue
            where = f"{name_of(document)}: {command}"
            assert match[1] in group.commands, where
            options = {o for p in group.commands[match[1]].params for o in p.opts}
            assert set(re.findall(r"--[\w-]+", match[2])) <= options, where
            checked += 1
    assert checked > 5


def test_keys_of_experiments_exist() -> None:
    pattern = re.compile(r"\b((?:data|model|loss|trainer|evaluation)\.\w+)[=:] ?([\w.-]+)")
    pairs = {
        (key, value.rstrip("."))
        for document in DOCUMENTS
        for command in commands(document)
        for key, value in pattern.findall(command)
        if not value.isupper()  # This is a placeholder.
    }
    assert len(pairs) > 5
    for key, value in sorted(pairs):
        load_config(ROOT / "configs" / "cjepa.yaml", [f"{key}={value}"])


def test_every_key_of_the_loss_section_is_in_the_table() -> None:
    page = (DOCS / "api" / "config.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == LOSS_KEYS


def test_variables_of_the_environment_exist() -> None:
    folders = ("cjepa_kernels", "csrc", "python_tests", "bench")
    sources = [ROOT / "setup.py", ROOT / "CMakeLists.txt", ROOT / "Makefile"]
    sources += [p for folder in folders for p in (ROOT / folder).rglob("*.[pch]*") if p.is_file()]
    text = "\n".join(p.read_text("utf-8") for p in sources if p.suffix not in (".pyc", ".so"))
    for document in DOCUMENTS:
        for variable in re.findall(r"\bCJEPA_\w+", document.read_text(encoding="utf-8")):
            assert re.search(rf"\b{variable}\b", text), f"{name_of(document)}: {variable}"


def test_errors_against_the_temperature_are_the_recorded_ones() -> None:
    script = bench_scripts.load("temperature_error")
    recorded = json.loads((ROOT / "bench/results/temperature_error_cpu.json").read_text())
    page = (DOCS / "numerics.md").read_text(encoding="utf-8")
    for row in recorded["rows"]:
        cells = (f"{row[key]:.0e}" for key in script.KEYS)
        assert f"| {row['temperature']} | {' | '.join(cells)} |" in page
    by_temperature = {row["temperature"]: row for row in recorded["rows"]}
    assert by_temperature[0.05]["here_gradient"] <= 1e-5
    now = script.measure(0.05)
    assert now["here_gradient"] <= 1e-5
    assert now["textbook_gradient"] > 100 * now["here_gradient"]
    assert now["textbook_loss"] > 100 * now["here_loss"]


@pytest.mark.parametrize("name", ["matrix", "triangle", "tournament", "strip"])
def test_pictures_of_the_concepts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    script: Any = importlib.import_module("draw_concepts")
    committed = (DOCS / "images" / f"concepts_{name}.svg").read_text(encoding="utf-8")
    for svg in (script.draw(name), committed):
        ElementTree.fromstring(svg)
        assert "prefers-color-scheme: dark" in svg
    texts = [re.findall(r">([^<>]+)</text>", svg) for svg in (script.draw(name), committed)]
    assert texts[0] == texts[1], "python docs/draw_concepts.py draws another picture"
