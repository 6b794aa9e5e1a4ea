"""The YAML reader of configurations: merge keys, errors of one line, and bounds on the size."""

from __future__ import annotations

import itertools
import math
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

pytest.importorskip("yaml")

from cjepa_kernels import create_loss_from_config
from cjepa_kernels.yaml_reader import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_NODES,
    parse_yaml,
    read_yaml,
)

LETTERS = "abcdefghi"


def nested_aliases(levels: int, merged: bool = False) -> str:
    """YAML in which each level holds the level before it nine times.

    A few hundred bytes of text then stand for 9 ** levels values.
    """
    lines = ["a: &a {x: 1}"]
    for before, name in itertools.pairwise(LETTERS[: levels + 1]):
        aliases = ", ".join([f"*{before}"] * 9)
        lines.append(f"{name}: &{name} " + (f"{{<<: [{aliases}]}}" if merged else f"[{aliases}]"))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("{<<: *base, y: 3}", {"x": 1, "y": 3}, id="before-own-keys"),
        pytest.param("{y: 3, <<: *base}", {"x": 1, "y": 3}, id="after-own-keys"),
        pytest.param("{<<: [*base, {y: 9, z: 4}]}", {"x": 1, "y": 2, "z": 4}, id="first-of-a-list"),
        pytest.param("{<<: [{y: 9}, *base]}", {"x": 1, "y": 9}, id="order-of-a-list"),
        pytest.param("{<<: {<<: *base, x: 5}, z: 0}", {"x": 5, "y": 2, "z": 0}, id="nested"),
        pytest.param("{<<: []}", {}, id="nothing"),
        pytest.param('{"<<": 1}', {"<<": 1}, id="quoted"),
    ],
)
def test_merge_keys(text: str, expected: dict[str, Any]) -> None:
    read = parse_yaml(f"base: &base {{x: 1, y: 2}}\nhere: {text}\nlast: *base")
    assert read["here"] == expected
    assert read["base"] == read["last"] == {"x": 1, "y": 2}, (
        "merging must not change the mapping that it reads"
    )


