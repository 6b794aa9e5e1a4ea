"""Functional forms: check the arguments, flatten, and call the operator of the back end."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import SupportsFloat

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels import ops, reference, triton
from cjepa_kernels.backends import (
    HAS_NATIVE,
    HAS_TRITON,
    Backend,
    check_backend,
    warn_without_native,
)
from cjepa_kernels.definitions import (
    EPS,
    FLOATING,
    LARGEST,
    REDUCTIONS,
    SMALLEST,
    STRATEGIES,
    TEMPERATURE,
    CrossLogSumExp,
    NTXentOutput,
    Reduction,
    Strategy,
)
from cjepa_kernels.distributed import Options
from cjepa_kernels.distributed import nt_xent as of_group
from cjepa_kernels.environment import read_when_imported
from cjepa_kernels.registration import refuse_transforms

# torch.amp.is_autocast_available says so too, but PyTorch 2.11 compiles no function that asks it.
WITHOUT_AUTOCAST = ("meta",)
LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
KEPT_BYTES = int(read_when_imported("CJEPA_KEPT_MIB", 256) * 2**20)
for _variable in ("CJEPA_CACHE_MIB", "CJEPA_WORKSPACE_MIB"):  # others read them, much later
    read_when_imported(_variable, 256)


def nt_xent(
    z_i: Tensor,
    z_j: Tensor,
    *,
    temperature: float | Tensor = TEMPERATURE,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
    reduction: Reduction = "mean",
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    strategy: Strategy = "auto",
    backend: Backend = "auto",
) -> NTXentOutput:
    """NT-Xent of two views, with its metrics, without the (2B, 2B) similarity matrix.

    Args:
        z_i: (B, D), or (B, N, D) which counts as B*N pairs. fp64, fp32, bf16 or fp16.
        z_j: Same shape and device; ``z_j[k]`` is the positive of ``z_i[k]``. Two dtypes become
            the one that ``torch.promote_types`` gives; gradients have each input's own.
        temperature: Float from 1e-30 to 1e30, or a tensor of shape () or (1,), which then gets a
            gradient of its shape. A tensor outside of that range gives NaN, because the host never
            reads it.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        eps: Lower bound on the norm used for normalisation; a row below it gets a zero
            gradient.
        reduction: ``mean`` over the 2B anchors, ``sum``, or ``none``.
        mask: (B, B) bool (B*N for 3-D inputs); True takes the pair of samples (k, l) out of the
            negatives, in all four blocks of views and both ways. The diagonal is ignored.
        group: Take the negatives from every rank of this process group. With R ranks and M rows
            in all, rank r returns for ``mean``

                (R / M) * sum over its own anchors a of loss_a

            whose mean over the ranks is the loss of one process on the whole batch, and so is the
            gradient that DDP averages. ``sum`` and ``none`` cover this rank's anchors, the metrics
            are global. Ranks may hold different numbers of pairs. Every rank has to take part in
            every forward and backward.
        strategy: How the ranks work together. ``all_gather``: every rank gathers the features of
            all, quick for small batches. ``ring``: shards travel from rank to rank while the one
            before is worked on, each pair of shards is multiplied once, and memory grows with this
            rank's rows. ``auto`` chooses by size.
        backend: ``auto`` or a name from :func:`cjepa_kernels.backends`.

    Returns:
        NTXentOutput.

    Raises:
        TypeError: A tensor of the wrong kind or dtype.
        ValueError: A wrong shape, device or value; the message names it. With a group also, on
            all ranks alike, a rank without pairs or one that asks for something else.
        RuntimeError: A back end that was asked for by name and is missing; a rank of the group that
            ended, or did not take part within the process group's timeout.

    Source: SimCLR, arXiv 2002.05709, equation 1.

    Example:
        >>> z_i, z_j = torch.eye(4), torch.eye(4)
        >>> out = nt_xent(z_i, z_j, temperature=0.5)
        >>> round(out.loss.item(), 4), out.accuracy.item()
        (0.5944, 1.0)
    """
    check_backend(backend)
    temperature = _without_arrays(temperature, z_i)
    check_temperature(temperature)
    check_reduction(reduction)
    check_in_range("eps", eps)
    check_strategy(strategy)
    check_bool("use_cosine_similarity", use_cosine_similarity)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a process group or None, got {type(group).__name__}")
    # Under a group, a rank without pairs must not stop here and leave the others waiting.
    _check_views(z_i, z_j, allow_empty=group is not None)
    if z_i.ndim == 3:
        z_i, z_j = z_i.flatten(0, 1), z_j.flatten(0, 1)
    if mask is not None:
        if group is not None:
            raise ValueError("mask must be None with a group: it names pairs of one rank only")
        _check_mask(mask, z_i)
    _check_temperature_device(temperature, "z_i", z_i)
    temperature, eps = _one_number(temperature), as_float(eps)
    z_i, z_j = _promote(z_i, z_j)
    if group is None:
        return _nt_xent(z_i, z_j, temperature, use_cosine_similarity, eps, reduction, mask, backend)
    if backend == "reference" and strategy == "ring":
        raise ValueError('strategy must be "auto" or "all_gather" with backend="reference"')
    of_group_eagerly = _nt_xent_of_group
    if torch.compiler.is_compiling():  # else disable() would import the compiler, as long as torch
        of_group_eagerly = torch.compiler.disable(_nt_xent_of_group)  # type: ignore[no-untyped-call]
    return of_group_eagerly(
        z_i, z_j, temperature, use_cosine_similarity, eps, reduction, group, strategy, backend
    )


def _nt_xent_of_group(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor,
    use_cosine_similarity: bool,
    eps: float,
    reduction: Reduction,
    group: dist.ProcessGroup,
    strategy: Strategy,
    backend: Backend,
) -> NTXentOutput:
    """All ranks of a group, checked arguments. How many pairs they hold is known at run time."""
    tensor, number = _split_temperature(temperature)
    overload = of_group.REFERENCE
    if backend != "reference":
        refuse_transforms("nt_xent", (z_i, z_j, tensor))
        overload = choose_overload(backend, z_i.device)
    options = Options(
        temperature=number,
        cosine=use_cosine_similarity,
        eps=eps,
        reduction=reduction,
        product_dtype=_product_dtype(z_i),
        keep=overload == "" and _keeps_exponentials(z_i, z_j, tensor),
        overload=overload,
        strategy=strategy,
        needs_gradient=torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (z_i, z_j, tensor)),
    )
    z_i, z_j, tensor = (ops.saveable(x) for x in (z_i, z_j, tensor))
    return NTXentOutput(*of_group.nt_xent(z_i, z_j, tensor, options, group))


def _nt_xent(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor,
    use_cosine_similarity: bool,
    eps: float,
    reduction: Reduction,
    mask: Tensor | None,
    backend: Backend,
) -> NTXentOutput:
    """One process, checked arguments."""
    if backend == "reference":
        with without_autocast(z_i.device):
            terms = reference.nt_xent(
                ops.saveable(z_i),
                ops.saveable(z_j),
                temperature=ops.saveable(temperature),
                use_cosine_similarity=use_cosine_similarity,
                eps=eps,
                mask=ops.saveable(mask),
            )
        return NTXentOutput(reference.reduce(terms.loss, reduction), *terms[1:])
    tensor, number = _split_temperature(temperature)
    overload = choose_overload(backend, z_i.device)
    keep = overload == "" and _keeps_exponentials(z_i, z_j, tensor)
    outputs = ops.call(
        "nt_xent",
        overload,
        *(z_i, z_j, mask, tensor, number, use_cosine_similarity, eps, reduction),
        *(_product_dtype(z_i), keep),
    )
    return NTXentOutput(*outputs[:5])


def cross_logsumexp(
    x: Tensor,
    y: Tensor,
    *,
    temperature: float | Tensor = TEMPERATURE,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
    backend: Backend = "auto",
) -> CrossLogSumExp:
    """Log-sum-exp of every row and every column of similarities, without the (M, N) matrix.

    With s_ab the similarity of ``x[a]`` and ``y[b]``, one pass gives log sum_b exp(s_ab / tau) for
    every a and log sum_a exp(s_ab / tau) for every b. Nothing is left out of either sum. These are
    the denominators of InfoNCE in both directions, the two halves of CLIP's loss.

    Args:
        x: (M, D), M >= 1. fp64, fp32, bf16 or fp16.
        y: (N, D), N >= 1; same D and device. Two dtypes become the one that
            ``torch.promote_types`` gives; gradients have each input's own.
        temperature: Float from 1e-30 to 1e30, or a tensor of shape () or (1,), which then gets a
            gradient of its shape. A tensor outside of that range gives NaN, because the host never
            reads it.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        eps: Lower bound on the norm used for normalisation; a row below it gets a zero
            gradient.
        backend: ``auto`` or a name from :func:`cjepa_kernels.backends`.

    Returns:
        CrossLogSumExp: ``row_lse`` (M,), ``column_lse`` (N,) and, detached and not divided by
        temperature, the largest similarities ``row_max`` (M,) and ``column_max`` (N,); fp32 (fp64
        for fp64 inputs).

    Raises:
        TypeError: A tensor of the wrong kind or dtype.
        ValueError: A wrong shape, device or value; the message names it.
        RuntimeError: A back end that was asked for by name and is missing.

    Source: InfoNCE, arXiv 1807.03748, equation 4; both directions as in CLIP, arXiv 2103.00020.

    Example:
        The symmetric loss of CLIP, ``image[k]`` and ``text[k]`` being a pair:

        >>> image, text = torch.eye(4), torch.eye(4)
        >>> out = cross_logsumexp(image, text, temperature=0.5)
        >>> positive = pair_similarity(image, text) / 0.5
        >>> losses = torch.stack([out.row_lse, out.column_lse]) - positive
        >>> round(losses.clamp(min=0).mean().item(), 4)  # below 0 only by rounding
        0.3408
    """
    check_backend(backend)
    temperature = _without_arrays(temperature, x)
    check_temperature(temperature)
    check_in_range("eps", eps)
    check_bool("use_cosine_similarity", use_cosine_similarity)
    _check_rectangle(x, y)
    _check_temperature_device(temperature, "x", x)
    temperature, eps = _one_number(temperature), as_float(eps)
    x, y = _promote(x, y)
    if backend == "reference":
        with without_autocast(x.device):
            return reference.cross_logsumexp(
                ops.saveable(x),
                ops.saveable(y),
                temperature=ops.saveable(temperature),
                use_cosine_similarity=use_cosine_similarity,
                eps=eps,
            )
    outputs = ops.call(
        "cross_logsumexp",
        choose_overload(backend, x.device),
        *(x, y, *_split_temperature(temperature), use_cosine_similarity, eps, _product_dtype(x)),
    )
    return CrossLogSumExp(*outputs[:4])


def pair_similarity(
    x: Tensor,
    y: Tensor,
    *,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
    backend: Backend = "auto",
) -> Tensor:
    """Similarity of row k of ``x`` and row k of ``y``, rounded as :func:`cross_logsumexp` does.

    That is the positive of InfoNCE. In half precision, under autocast and where a GPU may multiply
    in tf32, the log-sum-exp is over products of rounded rows, added up in fp32. A positive from
    rows that are not rounded, or one that is itself rounded to bf16, may lie above the log-sum-exp
    and give a negative loss.

    Args:
        x: (B, D), B >= 1. fp64, fp32, bf16 or fp16.
        y: Same shape and device. Two dtypes become the one that ``torch.promote_types`` gives.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        eps: Lower bound on the norm used for normalisation; a row below it gets a zero
            gradient.
        backend: The one that :func:`cross_logsumexp` is given: each has a rounding of its own.

    Returns:
        (B,) similarities, not divided by a temperature; fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError: A tensor of the wrong kind or dtype.
        ValueError: A wrong shape, device or value; the message names it.
        RuntimeError: A back end that was asked for by name and is missing.

    Source: InfoNCE, arXiv 1807.03748, equation 4 (the numerator).

    Example:
        >>> image, text = torch.eye(4), 2 * torch.eye(4)
        >>> pair_similarity(image, text)
        tensor([1., 1., 1., 1.])
    """
    check_backend(backend)
    check_in_range("eps", eps)
    check_bool("use_cosine_similarity", use_cosine_similarity)
    _check_rectangle(x, y)
    if x.shape != y.shape:
        raise ValueError(f"x and y must have as many rows as each other, got {len(x)} and {len(y)}")
    x, y = _promote(x, y)
    rounded: torch.dtype | None = None
    tf32 = False
    if backend != "reference":
        rounded = _product_dtype(x) or x.dtype
        on_triton = choose_overload(backend, x.device) == ".triton" or (
            backend in ("auto", "triton") and x.device.type == "cuda" and HAS_TRITON
        )
        tf32 = on_triton and rounded == torch.float32 and triton.rounds_to_tf32(x)
    eps = as_float(eps)
    with without_autocast(x.device):
        rows = [reference.embed_rows(ops.saveable(z), use_cosine_similarity, eps) for z in (x, y)]
        if rounded is not None:
            # The gradient is that of rows that are not rounded, as in the back ends.
            rows = [z + (_round_rows(z.detach(), rounded, tf32) - z.detach()) for z in rows]
        return (rows[0] * rows[1]).sum(dim=1)


def _round_rows(rows: Tensor, dtype: torch.dtype, tf32: bool) -> Tensor:
    """Operands of the product: rounded, but held in the dtype of sums."""
    if tf32:  # to 10 bits of mantissa, as round_to_tf32 in triton/kernels/operands.py
        bits = (rows.view(torch.int32) + 0x1000) & ~0x1FFF
        return torch.where(rows == rows, bits.view(torch.float32), rows)
    return rows.to(dtype).to(rows.dtype)


def choose_overload(backend: Backend, device: torch.device) -> str:
    """Overload of the operators: the dispatcher's choice, except for a CPU without native kernels.

    A module of an early revision registers kernels by being imported, for schemas that may differ.
    """
    if backend == "triton" and device.type != "cuda":
        return ".triton"  # in its interpreter
    if device.type == "cpu" and not HAS_NATIVE:
        if backend == "auto":
            warn_without_native()
        return ".chunked"
    return ".chunked" if backend == "chunked" else ""


def _without_arrays(temperature: float | Tensor, z: Tensor) -> float | Tensor:
    """A tensor in place of a number of NumPy's, which torch.compile takes for an array."""
    if isinstance(temperature, (float, Tensor)) or not torch.compiler.is_compiling():
        return temperature
    if hasattr(temperature, "__array__") and isinstance(z, Tensor):
        return torch.as_tensor(temperature, device=z.device)
    return temperature


