"""Every schedule of the Triton kernels: panels, strips, squares, splits, and both kinds of loads.

The tests of the operators compare values and gradients for every option. The sizes here are those
at which the host chooses a schedule. Run the tests with TRITON_INTERPRET=1, or on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerances import relative_error
from torch import Tensor

from cjepa_kernels import backends, cross_logsumexp, nt_xent, reference
from cjepa_kernels.functional.self_logsumexp import run_self_logsumexp

if not backends()["triton"].available:
    pytest.skip(backends()["triton"].reason, allow_module_level=True)

from cjepa_kernels.triton import allows_tf32, configs, launch
from cjepa_kernels.triton.prepare import largest_magnitude, symmetric

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET", "0") == "1" else "cuda"
HALF = [torch.bfloat16, torch.float16]
# Bounds on the relative error against the reference in fp64. The kernels round their operands to
# this dtype, the reference does not.
BOUND = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def loads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load blocks by pointers in one run and by descriptors in the other, on every device."""
    if DEVICE == "cuda" and request.param and not launch.has_tma(torch.device("cuda")):
        pytest.skip("this GPU has no tensor memory accelerator")
    monkeypatch.setattr(launch, "has_tma", lambda _: request.param)


@pytest.fixture
def small_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the workspace to one block of columns, or to a square of one block."""
    monkeypatch.setenv("CJEPA_WORKSPACE_MIB", "0.03")


@pytest.fixture
def replace_entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that replaces the table's entries for a kernel."""

    def replace(kernel: str, *entries: configs.Config) -> None:
        others = [entry for entry in configs.table() if entry.kernel != kernel]
        monkeypatch.setattr(configs, "table", lambda: (*entries, *others))
        configs.forget()

    yield replace
    monkeypatch.undo()
    configs.forget()


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run small inputs by the schedule of large ones: inner tiles, strips of two blocks, edges."""
    monkeypatch.setattr(launch, "ONE_LAUNCH_BLOCKS", 1)
    monkeypatch.setattr(launch, "RUN_LENGTH", 2)


def gradients_of(loss: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, upstream.to(loss))


def check_nt_xent(
    batch: int,
    features: int,
    dtype: torch.dtype = torch.float32,
    rounded: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Compare the loss of each anchor and the gradients with the reference in fp64.

    The bound is that of operands in ``rounded`` (default: ``dtype``).
    """
    bound = BOUND[rounded or dtype]
    z = tuple(torch.randn(batch, features, device=DEVICE).to(dtype) for _ in range(2))
    if options.get("use_cosine_similarity") is False:
        z = tuple(x / features**0.5 for x in z)
    upstream = torch.rand(2 * batch, device=DEVICE) + 0.5
    inputs = tuple(x.requires_grad_() for x in z)
    exact = tuple(x.detach().double().requires_grad_() for x in z)
    out = nt_xent(*inputs, reduction="none", backend="triton", **options)
    truth = nt_xent(*exact, reduction="none", backend="reference", **options)
    for value, expected in zip(out[:1] + out[4:], truth[:1] + truth[4:], strict=True):
        assert relative_error(value, expected) <= bound
    gradients = gradients_of(out.loss, inputs, upstream)
    for gradient, expected in zip(
        gradients, gradients_of(truth.loss, exact, upstream), strict=True
    ):
        assert relative_error(gradient, expected) <= bound


def check_rectangle(rows: int, columns: int, features: int, dtype: torch.dtype) -> None:
    """Compare the log-sum-exps and gradients of both sides with the reference in fp64."""
    inputs = tuple(
        torch.randn(n, features, device=DEVICE).to(dtype).requires_grad_() for n in (rows, columns)
    )
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    weights = tuple(torch.randn(n, device=DEVICE) for n in (rows, columns))
    results = []
    for backend, tensors in (("triton", inputs), ("reference", exact)):
        out = cross_logsumexp(*tensors, backend=backend)  # type: ignore[arg-type]
        total = (out.row_lse * weights[0]).sum() + (out.column_lse * weights[1]).sum()
        results.append([*out, *torch.autograd.grad(total, tensors)])
    for value, expected in zip(*results, strict=True):
        assert relative_error(value, expected) <= 2 * BOUND[dtype]


