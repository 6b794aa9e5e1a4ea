"""Checks whether csrc compiles against the headers of other versions of PyTorch.

    python csrc/check_headers.py 2.11.0 latest

The script downloads the wheel of each version once (some 500 MB) into build/headers and takes the
headers out of it. The compiler then checks every file that includes them, with the flags of
CMakeLists.txt. `installed` stands for the PyTorch that is installed. Remove build/headers to ask
for a newer "latest".
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "headers"


def unpack(version: str) -> Path:
    """The folder of a package `torch` that holds only the headers of that version."""
    wheels = WORK / "wheels" / version
    if not list(wheels.glob("*.whl")):
        wanted = "torch" if version == "latest" else f"torch=={version}"
        options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--quiet"]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, "-d", str(wheels), wanted],
            check=True,
        )
    (wheel,) = wheels.glob("*.whl")
    folder = WORK / wheel.name.split("-")[1]
    if not (folder / "torch" / "__init__.py").exists():
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("torch/include/"):
                    archive.extract(name, folder)
        (folder / "torch" / "__init__.py").touch()  # CMakeLists.txt asks where the package is
    return folder


def compile_commands(name: str, path: str) -> list[dict[str, str]]:
    """The commands with which CMake would build csrc and its tests."""
    import pybind11

    build = WORK / "build" / name
    subprocess.run(
        [
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            *("-DCJEPA_TESTS=ON", "-DCJEPA_WERROR=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
    )
    commands: list[dict[str, str]] = json.loads((build / "compile_commands.json").read_text())
    return commands


def check(command: dict[str, str]) -> tuple[str, str]:
    """The name of the file and the compiler's errors."""
    words = shlex.split(command["command"])
    output = words.index("-o")
    del words[output : output + 2]
    result = subprocess.run(
        [*words, "-fsyntax-only"], cwd=command["directory"], capture_output=True, text=True
    )
    found = result.stderr if result.returncode else ""
    return str(Path(command["file"]).relative_to(ROOT)), found


def check_version(version: str) -> bool:
    """Print how many files compile against one version. True if all of them do."""
    folder = None if version == "installed" else unpack(version)
    name = version if folder is None else folder.name
    commands = compile_commands(name, "" if folder is None else str(folder))
    # module.cpp includes no header of PyTorch, and must not find PyTorch's copy of pybind11 either.
    chosen = [c for c in commands if "/torch/" in c["command"] or c["file"].endswith("module.cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(check, chosen))
    for file, errors in results:
        if errors:
            print(f"{file}:\n{errors}")
    failed = sum(bool(errors) for _, errors in results)
    print(f"PyTorch {name}: {len(results) - failed} of {len(results)} files compile", flush=True)
    return failed == 0 and len(results) > 0


if __name__ == "__main__":
    versions = sys.argv[1:]
    if not versions:
        sys.exit(f"usage: python {sys.argv[0]} VERSION|latest|installed …")
    passed = [check_version(version) for version in versions]
    sys.exit(not all(passed))
