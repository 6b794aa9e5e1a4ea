"""Environment variables: the values that Python and C++ accept, and the errors for others."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from cjepa_kernels import backends, environment, nt_xent
from cjepa_kernels.cli import main
from cjepa_kernels.environment import read_mebibytes

TAKEN = {
    "": 256.0,
    "  \t": 256.0,
    "0": 0.0,
    "64": 64.0,
    " 64\n": 64.0,
    "0.5": 0.5,
    ".5": 0.5,
    "1e3": 1000.0,
    "1e-400": 0.0,
    str(2**40): float(2**40),
}
REFUSED = ["inf", "-inf", "nan", "-1", "-0.5", "1e300", "1e999", "much", "64 MiB", "1_000", "0x10"]
REFUSED += ["1,5", "٣", "--", ".", "1e", str(2**40 + 2**10), "9" * 5000]


@pytest.mark.parametrize("value", TAKEN, ids=repr)
def test_a_number_of_mebibytes(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CJEPA_TEST", value)
    assert read_mebibytes("CJEPA_TEST", 256) == TAKEN[value]


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: repr(value[:10]))
def test_anything_else_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CJEPA_TEST", value)
    with pytest.raises(ValueError, match=r"CJEPA_TEST must be a number of MiB.*, got") as caught:
        read_mebibytes("CJEPA_TEST", 256)
    assert len(str(caught.value)) < 200


def test_an_unset_variable_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CJEPA_TEST", raising=False)
    assert read_mebibytes("CJEPA_TEST", 12) == 12


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=120,
    )


def test_mistakes_are_reported_by_every_function() -> None:
    """The first call reports all mistakes in one message. The import does not fail."""
    code = """
import torch
from cjepa_kernels import NTXentLoss, cross_logsumexp, nt_xent, prediction_loss
a = torch.eye(3)
calls = [lambda: nt_xent(a, a), lambda: cross_logsumexp(a, a), lambda: prediction_loss(a, a),
         lambda: NTXentLoss()]
for call in calls:
    try:
        call()
    except ValueError as error:
        print(error)
"""
    bad_values = {"CJEPA_KEPT_MIB": "inf", "CJEPA_CACHE_MIB": "nan", "CJEPA_WORKSPACE_MIB": "-1"}
    if backends()["native"].available:
        bad_values["CJEPA_INSTRUCTION_SET"] = "avx1024"
    result = run_python(code, **bad_values)
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert len(set(lines)) == 1
    for variable, value in bad_values.items():
        assert f"{variable} must be " in lines[0]
        assert value in lines[0]


def test_the_command_line_reports_them_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "_problems", [])
    monkeypatch.setenv("CJEPA_TEST", "inf")
    assert environment.read_when_imported("CJEPA_TEST", 256) == 256
    assert environment.read_when_imported("CJEPA_TEST", 256) == 256
    monkeypatch.setattr(sys, "argv", ["cjepa", "info"])
    with pytest.raises(SystemExit, match="2"):
        main()
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == ("error: CJEPA_TEST must be a number of MiB from 0 to 2**40, got 'inf'\n")


@pytest.mark.skipif(not backends()["native"].available, reason="cjepa_kernels._C was not built")
def test_the_compiled_module_reads_the_same_text() -> None:
    """The module reads the variable at its first large call, so a program may set it until then."""
    code = f"""
import json, os, torch
from cjepa_kernels import cross_logsumexp
x = torch.randn(600, 64)
answers = {{}}
for value in {REFUSED!r}:
    os.environ["CJEPA_CACHE_MIB"] = value
    try:
        cross_logsumexp(x, x, backend="native")
        answers[value] = "taken"
    except (RuntimeError, ValueError) as error:
        answers[value] = str(error)
os.environ["CJEPA_CACHE_MIB"] = " .5\\n"
cross_logsumexp(x, x, backend="native")
print(json.dumps(answers))
"""
    result = run_python(code, CJEPA_CACHE_MIB="64")
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout)
    assert list(answers) == REFUSED
    for value, answer in answers.items():
        assert "CJEPA_CACHE_MIB must be a number of MiB from 0 to 2**40" in answer, value


def test_without_mistakes_nothing_is_noted() -> None:
    environment.check_environment()
    assert nt_xent(torch.eye(3), torch.eye(3)).accuracy == 1