def random_pairs(rows: int) -> Tensor:
    """(rows,) the positive of each row, or -1 for a sixth of them; pairs lie anywhere."""
    positives = torch.full((rows,), -1, device=DEVICE)
    first, second = torch.randperm(rows, device=DEVICE)[: rows // 12 * 10].view(2, -1)
    positives[first], positives[second] = second, first
    return positives


def check_rows(
    rows: int,
    features: int,
    dtype: torch.dtype,
    *,
    views: int = 1,
    positives: Tensor | None = None,
    classes: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    cosine: bool = True,
) -> None:
    """Compare rows against themselves with the reference in fp64: all results and gradients."""
    z = torch.randn(rows, features, device=DEVICE).to(dtype)
    learnt = isinstance(temperature, Tensor)
    leaves = [*z.chunk(views), *([temperature] if isinstance(temperature, Tensor) else [])]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = run_self_logsumexp(
        leaves[0],
        leaves[1] if views == 2 else None,
        positives=positives,
        classes=classes,
        temperature=leaves[-1] if learnt else temperature,
        use_cosine_similarity=cosine,
        eps=1e-8,
        overload=".triton",
    )
    if views == 2:
        positives = torch.arange(rows, device=DEVICE).roll(rows // 2)
        classes = None if classes is None else classes.repeat(2)
    truth = reference.self_logsumexp(
        torch.cat(exact[:views]),
        positives=positives,
        classes=classes,
        temperature=exact[-1] if learnt else temperature,
        use_cosine_similarity=cosine,
    )
    pairs: list[tuple[Tensor, Tensor]] = [(out.lse, truth.lse), (out.largest, truth.largest)]
    if positives is not None:
        pairs.append((out.positive, truth.positive))
    upstream = [torch.randn(rows, device=DEVICE) for _ in pairs]
    gradients = []
    for tensors, values in zip((leaves, exact), zip(*pairs, strict=True), strict=True):
        counted = values[0].isfinite()  # the log-sum-exp of a row without any entry is -inf
        total = (values[0].where(counted, 0.0) * upstream[0].to(values[0])).sum()
        for value in values[2:]:
            total = total + (value * upstream[2].to(value)).sum()
        gradients.append(torch.autograd.grad(total, tensors))
    for value, expected in pairs:
        assert torch.equal(value.isfinite(), expected.isfinite())
        finite = expected.isfinite()
        assert relative_error(value[finite], expected[finite]) <= 2 * BOUND[dtype]
    for gradient, expected in zip(*gradients, strict=True):
        assert relative_error(gradient, expected) <= 2 * BOUND[dtype]


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("batch", "features"), [(1, 1), (3, 17), (70, 64), (66, 300)])
def test_one_launch_of_all_tiles(batch: int, features: int, dtype: torch.dtype) -> None:
    check_nt_xent(batch, features, dtype)


@pytest.mark.usefixtures("loads", "large")
@pytest.mark.parametrize("batch", [64, 192, 201, 320])
@pytest.mark.parametrize("features", [16, 128])
def test_strips_and_edges(batch: int, features: int) -> None:
    check_nt_xent(batch, features, torch.float16)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("fold", [False, True])
def test_every_kind_of_strip(
    pipelined: bool, fold: bool, replace_entries: Callable[..., None]
) -> None:
    entry = configs.Config(
        architecture=0,
        kernel="strips",
        bits=16,
        features=256,
        warps=4,
        stages=2,
        rows=64,
        pipelined=pipelined,
        fold=fold,
    )
    replace_entries("strips", entry)
    check_nt_xent(201, 16, torch.float16)
    check_rectangle(300, 520, 16, torch.float16)


@pytest.mark.usefixtures("loads", "large")
@pytest.mark.parametrize("features", [40, 200])
def test_inner_tiles_and_edges(features: int) -> None:
    check_nt_xent(135, features, torch.float32)
    check_nt_xent(128, features, torch.bfloat16, temperature=0.01)


@pytest.mark.usefixtures("small_workspace")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.01},
        {"temperature": torch.tensor(0.3, device=DEVICE)},
        {"use_cosine_similarity": False, "temperature": 1.0},
    ],
    ids=["constant", "running", "tensor", "dot"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_panels_and_squares(options: dict[str, Any], dtype: torch.dtype) -> None:
    check_nt_xent(201, 20, dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_tie_of_the_positive_with_a_negative_is_no_hit(dtype: torch.dtype) -> None:
    """This holds whether the tiles compute S_ab or S_ba."""
    z = torch.randn(2, 70, 96, device=DEVICE).to(dtype)
    z = torch.cat((z, z), 1)  # Every sample occurs twice.
    assert nt_xent(z[0], z[1], backend="triton").accuracy.item() == 0


@pytest.mark.usefixtures("small_workspace")
def test_panels_with_a_mask() -> None:
    mask = torch.rand(201, 201, device=DEVICE) < 0.3
    check_nt_xent(201, 20, torch.float16, mask=mask)
    z = torch.randn(2, 201, 20, device=DEVICE)
    out = nt_xent(z[0], z[1], mask=mask, backend="triton")
    truth = nt_xent(z[0].double(), z[1].double(), mask=mask, backend="reference")
    for value, expected in zip(out, truth, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("large", "small_workspace")
def test_strips_in_panels() -> None:
    check_nt_xent(330, 16, torch.float16)
    check_rectangle(300, 520, 16, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 300), (300, 140), (256, 128)])
def test_rectangles(rows: int, columns: int, dtype: torch.dtype) -> None:
    check_rectangle(rows, columns, 24, dtype)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("rows", "columns"), [(256, 520), (300, 512), (300, 520), (512, 384)])
