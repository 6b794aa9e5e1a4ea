"""Figures in the documents: what records make of them, and which numbers look measured.

A page is compared as one line, its white space single, so that it may be wrapped anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

from documents import DOCS, FENCED, ROOT

PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in DOCS.rglob("*.md"))]
NOTES = "bench/results/measured_notes.json"

# Numbers that no measurement of ours stands behind, each with the reason: patterns for every page,
# then the words of one page.
SETTINGS_EVERYWHERE = {
    r"arXiv \d+\.\d+": "the number of a paper",
    r"(?:Python|PyTorch) \d+\.\d+": "a version",
    r"compute capability \d\.\d": "a generation of GPUs",
    r"H100 80GB HBM3": "the name of a device",
    r"(?:τ|temperatures?|eps|ε)(?: (?:=|from|of))? \d[\d.e-]*(?:(?:,| to| and|:) \d[\d.]*)*": (
        "a temperature or eps"
    ),
    r"[Ww]eights?(?: (?:of|from))? \d\.\d+(?: (?:and|to) \d\.\d+)?": "the weight of a term",
    r"default(?: here)? is \d\.\d+": "the default of a temperature",
    r"6·10⁻⁸": "the smallest number of fp16",
    r"(?:eps`|`eps`,)(?: of)? 10⁻¹²": "the eps of others",
    r"(?:whole|all of them) at 0\.02": "a temperature",
}
SETTINGS = {
    "README.md": {"the +0.8 to +1.0 claimed for ImageNet": "a claim of others"},
    "docs/api/backends.md": {"up to 256 MiB of exponentials": "a default"},
    "docs/benchmarks.md": {
        "a 99 % bootstrap interval": "how the comparison decides",
        "beyond 2 % on one side": "how the comparison decides",
    },
    "docs/definitions.md": {
        "(1.8e19 in fp32)": "the root of the largest number of fp32",
        "where fp32 resolves 6e-5": "a spacing of fp32",
        "views that are 10 % apart": "the input of a test",
        "stay within 1e-5, where the textbook loss is more than ten times further off": (
            "the bounds of the test that the sentence names"
        ),
    },
    "docs/differences.md": {
        "10.0 for identical views": "1 / 0.1",
        "reports accuracy 1.0": "all anchors, by definition",
    },
    "docs/distributed.md": {
        "| exchanges one after the other | 2 |": "how the strategy works",
        "the features of all ranks exceed 256 MiB": "a default",
        "(with them, up to 256 MiB more": "a default",
        "The ring's target, 0.6 of": "a target, compared in test_recorded_results.py",
    },
    "docs/faq.md": {
        "asked for 120 GB": "what an issue of others says",
        "0.1 is the default and a fair start; 0.07 to 0.2 is the range to try, and 0.5 was": (
            "temperatures"
        ),
        "0.1 here and in H-JEPA, 0.07 in pytorch-metric-learning and SupContrast, 0.5 in": (
            "temperatures"
        ),
        "multiplies its loss by τ / 0.07": "a factor in the code of others",
    },
    "docs/migrate/h-jepa.md": {"ten times as large": "1 / 0.1"},
    "docs/migrate/open_clip.md": {"a temperature of 0.01 or more": "a bound that CLIP sets"},
    "docs/numerics.md": {
        "a loss of 10⁻⁵ is mostly rounding": "an example",
        "views 10 % apart": "the input of the measurement",
        "good to about 10⁻⁷, and the temperature magnifies that a hundred times": (
            "the precision of fp32, and 1 / 0.01"
        ),
        "0.027 in the Triton kernels": "where the kernels switch",
        "to 10⁻⁵ in fp32": "the bound of a test",
    },
    "docs/performance.md": {
        "AVX-512, 1 MiB of L2 a core, 32 MiB of L3": "the device",
        "to the backward if they fit 256 MiB": "a default",
        "in a workspace of 64 MiB": "a default",
        "for the next call up to 256 MiB": "a default",
        "in squares of 64 MiB": "a default",
        "while they fit 256 MiB": "a default",
        "a page fault for every 4 KiB": "the size of a page",
        "with 2 MiB pages": "the size of a large page",
        "Gradients of more than 16 MiB": "where the kernel switches",
        "*Low temperatures* (below 0.027)": "where the kernels switch",
        "16 exponentials and 4 instructions of a warp a clock": "NVIDIA's figures",
    },
    "docs/results/cifar10.md": {
        "+0.8 to +1.0 points of linear probing": "a claim of others",
        "1.28 million images": "the size of ImageNet",
    },
    "docs/training.md": {
        "accuracy < 0.8:": "a rule, compared in test_recorded_results.py",
        "accuracy > 0.95:": "a rule, compared in test_recorded_results.py",
    },
}


class Found(NamedTuple):
    """A number that looks measured, and the words around it."""

    number: str
    context: str


def record(path: str) -> Any:
    """A JSON of the repository."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def flat(text: str) -> str:
    return " ".join(text.split())


