"""NT-Xent of a group: features travel between the ranks, similarities never.

Rank r holds M_r of the M rows. Its own block of S is the NT-Xent operator's; against the rows of
other ranks there are rectangles, which the operator of the log-sum-exp of both sides computes:

    LSE-_a  = log of the sum of both exp(LSE-), of the own block and of all rectangles of row a
    x_a     = LSE-_a - l_pos,  loss_a = softplus(x_a),  r_a = sigmoid(x_a)
    dL/ds_ab = (1/tau) [ g_a r_a exp(l_ab - LSE-_a) + g_b r_b exp(l_ab - LSE-_b) ]   over ranks too

The last line is the rectangle's backward with g r as the upstream gradients of both sides: what
travels with a row is (g r, LSE-). A positive is always of the own rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels import chunked, ops, reference
from cjepa_kernels.distributed.exchange import Exchange, count_flops
from cjepa_kernels.distributed.group import GlobalBatch, Setting, agree
from cjepa_kernels.distributed.reference import gather_pairs
from cjepa_kernels.distributed.ring import Rectangle, Ring, circulate
from cjepa_kernels.reference import Reduction, accumulation_dtype, positive_temperature

Strategy = Literal["auto", "all_gather", "ring"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
REFERENCE = "reference"

# "auto" takes the ring where the products that it saves take longer than its additional exchanges:
# FLOPs in the time that one exchange takes, by type of device.
FLOPS_PER_EXCHANGE = {"cpu": 2e7, "cuda": 1e10}
GATHERED_BYTES = 2**28  # and wherever the features of all ranks would take more than that


@dataclass(frozen=True)
class Options:
    """What the operators take besides tensors, and how ranks work together."""

    temperature: float
    cosine: bool
    eps: float
    reduction: Reduction
    product_dtype: torch.dtype | None
    keep: bool
    overload: str  # of the operators, or REFERENCE
    strategy: Strategy
    needs_gradient: bool


class GroupTerms(NamedTuple):
    """As ``NTXentOutput``, of this rank's rows; the metrics are those of all ranks."""

    loss: Tensor
    accuracy: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    lse: Tensor


def nt_xent(
    z_i: Tensor,
    z_j: Tensor,
    temperature: Tensor | None,
    options: Options,
    group: dist.ProcessGroup,
) -> GroupTerms:
    """NT-Xent of this rank's pairs with negatives from every rank of the group.

    Args:
        z_i: (B_r, D); B_r may be 0, which is an error on every rank.
        z_j: Same shape.
        temperature: () in place of the options' number.
        options: The same on every rank.
        group: The ranks.

    Raises:
        ValueError: On all ranks alike, if one of them has no pair or asks for something else.
        RuntimeError: A rank ended, or did not take part in time.
    """
    batch = agree(z_i, _settings(z_i, temperature, options), group)
    if options.overload == REFERENCE:
        return _reference(z_i, z_j, temperature, options, batch, group)
    strategy = choose_strategy(options.strategy, batch, z_i)
    options = replace(options, strategy=strategy)
    function: Any = _GroupNTXent.apply
    return GroupTerms(*function(z_i, z_j, temperature, options, batch, group))


def _reference(
    z_i: Tensor,
    z_j: Tensor,
    temperature: Tensor | None,
    options: Options,
    batch: GlobalBatch,
    group: dist.ProcessGroup,
) -> GroupTerms:
    pairs = gather_pairs(z_i, z_j, batch, group)
    with torch.autocast(z_i.device.type, enabled=False):
        terms = reference.nt_xent(
            pairs.z_i,
            pairs.z_j,
            temperature=options.temperature if temperature is None else temperature,
            use_cosine_similarity=options.cosine,
            eps=options.eps,
        )
        loss, lse = (x.view(2, -1)[:, pairs.own].flatten() for x in (terms.loss, terms.lse))
        return GroupTerms(_reduce(loss, options, batch), *terms[1:4], lse)


def _reduce(loss: Tensor, options: Options, batch: GlobalBatch) -> Tensor:
    if options.reduction == "mean":
        return loss.sum() * (batch.ranks / batch.rows)
    return reference.reduce(loss, options.reduction)