def test_rectangles_of_strips(rows: int, columns: int) -> None:
    check_rectangle(rows, columns, 16, torch.float16)


@pytest.mark.usefixtures("small_workspace")
def test_rectangles_in_panels_and_squares() -> None:
    check_rectangle(300, 260, 20, torch.float32)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("rows", "views"), [(127, 1), (128, 1), (129, 1), (520, 1), (512, 2)])
def test_rows_by_strips_and_edges(rows: int, views: int) -> None:
    check_rows(rows, 16, torch.float16, views=views)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("rows", [127, 129, 300])
def test_positives_in_inner_tiles_and_edges(rows: int) -> None:
    check_rows(rows, 40, torch.float16, positives=random_pairs(rows))
    # The first tiles hold no pair, the last ones many. Two rows in the middle have no positive.
    number = torch.arange(rows, device=DEVICE)
    positives = number.flip(0).where((2 * number - rows + 1).abs() > 1, -1)
    check_rows(rows, 16, torch.bfloat16, positives=positives)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("samples", [64, 150])
def test_classes_in_every_tile(views: int, samples: int) -> None:
    # The numbers differ in their upper 32 bits alone.
    classes = torch.randint(-2, 2, (samples,), device=DEVICE) * 2**40
    check_rows(views * samples, 40, torch.bfloat16, views=views, classes=classes)
    apart = torch.arange(samples, device=DEVICE) * -3
    check_rows(views * samples, 16, torch.float16, views=views, classes=apart)
    check_rows(views * samples, 16, torch.float16, views=views, classes=classes)


