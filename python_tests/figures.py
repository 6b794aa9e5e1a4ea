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

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(p.relative_to(ROOT).as_posix() for p in DOCS.rglob("*.md")),
]
NOTES = "bench/results/measured_notes.json"

_NUMBER = r"[+−±-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
_QUANTITY = (  # units that stand in words, too
    r"(?:(?:milli|micro|nano)?seconds?|minutes?|hours?|days?|per ?cent|points?|times|epochs?|"
    r"seeds?)"
)
_UNIT = (
    rf"(?:{_QUANTITY}|[mµn]?s|min|h|[kKMGT]i?B|[kMG]?bytes?|[MGTP]?FLOPs?|[MGTP]?b/s|[A-Za-z]+/s|%|"
    r"registers|instructions|passed|threads|cores|x|[×x](?! ?[\dA-Z])|fold)(?![\w²³])"
)
_COUNT = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|"
    "seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|"
    "(?:a |one )?hundred|(?:a |one )?thousand"
)
_COUNTED = rf"{_COUNT}|(?:{_COUNT})[ -](?:{_COUNT}|one)"
_JOIN = (  # between numbers that share a unit
    r"(?:,? (?:(?:rather|instead|down|up|now|compared|but|not|only|once|and|or) )*"
    r"(?:than|of|to|and|or|against|with|versus|vs\.?|from|not|by)|,|–|/|:)"
)
_PART = (
    r"(?:twice|thrice|double|half|(?:a|one|two|three|four|five|six|seven|eight|nine)[ -]"
    r"(?:half|third|quarter|fifth|sixth|seventh|eighth|ninth|tenth|twelfth|twentieth|hundredth)s?)"
)
_THING = (
    r"(?:time|times|memory|speed|cost|costs|rate|bytes|traffic|errors?|work|bandwidth|throughput|"
    r"latency|step|FLOPs?|peak|accuracy|spread)"
)
_DEGREE = (
    r"(?:fast|slow|quick|long|much|many|large|big|small|high|low|good|bad|accurate|cheap|costly|"
    r"expensive)(?:er)?"
)
# What may not follow a temperature: another digit, a unit, words that make it a ratio.
_ALONE = rf"(?![\d.,]*\d)(?![ -]?{_UNIT})(?! (?:of|as|against) )"
_TEMPERATURE = r"(?:0\.\d+|1\.0|1e-\d+)" + _ALONE

