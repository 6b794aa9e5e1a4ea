"""Every figure in the documents comes from a record, or is listed with what else it is."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from functools import cache

import figures
import figures_cpu
import figures_gpu
import figures_training
import pytest
from bench_scripts import load

from python_tests.docs.test_migration import MEASURED, gains

GENERATED = ("docs/results/amd-epyc-avx2", "docs/results/nvidia-h100-80gb-hbm3-bf16")


@cache
def expected() -> dict[str, list[str]]:
    """By page, every text that records make."""
    texts = defaultdict(list)
    sources = (figures.notes, figures_cpu.expected, figures_gpu.expected, figures_training.expected)
    for source in sources:
        for name, text in source():
            texts[name].append(figures.flat(text))
    for name in GENERATED:
        page = load("record").page_of(figures.record(f"{name}.json"))
        texts[f"{name}.md"].append(figures.flat(page))
    for name in MEASURED:
        texts[f"docs/migrate/{name}.md"].append(figures.flat(gains(name)))
    return dict(texts)


@pytest.mark.parametrize("name", figures.PAGES)
def test_page_says_what_was_recorded(name: str) -> None:
    page = figures.page(name)
    for text in expected().get(name, []):
        assert text in page, text


@pytest.mark.parametrize("name", figures.PAGES)
def test_every_figure_comes_from_a_record(name: str) -> None:
    settings = figures.SETTINGS.get(name, {})
    found = figures.unchecked(figures.page(name), expected().get(name, []), settings)
    assert not found, "\n".join(f"{number}: … {context} …" for number, context in found)


def test_expected_texts_are_of_pages_that_exist() -> None:
    assert set(expected()) | set(figures.SETTINGS) <= set(figures.PAGES)
    assert sum(map(len, expected().values())) > 140


def test_settings_are_in_use() -> None:
    for name, settings in figures.SETTINGS.items():
        assert not [text for text in settings if text not in figures.page(name)], name
    text = " ".join(map(figures.page, figures.PAGES))
    assert not [p for p in figures.SETTINGS_EVERYWHERE if not re.search(p, text)]


@pytest.mark.parametrize(
    "figure",
    [
        "takes 4.7 ms",
        "takes 12 µs",
        "162 to 188 GFLOP/s",
        "needs 1239 MiB",
        "is 3 times as fast",
        "is ten times as fast",
        "a ratio of 0.42.",
        "wrong by 5e-5",
        "an error of 10⁻⁷",
        "by 12 %",
        "8.9 points ahead",
        "| 256 | 1468 | ours |",
        "uses 254 registers",
        "takes 3 h",
        "is 5× as fast",
        "is 5 × as fast",
        "is eleven times as fast",
        "is twenty-five times as fast",
        "needs Twelve minutes",
        "is twice as fast",
        "takes half the time",
        "takes a tenth of the memory",
        "takes two thirds of eager's time",
        "has twice its error",
        "is half as large",
        "gains twice that",
        "is a seven-fold gain",
        "is sevenfold",
        "is faster by a factor of 7",
        "is faster by a factor of seven",
        "is 40 percent faster",
        "waits 5 milliseconds",
        "reads 120000 tokens/s",
        "takes 3 epochs",
        "runs on 16 threads",
        "takes 1234 rather than 12 ms",
        "takes 1234, not 12 ms",
        "At τ = 0.1, 20 times as fast",
        "temperature 0.1: 12 times",
        "temperature 0.1 and 7.7 as lightly's",
        "temperatures 0.1, 0.2 and 0.75 of the time",
        "temperature 0.1, 0.5 ms",
        "weight 0.1 and 7.7",
        "weight 0.1 and 0.77 of the time",
        "weights of 0.1 to 0.2 points",
        "default is 0.5 ms",
    ],
)
def test_guard_finds_a_figure(figure: str) -> None:
    assert figures.unchecked(f"It {figure} here", ["takes 4.8 ms"])
    assert not figures.unchecked(f"It {figure} here", [figure])


@pytest.mark.parametrize(
    "text",
    [
        "M = 8192, D = 256",
        "lightly 1.6.0",
        "`x = 0.5`",
        "[a](page-0.5.md)",
        "bf16, sm_90",
        "8 × 8 digits",
        "temperatures from 0.05 to 0.2",
        "τ = 0.01 and 0.02",
        "weight 0.1, temperature 0.1",
        "normalised twice",
        "half of the classes",
    ],
)
def test_guard_leaves_sizes_versions_and_code_alone(text: str) -> None:
    assert not figures.unchecked(text, [])


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("Run\n\n    5 ms\n\n    6 ms", False),
        ("Run\n    5 ms", True),
        ("- Run\n    5 ms", True),
        ("- Run\n\n    5 ms", True),
        ("1. Run\n\n   and\n\n        5 ms", True),
        ("- Run\n\nOutside\n\n    5 ms", False),
        ("```\n5 ms\n```", False),
    ],
)
def test_prose_is_what_a_reader_does_not_see_as_code(text: str, seen: bool) -> None:
    assert bool(figures.unchecked(figures.flat(figures.prose(text)), [])) == seen


NO_MEASUREMENT = {  # tables with numbers
    "docs/distributed.md": "| | all-gather | ring | | what travels, forward |",
    "docs/faq.md": "| loss | shown value | gradient after DDP's average |",
}
CONDITIONS = {  # of the README that belong to no measurement
    "compiled: AVX-512, AVX2 or the baseline": "what there is",
    "measured on an H100; for others": "which device",
}


@pytest.mark.parametrize("name", figures.PAGES)
def test_heads_of_tables_belong_to_what_is_checked(name: str) -> None:
    for head in figures.heads(name):
        if not head.startswith(NO_MEASUREMENT.get(name, "no")):
            assert any(head in text for text in expected()[name]), head


def test_conditions_of_the_readme_belong_to_what_is_checked() -> None:
    """Device, dtype, batch and features beside a figure: they change with the record or not."""
    page, checked = figures.page("README.md"), expected()["README.md"]
    found = figures.unchecked(page, checked, CONDITIONS, figures.CONDITIONS)
    assert not found, "\n".join(f"{word}: … {context} …" for word, context in found)
    assert all(text in page for text in CONDITIONS)


@pytest.mark.parametrize("name", figures.PAGES)
def test_a_changed_figure_is_found(name: str) -> None:
    page, checked = figures.page(name), expected().get(name, [])
    settings = figures.SETTINGS.get(name, {})
    everywhere = [m.span() for p in figures.SETTINGS_EVERYWHERE for m in re.finditer(p, page)]
    for number in figures.numbers(page):
        if any(start <= number.start() and number.end() <= end for start, end in everywhere):
            continue
        other = re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), number[0])
        changed = page[: number.start()] + other + page[number.end() :]
        if other == number[0] or any(text not in changed for text in (*checked, *settings)):
            continue
        assert figures.unchecked(changed, checked, settings), changed[number.start() - 80 :][:160]


# Notes without a commit or command, by environment, which says why. A new note has both.
NOT_RECORDED = {
    "cpu": 17,
    "h100 at the benchmark's commit": 1,
    "h100": 1,
    "sm_90": 2,
    "gloo": 2,
    "demo": 2,
}


def test_notes_say_where_they_come_from() -> None:
    recorded = figures.record(figures.NOTES)
    environments = recorded["environments"]
    notes = (*recorded["notes"], recorded["earlier runs of the targets"])
    for note in notes:
        environment = environments[note["environment"]]
        assert set(environment) - {"why"} == {"device", "versions", "date", "commit", "command"}
        assert environment["device"] not in ("", "not recorded")
        assert re.fullmatch(r"\d{4}-\d\d(-\d\d)?", environment["date"])
        assert note["what"]
        assert note["page"] in figures.PAGES
    lacking = {name for name, of in environments.items() if "not recorded" in of.values()}
    assert all(environments[name].get("why") for name in lacking)
    assert Counter(n["environment"] for n in notes if n["environment"] in lacking) == NOT_RECORDED
    assert {note["environment"] for note in notes} == set(environments)
    for note in recorded["notes"]:
        names = re.findall(r"{(\w+)[:}]", note["sentence"])
        assert set(names) == set(note["values"]), note["sentence"]
