"""The compiled CPU kernel: every instruction set, any number of threads, and its surroundings."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, relative_error
from torch import Tensor

from cjepa_kernels import NTXentOutput, backends, cross_logsumexp, functional, nt_xent, ops
from cjepa_kernels.backends import compiled_module

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    not backends()["native"].available, reason="cjepa_kernels._C was not built: no compiler here"
)


def instruction_sets() -> list[str]:
    module = compiled_module()
    return [] if module is None else list(module.build_info()["instruction_sets"])


def run(z_i: Tensor, z_j: Tensor, **options: Any) -> list[Tensor]:
    """Loss, metrics and both gradients."""
    leaves = [z.detach().clone().requires_grad_() for z in (z_i, z_j)]
    out: NTXentOutput = nt_xent(leaves[0], leaves[1], **options)
    return [*out, *torch.autograd.grad(out.loss, leaves)]


@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_parity_suite_on_every_instruction_set(instruction_set: str) -> None:
    """The one in use is covered by the suite itself; this covers all that the CPU can run."""
    files = ["test_native.py", "test_nt_xent.py", "test_ops.py", "test_first_implementation.py"]
    files += ["test_cross_logsumexp.py", "test_cross_logsumexp_identities.py"]
    chosen = "sizes_around or (not test_native and (native or gradcheck or opcheck))"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-cov"]
    command += ["-k", chosen, *(str(TESTS / file) for file in files)]
    environment = {**os.environ, "CJEPA_INSTRUCTION_SET": instruction_set, "OMP_NUM_THREADS": "1"}
    environment["CJEPA_POISON_MEMORY"] = "1"
    environment = {k: v for k, v in environment.items() if not k.startswith(("PYTEST_", "COV"))}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


def test_unknown_instruction_set_is_refused() -> None:
    environment = {**os.environ, "CJEPA_INSTRUCTION_SET": "avx1024"}
    code = "import torch, cjepa_kernels._C as c; c.build_info()"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "CJEPA_INSTRUCTION_SET must be one of baseline" in result.stderr


# One block, several of 96 rows, blocks of 192 from 1536 rows on, many chunks from 8192 on; ragged.
@pytest.mark.parametrize(
    ("batch", "features"), [(47, 31), (96, 64), (401, 37), (1000, 70), (4100, 24)], ids=str
)
@pytest.mark.parametrize("temperature", [0.1, 0.01], ids=["constant_shift", "running_maxima"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "computed_again"])
@pytest.mark.usefixtures("poisoned_memory")
def test_sizes_around_the_blocks(
    batch: int, features: int, temperature: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(functional, "KEPT_BYTES", 0)
    z_i = torch.randn(batch, features)
    z_j = z_i + 0.5 * torch.randn_like(z_i)
    actual = run(z_i, z_j, temperature=temperature, backend="native")
    same_dtype = run(z_i, z_j, temperature=temperature, backend="chunked")
    truth = run(z_i.double(), z_j.double(), temperature=temperature, backend="chunked")
    floors = [FLOOR_VALUE[torch.float32], *[FLOOR_GRADIENT[torch.float32]] * 2]
    for index, floor in zip((0, 5, 6), floors, strict=True):
        bound = 2 * relative_error(same_dtype[index], truth[index]) + floor
        assert relative_error(actual[index], truth[index]) <= bound
    assert abs(actual[1].item() - truth[1].item()) <= 2 / batch  # a near tie may fall either way


@pytest.mark.parametrize("options", [{}, {"temperature": 0.01}, {"reduction": "sum"}], ids=str)
def test_same_bits_on_any_number_of_threads(options: dict[str, Any]) -> None:
    z_i, z_j = torch.randn(2, 900, 33)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run(z_i, z_j, backend="native", **options))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_calls_from_several_python_threads() -> None:
    inputs = [torch.randn(2, 150, 20) for _ in range(8)]
    expected = [run(z[0], z[1], backend="native") for z in inputs]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda z: run(z[0], z[1], backend="native"), inputs * 4))
    for index, result in enumerate(actual):
        pairs = zip(result, expected[index % len(inputs)], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_works_after_fork() -> None:
    code = """
