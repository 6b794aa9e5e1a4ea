"""Statistics, processes and checkouts of ``make bench-compare``. No test asserts a time."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bench_scripts import ROOT, load

from cjepa_kernels import backends
from cjepa_kernels.bench.candidates import BOTH, FORWARD
from cjepa_kernels.bench.sizes import Size

compare, revisions = load("compare"), load("revisions")
needs_git = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="needs a checkout of the repository"
)
needs_native = pytest.mark.skipif(
    not backends()["native"].available, reason=backends()["native"].reason
)


def turns(ratio: float, *, within: float = 0.02, between: float = 0.0, seed: int = 0) -> Any:
    """Times of 8 pairs of processes with 6 turns each, in which HEAD takes ``ratio`` times as long.

    ``within`` is the noise from one turn to the next, ``between`` that from pair to pair.
    """
    draw = random.Random(seed)
    pairs = []
    for _ in range(8):
        shift = 1 + draw.uniform(-between, between)
        pairs.append(
            [
                (1 + draw.uniform(-within, within), ratio * shift + draw.uniform(-within, within))
                for _ in range(6)
            ]
        )
    return pairs


@pytest.mark.parametrize(
    ("ratio", "noise", "verdict"),
    [
        (1.0, {}, "equal"),
        (1.1, {}, "slower"),
        (0.9, {}, "faster"),
        # This change exceeds the noise, but it is within the margin.
        (1.01, {"within": 0.001}, "equal"),
        (1.0, {"within": 0.5}, "unclear"),
        (1.0, {"between": 0.2}, "unclear"),
    ],
    ids=["same", "slower", "faster", "too_small", "noisy", "processes_differ"],
)
def test_verdict_of_a_ratio(ratio: float, noise: dict[str, float], verdict: str) -> None:
    for seed in range(10):
        comparison = compare.summarise(turns(ratio, seed=seed, **noise))
        assert comparison.ratio.low <= comparison.ratio.value <= comparison.ratio.high
        assert comparison.verdict == verdict
    if not noise:
        assert comparison.ratio.value == pytest.approx(ratio, abs=0.02)


def test_noise_between_processes_widens_the_interval() -> None:
    """Turns of the same two processes are not independent of each other."""
    within = compare.summarise(turns(1.0)).ratio
    between = compare.summarise(turns(1.0, between=0.2)).ratio
    assert between.high - between.low > 2 * (within.high - within.low)


def test_statement_names_what_changed() -> None:
    cases = [compare.Case(Size(256, 64), direction) for direction in (FORWARD, BOTH)]
    same, slower = compare.summarise(turns(1.0)), compare.summarise(turns(1.2))
    both = "M=256 D=64 forward, M=256 D=64 forward+backward"
    text = compare.statement(dict.fromkeys(cases, same))
    assert text == f"HEAD is as fast, within 2 %: {both}"
    lines = compare.statement({cases[0]: same, cases[1]: slower}).splitlines()
    assert lines[0] == "HEAD is slower: M=256 D=64 forward+backward (20 %)"
    assert lines[1] == "HEAD is as fast, within 2 %: M=256 D=64 forward"
    few = compare.summarise(turns(1.2)[:7])
    assert compare.statement({cases[0]: few}) == "Too noisy to tell: M=256 D=64 forward"
    assert compare.table({cases[0]: few})[0][-2:] == ["", "unclear"]
    table = compare.table({cases[1]: slower})
    assert len(table[0]) == len(compare.HEADER)
    assert table[0][-1] == "slower"


def request(direction: str) -> dict[str, Any]:
    return {"task": "nt_xent", "rows": 16, "features": 8, "direction": direction, "seconds": 0.0}


@needs_native
def test_processes_take_turns() -> None:
    requests = [request(direction) for direction in (FORWARD, BOTH)]
    times = revisions.measure_in_turn(ROOT, ROOT, requests, processes=1, rounds=2)
    assert len(times) == len(requests)
    for of_request in times:
        ((first, second),) = of_request
        assert min(*first, *second) > 0


@needs_native
def test_a_package_of_another_folder_is_refused(tmp_path: Path) -> None:
    revisions.check_package(ROOT)
    with pytest.raises(RuntimeError, match=f"is not {tmp_path} with its compiled module"):
        revisions.check_package(tmp_path)


def test_a_process_that_ends_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text("input()")
    monkeypatch.setattr(revisions, "WORKER", script)
    worker = revisions.Worker(ROOT)
    try:
        with pytest.raises(RuntimeError, match="ended"):
            worker.measure(request(FORWARD))
    finally:
        worker.close()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of three commits: the second changes Python, the third changes C++."""
    root = tmp_path / "repository"
    for folder in ("csrc", "cjepa_kernels"):
        (root / folder).mkdir(parents=True)

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)

    git("init", "--quiet")
    for number, name in enumerate(("csrc/a.cpp", "cjepa_kernels/a.py", "csrc/a.cpp")):
        (root / name).write_text(str(number))
        git("add", "-A")
        git("commit", "--quiet", "-m", name)
    monkeypatch.setattr(revisions, "ROOT", root)
    return root


def test_checkouts_share_a_module_and_are_removed(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[Path] = []

    def build(checkout: Path) -> None:
        built.append(checkout)
        (checkout / "cjepa_kernels").mkdir(exist_ok=True)
        (checkout / "cjepa_kernels" / "_C.so").write_text(checkout.name)

    monkeypatch.setattr(revisions, "build", build)
    with revisions.checkouts(["HEAD~2", "HEAD~1", "HEAD"]) as paths:
        assert built == [paths[0], paths[2]]
        assert [(path / "csrc" / "a.cpp").read_text() for path in paths] == ["0", "0", "2"]
        modules = [(path / "cjepa_kernels" / "_C.so").read_text() for path in paths]
        assert modules == [paths[0].name, paths[0].name, paths[2].name]
    assert "HEAD~1 has the compiled module of HEAD~2" in capsys.readouterr().out
    assert not any(path.exists() for path in paths)
    assert len(revisions.git("worktree", "list").splitlines()) == 1


def test_a_failed_build_leaves_no_checkout(repository: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"the build of .* failed"),
        revisions.checkouts(["HEAD"]),
    ):
        pytest.fail("there is no setup.py")
    assert len(revisions.git("worktree", "list").splitlines()) == 1


@needs_git
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a revision is needed: make bench-compare BASE=main"),
        (["no-such-revision"], "expected a revision of this repository, got 'no-such-revision'"),
        (["HEAD", "--sizes", "3x4"], "an even M of 4 or more and a D of 2 or more, got '3x4'"),
        (["HEAD", "--rounds", "0"], "--rounds: expected 1 or more, got 0"),
    ],
    ids=["none", "revision", "size", "rounds"],
)
def test_bad_options_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.parse_arguments(arguments)
    assert message in capsys.readouterr().err
