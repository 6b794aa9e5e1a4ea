"""Records of the GPU kernels name the files that they depend on, and pages say what has changed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from bench_scripts import load
from repository import ROOT

from cjepa_kernels.bench import machine, sources
from cjepa_kernels.provenance import git

hash_sources = load("hash_sources")
# The pages that show figures of a record. An empty tuple: the record is shown by none.
PAGES = {
    "NVIDIA-H100-80GB-HBM3-2026-11-27.json": ("README.md", "docs/results/gpu.md"),
    "gpu_instructions_sm90.json": ("docs/performance.md",),
    "nvidia-h100-80gb-hbm3-bf16.json": ("docs/results/nvidia-h100-80gb-hbm3-bf16.md",),
    "gpu_exploration_h100.json": (),
    "gpu_check.json": ("README.md", "docs/results/gpu-check.md"),
    "gpu_hopper.json": (),
}
FILES = {
    "cjepa_kernels/triton/kernels/pack.py": sources.KERNELS,
    "cjepa_kernels/triton/kernels/hopper/wide.py": sources.KERNELS,
    "cjepa_kernels/triton/configs.json": sources.CONFIGURATIONS,
    "cjepa_kernels/triton/configs.py": sources.CONFIGURATIONS,
    "cjepa_kernels/triton/proved.json": None,
    "cjepa_kernels/triton/launch.py": sources.HOST,
    "csrc/cuda/plan.cpp": sources.PLANS,
    "csrc/cuda/notes.md": None,
    "csrc/cpu/nt_xent.cpp": None,
    "cjepa_kernels/triton/kernels/pack.cpython-312.pyc": None,
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit that has a file of every kind."""
    for name in FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}\n")
    commands: tuple[tuple[str, ...], ...] = (
        ("init", "-q"),
        ("add", "."),
        ("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "first"),
    )
    for command in commands:
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_the_hash_of_files_is_that_of_their_commit(checkout: Path) -> None:
    hashes = sources.of_files(checkout)
    assert set(hashes) == set(sources.PARTS)
    assert sources.ABSENT not in hashes.values()
    assert sources.of_commit("HEAD", checkout) == hashes
    assert sources.of_commit("HEAD-dirty", checkout) is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["content", "name", "removed"])
def test_a_change_of_a_file_changes_the_hash_of_its_part(
    checkout: Path, name: str, change: str
) -> None:
    before = sources.of_files(checkout)
    path, parts = checkout / name, {FILES[name]}
    if change == "content":
        path.write_text("other\n")
    elif change == "name":
        renamed = path.rename(path.with_name(f"other_{path.name}"))
        parts.add(sources.part_of(renamed.relative_to(checkout).as_posix()))
    else:
        path.unlink()
    parts.discard(None)
    now = sources.of_files(checkout)
    assert set(sources.changed(before, now)) == parts
    assert ("have not changed since" in sources.since(before, now)) == (not parts)
    assert sources.of_commit("HEAD", checkout) == before


def test_a_record_without_hashes_says_so() -> None:
    assert sources.since(None) == "It is not known exactly which kernels were measured."


def test_a_part_that_a_record_lacks_has_changed_if_it_has_files() -> None:
    assert sources.changed({}, {"kernels": sources.ABSENT}) == []
    assert sources.changed({}, {"kernels": "1"}) == ["kernels"]
    assert sources.changed({"kernels": "1"}, {}) == ["kernels"]


def test_records_of_the_kernels_alone_name_their_files() -> None:
    assert machine.environment(of_kernels=True)["sources"] == sources.of_files()
    assert "sources" not in machine.environment()


@pytest.mark.parametrize("path", hash_sources.records(), ids=lambda path: path.name)
def test_a_record_names_the_files_of_its_commit(path: Path) -> None:
    at = json.loads(path.read_text(encoding="utf-8"))["environment"]
    assert "sources" in at, "run python bench/hash_sources.py"
    if not git("cat-file", "-t", at["commit"], root=ROOT):
        pytest.skip(f"this checkout has no commit {at['commit']}")
    assert at["sources"] == sources.of_commit(at["commit"], ROOT)


@pytest.mark.parametrize("path", hash_sources.records(), ids=lambda path: path.name)
def test_the_pages_of_a_record_say_whether_the_kernels_have_changed(path: Path) -> None:
    sentence = sources.since(json.loads(path.read_text(encoding="utf-8"))["environment"]["sources"])
    assert path.name in PAGES, "name the pages that show the record"
    for page in PAGES[path.name]:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert sentence in text, f"{page}: run python docs/generate_figures.py or bench/record.py"
