"""The site shows the defaults of the public functions and modules as numbers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from repository import ROOT

import cjepa_kernels

griffe = pytest.importorskip("griffe")


@pytest.fixture(scope="module")
def package() -> Any:
    """The package as the site reads it: from its sources, by the extensions of the site."""
    extensions = griffe.load_extensions(str(ROOT / "docs" / "docstrings.py"))
    return griffe.load("cjepa_kernels", search_paths=[ROOT], extensions=extensions)


@pytest.mark.parametrize("name", ["nt_xent", "prediction_loss", "ContrastiveJEPALoss"])
def test_the_site_shows_the_defaults_that_python_has(package: Any, name: str) -> None:
    public = getattr(cjepa_kernels, name)
    shown = package[f"{public.__module__}.{name}".removeprefix("cjepa_kernels.")]
    if inspect.isclass(public):
        shown = shown["__init__"]
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(public).parameters.values()
        if isinstance(parameter.default, float)
    }
    assert defaults
    assert {n: float(str(shown.parameters[n].default)) for n in defaults} == defaults