import os, torch
from cjepa_kernels import nt_xent
z = torch.randn(2, 300, 16)
expected = nt_xent(z[0], z[1], backend="native").loss
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    ok = torch.equal(nt_xent(z[0], z[1], backend="native").loss, expected)
    os._exit(0 if ok else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr


def test_huge_loss_scale_with_antipodal_negatives() -> None:
    """Every negative is as far away as can be: the weights are at their largest."""
    direction = torch.nn.functional.normalize(torch.randn(1, 24), dim=1)
    z_i = torch.cat([direction, -direction.expand(30, 24)]) + 1e-3 * torch.randn(31, 24)
    z_j = torch.cat([-direction, -direction.expand(30, 24)]) + 1e-3 * torch.randn(31, 24)
    truth = run(z_i.double(), z_j.double(), temperature=0.024, backend="reference")
    leaves = [z.clone().requires_grad_() for z in (z_i, z_j)]
    loss = nt_xent(leaves[0], leaves[1], temperature=0.024, backend="native").loss * 2.0**16
    for gradient, expected in zip(torch.autograd.grad(loss, leaves), truth[5:], strict=True):
        assert gradient.isfinite().all()
        assert relative_error(gradient / 2.0**16, expected) < 1e-4


@pytest.mark.parametrize("rows", [2, 94, 98, 1534, 1536, 1538])
def test_python_knows_how_much_is_kept(rows: int) -> None:
    z = torch.randn(rows // 2, 2)
    out = ops.operator("nt_xent")(z, z, None, None, 0.1, True, 1e-8, "mean", None, True)
    assert out[-1].numel() == ops.kept_size(rows)


def test_exponentials_are_kept_for_a_gradient_within_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keeps = functional._keeps_exponentials
    z = torch.randn(50, 4)
    wanted = z.clone().requires_grad_()
    temperature = torch.tensor(0.1, requires_grad=True)
    assert keeps(wanted, z, None)
    assert keeps(z, wanted, None)
    assert keeps(z, z, temperature)
    assert not keeps(z, z, None)
    with torch.no_grad():
        assert not keeps(wanted, z, None)
    monkeypatch.setattr(functional, "KEPT_BYTES", 4 * ops.kept_size(100))
    assert keeps(wanted, z, None)
    assert not keeps(wanted.double(), z.double(), None)  # twice the bytes


def test_dot_product_of_long_rows() -> None:
    """Far beyond what the constant shift can take: exponents of hundreds."""
    z_i, z_j = 20 * torch.nn.functional.normalize(torch.randn(2, 60, 12), dim=2)
    options = {"use_cosine_similarity": False, "temperature": 0.1}
    actual = run(z_i, z_j, backend="native", **options)
    truth = run(z_i.double(), z_j.double(), backend="reference", **options)
    for index in (0, 5, 6):
        assert relative_error(actual[index], truth[index]) < 1e-4


def test_a_huge_row_leaves_the_others_alone() -> None:
    """Exponents far below the range are zero, whatever their size."""
    x = torch.tensor([[1.0, 0.0], [-1e15, 0.0]])
    y = torch.tensor([[1.0, 0.0], [0.5, 1.0]])
    options = {"use_cosine_similarity": False, "temperature": 0.7}
    actual = cross_logsumexp(x, y, backend="native", **options)  # type: ignore[arg-type]
    expected = cross_logsumexp(x.double(), y.double(), backend="reference", **options)  # type: ignore[arg-type]
    torch.testing.assert_close(actual.column_lse.double(), expected.column_lse, rtol=1e-6, atol=0)


Z = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.ones(2, 4)}, "same number of rows"),
        ({1: torch.ones(3, 2)}, "as many features"),
        ({1: Z.double()}, "same dtype"),
        ({0: Z.int(), 1: Z.int()}, "fp64, fp32, bf16 or fp16"),
        ({0: Z[None], 1: Z[None]}, "2-D"),
        ({0: Z[:, :0], 1: Z[:, :0]}, "empty"),
        ({2: torch.ones(2, 2, dtype=torch.bool)}, "mask"),
        ({7: "median"}, "reduction"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_the_operator_itself_stays_in_its_memory(change: dict[int, Any], message: str) -> None:
    arguments = [Z, Z, None, None, 0.1, True, 1e-8, "mean", None, False]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(ValueError, match=message):
        ops.operator("nt_xent")(*arguments)


@pytest.mark.parametrize("position", [0, 5, 6, 7, 8])
def test_the_backward_operator_takes_what_its_forward_left(position: int) -> None:
    saved = ops.operator("nt_xent")(Z, Z, None, None, 0.1, True, 1e-8, "none", None, True)
    arguments = [torch.ones(6), Z, Z, None, None, *saved[-4:], 0.1, True, 1e-8, "none", None]
    ops.operator("nt_xent_backward")(*arguments)
    arguments[position] = arguments[position][:-1].clone()
    with pytest.raises(ValueError, match="cjepa_kernels: "):
        ops.operator("nt_xent_backward")(*arguments)