def choose_strategy(strategy: Strategy, batch: GlobalBatch, z: Tensor) -> Strategy:
    """The ring or the all-gather, by size unless one is asked for; the same on every rank.

    The all-gather takes 6 M_r M D FLOPs a rank and 2 exchanges, the ring 4 M_r M D and about
    2 (R / 2 + 1), each with the latency of one.
    """
    if strategy != "auto":
        return strategy
    ranks, features = batch.ranks, z.shape[1]
    if batch.rows * features * z.element_size() > GATHERED_BYTES:
        return "ring"
    saved = 2 * batch.rows**2 // ranks * features
    per_exchange = FLOPS_PER_EXCHANGE.get(z.device.type, FLOPS_PER_EXCHANGE["cuda"])
    return "ring" if saved > per_exchange * 2 * (ranks // 2) else "all_gather"


def _settings(z: Tensor, temperature: Tensor | None, options: Options) -> list[Setting]:
    yes_or_no = (False, True)
    return [
        Setting("the dtype of z_i and z_j", z.dtype, DTYPES),
        Setting("autocast's dtype", options.product_dtype, (None, *DTYPES)),
        Setting("requires_grad of z_i, z_j or temperature", options.needs_gradient, yes_or_no),
        Setting("whether temperature is a tensor", temperature is not None, yes_or_no),
        Setting("temperature", options.temperature),
        Setting("use_cosine_similarity", options.cosine, yes_or_no),
        Setting("eps", options.eps),
        Setting("reduction", options.reduction, REDUCTIONS),
        Setting("strategy", options.strategy, STRATEGIES),
    ]


class Operators:
    """The operators with the arguments that do not change, counting what they multiply."""

    def __init__(self, options: Options, temperature: Tensor | None, dtype: torch.dtype) -> None:
        self.options, self.temperature = options, temperature
        # Parts of a gradient come in the accumulation dtype from operands that are widened.
        self.wide = accumulation_dtype(dtype)
        self.product_dtype = options.product_dtype or (dtype if dtype != self.wide else None)

    def tau(self) -> float | Tensor:
        """The temperature, fp64 if it is a tensor."""
        if self.temperature is None:
            return self.options.temperature
        return positive_temperature(self.temperature.double())

    def own(self, z_i: Tensor, z_j: Tensor) -> tuple[Tensor, ...]:
        """The own block: as ``ops.NT_XENT``, per row."""
        o = self.options
        count_flops((2 * len(z_i)) ** 2 * z_i.shape[1])
        return self._operator("nt_xent")(
            z_i, z_j, None, self.temperature, o.temperature, o.cosine, o.eps, "none",
            o.product_dtype, o.keep,
        )  # fmt: skip

    def own_backward(
        self, grad_loss: Tensor, z_i: Tensor, z_j: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Gradients of the own block, with LSE- over all ranks; as ``ops.NT_XENT_BACKWARD``."""
        o, computed_again = self.options, saved[-1].numel() == 0
        count_flops((2 + computed_again) * (2 * len(z_i)) ** 2 * z_i.shape[1])
        return self._operator("nt_xent_backward")(
            grad_loss, z_i.to(self.wide), z_j.to(self.wide), None, self.temperature, *saved,
            o.temperature, o.cosine, o.eps, "none", self.product_dtype,
        )  # fmt: skip

    def rectangle(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What the rows of x and those of y add to each other: (n, 3) as of :func:`rows_of`."""
        o = self.options
        count_flops(2 * len(x) * len(y) * x.shape[1])
        out = self._operator("cross_logsumexp")(
            x, y, self.temperature, o.temperature, o.cosine, o.eps, o.product_dtype
        )
        return rows_of(out[4], out[5], out[2]), rows_of(out[6], out[7], out[3])

    def rectangle_backward(
        self, x: Tensor, y: Tensor, of_rows: Tensor, of_columns: Tensor, *, of_y: bool
    ) -> tuple[Tensor, ...]:
        """Gradients of x and, if asked for, of y from (g r, shift, log_sum) of their rows."""
        o = self.options
        count_flops(2 * (2 + of_y) * len(x) * len(y) * x.shape[1])
        rows, columns = of_rows.T.contiguous(), of_columns.T.contiguous()
        return self._operator("cross_logsumexp_backward")(
            rows[0], columns[0], x.to(self.wide), y.to(self.wide), self.temperature,
            rows[1], rows[2], columns[1], columns[2],
            o.temperature, o.cosine, o.eps, self.product_dtype, True, of_y,
        )  # fmt: skip

    def _operator(self, name: str) -> Callable[..., tuple[Tensor, ...]]:
        return ops.operator(name, self.options.overload)  # type: ignore[no-any-return]


def rows_of(shift: Tensor, log_sum: Tensor, hardest: Tensor) -> Tensor:
    """(n, 3) fp64: shift and log_sum of LSE-, the largest similarity of a negative."""
    return torch.stack([shift, log_sum, hardest], dim=1).double()


def merge_rows(a: Tensor, b: Tensor, tau: float | Tensor) -> Tensor:
    """LSE- and hardest negative over the negatives of both; each (n, 3)."""
    # The shift of an empty sum means nothing.
    shifts = [part[:, 0].masked_fill(part[:, 1] == -torch.inf, -torch.inf) for part in (a, b)]
    shift = torch.maximum(*shifts)
    shift = shift.masked_fill(shift == -torch.inf, 0.0)
    log_sums = [part[:, 1] + (s - shift) / tau for part, s in zip((a, b), shifts, strict=True)]
    return torch.stack(
        [shift, torch.logaddexp(*log_sums), torch.maximum(a[:, 2], b[:, 2])], dim=1
    )


class _GroupNTXent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z_i: Tensor,
        z_j: Tensor,
        temperature: Tensor | None,
        options: Options,
        batch: GlobalBatch,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(z_i.device.type, enabled=False):
            exchange = Exchange(group)
            operators = Operators(options, temperature, z_i.dtype)
            shard = torch.cat([z_i, z_j])  # (M_r, D)
            if options.strategy == "ring":
                rows, own, others = _ring_forward(z_i, z_j, shard, operators, batch, exchange)
            else:
                rows, own, others = _gather_forward(z_i, z_j, shard, operators, batch, exchange)
            positive, kept = own[-2:]
            outputs = _finish(shard, rows, positive, operators, batch, exchange)
        of_loss = rows[:, :2].to(positive.dtype)
        ctx.save_for_backward(z_i, z_j, temperature, of_loss, positive, kept, others)
        ctx.options, ctx.batch, ctx.group = options, batch, group
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 6
        z_i, z_j, temperature, of_loss, positive, kept, others = ctx.saved_tensors
        options, batch = ctx.options, ctx.batch
        with torch.autocast(z_i.device.type, enabled=False):
            exchange = Exchange(ctx.group, backward=True)
            operators = Operators(options, temperature, z_i.dtype)
            upstream = grad_loss.to(positive.dtype).expand(len(positive))
            if options.reduction == "mean":
                upstream = upstream * (batch.ranks / batch.rows)
            shift, log_sum = of_loss[:, 0].contiguous(), of_loss[:, 1].contiguous()
            pull = torch.sigmoid((shift - positive) / operators.tau() + log_sum) * upstream
            weights = torch.stack([pull.to(positive.dtype), shift, log_sum], dim=1)  # (M_r, 3)
            state = _Backward(z_i, z_j, upstream, weights, (shift, log_sum, positive, kept))
            if options.strategy == "ring":
                grad, grad_temperature = _ring_backward(state, operators, batch, exchange)
            else:
                grad, grad_temperature = _gather_backward(
                    state, others, operators, exchange, batch
                )
        needs = ctx.needs_input_grad
        return (
            grad[: len(z_i)].to(z_i.dtype) if needs[0] else None,
            grad[len(z_i) :].to(z_j.dtype) if needs[1] else None,
            grad_temperature if needs[2] else None,
            *(None,) * 3,
        )


def _finish(
    shard: Tensor,
    rows: Tensor,
    positive: Tensor,
    operators: Operators,
    batch: GlobalBatch,
    exchange: Exchange,
) -> tuple[Tensor, ...]:
    """Loss and LSE of the own rows, the metrics of all."""
    options, tau = operators.options, operators.tau()
    shift, log_sum, hardest = rows.unbind(dim=1)
    own = positive.double()
    loss = -torch.nn.functional.logsigmoid((own - shift) / tau - log_sum)
    lse = torch.logaddexp(shift / tau + log_sum, own / tau)
    units = chunked.operands(shard, options.cosine, options.eps, options.product_dtype)
    # |sum z|^2 - sum |z|^2 - sum s_pos over the negatives: sums of rows, no pass over pairs.
    sums = torch.cat(
        [
            units.sum(dim=0, dtype=torch.float64),
            torch.stack([units.square().sum(dtype=torch.float64), own.sum()]),
            (own > hardest).sum(dtype=torch.float64)[None],
        ]
    )
    exchange.all_reduce(sums)
    squares, positives, hits = sums[-3:].unbind()
    negatives = batch.rows * (batch.rows - 2)
    negative = (sums[:-3].square().sum() - squares - positives) / (negatives or torch.nan)
    loss = _reduce(loss, options, batch)
    outputs = (loss, hits / batch.rows, positives / batch.rows, negative, lse)
    return tuple(output.to(positive.dtype) for output in outputs)


@dataclass
class _Backward:
    """What both strategies' backwards begin with.

    Attributes:
        upstream: (M_r,) gradients of the losses of the own rows.
        weights: (M_r, 3): g r, shift and log_sum of the own rows.
        saved: As ``ops.NT_XENT_BACKWARD`` takes it: shift, log_sum, positive, kept.
    """

    z_i: Tensor
    z_j: Tensor
    upstream: Tensor
    weights: Tensor
    saved: tuple[Tensor, ...]

    def own_block(self, operators: Operators) -> tuple[Tensor, Tensor]:
        """(M_r, D) gradient that the own block gives, and what it gives for the temperature."""
        of_i, of_j, of_temperature = operators.own_backward(
            self.upstream, self.z_i, self.z_j, self.saved
        )
        return torch.cat([of_i, of_j]), of_temperature


def _ring_forward(
    z_i: Tensor,
    z_j: Tensor,
    shard: Tensor,
    operators: Operators,
    batch: GlobalBatch,
    exchange: Exchange,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """(M_r, 3) as of ``rows_of``, what the own block left, nothing of the others."""
    ring, tau = Ring(batch), operators.tau()
    own: list[Tensor] = []
    found: list[Tensor] = []

    def first() -> None:
        own.extend(operators.own(z_i, z_j))
        hardest, shift, log_sum = own[5:8]
        found.append(rows_of(shift, log_sum, hardest))

    def visit(rectangle: Rectangle, visitor: Sequence[Tensor]) -> Tensor:
        of_own, of_visitor = operators.rectangle(shard[rectangle.own], visitor[0])
        part = found[0][rectangle.own]
        part.copy_(merge_rows(part, of_own, tau))
        return of_visitor

    def merge(before: Tensor, new: Tensor) -> Tensor:
        return merge_rows(before, new, tau)

    home = circulate(ring, exchange, [shard], visit, merge, first=first, last=lambda: None)
    if home is not None:
        part = found[0][ring.collected(batch.rank)]
        part.copy_(merge(part, home))
    return found[0], tuple(own), shard.new_empty(0)


def _ring_backward(
    state: _Backward, operators: Operators, batch: GlobalBatch, exchange: Exchange
) -> tuple[Tensor, Tensor]:
    ring = Ring(batch)
    shard = torch.cat([state.z_i, state.z_j])
    grad = shard.new_zeros(shard.shape, dtype=operators.wide)
    of_temperature: list[Tensor] = []

    def visit(rectangle: Rectangle, visitor: Sequence[Tensor]) -> Tensor:
        features, weights = visitor
        own = rectangle.own
        of_own, of_visitor, along = operators.rectangle_backward(
            shard[own], features, state.weights[own], weights, of_y=True
        )
        grad[own] += of_own
        of_temperature.append(along)
        return of_visitor

    def last() -> None:
        # The longest exchange that nothing else could hide is that of the gradients going home.
        of_own, along = state.own_block(operators)
        grad.add_(of_own)
        of_temperature.append(along)

    home = circulate(
        ring, exchange, [shard, state.weights], visit, torch.add, first=lambda: None, last=last
    )
    if home is not None:
        grad[ring.collected(batch.rank)] += home
    return grad, torch.stack(of_temperature).sum(dim=0)


def _gather_forward(
    z_i: Tensor,
    z_j: Tensor,
    shard: Tensor,
    operators: Operators,
    batch: GlobalBatch,
    exchange: Exchange,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """(M_r, 3) as of ``rows_of``, what the own block left, and the rows of all other ranks."""
    others = _gather_others(shard, batch, exchange)
    own = operators.own(z_i, z_j)
    hardest, shift, log_sum = own[5:8]
    rows = rows_of(shift, log_sum, hardest)
    if len(others) > 0:
        rows = merge_rows(rows, operators.rectangle(shard, others)[0], operators.tau())
    return rows, tuple(own), others


def _gather_backward(
    state: _Backward, others: Tensor, operators: Operators, exchange: Exchange, batch: GlobalBatch
) -> tuple[Tensor, Tensor]:
    """Own rows' gradients alone: with (g r, LSE-) of all rows, no gradient has to travel."""
    grad, of_temperature = state.own_block(operators)
    if len(others) > 0:
        weights = _gather_others(state.weights, batch, exchange)
        shard = torch.cat([state.z_i, state.z_j])
        of_own, _, along = operators.rectangle_backward(
            shard, others, state.weights, weights, of_y=False
        )
        grad += of_own
        of_temperature = of_temperature + along / 2  # the other half is the other ranks'
    return grad, of_temperature


def _gather_others(own: Tensor, batch: GlobalBatch, exchange: Exchange) -> Tensor:
    """Rows of all other ranks, in the order of the ranks after this one."""
    if batch.ranks == 1:
        return own[:0]
    padded = own
    longest = 2 * max(batch.batches)
    if len(own) < longest:
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own
    everything = exchange.all_gather(padded)
    others = [(batch.rank + step) % batch.ranks for step in range(1, batch.ranks)]
    return torch.cat([everything[other, : batch.rows_of(other)] for other in others])
