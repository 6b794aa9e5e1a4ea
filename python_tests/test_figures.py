"""Every figure in the documents comes from a record, or is listed with what else it is."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache

import figures
import figures_cpu
import figures_gpu
import figures_training
import pytest
from bench_scripts import load
from test_migration import MEASURED, gains

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
    assert sum(map(len, expected().values())) > 200


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
    ],
)
def test_guard_finds_a_figure(figure: str) -> None:
    assert figures.unchecked(f"It {figure} here", ["takes 4.8 ms"])
    assert not figures.unchecked(f"It {figure} here", [figure])


@pytest.mark.parametrize(
    "text", ["M = 8192, D = 256", "lightly 1.6.0", "`x = 0.5`", "[a](page-0.5.md)", "bf16, sm_90"]
)
def test_guard_leaves_sizes_versions_and_code_alone(text: str) -> None:
    assert not figures.unchecked(text, [])


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


def test_notes_say_where_they_come_from() -> None:
    recorded = figures.record(figures.NOTES)
    for note in (*recorded["notes"], recorded["earlier runs of the targets"]):
        environment = recorded["environments"][note["environment"]]
        assert set(environment) == {"device", "versions", "date", "commit", "command"}
        assert note["what"]
        assert note["page"] in figures.PAGES
    for note in recorded["notes"]:
        names = re.findall(r"{(\w+)[:}]", note["sentence"])
        assert set(names) == set(note["values"]), note["sentence"]
