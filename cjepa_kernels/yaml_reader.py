"""YAML as configurations want it: ``1e-3`` is a number, a key given twice is an error.

Anchors, aliases and merge keys (``<<: *base``) work as in PyYAML. Bounds on the size keep a small
file from growing into a large one. PyYAML is imported when something is read: importing the
package needs torch alone.
"""

from __future__ import annotations

import codecs
import functools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from cjepa_kernels.extras import require

MAX_BYTES = 256 * 2**10  # of a file, and of the characters of all its values
MAX_NODES = 5000  # keys and values, an alias counting as much as what it stands for
MAX_DEPTH = 32  # levels of lists and mappings
MAX_DIGITS = 100  # of an integer

_TAG = "tag:yaml.org,2002:"
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_MAX_MESSAGE = 300
_UNUSABLE = re.compile(r"[\x00\ud800-\udfff]")  # what no file name, terminal or log takes
_EXPONENT_WITHOUT_DOT = re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+$")
_BASE_60 = "{} would be a number to base 60; quote it if text is meant"


def read_yaml(path: Path) -> Any:
    """Parse a file in UTF-8, or in UTF-16 with a byte order mark.

    Args:
        path: The file, of at most ``MAX_BYTES``.

    Returns:
        Numbers, strings, booleans and None in dictionaries and lists; None for an empty file.

    Raises:
        FileNotFoundError: No such file.
        ImportError: PyYAML is missing.
        ValueError: The file is not valid YAML or too large; the message is one line that names
            the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected an existing YAML file, got {str(path)!r}")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        return parse_yaml(_decode(data))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid YAML: {error}") from error


def parse_yaml(text: str) -> Any:
    """Parse a string.

    Args:
        text: YAML of at most ``MAX_BYTES``, ``MAX_NODES`` and ``MAX_DEPTH``.

    Returns:
        Numbers, strings, booleans and None in dictionaries and lists; None for an empty string.

    Raises:
        ImportError: PyYAML is missing.
        ValueError: The string is not valid YAML or too large; the message is one line.
    """
    yaml = require("yaml", extra="yaml")
    if len(text) > MAX_BYTES:
        raise ValueError(f"expected at most {MAX_BYTES // 2**10} KiB")
    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ValueError(_in_one_line(error, text)) from error
    except (ValueError, OverflowError) as error:  # PyYAML lets these through
        raise ValueError(f"an escape such as \\UFFFFFFFF is out of range ({error})") from error


def _decode(data: bytes) -> str:
    if len(data) > MAX_BYTES:
        raise ValueError(f"expected a file of at most {MAX_BYTES // 2**10} KiB")
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if wide else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        name = "UTF-16" if wide else "UTF-8"
        raise ValueError(
            f"expected text in UTF-8, byte {error.start + 1} is not {name}: {error.reason}"
        ) from error


def _in_one_line(error: Exception, text: str) -> str:
    """What PyYAML says over several lines, with the place in front."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    parts = [getattr(error, name, None) for name in ("context", "problem")]
    message = ", ".join(part for part in parts if part) or str(error)
    line, column = (None, None) if mark is None else (mark.line + 1, mark.column + 1)
    position = getattr(error, "position", None)  # of a character that PyYAML refuses
    if position is not None:
        line = text.count("\n", 0, position) + 1
        column = position - text.rfind("\n", 0, position)
        message = f"character U+{ord(text[position]):04X} is not allowed"
    message = " ".join(message.split())
    if len(message) > _MAX_MESSAGE:
        message = message[: _MAX_MESSAGE - 1] + "…"
    return message if line is None else f"line {line}, column {column}: {message}"


class _Extent(NamedTuple):
    """Size of a node with its aliases expanded."""

    nodes: int
    characters: int
    depth: int


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


