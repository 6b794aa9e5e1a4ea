"""Log-sum-exp of each row against the other rows, as a function."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cjepa_kernels import ops, reference
from cjepa_kernels.backends import Backend, check_backend
from cjepa_kernels.definitions import EPS, TEMPERATURE, SelfLogSumExp, SelfLogSumExpForward
from cjepa_kernels.functional import checks, dispatch


def self_logsumexp(
    z: Tensor,
    *,
    positives: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float | Tensor = TEMPERATURE,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
    backend: Backend = "auto",
) -> SelfLogSumExp:
    """Log-sum-exp of the logits of each row against the others, without the (M, M) matrix.

    With s_ab the similarity of rows a and b, LSE_a is the log-sum-exp of s_ab / tau over the rows b
    that count: not a itself, not the positive of a, and with ``labels`` no row of a's class. Losses
    of one batch against itself are made of LSE_a and of the positive's similarity: NT-Xent, DCL,
    SupCon, and their like.

    Args:
        z: (M, D), M >= 1. fp64, fp32, bf16 or fp16.
        positives: (M,) int64 on the same device: for each row the row that is its positive, or -1
            for a row without one. Two rows are each other's positive or not at all. Default: none.
        labels: (M,) integers on the same device, any numbers. Default: rows of every class count.
        temperature: Float from 1e-30 to 1e30, or a tensor of shape () or (1,), which then gets a
            gradient of its shape. A tensor outside of that range gives NaN, because the host never
            reads it. Default 0.1.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        eps: Lower bound on the norm used for normalisation; a row below it gets a zero
            gradient. Default 1e-8.
        backend: ``auto`` or a name from :func:`cjepa_kernels.backends`.

    Returns:
        SelfLogSumExp: ``lse`` (M,) and ``positive`` (M,), and detached ``largest`` (M,); fp32 (fp64
        for fp64 inputs). ``lse`` is -inf for a row of which no other row counts.

    Raises:
        TypeError: A tensor of the wrong kind or dtype.
        ValueError: A wrong shape, device or value; the message names it. On a GPU and under
            torch.compile the host does not read ``positives``. There a wrong number makes its row's
            ``positive`` NaN. The compiled CPU kernels raise.
        RuntimeError: A back end that was asked for by name and is missing.

    Source: SimCLR, arXiv 2002.05709, equation 1; SupCon, arXiv 2004.11362, equation 2.

    Example:
        >>> z = torch.eye(4)
        >>> out = self_logsumexp(z, labels=torch.tensor([7, 7, 8, 8]), temperature=0.5)
        >>> out.lse  # log 2: the two rows of the other class are orthogonal
        tensor([0.6931, 0.6931, 0.6931, 0.6931])
    """
    check_backend(backend)
    temperature = checks.without_arrays(temperature, z)
    checks.check_temperature(temperature)
    checks.check_in_range("eps", eps)
    checks.check_bool("use_cosine_similarity", use_cosine_similarity)
    checks.check_rows("z", z)
    checks.check_temperature_device(temperature, "z", z)
    if positives is not None:
        positives = checks.as_mutual(positives, z)
    if labels is not None:
        labels = checks.as_classes(labels, z.shape[0], z.device, of="row")
    options: dict[str, Any] = {
        "positives": ops.saveable(positives),
        "classes": ops.saveable(labels),
        "temperature": checks.as_float_or_scalar(temperature),
        "use_cosine_similarity": use_cosine_similarity,
        "eps": checks.as_float(eps),
    }
    if backend == "reference":
        options["temperature"] = ops.saveable(options["temperature"])
        with dispatch.without_autocast(z.device):
            return reference.self_logsumexp(ops.saveable(z), **options)
    overload = dispatch.choose_overload(backend, z.device)
    out = run_self_logsumexp(z, None, overload=overload, **options)
    positive = out.lse.new_zeros(z.shape[0]) if positives is None else out.positive
    return SelfLogSumExp(lse=out.lse, largest=out.largest, positive=positive)


def run_self_logsumexp(
    z_i: Tensor,
    z_j: Tensor | None,
    *,
    positives: Tensor | None = None,
    classes: Tensor | None = None,
    class_means: Tensor | None = None,
    class_weights: Tensor | None = None,
    temperature: float | Tensor,
    use_cosine_similarity: bool,
    eps: float,
    overload: str,
) -> SelfLogSumExpForward:
    """All results of the operator, for checked arguments; two views have the same dtype."""
    tensor, number = checks.split_temperature(temperature)
    rows = z_i.shape[0] * (1 if z_j is None else 2)
    out: SelfLogSumExpForward = ops.call(
        "self_logsumexp",
        overload,
        z_i=z_i,
        z_j=z_j,
        positives=positives,
        classes=classes,
        class_means=class_means,
        class_weights=class_weights,
        temperature_tensor=tensor,
        temperature=number,
        use_cosine_similarity=use_cosine_similarity,
        eps=eps,
        product_dtype=dispatch.product_dtype(z_i),
        keep=dispatch.saves_for_backward(
            lambda limit: ops.triangle_saves_at_most(limit, overload, z_i, rows), z_i, z_j, tensor
        ),
    )
    return out