# Numbers that no measurement of ours stands behind, each with the reason: patterns for every page,
# then the words of one page.
SETTINGS_EVERYWHERE = {
    r"arXiv \d+\.\d+": "the number of a paper",
    r"(?:Python|PyTorch) \d+\.\d+": "a version",
    r"compute capability \d\.\d": "a generation of GPUs",
    r"H100 80GB HBM3": "the name of a device",
    rf"(?:τ|[Tt]emperatures?|eps|ε)(?: (?:=|from|of))? {_TEMPERATURE}"
    rf"(?:(?:,| to| and) {_TEMPERATURE})*": "a temperature or eps",
    rf"[Ww]eights?(?: (?:of|from))? 0\.\d+{_ALONE}(?: (?:and|to) 0\.\d+{_ALONE})?": (
        "the weight of a term"
    ),
    rf"default(?: here)? is {_TEMPERATURE}": "the default of a temperature",
    r"\[[Ff]ive minutes\]|^# Five minutes": "the name of a page",
    r"6·10⁻⁸": "the smallest number of fp16",
    r"(?:eps`|`eps`,)(?: of)? 10⁻¹²": "the eps of others",
    r"(?:whole|all of them) at 0\.02": "a temperature",
}
SETTINGS = {
    "CHANGELOG.md": {"lie between 1e-30 and 1e30": "a bound of the code"},
    "README.md": {"the +0.8 to +1.0 claimed for ImageNet": "a claim of others"},
    "CONTRIBUTING.md": {"the values and gradients of 2.13 in": "a version"},
    "docs/api/backends.md": {"up to 256 MiB of exponentials": "a default"},
    "docs/api/config.md": {"- 256 KiB as the size of the file": "a bound"},
    "docs/benchmarks.md": {
        "Its 99 % interval is that of the sign test": "a rule, compared in test_bench_verdict.py",
        "beyond 2 % on one side, and *as fast* if it lies within 2 %": (
            "a rule, compared in test_bench_verdict.py"
        ),
        "for up to 30 times `--seconds`": "a rule, compared in test_bench_verdict.py",
    },
    "docs/definitions.md": {
        "with weights 1.0 and 0.1 by default": "defaults",
        "(1.8e19 in fp32)": "the root of the largest number of fp32",
        "targets of any size up to 1e38": "the bound of a test in test_limits.py",
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
    "docs/migrate/open_clip.md": {
        "bf16 features, is off by up to 0.01, at a scale of 100 by 1": (
            "compared in test_migration.py"
        ),
        "rows rounded to bf16 hide differences below 0.002": "the precision of bf16",
        "a pair is off by up to 1e-4 in fp32": "the bound of a test in test_migration.py",
        "is good to 1e-7 there": "the precision of fp32",
        "which may be off by 0.1": "the bound of a test in test_migration.py",
        "a temperature of 0.01 or more": "a bound that CLIP sets",
        "it is half as large (1/R with R ranks)": "1 / R",
    },
    "docs/numerics.md": {
        "any number from 10⁻³⁰ to 10³⁰": "a bound of the code",
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
        "no more than 4 threads could": "one of the four chunks each",
        "*Low temperatures* (below 0.027)": "where the kernels switch",
        "16 exponentials and 4 instructions of a warp a clock": "NVIDIA's figures",
    },
    "docs/results/cifar10.md": {
        "+0.8 to +1.0 points of linear probing": "a claim of others",
        "1.28 million images": "the size of ImageNet",
    },
    "docs/results/gpu.md": {
        "had twice eager's error with Triton's own": "the bound of a test, which then failed",
    },
    "docs/training.md": {
        "is above 0.85 of log(2B − 1) and the accuracy below 12 / (2B − 1), both of chance, 8 "
        "epochs after warm-up": "a rule, compared in test_recorded_results.py",
        "accuracy > 0.95:": "a rule, compared in test_recorded_results.py",
        "above 25 times the weighted": "a rule, compared in test_recorded_results.py",
        "is below 0.3 and grew by less than 0.1 over 8 epochs": (
            "a rule, compared in test_recorded_results.py"
        ),
        "use 0.625 and 0.25:": "settings of the shipped experiments",
        "medians of 3 epochs": "a rule, compared in test_recorded_results.py",
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
    """One line, without the lines that separate a table's head from its rows."""
    return " ".join(re.sub(r"^\|[-:| ]+\|$", "", text, flags=re.MULTILINE).split())


def prose(text: str) -> str:
    """Without blocks of code: fenced, or indented after an empty line outside of a list."""
    kept: list[str] = []
    in_list, after_break = False, True
    for line in FENCED.sub("", text).splitlines():
        if line.strip():
            indented = line.startswith(("    ", "\t"))
            if re.match(r" {0,3}(?:[-*+]|\d+[.)]) ", line):
                in_list = True
            elif after_break and not line.startswith(" "):
                in_list = False
            if indented and after_break and not in_list:
                continue  # after it, too, the next indented line is code
        after_break = not line.strip()
        kept.append(line)
    return "\n".join(kept)


@cache
def page(name: str) -> str:
    """The prose and tables of a page as one line."""
    return flat(prose((ROOT / name).read_text(encoding="utf-8")))


def notes() -> Iterator[tuple[str, str]]:
    """Page and sentence of everything that was measured by hand."""
    for note in record(NOTES)["notes"]:
        yield note["page"], note["sentence"].format(**note["values"])


MEASURED = re.compile(
    rf"(?<![\w.^₀-₉]){_NUMBER}(?:{_JOIN} {_NUMBER})*[ -]?{_UNIT}"
    r"|(?<![\w.])[+−±-]?\d[\d,]*\.\d+(?:e[+-]?\d+)?(?![\w²³]|\.\d)"  # a decimal; not 2.13.0
    r"|(?<![\w.])\d+e[+-]?\d+(?!\w)"
    r"|\b10⁻[⁰¹²³⁴⁵⁶⁷⁸⁹]+"
    rf"|(?i:\b(?:{_COUNTED})[ -]?(?:{_QUANTITY}|fold)\b)"
    rf"|\b[Ff]actors? of (?:{_NUMBER}|(?:{_COUNTED})\b)"
    rf"|(?i:\b{_PART} (?:as {_DEGREE}\b|that\b|(?:of )?(?:(?:the|its|their|\w+'s) )?{_THING}\b))"
    r"|(?<=\| )[+−±-]?\d[\d,.e±/ −-]*(?= \|)"  # a cell of a table
)
CONDITIONS = re.compile(  # under which something was measured
    r"\b(?:fp16|fp32|fp64|bf16|tf32|AVX\w*(?:-512)?|[AHBL]\d{2,3}0?|EPYC|Xeon|Ryzen|Core)\b"
    r"|\b[BMDR](?:_r)? = \d[\d,]*(?![\d,]*\w)|\bbatch(?:es of)? \d[\d,]*"
    r"|\d[\d,]* (?:pairs|rows|images|patches)"
)
_CODE = re.compile(r"`[^`]*`|\]\([^)\s]*\)")


def numbers(text: str, pattern: re.Pattern[str] = MEASURED) -> Iterator[re.Match[str]]:
    """Those of a flat text that look measured; code and links are left out."""
    return pattern.finditer(_CODE.sub(lambda match: "`" * len(match[0]), text))


def unchecked(
    text: str,
    checked: Iterable[str],
    settings: Iterable[str] = (),
    pattern: re.Pattern[str] = MEASURED,
) -> list[Found]:
    """Numbers that look measured and lie outside everything that is checked.

    Args:
        text: A page, see ``page``.
        checked: Texts that records make.
        settings: Texts whose numbers are no measurements.
        pattern: What to look for.
    """
    covered = bytearray(len(text))
    for known in [*map(re.escape, (*checked, *settings)), *SETTINGS_EVERYWHERE]:
        for match in re.finditer(known, text):
            covered[slice(*match.span())] = b"\1" * len(match[0])
    return [
        Found(match[0], text[max(0, match.start() - 60) : match.end() + 40])
        for match in numbers(text, pattern)
        if not all(
            covered[match.start() + i]
            for i, character in enumerate(match[0])
            if character.isdigit() or not re.search(r"\d", match[0])
        )
    ]


def heads(name: str) -> Iterator[str]:
    """Head and first row, as one line, of every table of a page with a number in its rows."""
    text = prose((ROOT / name).read_text(encoding="utf-8"))
    for table in re.finditer(r"^\|.*\|\n\|[-:| ]+\|\n(?:\|.*\|\n?)+", text, re.MULTILINE):
        head, _, *rows = table[0].splitlines()
        if any(re.search(r"(?<=\| )[+−±-]?\d[\d,.e±/ −-]*(?= \|)", row) for row in rows):
            yield flat(f"{head}\n{rows[0]}")
