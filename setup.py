"""Builds the compiled module with CMake and Ninja; everything else is in pyproject.toml.

The module needs PyTorch's headers, so an installation that is to have it uses the PyTorch that is
installed already: ``pip install --no-build-isolation``. Without PyTorch or a compiler at hand the
installation goes on and is pure Python: ``cjepa_kernels.backends()`` says so.
``CJEPA_REQUIRE_NATIVE=1`` makes a failed build an error, ``CJEPA_NO_NATIVE=1`` skips it, and
``CJEPA_WERROR=1`` treats the compiler's warnings as errors. ``CJEPA_BUILD_DIR`` is where CMake
builds and may be kept, so that the C++ tests find the same object files there.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


class CMakeBuild(build_ext):
    """Configure and build CMakeLists.txt, the module landing where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        if flag("CJEPA_NO_NATIVE"):
            return
        try:
            self.build_with_cmake(ext)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            if flag("CJEPA_REQUIRE_NATIVE"):
                raise
            print(f"warning: {ext.name} was not built, installing without it: {error}")

    def build_with_cmake(self, ext: Extension) -> None:
        import pybind11
        import torch  # noqa: F401  (its headers; CMake asks Python where they are)

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
        # A build environment's own cmake and ninja stand beside its Python, not on PATH.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = {**os.environ, "PATH": path}
        subprocess.run(configure, check=True, env=environment)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        # An editable install builds to a temporary place and copies; nothing to copy if skipped.
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
