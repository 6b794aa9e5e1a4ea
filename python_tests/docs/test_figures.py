"""The documents contain the figures of the records: generating them again changes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

from docs import generate_figures
from docs.generate_figures import MARKER, TEMPLATES, FigureError, generate

PAGES = [path.relative_to(ROOT).as_posix() for path in generate_figures.pages()]
MEMORY = "bench/results/nt_xent_memory_cpu.json"


@pytest.mark.parametrize("page", PAGES)
def test_generating_changes_nothing(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert generate(text, page) == text, "run python docs/generate_figures.py"


def test_every_template_has_a_page() -> None:
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    markers = [marker for text in texts for marker in MARKER.findall(text)]
    assert set(TEMPLATES) == {name for marker in markers for name in re.findall(r": (\w+)", marker)}


def block(name: str) -> str:
    return f"Before\n\n<!-- figures: {name} -->\n\nold\n\n<!-- end of figures -->\n\nAfter\n"


def test_a_block_is_replaced_and_the_rest_of_the_page_kept() -> None:
    page = generate(block("memory_cpu"), "page.md")
    start, end = (
        "Before\n\n<!-- figures: memory_cpu -->\n\n| M |",
        "|\n\n<!-- end of figures -->\n\nAfter\n",
    )
    assert page.startswith(start)
    assert page.endswith(end)
    assert "old" not in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (block("unknown"), r"page\.md: docs/generate_figures\.py has no template 'unknown'"),
        (block("memory_cpu").replace("end of", "end"), r"page\.md: a marker .* has no partner"),
        (f"<!-- end of figures -->\n{block('memory_cpu')}", r"page\.md: a marker"),
        (block("memory_cpu") + block("memory_cpu").split("old")[0], r"page\.md: a marker"),
    ],
    ids=["no template", "no end", "no start", "second has no end"],
)
def test_a_marker_without_a_partner_or_a_template_is_an_error(text: str, message: str) -> None:
    with pytest.raises(FigureError, match=message):
        generate(text, "page.md")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Read records from an empty directory, and clear the cache of records."""
    (tmp_path / MEMORY).parent.mkdir(parents=True)
    monkeypatch.setattr(generate_figures, "ROOT", tmp_path)
    generate_figures.record.cache_clear()
    yield tmp_path
    generate_figures.record.cache_clear()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"rows": [{"M": 4096, "backend": "native"}]},
            f"{MEMORY}: no field 'extra_bytes' beside M",
        ),
        ({"lines": []}, f"{MEMORY}: no field 'rows' beside lines"),
        ({"rows": [{"M": 4096, "backend": "chunked", "extra_bytes": 0}]}, "'native'"),
    ],
    ids=["no field", "no section", "no entry"],
)
def test_a_record_that_lacks_something_is_an_error(
    root: Path, content: object, message: str
) -> None:
    (root / MEMORY).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(FigureError, match=message) as error:
        generate(block("memory_cpu"), "page.md")
    assert str(error.value).startswith("page.md, block 'memory_cpu': ")


@pytest.mark.usefixtures("root")
def test_a_record_that_is_missing_is_an_error() -> None:
    with pytest.raises(FigureError, match=MEMORY):
        generate(block("memory_cpu"), "page.md")
    with pytest.raises(FigureError, match=r"bench/results: 0 files NVIDIA-\*\.json instead of one"):
        generate(block("gpu_small"), "page.md")


def test_the_command_writes_blocks_and_checks_them(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"M": 4096, "backend": "native", "extra_bytes": 2**20, "over_input": 2}
    (root / MEMORY).write_text(json.dumps({"rows": [record]}), encoding="utf-8")
    page = root / "README.md"
    page.write_text(block("memory_cpu"), encoding="utf-8")
    for arguments, status, printed in (
        (["--check"], 1, "out of date: README.md\n"),
        ([], 0, "written: README.md\n"),
        (["--check"], 0, ""),
    ):
        monkeypatch.setattr("sys.argv", ["generate_figures.py", *arguments])
        assert generate_figures.main() == status
        assert capsys.readouterr().out == printed
    assert "| 4096 | 1 | not run | not run | 2.0 |" in page.read_text(encoding="utf-8")
    page.write_text(block("unknown"), encoding="utf-8")
    assert generate_figures.main() == 2
    assert "has no template 'unknown'" in capsys.readouterr().err
