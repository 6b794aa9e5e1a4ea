"""Builds the compiled module with CMake and Ninja; everything else is in pyproject.toml.

The module needs the headers of the PyTorch that is installed already. To build it, install with
``pip install --no-build-isolation``. If PyTorch, the build tools and a compiler are there, a failed
build fails the installation. If one of them is missing, the installation goes on in pure Python:
``cjepa_kernels.backends()`` says so, and so does a warning at the first use on a CPU.

These variables of the environment change the build:

- ``CJEPA_NO_NATIVE=1`` skips it.
- ``CJEPA_REQUIRE_NATIVE=1`` makes a missing compiler or tool an error.
- ``CJEPA_WERROR=1`` treats the compiler's warnings as errors.
- ``CJEPA_BUILD_DIR`` names the directory in which CMake builds. It can be used again, so that the
  C++ tests find the same object files there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
COMPILERS = ("c++", "g++", "clang++")  # CMake looks for these too, unless CXX names one
LINES_OF_ERROR = 20


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def search_path() -> str:
    """PATH, preceded by the directory of this Python, where pip installs cmake and ninja."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def missing_tools() -> list[str]:
    """What the build needs and this machine lacks. A compiler that CXX names counts as present."""
    missing = []
    if importlib.util.find_spec("torch") is None:
        missing.append("PyTorch (build isolation hides it: pip install --no-build-isolation)")
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    for program in ("cmake", "ninja"):
        if shutil.which(program, path=search_path()) is None:
            missing.append(program)
    if not os.environ.get("CXX", "").strip() and not any(map(shutil.which, COMPILERS)):
        missing.append(f"C++20 compiler ({', '.join(COMPILERS)}, or the one that CXX names)")
    return missing


def check_torch() -> None:
    """Stop if PyTorch is too old. It lacks headers, and the compiler's errors would not say so."""
    version = importlib.metadata.version("torch")
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        raise SystemExit(failure([f"PyTorch {version} is installed, and {needed} is needed"]))


def errors_in(output: Sequence[str]) -> list[str]:
    """The lines from the first one with an error on, else the last lines."""
    for position, line in enumerate(output):
        if re.search(r"\berror\b|CMake Error|undefined reference", line, re.IGNORECASE):
            return list(output[position : position + LINES_OF_ERROR])
    return list(output[-LINES_OF_ERROR:])


def failure(lines: Sequence[str]) -> str:
    """The last lines that a failed installation shows."""
    return "\n".join(
        [
            "error: the compiled module cjepa_kernels._C could not be built:",
            *(f"  {line}" for line in lines),
            "CJEPA_NO_NATIVE=1 in the environment installs without it, in pure Python, which is "
            "slower on CPUs",
        ]
    )


def run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a step of the build. If it fails, end the installation with its errors."""
    output = []
    try:
        with subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                output.append(line.rstrip())
    except OSError as error:
        raise SystemExit(failure([str(error)])) from error
    if process.returncode != 0:
        raise SystemExit(failure(errors_in(output)))


class CMakeBuild(build_ext):
    """Builds CMakeLists.txt, with the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        if flag("CJEPA_NO_NATIVE"):
            return
        missing = missing_tools()
        if not missing:
            check_torch()
            self.build_with_cmake(ext)
        elif flag("CJEPA_REQUIRE_NATIVE"):
            raise SystemExit(failure([f"there is no {name}" for name in missing]))
        else:
            print(
                f"warning: {ext.name} is not built, and the installation is pure Python, which is "
                f"slower on CPUs: there is no {', and no '.join(missing)}",
                file=sys.stderr,
            )

    def build_with_cmake(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(os.environ.get("CJEPA_BUILD_DIR", f"{self.build_temp}/cmake")).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-G",
            "Ninja",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DCJEPA_VERSION={self.distribution.get_version()}",
            f"-DCJEPA_WERROR={'ON' if flag('CJEPA_WERROR') else 'OFF'}",
        ]
        environment = {**os.environ, "PATH": search_path()}
        run(configure, environment)
        run(["cmake", "--build", str(build)], environment)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        # An editable installation builds in a temporary directory and copies the module from
        # there. A skipped build leaves nothing to copy.
        self.extensions = [
            ext
            for ext in self.extensions
            if Path(self.get_ext_fullpath(ext.name)).exists()
            or (Path(self.build_lib) / self.get_ext_filename(ext.name)).exists()
        ]
        super().copy_extensions_to_source()


setup(
    ext_modules=[Extension("cjepa_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
