"""The walk-throughs of CONTRIBUTING: their code works and changes only the files that they name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from public_interface import RECORD, differences
from repository import ROOT
from walkthrough import Extension, apply_walkthrough, copy_package, section_of

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Extension:
    """A copy of the package with the operator of the walk-through, which has no kernels."""
    target = tmp_path_factory.mktemp("walkthrough")
    copy_package(ROOT, target)
    operator, _, _ = section_of(CONTRIBUTING, "Adding an operator").partition("### A kernel")
    return apply_walkthrough(operator, target)


@pytest.fixture(scope="module")
def with_kernels(tmp_path_factory: pytest.TempPathFactory) -> Extension:
    """A copy that also has the lines that register the kernels."""
    target = tmp_path_factory.mktemp("kernels")
    copy_package(ROOT, target)
    return apply_walkthrough(section_of(CONTRIBUTING, "Adding an operator"), target)


@pytest.fixture(scope="module")
def with_toy(tmp_path_factory: pytest.TempPathFactory) -> Extension:
    """A copy of the package with the back end of the walk-through."""
    target = tmp_path_factory.mktemp("toy")
    copy_package(ROOT, target)
    return apply_walkthrough(section_of(CONTRIBUTING, "Adding a back end"), target)


def run_python(directory: Path, *arguments: str) -> str:
    """Run Python in a copy of the package, check that it succeeds, and return its output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env={**environment, "PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run_tests(directory: Path, tests: list[str]) -> None:
    """Run tests in a copy of the package. All must pass, and none may be skipped."""
    output = run_python(directory, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    assert " passed" in output
    assert "skipped" not in output


def test_the_operator_passes_its_tests(extended: Extension) -> None:
    target = extended.directory
    tests = [name for name in extended.added if Path(name).name.startswith("test_")]
    run_tests(target, tests)


def test_an_operator_is_one_file_a_layer_and_one_entry_a_register(
    extended: Extension,
) -> None:
    added, changed = extended.added, extended.changed
    assert {Path(name).stem.removeprefix("test_") for name in added} == {"alignment"}
    assert set(Counter(Path(name).parent for name in added).values()) == {1}
    assert sum(name.startswith("python_tests/") for name in added) == 1
    registers = [name for name in changed if Path(name).name == "__init__.py"]
    assert set(changed) - set(registers) == {
        "CHANGELOG.md",
        "cjepa_kernels/definitions.py",
        "docs/api/functional.md",
        "docs/api/modules.md",
        "docs/definitions.md",
        "python_tests/support/result_cases.py",
    }
    assert len(registers) == len(set(registers))


# What one process shows of the package with the operator.
FINDINGS = """
import doctest, importlib, json, sys
import torch
import cjepa_kernels
sys.path.insert(0, sys.argv[1])
from result_cases import alignment_cases, cases_of, run_cases

ours = run_cases(alignment_cases("chunked"))
modules = [importlib.import_module(f"cjepa_kernels.{layer}.alignment") for layer in sys.argv[2:]]
found = {
    "imported": [cjepa_kernels.__file__, cjepa_kernels.alignment.__name__],
    "examples": [list(doctest.testmod(m, extraglobs={"torch": torch})) for m in modules],
    "cases_to_compare": ours.keys() <= dict(cases_of("functions", quick=True)).keys(),
    "results": sorted({name for results in ours.values() for name in results}),
    "same_results": len({tuple(results) for results in ours.values()}) == 1,
}
print(json.dumps(found))
"""


def test_the_operator_is_imported_documented_and_compared(extended: Extension) -> None:
    """Its module is imported, the examples of its docstrings run, and revisions are compared."""
    target = extended.directory
    support = str(target / "python_tests" / "support")
    output = run_python(target, "-c", FINDINGS, support, "functional", "modules")
    assert json.loads(output) == {
        "imported": [str(target / "cjepa_kernels" / "__init__.py"), "alignment"],
        "examples": [[0, 1], [0, 1]],  # failed and tried
        "cases_to_compare": True,
        "results": ["gradient of x", "gradient of y", "loss"],
        "same_results": True,
    }


def test_the_operator_is_recorded(extended: Extension) -> None:
    target = extended.directory
    run_python(target, "python_tests/support/public_interface.py", "--write")
    before, record = (
        json.loads((root / RECORD.relative_to(ROOT)).read_text(encoding="utf-8"))
        for root in (ROOT, target)
    )
    assert differences(before, record) == []
    assert {"cjepa_kernels.alignment", "cjepa_kernels.AlignmentLoss"} <= set(record["names"])
    assert record["modules"]["cjepa_kernels.AlignmentLoss"]["results"] == ["loss"]
    assert {"cjepa_kernels::alignment", "cjepa_kernels::alignment_backward.chunked"} <= set(
        record["operators"]
    )


def test_the_lines_of_kernels_have_their_places(with_kernels: Extension) -> None:
    code = "from cjepa_kernels import triton; print(*triton.OPERATORS)"
    assert "alignment" in run_python(with_kernels.directory, "-c", code).split()
    assert {
        "CMakeLists.txt",
        "Makefile",
        "bench/gpu_check_steps.py",
        "cjepa_kernels/triton/__init__.py",
        "csrc/cpu/operators.cpp",
        "csrc/tests/tests.cmake",
        "python_tests/ops/test_alignment.py",
    } <= set(with_kernels.changed)


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
