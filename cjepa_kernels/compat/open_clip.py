"""The losses of ``open_clip``: ``from cjepa_kernels.compat.open_clip import ClipLoss``."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cjepa_kernels.compat.gathered import gather_rows, own_rows
from cjepa_kernels.compat.representation import shown
from cjepa_kernels.definitions import FLOATING, accumulation_dtype
from cjepa_kernels.functional import checks
from cjepa_kernels.functional.info_nce import info_nce


class ClipLoss(nn.Module):
    """``open_clip.ClipLoss``: the cross entropy of logits of images and texts, in both directions.

    The arguments, their order and their defaults are those of open_clip 3.3.0. Features are taken
    as they come, so normalise them as for open_clip.

    Args:
        local_loss: With several ranks, contrast this rank's pairs with those of all ranks. With
            False every rank computes the loss of all pairs.
        gather_with_grad: Features of other ranks carry a gradient. DDP's average is the gradient of
            the whole batch only with True. With False open_clip's gradient is another one, and so
            is this.
        cache_labels: Ignored, because no labels are made.
        rank: Rank of this process.
        world_size: Number of ranks, those of the default process group.
        use_horovod: Must be False.

    Raises:
        ValueError: An argument that is not covered; the message names it.

    Source: CLIP, arXiv 2103.00020.

    Example:
        >>> loss_fn = ClipLoss()
        >>> loss = loss_fn(torch.eye(4), torch.eye(4), torch.tensor(2.0))
        >>> round(loss.item(), 4)
        0.3408
    """

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
        if use_horovod:
            raise ValueError(
                f"use_horovod must be False, got {use_horovod!r}: start the ranks with "
                "torch.distributed, or stay with open_clip.ClipLoss"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch of pairs.

        Args:
            image_features: (B, D).
            text_features: (B, D); row k belongs to row k of ``image_features``.
            logit_scale: Positive factor of the logits, a number or a tensor of one element, which
                gets a gradient unless it holds an integer. A tensor that is not positive gives NaN,
                because the host never reads it.
            logit_bias: A number or a tensor of one element. It is added to all logits and does not
                change the loss, and its gradient is 0.
            output_dict: Return ``{"contrastive_loss": loss}``.

        Returns:
            () fp32 (fp64 for fp64 features), or a dict with it.
        """
        checks.check_rectangle(
            image_features, text_features, names=("image_features", "text_features")
        )
        if image_features.shape != text_features.shape:
            raise ValueError(
                "image_features and text_features must have as many rows as each other, got "
                f"{len(image_features)} and {len(text_features)}"
            )
        loss = self._loss(image_features, text_features, _temperature(logit_scale, image_features))
        if isinstance(logit_bias, Tensor):
            if logit_bias.numel() != 1:
                raise ValueError(
                    "logit_bias must be a number or a tensor of one element, got a tensor of shape "
                    f"{tuple(logit_bias.shape)}"
                )
            # DDP expects a gradient for every parameter.
            loss = loss + 0 * logit_bias.reshape(()).to(loss)
        elif logit_bias is not None and not checks.is_number(logit_bias):
            raise TypeError(
                f"logit_bias must be a number or a tensor of one element, got {logit_bias!r}"
            )
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        """Settings as ``name=value``, for ``print(module)``."""
        names = ("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size")
        return shown(self, *names, "use_horovod")

    def _loss(self, image: Tensor, text: Tensor, temperature: float | Tensor) -> Tensor:
        if self.world_size == 1:
            return _clip(image, text, temperature)
        self._check_ranks()
        all_images, all_texts = (
            gather_rows(rows, with_gradient=self.gather_with_grad) for rows in (image, text)
        )
        own = own_rows(image)
        if self.local_loss:
            of_images = _one_direction(image, all_texts, own, temperature)
            return (of_images + _one_direction(text, all_images, own, temperature)) / 2
        if not self.gather_with_grad:
            all_images = all_images.index_copy(0, own, image)
            all_texts = all_texts.index_copy(0, own, text)
        return _clip(all_images, all_texts, temperature)

    def _check_ranks(self) -> None:
        """Raise unless ``rank`` and ``world_size`` are those of the default process group."""
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"world_size must be 1 without a process group, got {self.world_size}: call "
                "torch.distributed.init_process_group first"
            )
        expected = (dist.get_rank(), dist.get_world_size())
        if (self.rank, self.world_size) != expected:
            raise ValueError(
                "rank and world_size must be those of the default process group, "
                f"{expected[0]} and {expected[1]}, got {self.rank} and {self.world_size}"
            )


def _clip(image: Tensor, text: Tensor, temperature: float | Tensor) -> Tensor:
    return info_nce(
        image, text, temperature=temperature, symmetric=True, use_cosine_similarity=False
    ).loss


def _one_direction(
    query: Tensor, key: Tensor, positives: Tensor, temperature: float | Tensor
) -> Tensor:
    return info_nce(
        query, key, positives=positives, temperature=temperature, use_cosine_similarity=False
    ).loss


def _temperature(logit_scale: Tensor | float, features: Tensor) -> Tensor | float:
    """1 / scale; of a tensor in fp32 or fp64, because half precision would round the quotient."""
    if not isinstance(logit_scale, Tensor):
        checks.check_in_range("logit_scale", logit_scale)
        return 1 / checks.as_float(logit_scale)
    if logit_scale.numel() != 1 or logit_scale.dtype not in (*FLOATING, *checks.LABELS):
        raise ValueError(
            "logit_scale must be a number or a real tensor of one element, got "
            f"{checks.described(logit_scale)}"
        )
    dtype = torch.promote_types(logit_scale.dtype, accumulation_dtype(features.dtype))
    return logit_scale.reshape(()).to(features.device, dtype).reciprocal()
