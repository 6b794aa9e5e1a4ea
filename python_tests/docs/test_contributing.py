"""The walk-throughs of CONTRIBUTING: what they add works and touches as few files as they say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from repository import ROOT
from walkthrough import Extension, apply_walkthrough, copy_package, section_of

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Extension:
    """A copy of the package with the operator of the walk-through."""
    target = tmp_path_factory.mktemp("walkthrough")
    copy_package(ROOT, target)
    return apply_walkthrough(section_of(CONTRIBUTING, "Adding an operator"), target)


@pytest.fixture(scope="module")
def with_toy(tmp_path_factory: pytest.TempPathFactory) -> Extension:
    """A copy of the package with the back end of the walk-through."""
    target = tmp_path_factory.mktemp("toy")
    copy_package(ROOT, target)
    return apply_walkthrough(section_of(CONTRIBUTING, "Adding a back end"), target)


def run_tests(directory: Path, tests: list[str]) -> None:
    """Run tests in a copy of the package; all have to pass and none may be skipped."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=directory,
        env={**environment, "PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def test_the_operator_passes_its_tests(extended: Extension) -> None:
    target = extended.directory
    tests = [name for name in extended.added if Path(name).name.startswith("test_")]
    run_tests(target, tests)


def test_the_package_with_the_operator_is_imported(
    extended: Extension,
) -> None:
    target = extended.directory
    code = "import cjepa_kernels; print(cjepa_kernels.__file__, cjepa_kernels.alignment.__name__)"
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=target,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert said.split() == [str(target / "cjepa_kernels" / "__init__.py"), "alignment"]


def test_an_operator_is_one_file_a_layer_and_one_entry_a_register(
    extended: Extension,
) -> None:
    added, changed = extended.added, extended.changed
    assert {Path(name).stem.removeprefix("test_") for name in added} == {"alignment"}
    assert set(Counter(Path(name).parent for name in added).values()) == {1}
    assert sum(name.startswith("python_tests/") for name in added) == 1
    registers = [name for name in changed if Path(name).name == "__init__.py"]
    assert set(changed) - set(registers) == {"cjepa_kernels/definitions.py"}
    assert len(registers) == len(set(registers))


TEST_OF_TOY = """
import torch
from cjepa_kernels import backends, nt_xent


def test_toy():
    assert backends()["toy"].available
    z = torch.randn(5, 4, requires_grad=True)
    losses = [nt_xent(z, z.detach().flip(1), backend=name).loss for name in ("toy", "chunked")]
    gradients = [torch.autograd.grad(loss, z)[0] for loss in losses]
    torch.testing.assert_close(losses[0], 3 * losses[1])
    torch.testing.assert_close(gradients[0], 3 * gradients[1])
"""


def test_the_back_end_computes_and_is_a_layer(with_toy: Extension) -> None:
    (with_toy.directory / "test_toy.py").write_text(TEST_OF_TOY, encoding="utf-8")
    run_tests(with_toy.directory, ["test_toy.py", "python_tests/package/test_layers.py"])


def test_a_back_end_is_one_folder_and_three_registers(with_toy: Extension) -> None:
    assert with_toy.added == ["cjepa_kernels/toy/__init__.py"]
    assert with_toy.changed == [
        "cjepa_kernels/backends.py",
        "cjepa_kernels/ops/__init__.py",
        "python_tests/package/test_layers.py",
    ]


def test_a_change_whose_text_is_gone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("one\ntwo\n", encoding="utf-8")
    apply_walkthrough("```diff\n# a.py\n one\n-two\n+three\n```\n", tmp_path)
    assert (tmp_path / "a.py").read_text(encoding="utf-8") == "one\nthree\n"
    with pytest.raises(ValueError, match=r"expected once in .*a\.py, found 0"):
        apply_walkthrough("```diff\n# a.py\n-two\n+three\n```\n", tmp_path)
