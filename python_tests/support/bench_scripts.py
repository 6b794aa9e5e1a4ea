"""Import and run the scripts of bench/, which are not part of the package, in tests."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

import torch
from repository import ROOT

sys.path.insert(0, str(ROOT / "bench"))


def load(name: str) -> Any:
    """Import one of the scripts as a module."""
    return importlib.import_module(name)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the root of the repository, with one thread."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )


def leaves(batch: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two correlated views in float64."""
    z_i, noise = torch.randn(2, batch, features, dtype=torch.float64)
    return z_i.clone().requires_grad_(), (z_i + noise).requires_grad_()