def _one_number(temperature: float | Tensor) -> float | Tensor:
    """A checked temperature as the back ends take it: a float, or a 0-dim tensor."""
    if not isinstance(temperature, Tensor):
        return as_float(temperature)
    return temperature.reshape(()) if temperature.ndim else temperature


def _split_temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """The operators' two arguments: a tensor, which counts if given, and a number."""
    if isinstance(temperature, Tensor):
        return temperature, 1.0
    return None, temperature


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, on a device that has it."""
    if device.type in WITHOUT_AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _product_dtype(z: Tensor) -> torch.dtype | None:
    """What autocast wants the operands rounded to; None outside of it."""
    if z.dtype == torch.float64 or z.device.type in WITHOUT_AUTOCAST:
        return None
    if torch.is_autocast_enabled(z.device.type):
        return torch.get_autocast_dtype(z.device.type)
    return None


def _keeps_exponentials(z_i: Tensor, z_j: Tensor, temperature: Tensor | None) -> bool:
    """Whether the forward should leave the backward its exponentials, within the budget."""
    if z_i.device.type != "cpu" or not HAS_NATIVE or not torch.is_grad_enabled():
        return False
    if torch.compiler.is_exporting():  # the size would bind the exported program to this batch
        return False
    if not any(z is not None and z.requires_grad for z in (z_i, z_j, temperature)):
        return False
    size = 8 if z_i.dtype == torch.float64 else 4
    return ops.kept_size(2 * z_i.shape[0]) * size <= KEPT_BYTES


def check_strategy(strategy: str) -> None:
    """Raise unless ``strategy`` is known."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {list(STRATEGIES)}, got {strategy!r}")


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number: of Python or, as ``np.float32(0.1)``, of NumPy."""
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float, Real))


def as_float(value: SupportsFloat) -> float:
    """A number of any kind; an int beyond every float is infinite.

    A float stays the same object: for torch.compile another one is a result, which it recompiles
    for wherever it leaves a graph.
    """
    if type(value) is float:
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite positive number."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < as_float(value) < math.inf:  # torch.compile traces it for symbolic floats
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_in_range(name: str, value: float) -> None:
    """Raise unless ``value`` is a positive number that fp32 has, and its inverse too."""
    check_positive(name, value)
    if not SMALLEST <= as_float(value) <= LARGEST:
        raise ValueError(f"{name} must lie between {SMALLEST} and {LARGEST}, got {value}")


def check_bool(name: str, value: bool) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_temperature(temperature: float | Tensor) -> None:
    """Raise unless ``temperature`` is a positive finite float, or a () or (1,) floating tensor."""
    if isinstance(temperature, Tensor):
        if temperature.shape not in ((), (1,)) or temperature.dtype not in FLOATING:
            raise ValueError(
                "temperature must be a float, or a floating-point tensor (fp64, fp32, bf16 or "
                "fp16) of shape () or (1,), got a tensor of "
                f"shape {tuple(temperature.shape)} and dtype {temperature.dtype}"
            )
        return
    if not is_number(temperature):
        raise TypeError(
            f"temperature must be a float or a tensor of shape () or (1,), got {temperature!r}"
        )
    if not 0 < as_float(temperature) < math.inf:
        raise ValueError(f"Temperature must be positive, and finite, got {temperature}")
    if not SMALLEST <= as_float(temperature) <= LARGEST:
        raise ValueError(
            f"temperature must lie between {SMALLEST} and {LARGEST}, got {temperature}"
        )


def check_reduction(reduction: str) -> None:
    """Raise unless ``reduction`` is ``mean``, ``sum`` or ``none``."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {list(REDUCTIONS)}, got {reduction!r}")


