"""Losses of other projects as plain formulas, with the constructors and forwards they have there.

They are our own writing, and ``python_tests/compat`` compares them with the projects where those
are installed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from cjepa_kernels.bench import formulas


class ClipLoss(nn.Module):
    """``open_clip.ClipLoss`` 3.3.0."""

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.rank, self.world_size = rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        image, text = image_features, text_features
        images, texts = self._gather(image), self._gather(text)
        if not self.local_loss:
            image, text = images, texts
        labels = torch.arange(len(image))
        if self.local_loss:
            labels += self.rank * len(image)
        loss = torch.zeros(())
        for rows, others in ((image, texts), (text, images)):
            logits = logit_scale * rows @ others.T
            if logit_bias is not None:
                logits = logits + logit_bias
            loss = loss + F.cross_entropy(logits, labels) / 2
        return {"contrastive_loss": loss} if output_dict else loss

    def _gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks; without ``gather_with_grad`` those of others are constants."""
        if self.world_size == 1:
            return rows
        if self.gather_with_grad:
            return torch.cat(all_gather(rows))
        gathered = [torch.zeros_like(rows) for _ in range(self.world_size)]
        dist.all_gather(gathered, rows.detach())
        if not self.local_loss:
            gathered[self.rank] = rows
        return torch.cat(gathered)


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """``info_nce.info_nce`` of info-nce-pytorch 0.1.4."""
    query, key = F.normalize(query, dim=-1), F.normalize(positive_key, dim=-1)
    labels = torch.arange(len(query))
    logits = query @ key.T
    if negative_keys is not None:
        negatives = F.normalize(negative_keys, dim=-1)
        of_rows = "nd,nmd->nm" if negative_mode == "paired" else "nd,md->nm"
        positive = (query * key).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, torch.einsum(of_rows, query, negatives)], dim=1)
        labels = torch.zeros_like(labels)
    return F.cross_entropy(logits / temperature, labels, reduction=reduction)


class InfoNCE(nn.Module):
    """``info_nce.InfoNCE`` of info-nce-pytorch 0.1.4."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
    ) -> None:
        super().__init__()
        self.temperature, self.reduction, self.mode = temperature, reduction, negative_mode

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None
    ) -> Tensor:
        return info_nce(
            query, positive_key, negative_keys, self.temperature, self.reduction, self.mode
        )


class MultipleNegativesRankingLoss(nn.Module):
    """The loss of sentence-transformers 6.2.0 without weights of hard negatives."""

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Any = None,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
    ) -> None:
        super().__init__()
        self.model, self.scale, self.gather = model, scale, gather_across_devices
        self.normalise = getattr(similarity_fct, "__name__", "cos_sim") != "dot_score"
        self.directions, self.joint = directions, partition_mode == "joint"

    def forward(self, sentence_features: list[Any], labels: Any) -> Tensor:
        columns = [self.model(column)["sentence_embedding"] for column in sentence_features]
        if self.normalise:
            columns = [F.normalize(rows, dim=1) for rows in columns]
        query, document = columns[:2]
        everything = [torch.cat(all_gather(rows)) if self.gather else rows for rows in columns]
        ranks = len(everything[0]) // len(query)
        first = dist.get_rank() * len(query) if self.gather else 0
        own = torch.eye(ranks * len(query), dtype=torch.bool)[first : first + len(query)]
        of_all_columns = own.repeat(1, len(columns) - 1)
        queries, documents = everything[0], torch.cat(everything[1:])
        logits = {
            "query_to_doc": query @ documents.T,
            "query_to_query": (query @ queries.T).masked_fill(own, -torch.inf),
            "doc_to_query": document @ queries.T,
            "doc_to_doc": (document @ documents.T).masked_fill(of_all_columns, -torch.inf),
        }
        chosen = [self.scale * logits[direction] for direction in self.directions]
        if self.joint:
            chosen = [torch.cat(chosen, dim=1)]
        positive = self.scale * (query * document).sum(dim=1)
        return torch.stack([(x.logsumexp(dim=1) - positive).mean() for x in chosen]).mean()


class LightlyMemoryBank(nn.Module):
    """``NTXentLoss.memory_bank`` of lightly 1.6.0. It holds unit rows and overwrites the oldest."""

    bank: Tensor  # (K, D)
    bank_ptr: Tensor  # (1,) int64, index of the next row to write
    gather: bool = False  # whether the rows of all ranks are pushed

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        rows = F.normalize(torch.randn(size), dim=1)
        self.register_buffer("bank", rows, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Overwrite the oldest rows. Rows beyond the end of the bank are dropped."""
        if self.gather:
            of_ranks = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
            dist.all_gather(of_ranks, rows)
            rows = torch.cat(of_ranks)
        for row in rows:
            self.bank[self.bank_ptr] = row
            self.bank_ptr += 1
            if self.bank_ptr == len(self.bank):
                self.bank_ptr.zero_()
                break


