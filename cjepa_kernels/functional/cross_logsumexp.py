"""Log-sum-exp of both sides of a rectangle as a function, and the similarity of its pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels import ops, reference
from cjepa_kernels.backends import Backend, check_backend
from cjepa_kernels.definitions import EPS, TEMPERATURE, CrossLogSumExp, CrossLogSumExpForward
from cjepa_kernels.functional import checks, dispatch


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
            reads it. Default 0.1.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        eps: Lower bound on the norm used for normalisation; a row below it gets a zero
            gradient. Default 1e-8.
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
    temperature = checks.without_arrays(temperature, x)
    checks.check_temperature(temperature)
    checks.check_in_range("eps", eps)
    checks.check_bool("use_cosine_similarity", use_cosine_similarity)
    checks.check_rectangle(x, y)
    checks.check_temperature_device(temperature, "x", x)
    temperature, eps = checks.as_float_or_scalar(temperature), checks.as_float(eps)
    x, y = checks.promote(x, y)
    if backend == "reference":
        with dispatch.without_autocast(x.device):
            return reference.cross_logsumexp(
                ops.saveable(x),
                ops.saveable(y),
                temperature=ops.saveable(temperature),
                use_cosine_similarity=use_cosine_similarity,
                eps=eps,
            )
    tensor, number = checks.split_temperature(temperature)
    out: CrossLogSumExpForward = ops.call(
        "cross_logsumexp",
        dispatch.choose_overload(backend, x.device),
        x=x,
        y=y,
        temperature_tensor=tensor,
        temperature=number,
        use_cosine_similarity=use_cosine_similarity,
        eps=eps,
        product_dtype=dispatch.product_dtype(x),
    )
    return CrossLogSumExp(
        row_lse=out.row_lse,
        column_lse=out.column_lse,
        row_max=out.row_max,
        column_max=out.column_max,
    )


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
            gradient. Default 1e-8.
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
    checks.check_in_range("eps", eps)
    checks.check_bool("use_cosine_similarity", use_cosine_similarity)
    checks.check_rectangle(x, y)
    if x.shape != y.shape:
        raise ValueError(f"x and y must have as many rows as each other, got {len(x)} and {len(y)}")
    x, y = checks.promote(x, y)
    rounded: torch.dtype | None = None
    tf32 = False
    if backend != "reference":
        rounded = dispatch.product_dtype(x) or x.dtype
        overload = dispatch.choose_overload(backend, x.device)
        tf32 = rounded == torch.float32 and dispatch.rounds_to_tf32(overload, x)
    eps = checks.as_float(eps)
    with dispatch.without_autocast(x.device):
        rows = [reference.embed_rows(ops.saveable(z), use_cosine_similarity, eps) for z in (x, y)]
        if rounded is not None:
            # The gradient is that of the rows before rounding, as in the back ends.
            rows = [z + (_round_rows(z.detach(), rounded, tf32) - z.detach()) for z in rows]
        return (rows[0] * rows[1]).sum(dim=1)


def _round_rows(rows: Tensor, dtype: torch.dtype, tf32: bool) -> Tensor:
    """Operands of the product: rounded, in the accumulation dtype."""
    if tf32:  # to 10 bits of mantissa, as round_to_tf32 in triton/kernels/operands.py
        bits = (rows.view(torch.int32) + 0x1000) & ~0x1FFF
        return torch.where(rows == rows, bits.view(torch.float32), rows)
    return rows.to(dtype).to(rows.dtype)
