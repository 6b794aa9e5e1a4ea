"""Installation: when setup.py builds the compiled module, and the errors of a failed build."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from repository import ROOT

setuptools = pytest.importorskip("setuptools")

VARIABLES = ("CXX", "CJEPA_NO_NATIVE", "CJEPA_REQUIRE_NATIVE", "CJEPA_BUILD_DIR")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import setup.py as a module, without the environment variables that change what it does."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return module


@pytest.fixture
def programs(tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make PATH a single folder with a cmake, a ninja and a c++ that do nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cmake", "ninja", "c++"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(script, "search_path", lambda: str(folder))
    return folder


@pytest.fixture
def build(script: ModuleType, programs: Path) -> Callable[[], list[str]]:
    """A function that runs setup.py and returns the names of the extensions that it built."""
    built: list[str] = []

    def build_extension() -> list[str]:
        command = script.CMakeBuild(setuptools.Distribution({"version": "0"}))
        command.build_with_cmake = lambda extension: built.append(extension.name)
        command.build_extension(setuptools.Extension("cjepa_kernels._C", sources=[]))
        return built

    return build_extension


def hide_package(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *rest: None if n == name else find(n, *rest)
    )


def test_a_machine_with_everything_builds(build: Any) -> None:
    assert build() == ["cjepa_kernels._C"]


MISSING = ["torch", "pybind11", "cmake", "ninja", "c++"]


def remove(name: str, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("torch", "pybind11"):
        hide_package(monkeypatch, name)
    else:
        (programs / name).unlink()


@pytest.mark.parametrize("name", MISSING)
def test_without_a_tool_the_installation_goes_on(
    name: str,
    build: Any,
    programs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    remove(name, programs, monkeypatch)
    assert build() == []
    warning = capsys.readouterr().err
    assert warning.startswith(
        "warning: cjepa_kernels._C is not built, and the installation is pure"
    )
    assert {"torch": "PyTorch"}.get(name, name) in warning


@pytest.mark.parametrize("name", MISSING)
def test_without_a_tool_that_is_required_it_fails(
    name: str, build: Any, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove(name, programs, monkeypatch)
    monkeypatch.setenv("CJEPA_REQUIRE_NATIVE", "1")
    with pytest.raises(SystemExit, match=r"there is no (?s:.)*CJEPA_NO_NATIVE=1"):
        build()


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_other_compilers_that_cmake_finds(compiler: str, build: Any, programs: Path) -> None:
    (programs / "c++").rename(programs / compiler)
    assert build() == ["cjepa_kernels._C"]


def test_a_compiler_of_the_users_choice_counts(
    build: Any, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """setup.py does not check a compiler that the user chose.

    If it does not work, CMake reports the error and the installation fails.
    """
    (programs / "c++").unlink()
    monkeypatch.setenv("CXX", "/nowhere/c++ -v")
    assert build() == ["cjepa_kernels._C"]
    monkeypatch.setenv("CXX", " ")
    assert build() == ["cjepa_kernels._C"], "an empty CXX names no compiler, so nothing is built"


@pytest.mark.parametrize("required", ["", "1"])
def test_the_users_choice_of_pure_python(
    required: str, build: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CJEPA_NO_NATIVE", "1")
    monkeypatch.setenv("CJEPA_REQUIRE_NATIVE", required)
    assert build() == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("version", "good"), [("2.10.1+cpu", False), ("2.11.0a0", True), ("3.0", True)]
)
def test_an_old_pytorch_is_named(
    version: str, good: bool, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if good:
        assert build() == ["cjepa_kernels._C"]
        return
    with pytest.raises(SystemExit) as caught:
        build()
    assert f"PyTorch {version} is installed, and 2.11 is needed" in str(caught.value)


def test_the_oldest_pytorch_is_that_of_the_package(script: ModuleType) -> None:
    oldest = ".".join(map(str, script.OLDEST_TORCH))
    assert f'dependencies = ["torch>={oldest}"]' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_a_failed_step_ends_with_its_errors(
    script: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    code = (
        "print('before\\n' * 50 + 'a.cpp:1:2: error: no such thing\\n' + 'after\\n' * 50); exit(3)"
    )
    with pytest.raises(SystemExit) as caught:
        script.run([sys.executable, "-c", code], os.environ)
    lines = str(caught.value).splitlines()
    assert lines[:2] == [
        "error: the compiled module cjepa_kernels._C could not be built:",
        "  a.cpp:1:2: error: no such thing",
    ]
    assert len(lines) <= script.LINES_OF_ERROR + 2
    assert lines[-1].startswith("CJEPA_NO_NATIVE=1 in the environment installs without it")
    assert capfd.readouterr().out.count("before") == 50, "the whole output of the program is shown"


def test_a_program_that_cannot_be_started_is_an_error_too(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"nowhere/cmake(?s:.)*CJEPA_NO_NATIVE=1"):
        script.run(["/nowhere/cmake"], os.environ)


def test_an_error_without_the_word_shows_the_end(script: ModuleType) -> None:
    output = [f"line {i}" for i in range(100)]
    assert script.errors_in(output) == output[-script.LINES_OF_ERROR :]


@pytest.mark.skipif(
    shutil.which("cmake", path=Path(sys.executable).parent) is None, reason="no CMake"
)
def test_a_compiler_that_fails_fails_the_installation(tmp_path: Path) -> None:
    """The real script and the real CMake run with a compiler that refuses every file."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'a.cpp:1:1: error: I compile nothing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    command = ["build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "build")]
    result = subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=ROOT,
        env={**environment, "CXX": str(compiler)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "I compile nothing" in result.stdout
    last = result.stderr.splitlines()[-25:]
    assert any(
        "error: the compiled module cjepa_kernels._C could not be built" in line for line in last
    )
    assert any("CMake Error" in line for line in last)
    assert last[-1].startswith("CJEPA_NO_NATIVE=1 in the environment installs without it")
    assert "Traceback" not in result.stderr