class LightlyNTXentLoss(nn.Module):
    """``lightly.loss.NTXentLoss`` of 1.6.0."""

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: tuple[int, int] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.temperature, self.gather = temperature, gather_distributed
        self.memory_bank = None
        if memory_bank_size is not None:
            self.memory_bank = LightlyMemoryBank(memory_bank_size)
            self.memory_bank.gather = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if self.memory_bank is not None:
            return self._with_bank(out0, out1, self.memory_bank)
        if not self.gather:
            loss: Tensor = formulas.lightly(out0, out1, temperature=self.temperature)
            return loss
        views = [F.normalize(rows, dim=1) for rows in (out0, out1)]
        everything = torch.cat([torch.cat(all_gather(rows)) for rows in views])
        batch, rank, ranks = len(out0), dist.get_rank(), dist.get_world_size()
        own = torch.arange(rank * batch, (rank + 1) * batch)
        losses = []
        for rows, itself, other in (
            (views[0], own, own + ranks * batch),
            (views[1], own + ranks * batch, own),
        ):
            logits = rows @ everything.T / self.temperature
            logits = logits.scatter(1, itself[:, None], -torch.inf)
            losses.append(F.cross_entropy(logits, other))
        return (losses[0] + losses[1]) / 2

    def _with_bank(self, out0: Tensor, out1: Tensor, memory: LightlyMemoryBank) -> Tensor:
        query, key = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        positive = (query * key).sum(dim=1, keepdim=True)  # (B, 1)
        negatives = query @ memory.bank.clone().T  # (B, K)
        if query.requires_grad:
            memory.push(key)
        logits = torch.cat([positive, negatives], dim=1) / self.temperature
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


class LightlyDCLLoss(nn.Module):
    """``lightly.loss.DCLLoss`` of 1.6.0."""

    def __init__(
        self, temperature: float = 0.1, weight_fn: Any = None, gather_distributed: bool = False
    ) -> None:
        super().__init__()
        self.temperature, self.weight_fn, self.gather = temperature, weight_fn, gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        views = [F.normalize(rows, dim=1) for rows in (out0, out1)]
        everything = [torch.cat(all_gather(rows)) if self.gather else rows for rows in views]
        first = dist.get_rank() * len(out0) if self.gather else 0
        own = torch.eye(len(everything[0]), dtype=torch.bool)[first : first + len(out0)]
        losses = []
        for rows, other in (views, views[::-1]):
            logits = torch.cat([(rows @ x.T).masked_fill(own, -torch.inf) for x in everything], 1)
            positive = (rows * other).sum(dim=1) / self.temperature
            if self.weight_fn is not None:
                positive = positive * self.weight_fn(rows, other)
            losses.append(((logits / self.temperature).logsumexp(dim=1) - positive).mean())
        return (losses[0] + losses[1]) / 2


class LightlyDCLWLoss(LightlyDCLLoss):
    """``lightly.loss.DCLWLoss`` of 1.6.0."""

    def __init__(
        self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False
    ) -> None:
        super().__init__(temperature, self._weights, gather_distributed)
        self.sigma = sigma

    def _weights(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 - len(x) * ((x * y).sum(dim=1).detach() / self.sigma).softmax(dim=0)