def test_merge_keys_in_a_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "loss.yaml"
    file.write_text(
        "shared: &shared\n  type: cjepa\n  contrastive_weight: 0.2\n"
        "loss:\n  <<: *shared\n  contrastive_weight: 0.3\n"
    )
    assert create_loss_from_config(file).contrastive_weight == 0.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{x: 1, x: 2}", "column 8: key 'x' is given twice", id="key"),
        pytest.param("{1: a, true: b}", "key True is given twice", id="equal-keys"),
        pytest.param("a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}", "'y' is given twice", id="beside"),
        pytest.param("a: &a {x: 1}\nb: {<<: *a, <<: *a}", "<<: [*a, *b]", id="merge-twice"),
        pytest.param("{<<: 1}", "expected a mapping or list of mappings for merging", id="merge-1"),
        pytest.param("{<<: [1]}", "expected a mapping for merging", id="merge-of-1"),
        pytest.param("a: <<", "<< is a key", id="merge-as-value"),
        pytest.param("? [a]\n: b", "string or a number as key", id="list-as-key"),
        pytest.param("a: &a [*a]", r"column 8: *a stands inside", id="list-in-itself"),
        pytest.param("a: &a {b: [*a]}", r"*a stands inside", id="mapping-in-itself"),
        pytest.param("a: &a {<<: *a}", r"*a stands inside", id="merged-with-itself"),
        pytest.param("&a {*a : b}", r"*a stands inside", id="key-of-itself"),
        pytest.param("a: *b", "undefined alias 'b'", id="no-anchor"),
        pytest.param("a:\n\tb: 1", r"line 2, column 1: ", id="tab"),
        pytest.param("a: \0", "column 4: character U+0000", id="nul"),
        pytest.param("b:\n  \x1b[31m", "line 2, column 3: character U+001B", id="control"),
        pytest.param('a: "\\0"', "U+0000 is not allowed", id="nul-by-escape"),
        pytest.param('a: "\\ud800"', "U+D800 is not allowed", id="surrogate-by-escape"),
        pytest.param('a: "\\U00110000"', "chr()", id="beyond-unicode"),
        pytest.param('a: "\\UFFFFFFFF"', "too large", id="far-beyond-unicode"),
        pytest.param("a: 9e9999", "'9e9999' is too large for a float", id="float-overflow"),
        pytest.param("a: -9.5e+9999", "too large for a float", id="negative-overflow"),
        pytest.param("a: 1e-9999", "'1e-9999' is too small for a float", id="float-underflow"),
        pytest.param("a: " + "1" * 5000, "at most 100 digits", id="long-integer"),
        pytest.param("a: 0x" + "f" * 5000, "at most 100 digits", id="long-hexadecimal"),
        pytest.param("a: 0x_", "'0x_' is not a value of !!int", id="no-digit"),
        pytest.param("a: !!int x", "'x' is not a value of !!int", id="tagged-int"),
        pytest.param("a: !!int ''", "not a value of !!int", id="empty-int"),
        pytest.param("a: !!float x", "not a value of !!float", id="tagged-float"),
        pytest.param("a: !!bool maybe", "not a value of !!bool", id="tagged-bool"),
        pytest.param("a: 1:30", "base 60", id="minutes"),
        pytest.param("a: 1:30.5", "base 60", id="minutes-float"),
        pytest.param("a: 010", "octal", id="leading-zero"),
        pytest.param("a: -07", "octal", id="negative-leading-zero"),
        pytest.param("a: !!python/object/apply:os.system [ls]", "tag !!python/obj", id="python"),
        pytest.param("a: !env HOME", "tag !env is not read", id="own-tag"),
        pytest.param("a: !!set {x}", "tag !!set is not read", id="set"),
        pytest.param("a: !!binary aGk=", "tag !!binary is not read", id="binary"),
        pytest.param("a: !!timestamp x", "tag !!timestamp is not read", id="timestamp"),
        pytest.param("a: 1\n---\nb: 1", "a single document", id="two-documents"),
        pytest.param("[1", "expected ',' or ']'", id="open-bracket"),
        pytest.param("a: *" + "x" * 100_000, "undefined alias 'xxx", id="long-name"),
        pytest.param("{" + "x" * 900 + ": 1, " + "x" * 900 + ": 1}", "…", id="long-key"),
    ],
)
def test_mistakes_are_one_line_with_the_place(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_yaml(text)
    error = str(caught.value)
    assert len(error.splitlines()) == 1
    assert len(error) <= 400
    assert error.startswith("line ") or "Unicode" in text or "\\U" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("1e-3", 0.001, id="no-dot"),
        pytest.param(".inf", math.inf, id="infinity"),
        pytest.param("0e-9", 0.0, id="zero"),
        pytest.param("0", 0, id="integer-zero"),
        pytest.param("0x10", 16, id="hexadecimal"),
        pytest.param("1_000", 1000, id="underscore"),
        pytest.param("1" * 100, int("1" * 100), id="many-digits"),
        pytest.param("2024-01-31", "2024-01-31", id="date"),
        pytest.param("2024-99-99", "2024-99-99", id="no-date"),
        pytest.param("=", "=", id="equals"),
        pytest.param("\ufeff1", 1, id="byte-order-mark"),
        pytest.param("'1:30'", "1:30", id="quoted"),
        pytest.param("", None, id="empty"),
    ],
)
def test_values(text: str, expected: object) -> None:
    value = parse_yaml(text)
    assert value == expected
    assert type(value) is type(expected)