@functools.cache
def _loader() -> Any:
    yaml: Any = require("yaml", extra="yaml")
    error = yaml.constructor.ConstructorError

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Checks the size while nodes are composed, before anything is built out of them."""

        yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own name and type)
            first: [(tag, pattern) for tag, pattern in entries if tag.removeprefix(_TAG) in known]
            for known in [(*_PLAIN, "merge")]  # a date is text, and so is "="
            for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }
        yaml_constructors = {  # noqa: RUF012
            _TAG + name: yaml.SafeLoader.yaml_constructors[_TAG + name] for name in _PLAIN
        }

        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.nesting = 0
            self.nodes = 0
            self.characters = 0
            self.extents: dict[Any, _Extent] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            is_alias = self.check_event(yaml.AliasEvent)
            self.nesting += 1
            if not is_alias:
                self.account(_Extent(1, len(getattr(event, "value", "")), 1), event)
            node = super().compose_node(parent, index)
            if is_alias:
                if node not in self.extents:
                    self.refuse(event, f"*{event.anchor[:60]} stands inside of what it refers to")
                self.account(self.extents[node], event)
            else:
                self.extents[node] = self.extent(node)
            self.nesting -= 1
            return node

        def account(self, extent: _Extent, event: Any) -> None:
            self.nodes += extent.nodes
            self.characters += extent.characters
            expanded = "with aliases expanded"
            if self.nesting + extent.depth - 1 > MAX_DEPTH:
                self.refuse(event, f"expected at most {MAX_DEPTH} levels, {expanded}")
            if self.nodes > MAX_NODES:
                self.refuse(event, f"expected at most {MAX_NODES} keys and values, {expanded}")
            if self.characters > MAX_BYTES:
                self.refuse(event, f"expected at most {MAX_BYTES} characters, {expanded}")

        def extent(self, node: Any) -> _Extent:
            if isinstance(node, yaml.ScalarNode):
                unusable = _UNUSABLE.search(node.value)  # escapes can write it
                if unusable:
                    self.refuse(node, f"character U+{ord(unusable[0]):04X} is not allowed")
                return _Extent(1, len(node.value), 1)
            children = node.value
            if isinstance(node, yaml.MappingNode):
                self.check_keys(node)
                children = [child for pair in node.value for child in pair]
            inner = [self.extents[child] for child in children]
            return _Extent(
                1 + sum(child.nodes for child in inner),
                sum(child.characters for child in inner),
                1 + max((child.depth for child in inner), default=0),
            )

        def check_keys(self, node: Any) -> None:
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    self.refuse(key, "expected a string or a number as key, got a list or mapping")
                if key.tag == _TAG + "merge":
                    name, hint = key.value, "; one list merges several, as in <<: [*a, *b]"
                else:
                    name, hint = self.construct_object(key, deep=True), ""
                if (key.tag == _TAG + "merge", name) in seen:
                    self.refuse(key, f"key {_short(name)} is given twice{hint}")
                seen.add((key.tag == _TAG + "merge", name))

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            if node.tag not in self.yaml_constructors:
                tag = node.tag.replace(_TAG, "!!")
                if tag == "!!merge":
                    self.refuse(node, "<< is a key, as in <<: *base; quote it if text is meant")
                self.refuse(
                    node,
                    f"tag {tag[:60]} is not read: expected null, booleans, numbers, strings, lists "
                    "and mappings",
                )
            try:
                return super().construct_object(node, deep)
            except (ValueError, KeyError, IndexError):  # such as !!int before a word
                kind = node.tag.replace(_TAG, "!!")
                self.refuse(node, f"{_short(node.value)} is not a value of {kind}")

        def construct_yaml_int(self, node: Any) -> Any:
            text = self.construct_scalar(node).replace("_", "")
            if len(text) > MAX_DIGITS:
                self.refuse(node, f"expected a number of at most {MAX_DIGITS} digits")
            if ":" in text:
                self.refuse(node, _BASE_60.format(_short(text)))
            digits = text.lstrip("+-")
            if len(digits) > 1 and digits[0] == "0" and digits.isdigit():
                self.refuse(
                    node,
                    f"{_short(text)} is octal to some readers and decimal to others; write it "
                    "without the leading zero, or quote it if text is meant",
                )
            return super().construct_yaml_int(node)

        def construct_yaml_float(self, node: Any) -> Any:
            text = self.construct_scalar(node)
            if ":" in text:
                self.refuse(node, _BASE_60.format(_short(text)))
            value = super().construct_yaml_float(node)
            if math.isinf(value) and "inf" not in text.lower():
                self.refuse(node, f"{_short(text)} is too large for a float")
            mantissa = text.lower().partition("e")[0]
            if value == 0 and any(digit in "123456789" for digit in mantissa):
                self.refuse(node, f"{_short(text)} is too small for a float")
            return value

        def refuse(self, where: Any, message: str) -> None:
            raise error(None, None, message, where.start_mark)

    Loader.add_constructor(_TAG + "int", Loader.construct_yaml_int)
    Loader.add_constructor(_TAG + "float", Loader.construct_yaml_float)
    Loader.add_implicit_resolver(  # YAML 1.1 wants a dot in a float
        _TAG + "float", _EXPONENT_WITHOUT_DOT, list("-+0123456789")
    )
    return Loader
