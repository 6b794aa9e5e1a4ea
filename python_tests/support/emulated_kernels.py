"""The Gluon kernels of the package in the emulator, for tests of calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import gluon_emulator
import pytest

import cjepa_kernels
from cjepa_kernels.triton import hopper, hopper_gradients

PACKAGE = "cjepa_kernels.triton.kernels"
KERNELS = Path(cjepa_kernels.__file__).parent / "triton" / "kernels"
# Files of Gluon kernels, each after those that it imports.
FILES = ("hopper", "hopper_owned", "hopper_squares")
Replacement = tuple[str, str]


def load_kernels(**faults: list[Replacement]) -> dict[str, ModuleType]:
    """The modules of all Gluon kernels by file, with the emulator in place of Gluon.

    Args:
        faults: Changes of the text of a file, to plant faults: what is replaced, and by what.
    """
    modules: dict[str, ModuleType] = {}
    for file in FILES:
        imports = {f"{PACKAGE}.{name}": module for name, module in modules.items()}
        modules[file] = gluon_emulator.load_kernels(
            KERNELS / f"{file}.py", *faults.get(file, []), imports=imports
        )
    return modules


class EmulatedKernel:
    """A kernel that is launched as Triton's are."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function, self.launches = function, 0

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def run(*, num_warps: int, maxnreg: int, **arguments: Any) -> None:
            assert (num_warps, maxnreg) == (4, hopper.REGISTERS)
            self.launches += 1
            gluon_emulator.launch(self.function, grid[0], self.launches, **arguments)

        return run

    def warmup(self, **_: Any) -> None:
        """Nothing to compile."""


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is compiled, no schedule is made, no warning was given, no variable is set."""
    for name in ("_compiled", "_failed"):
        monkeypatch.setattr(hopper, name, set())
    monkeypatch.setattr(hopper, "_tables", {})
    monkeypatch.setattr(hopper, "_warned", False)
    monkeypatch.delenv("CJEPA_GLUON", raising=False)


def emulate(
    monkeypatch: pytest.MonkeyPatch, modules: Mapping[str, ModuleType], programs: int
) -> dict[str, EmulatedKernel]:
    """Let calls of any size go by the emulated kernels, in Triton's interpreter.

    Returns:
        The kernels by the names that ``configs.py`` has for them.
    """
    found = {
        name: EmulatedKernel(getattr(modules[file], f"{name}_kernel"))
        for name, file in hopper.FILES.items()
    }
    monkeypatch.setenv("CJEPA_GLUON", "1")
    for module in (hopper, hopper_gradients):
        monkeypatch.setattr(module, "triton_is_interpreted", lambda: False)
    monkeypatch.setattr(hopper, "kernel_of", found.__getitem__)
    monkeypatch.setattr(hopper, "blocks_of", gluon_emulator.descriptor)
    monkeypatch.setattr(hopper, "programs", lambda device: programs)
    monkeypatch.setattr(hopper, "SMALLEST_BLOCKS", 1)
    return found