def check_floating_tensor(name: str, value: object) -> None:
    """Raise unless ``value`` is a tensor of fp64, fp32, bf16 or fp16."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be of fp64, fp32, bf16 or fp16, got {value.dtype}")


def _check_views(z_i: Tensor, z_j: Tensor, *, allow_empty: bool) -> None:
    check_floating_tensor("z_i", z_i)
    if isinstance(z_j, Tensor) and z_j.ndim == 1 and z_j.dtype in LABELS:
        raise TypeError(
            "z_j must be the embeddings of the second view, got what looks like labels, a tensor "
            f"of shape {tuple(z_j.shape)} and dtype {z_j.dtype}: row k of z_i and row k of z_j are "
            "a pair, and labels are not needed (docs/migrate/pytorch-metric-learning.md)"
        )
    check_floating_tensor("z_j", z_j)
    if z_i.shape != z_j.shape:
        raise ValueError(
            f"z_i and z_j must have the same shape, got {tuple(z_i.shape)} and {tuple(z_j.shape)}"
        )
    if z_i.ndim not in (2, 3):
        raise ValueError(f"z_i and z_j must be (B, D) or (B, N, D), got {tuple(z_i.shape)}")
    if 0 in (z_i.shape[-1:] if allow_empty else z_i.shape):
        raise ValueError(
            f"z_i and z_j must hold at least one pair and one feature, got {tuple(z_i.shape)}"
        )
    _check_same_device("z_i and z_j", z_i, z_j)


def _check_rectangle(x: Tensor, y: Tensor) -> None:
    for name, z, shape in (("x", x, "(M, D)"), ("y", y, "(N, D)")):
        check_floating_tensor(name, z)
        if z.ndim != 2:
            raise ValueError(f"{name} must be {shape}, got {tuple(z.shape)}")
        if 0 in z.shape:
            raise ValueError(
                f"{name} must hold at least one row and one feature, got {tuple(z.shape)}"
            )
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"x and y must have the same D, got {x.shape[1]} and {y.shape[1]} features"
        )
    _check_same_device("x and y", x, y)


def _promote(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that ``torch.cat`` of them has."""
    if a.dtype == b.dtype:
        return a, b
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _check_same_device(names: str, a: Tensor, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"{names} must be on the same device, got {a.device} and {b.device}")


def _check_temperature_device(temperature: float | Tensor, name: str, z: Tensor) -> None:
    if isinstance(temperature, Tensor) and temperature.device != z.device:
        raise ValueError(
            f"temperature must be on the device of {name}, {z.device}, got {temperature.device}"
        )


def _check_mask(mask: Tensor, z_i: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, got {got}")
    batch = z_i.shape[0]
    if mask.shape != (batch, batch):
        raise ValueError(
            f"mask must be ({batch}, {batch}), one entry a pair of samples, got {tuple(mask.shape)}"
        )
    if mask.device != z_i.device:
        raise ValueError(f"mask must be on the device of z_i, {z_i.device}, got {mask.device}")