@pytest.mark.usefixtures("small_workspace")
@pytest.mark.parametrize(
    ("options", "paired", "classed"),
    [
        ({}, True, False),
        ({"temperature": 0.005}, True, True),
        ({"temperature": torch.tensor(0.3, device=DEVICE), "views": 2}, False, True),
        ({"temperature": torch.tensor(0.02, device=DEVICE)}, True, False),
        ({"cosine": False, "temperature": 5.0}, True, True),
    ],
    ids=["constant", "running", "views", "tensor", "dot"],
)
def test_rows_in_panels_and_squares(options: dict[str, Any], paired: bool, classed: bool) -> None:
    classes = torch.randint(5, (300 // options.get("views", 1),), device=DEVICE)
    check_rows(
        300,
        20,
        torch.float32,
        positives=random_pairs(300) if paired else None,
        classes=classes if classed else None,
        **options,
    )


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_owned_rows_in_splits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "splits", lambda *_: splits)
    check_nt_xent(100, 64, torch.float16)
    check_nt_xent(96, 64, torch.bfloat16)
    check_rectangle(150, 200, 64, torch.float16)
    check_rows(150, 64, torch.float16)
    check_rows(150, 64, torch.bfloat16, positives=random_pairs(150))


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("columns", [64, 128])
def test_every_tile_of_owned_rows(
    rows: int, columns: int, replace_entries: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_entries(
        "owned",
        configs.Config(
            architecture=0,
            kernel="owned",
            bits=16,
            features=256,
            warps=8,
            stages=2,
            rows=rows,
            columns=columns,
        ),
    )
    monkeypatch.setattr(launch, "splits", lambda *_: 2)
    check_nt_xent(99, 16, torch.float16)  # The last block has 70 of the 198 rows.
    check_nt_xent(160, 16, torch.float16)
    check_rectangle(150, 200, 16, torch.float16)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_without_owned_rows(dtype: torch.dtype, replace_entries: Callable[..., None]) -> None:
    replace_entries("owned")
    check_nt_xent(100, 64, dtype)
    check_rectangle(150, 200, 64, dtype)


def test_tf32_follows_pytorchs_setting() -> None:
    operands, matmul = launch.Operands, torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        assert operands.of(torch.float32, None).precision == "tf32"
        check_nt_xent(70, 40, rounded=torch.float16)
        matmul.allow_tf32 = False
        assert operands.of(torch.float32, None).planes == 3
        if hasattr(matmul, "fp32_precision"):  # Newer versions also have this setting.
            matmul.fp32_precision = "tf32"
            assert allows_tf32()
            matmul.fp32_precision = "ieee"
            assert not allows_tf32()
    finally:
        matmul.allow_tf32 = before


def test_a_temperature_gradient_is_not_that_of_rounded_coefficients() -> None:
    z = tuple(torch.randn(40, 24, device=DEVICE).bfloat16() for _ in range(2))
    gradients = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "chunked")):
        temperature = torch.tensor(0.02, dtype=dtype, device=DEVICE, requires_grad=True)
        loss = nt_xent(*z, temperature=temperature, backend=backend).loss  # type: ignore[arg-type]
        gradients.append(torch.autograd.grad(loss, temperature)[0])
    assert relative_error(*gradients) <= 2e-5


def test_fp64_goes_to_the_chunked_back_end() -> None:
    z = torch.randn(2, 9, 5, device=DEVICE, dtype=torch.float64).requires_grad_()
    results = []
    for backend in ("triton", "chunked"):
        out = nt_xent(z[0], z[1], backend=backend)  # type: ignore[arg-type]
        cross = cross_logsumexp(z[0], z[1], backend=backend)  # type: ignore[arg-type]
        total = out.loss + cross.row_lse.sum() + 2 * cross.column_lse.sum()
        results.append([*out, *cross, *torch.autograd.grad(total, z)])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_dot_product_of_inf_is_nan_though_it_may_be_minus_inf(
    dtype: torch.dtype, poison: float
) -> None:
    z_i = torch.tensor([[poison], [-1.0], [-1.0]], device=DEVICE).to(dtype)
    z_j = torch.tensor([[1.0], [-1.0], [-1.0]], device=DEVICE).to(dtype)
    out = nt_xent(z_i, z_j, use_cosine_similarity=False, temperature=1.0, backend="triton")
    assert out.loss.isnan()


@pytest.mark.usefixtures("large")
def test_a_pair_has_one_similarity_wherever_it_lies() -> None:
    z, positives = torch.randn(300, 33, device=DEVICE), random_pairs(300)
    out = run_self_logsumexp(
        z,
        None,
        positives=positives,
        temperature=0.1,
        use_cosine_similarity=True,
        eps=1e-8,
        overload=".triton",
    )
    paired = positives >= 0
    assert torch.equal(out.positive[paired], out.positive[positives[paired]])
    assert (out.positive[~paired] == 0).all()