@cache
def page(name: str) -> str:
    """The prose and tables of a page as one line, blocks of code left out."""
    text = FENCED.sub("", (ROOT / name).read_text(encoding="utf-8"))
    return flat(re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.MULTILINE))


def notes() -> Iterator[tuple[str, str]]:
    """Page and sentence of everything that was measured by hand."""
    for note in record(NOTES)["notes"]:
        yield note["page"], note["sentence"].format(**note["values"])


_NUMBER = r"[+−±-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
_UNIT = (
    r"(?:[mµn]?s|min|minutes?|seconds?|hours?|[kKMGT]i?B|bytes?|[MGTP]?FLOPs?|[MGTP]?b/s|%|times|"
    r"points?|registers|instructions|passed|x)(?![\w²³])"
)
_WORDS = "two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|forty|hundred"
MEASURED = re.compile(
    rf"(?<![\w.^₀-₉]){_NUMBER}(?:(?:,| to| and| or| of| against) {_NUMBER})*[ -]?{_UNIT}"
    r"|(?<![\w.])[+−±-]?\d[\d,]*\.\d+(?:e[+-]?\d+)?(?![\w²³]|\.\d)"  # a decimal; not 2.13.0
    r"|(?<![\w.])\d+e[+-]?\d+(?!\w)"
    r"|\b10⁻[⁰¹²³⁴⁵⁶⁷⁸⁹]+"
    rf"|\b(?:{_WORDS}) times\b"
    r"|(?<=\| )[+−±-]?\d[\d,.e±/ −-]*(?= \|)"  # a cell of a table
)
_CODE = re.compile(r"`[^`]*`|\]\([^)\s]*\)")


def numbers(text: str) -> Iterator[re.Match[str]]:
    """Those of a flat text that look measured; code and links are left out."""
    prose = _CODE.sub(lambda match: "`" * len(match[0]), text)
    return MEASURED.finditer(prose)


def unchecked(text: str, checked: Iterable[str], settings: Iterable[str] = ()) -> list[Found]:
    """Numbers that look measured and lie outside everything that is checked.

    Args:
        text: A page, see ``page``.
        checked: Texts that records make.
        settings: Texts whose numbers are no measurements.
    """
    covered = bytearray(len(text))
    patterns = [*map(re.escape, (*checked, *settings)), *SETTINGS_EVERYWHERE]
    for pattern in patterns:
        for match in re.finditer(pattern, text):
            covered[slice(*match.span())] = b"\1" * len(match[0])
    return [
        Found(match[0], text[max(0, match.start() - 60) : match.end() + 40])
        for match in numbers(text)
        if not all(
            covered[match.start() + i]
            for i, character in enumerate(match[0])
            if character.isdigit() or not re.search(r"\d", match[0])
        )
    ]
