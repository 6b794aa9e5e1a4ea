"""A griffe extension: docstrings' roles, such as ``:func:`name```, become links of the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod):`([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **options: Any) -> None:
        """Replace each role by a cross-reference to what it names."""
        if obj.docstring is not None:

            def link(match: re.Match[str]) -> str:
                name = match[1]
                public = name if name.startswith("cjepa_kernels.") else f"cjepa_kernels.{name}"
                return f"[`{name.rpartition('.')[2]}`][{public}]"

            obj.docstring.value = ROLE.sub(link, obj.docstring.value)