def test_fewer_rows_than_a_tile_beside_many_columns() -> None:
    check_rectangle(100, 17 * 128, 64, torch.bfloat16)


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"capability 7\.5"):
        configs.choose("tiles", 75, torch.bfloat16, 64)


def test_a_tuned_choice_goes_before_the_packages(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configs.forget()
    before = configs.choose("tiles", 90, torch.bfloat16, 256)
    tuned = configs.Config(
        architecture=90, kernel="tiles", bits=16, features=before.features, warps=4, stages=5
    )
    configs.write(configs.cache_file(), [tuned])
    assert configs.choose("tiles", 90, torch.bfloat16, 256) == tuned
    configs.cache_file().write_text("[{")  # The file is incomplete.
    configs.forget()
    with pytest.warns(UserWarning, match="the file of tuned choices .* cannot be used"):
        assert configs.choose("tiles", 90, torch.bfloat16, 256) == before
    with pytest.raises(ValueError, match="delete it, and run cjepa tune again"):
        configs.read(configs.cache_file())
    monkeypatch.undo()
    configs.forget()


def test_a_workspace_must_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CJEPA_WORKSPACE_MIB", "much")
    z = torch.randn(2, 4, 4, device=DEVICE)
    with pytest.raises(ValueError, match="CJEPA_WORKSPACE_MIB"):
        nt_xent(z[0], z[1], backend="triton")


def test_tuning_takes_the_fastest_and_leaves_out_what_fails(tmp_path: Any) -> None:
    from cjepa_kernels import tune

    tiles = configs.Config(
        architecture=90, kernel="tiles", bits=16, features=256, warps=8, stages=3
    )
    strips = configs.Config(
        architecture=90, kernel="strips", bits=16, features=256, warps=4, stages=2
    )

    def measure() -> float:
        chosen = {e.kernel: e for e in reversed(configs.table())}
        if chosen["tiles"].stages == 4:
            raise RuntimeError("out of shared memory")
        fast = chosen["tiles"].warps == 4 and chosen["tiles"].stages == 2
        return 1.0 - 0.5 * fast - 0.1 * (chosen["strips"].warps == 0)

    lines: list[str] = []
    tuned = tune.tune([tiles, strips], measure, lines.append)
    assert tuned == [
        configs.Config(architecture=90, kernel="tiles", bits=16, features=256, warps=4, stages=2),
        configs.Config(architecture=90, kernel="strips", bits=16, features=256, warps=0, stages=2),
    ]
    assert any("inf" in line for line in lines)
    assert configs._trial == []
    assert tune.replaces(tuned, tiles)
    assert not tune.replaces(
        tuned,
        configs.Config(architecture=80, kernel="tiles", bits=16, features=256, warps=4, stages=2),
    )


@pytest.mark.parametrize("numbers", [[0.0, -3.0, 2.0], [-0.0], [1.0, torch.nan, -torch.inf]])
def test_the_largest_gradient_is_that_of_pytorch(numbers: list[float]) -> None:
    grad = torch.tensor(numbers, device=DEVICE)
    for given in (grad, grad.repeat(5000)[::2], grad[:1].expand(7), grad[:1].expand(7)[:1]):
        expected = given.abs().amax()
        torch.testing.assert_close(
            largest_magnitude(given), expected, rtol=0, atol=0, equal_nan=True
        )
    other = torch.full((9000,), 2.5, device=DEVICE)
    expected = torch.maximum(grad.abs().amax(), other.amax())
    torch.testing.assert_close(
        largest_magnitude(grad, other), expected, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("size", [1, 63, 64, 130])
def test_a_mask_is_made_symmetric(size: int) -> None:
    mask = torch.rand(size, 2 * size, device=DEVICE) < 0.3
    for given in (mask[:, :size], mask[:, ::2], mask[:, :size].T, mask[:1, :1].expand(size, size)):
        assert torch.equal(symmetric(given), given | given.T)
