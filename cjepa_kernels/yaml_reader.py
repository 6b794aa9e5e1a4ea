"""YAML as configurations want it: ``1e-3`` is a number, a key given twice is an error.

PyYAML is imported when something is read: importing the package needs torch alone.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from cjepa_kernels.extras import require


def read_yaml(path: Path) -> Any:
    """Parse a file.

    Raises:
        FileNotFoundError: No such file.
        ImportError: PyYAML is missing.
        ValueError: The file is not valid YAML; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"config must be an existing YAML file, got {str(path)!r}")
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one as well
        raise ValueError(f"config {str(path)!r} is not valid YAML: {error}") from error


def parse_yaml(text: str) -> Any:
    """Parse a string.

    Raises:
        ValueError: The string is not valid YAML.
    """
    yaml = require("yaml", extra="yaml")
    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


@functools.cache
def _loader() -> Any:
    yaml: Any = require("yaml", extra="yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for position, key in enumerate(keys):
                if key in keys[:position]:
                    mark = node.value[position][0].start_mark
                    message = f"key {key!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, message, mark)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(  # YAML 1.1 wants a dot in a float
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )
    return Loader
