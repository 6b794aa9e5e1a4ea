"""Griffe extensions: docstrings and signatures become what reads well on the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

PACKAGE = "cjepa_kernels."
ROLE = re.compile(r":(?:func|class):`([\w.]+)`")
PAPER = re.compile(r"arXiv\s+(\d{4}\.\d{5})")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)  # a section only in the plural


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **options: Any) -> None:
        """Roles become links to what they name, papers to where they are."""
        if obj.docstring is not None:
            text = ROLE.sub(_link, obj.docstring.value)
            text = PAPER.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", text)


class Defaults(griffe.Extension):
    """Shows the number of a default that is the name of a constant of the package."""

    def on_function(
        self, *, func: griffe.Function, loader: griffe.GriffeLoader, **options: Any
    ) -> None:
        """``temperature=TEMPERATURE`` becomes ``temperature=0.1``."""
        for parameter in func.parameters:
            default = parameter.default
            if isinstance(default, griffe.ExprName) and default.canonical_path.startswith(PACKAGE):
                constant = loader.modules_collection[default.canonical_path]
                if constant.is_attribute:
                    parameter.default = constant.value


def _link(role: re.Match[str]) -> str:
    name = role[1]
    public = name if name.startswith(PACKAGE) else PACKAGE + name
    return f"[`{name.rpartition('.')[2]}`][{public}]"