BOMBS = {
    "aliases": nested_aliases(4),
    "aliases-of-9-levels": nested_aliases(8),
    "merges": nested_aliases(8, merged=True),
    "characters": "a: &a " + "x" * 40_000 + "\nb: [" + "*a," * 40 + "]",
    "chain": "a: &a {x: 1}\nk0: &k0 [*a]\n"
    + "\n".join(f"k{i}: &k{i} [*k{i - 1}]" for i in range(1, 100)),
    "brackets": "[" * 1000,
    "closed-brackets": "[" * 1000 + "]" * 1000,
    "braces": "{a: " * 1000,
    "dashes": "- " * 1000,
    "indentation": "\n".join(" " * i + "a:" for i in range(500)),
    "keys": "\n".join(f"k{i}: 1" for i in range(20_000)),
    "30,000-keys": "\n".join(f"key{i}: 1" for i in range(30_000)),
    "items": "[" + "1," * 100_000 + "]",
    "comment": "#" * 10**6,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_at_once(name: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match="expected at most") as caught:
        parse_yaml(BOMBS[name])
    assert time.process_time() - start < 2
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["aliases-of-9-levels", "merges", "characters"])
def test_bombs_take_no_memory(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="expected at most"):
            parse_yaml(BOMBS[name])
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


def test_bounds_are_reached() -> None:
    """The reader accepts a document at each bound and refuses one that is larger by 1."""
    items = MAX_NODES - 1  # The list itself counts as one node.
    assert len(parse_yaml("[" + "1," * items + "]")) == items
    assert parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    assert len(parse_yaml("x" * MAX_BYTES)) == MAX_BYTES
    for text in ("[" + "1," * MAX_NODES + "]", "[" * (MAX_DEPTH + 1), "x" * (MAX_BYTES + 1)):
        with pytest.raises(ValueError, match="expected at most"):
            parse_yaml(text)


def test_the_page_names_the_bounds() -> None:
    page = (ROOT / "docs" / "api" / "config.md").read_text(encoding="utf-8")
    for bound in (
        f"{MAX_BYTES // 2**10} KiB as the size",
        f"{MAX_NODES:,} keys and values",
        f"{MAX_DEPTH} levels",
        f"{MAX_DIGITS} digits",
    ):
        assert f"- {bound}" in page


def test_encodings_of_files(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file.write_text("name: Bär\n", encoding=encoding)
        assert read_yaml(file) == {"name": "Bär"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"\x89PNG\r\n\x1a\n\x00\x00", "byte 1 is not UTF-8", id="image"),
        pytest.param("name: Bär".encode("latin-1"), "byte 8 is not UTF-8", id="latin-1"),
        pytest.param("a: 1".encode("utf-16-le"), "character U.0000 is not allowed", id="no-mark"),
        pytest.param(b"\xff\xfea\x00:", "byte 5 is not UTF-16", id="half-a-character"),
        pytest.param(b"\x00" * 100, "character U.0000 is not allowed", id="zeros"),
        pytest.param(b"#" * (MAX_BYTES + 1), "at most 256 KiB", id="large"),
    ],
)
def test_files_that_are_no_yaml(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.yaml' is not valid YAML: .*{message}") as caught:
        read_yaml(file)
    assert len(str(caught.value).splitlines()) == 1


def load_experiment(file: Path) -> None:
    from cjepa_kernels.train.config import load_config

    load_config(file)


def override_experiment(file: Path) -> None:
    from cjepa_kernels.train.config import config_from_dict

    config_from_dict({}, [f"seed={file.read_text()}"])


def resume_run(file: Path) -> None:
    from cjepa_kernels.train.config import ExperimentConfig
    from cjepa_kernels.train.loop.run_directory import check_run_directory

    (file.parent / "config.yaml").write_text(file.read_text())
    check_run_directory(ExperimentConfig(), file.parent)


@pytest.mark.parametrize("text", [BOMBS["aliases-of-9-levels"], "[" * 1000], ids=["bomb", "["])
@pytest.mark.parametrize(
    "reader", [create_loss_from_config, load_experiment, override_experiment, resume_run]
)
def test_every_reader_is_bounded(
    reader: Callable[[Path], object], text: str, tmp_path: Path
) -> None:
    if reader is not create_loss_from_config:
        pytest.importorskip("pydantic")
    file = tmp_path / "experiment.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"not valid YAML.*: expected at most"):
        reader(file)


def test_nothing_else_reads_yaml() -> None:
    for file in (ROOT / "cjepa_kernels").rglob("*.py"):
        if file.name != "yaml_reader.py":
            text = file.read_text(encoding="utf-8")
            assert "yaml.load(" not in text, file
            assert "yaml.safe_load" not in text, file
