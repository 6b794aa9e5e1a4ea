"""The training step: two views, context and target encoder, predictor, losses, schedules."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from torch import Tensor, nn

from cjepa_kernels import ContrastiveJEPALoss, HJEPALoss, create_loss_from_config
from cjepa_kernels.functional import cls_tokens
from cjepa_kernels.train.config import ExperimentConfig, config_to_dict
from cjepa_kernels.train.data.batches import IndexedImages
from cjepa_kernels.train.data.masking import PatchMasks, multi_block_masks, patch_counts
from cjepa_kernels.train.data.views import two_views
from cjepa_kernels.train.evaluation.features import FeatureExtractor, Features
from cjepa_kernels.train.model.vit import (
    Predictor,
    VisionTransformer,
    patch_grid,
    pool_tokens,
)

_CONTRASTIVE_METRICS = (
    "contrastive_loss",
    "contrastive_accuracy",
    "contrastive_pos_sim",
    "contrastive_neg_sim",
)


class MaskedViews(NamedTuple):
    """A batch as the model takes it; the second views follow the first ones."""

    images: Tensor  # (2B, C, H, W) fp32 in [0, 1]
    visible: Tensor  # (2B, K) int64
    predicted: Tensor  # (2B, M) int64
    labels: Tensor | None = None  # (B,) int64, the classes of the images


class CJEPAModule(L.LightningModule):
    """Hierarchical JEPA with a contrastive term on the context encoder's CLS token.

    Args:
        config: The experiment.
        image_shape: Channels, height and width.
        channel_mean: (C,) fp32, mean of each channel on the scale [0, 1].
        channel_std: (C,) fp32, standard deviation of each channel.
        total_steps: Optimiser steps of the whole run, for the schedules.
        data: Fingerprint of the images and labels, for the checkpoints.

    Raises:
        ValueError: If the masks, the patches or the loss do not fit the images.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        image_shape: tuple[int, int, int],
        channel_mean: Tensor,
        channel_std: Tensor,
        total_steps: int,
        *,
        data: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.image_shape = image_shape
        self.total_steps = total_steps
        self.data = data
        self.loss = build_loss(config, image_shape)
        self.gathers = bool(self.loss.distributed)
        self.loss.distributed = False  # until there are several processes
        self.levels = hierarchy_levels(self.loss)
        self.metric_names = metric_names(self.levels)
        # The global generator keeps its state. The weights are the same in every arm of a
        # comparison, because the encoder is drawn before the predictor and the loss draws nothing.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.encoder = VisionTransformer(config.model, image_shape, channel_mean, channel_std)
            self.predictor = Predictor(config.model, self.encoder.grid, self.levels)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        if self.loss.jepa_weight == 0:
            # The predictor's loss is only monitored. A frozen predictor takes no part in DDP's
            # exchange of gradients.
            self.predictor.requires_grad_(False)

    def setup(self, stage: str) -> None:
        """Take the negatives from all processes, where there are several."""
        self.loss.distributed = self.gathers and self.trainer.world_size > 1

    def on_after_batch_transfer(self, batch: IndexedImages, dataloader_idx: int) -> MaskedViews:
        """Augment and mask on the device, outside of autocast."""
        seed, epoch = self.config.seed, self.current_epoch
        masks = [
            multi_block_masks(
                samples=batch.samples,
                grid=self.encoder.grid,
                config=self.config.masking,
                seed=seed,
                epoch=epoch,
                view=view,
            )
            for view in (0, 1)
        ]
        both = _concatenate(masks)
        images = two_views(
            images=batch.images,
            samples=batch.samples,
            config=self.config.views,
            seed=seed,
            epoch=epoch,
        )
        return MaskedViews(images, both.visible, both.predicted, batch.labels)

    def training_step(self, batch: MaskedViews, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss and the metrics of one step."""
        pairs = len(batch.images) // 2
        context = self.encoder(batch.images, batch.visible)  # (2B, K + 1, D)
        with torch.no_grad():
            # The target encoder sees the whole views; only the hidden patches are read.
            hidden = self.target_encoder(batch.images, wanted=batch.predicted)  # (2B, M, D)
            targets = [pool_tokens(hidden, level) for level in range(self.levels)]
        with torch.set_grad_enabled(self.loss.jepa_weight != 0):
            predictions = self.predictor(context, batch.visible, batch.predicted)
        cls = cls_tokens(context)[:, None]  # (2B, 1, D)
        out = self.loss(
            predictions=predictions,
            targets=targets,
            context_features_i=cls[:pairs],
            context_features_j=cls[pairs:],
            labels=batch.labels if self.loss.contrastive_type == "sup_con" else None,
        )
        metrics = torch.stack([out[name].detach().float() for name in self.metric_names])
        return {"loss": out["loss"], "metrics": metrics}

    def on_train_batch_start(self, batch: MaskedViews, batch_idx: int) -> None:
        """Set the learning rate of this step, a pure function of its number."""
        rate = self.learning_rate_at(self.global_step)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def on_train_batch_end(self, outputs: Any, batch: MaskedViews, batch_idx: int) -> None:
        """Move the target encoder towards the context encoder."""
        momentum = self.momentum_at(self.global_step - 1)
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.target_encoder.parameters()),
                list(self.encoder.parameters()),
                1.0 - momentum,
            )

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up times cosine decay."""
        config = self.config.optimizer
        warmup = max(1, int(config.warmup_fraction * self.total_steps))
        ramp = min(1.0, (step + 1) / warmup)
        progress = max(0, step - warmup) / max(1, self.total_steps - warmup)
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        low = config.min_learning_rate
        return ramp * (low + (config.learning_rate - low) * cosine)

    def momentum_at(self, step: int) -> float:
        """Momentum of the target encoder after a step, counted from 0: linear over the run."""
        start, end = self.config.optimizer.ema_start, self.config.optimizer.ema_end
        return start + (end - start) * step / self.total_steps

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; vectors, biases and tokens do not decay."""
        config = self.config.optimizer
        decayed: list[nn.Parameter] = []
        undecayed: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                is_token = name.endswith(("cls_token", "mask_token"))
                (undecayed if parameter.ndim <= 1 or is_token else decayed).append(parameter)
        # Lightning does not clip the gradients of a fused optimizer in mixed precision, because the
        # fused kernel may undo the scaling of fp16 only after clipping. None leaves the choice of
        # the implementation to PyTorch.
        fused: bool | None = None
        if self.config.trainer.precision == "32-true":
            fused = self.device.type in ("cpu", "cuda")
        groups: list[dict[str, Any]] = [
            {"params": decayed},
            {"params": undecayed, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=fused,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint self-contained."""
        checkpoint["experiment"] = config_to_dict(self.config)
        checkpoint["image_shape"] = list(self.image_shape)
        checkpoint["data"] = self.data


def build_loss(
    config: ExperimentConfig, image_shape: tuple[int, int, int] | None = None
) -> ContrastiveJEPALoss:
    """Build the loss of an experiment and check that it fits the model and the masks.

    Args:
        config: The experiment.
        image_shape: Channels, height and width, once they are known.

    Returns:
        The loss.

    Raises:
        ValueError: If the ``loss`` section is invalid or does not fit the ``masking`` section.
    """
    # Unless the experiment says otherwise, several devices train as one does with the whole batch.
    loss = create_loss_from_config({"loss": {"gather_distributed": True, **config.loss}})
    if not isinstance(loss, ContrastiveJEPALoss):
        raise ValueError(
            "loss.type: the training program needs 'cjepa', or use_contrastive: true; for the "
            f"H-JEPA baseline set loss.contrastive_weight to 0; got {config.loss.get('type')!r}"
        )
    if loss.jepa_weight == 0 and loss.contrastive_weight == 0:
        raise ValueError("loss: jepa_weight and contrastive_weight must not both be 0")
    for module in (loss, loss.jepa_loss):
        if getattr(module, "reduction", "mean") == "none":
            raise ValueError("loss.reduction: training needs 'mean' or 'sum', got 'none'")
        if getattr(module, "reduction", "mean") == "sum" and config.trainer.devices > 1:
            raise ValueError(
                "loss.reduction: several devices average their gradients and need 'mean', got "
                f"'sum' with trainer.devices={config.trainer.devices}"
            )
    levels = hierarchy_levels(loss)
    needed = 2 ** (levels - 1)
    predicted = config.masking.predicted
    if image_shape is not None:
        rows, columns = patch_grid(config.model.patch_size, image_shape)
        predicted = patch_counts(config.masking, rows * columns).predicted
    # Whether a fraction is too small is known only with the number of patches.
    if isinstance(predicted, int) and predicted < needed:
        raise ValueError(
            f"masking.predicted: {levels} hierarchy levels need at least "
            f"{needed} predicted patches, got {predicted}"
        )
    return loss


def hierarchy_levels(loss: ContrastiveJEPALoss) -> int:
    """Number of hierarchy levels that a loss expects.

    Args:
        loss: The loss.

    Returns:
        Its ``num_hierarchies``.
    """
    return int(cast(HJEPALoss, loss.jepa_loss).num_hierarchies)


def metric_names(levels: int) -> tuple[str, ...]:
    """Names of the loss's metrics that a run records.

    Args:
        levels: Number of hierarchy levels.

    Returns:
        Keys of the loss's dictionary.
    """
    per_level = tuple(f"loss_h{level}" for level in range(levels))
    return ("loss", "jepa_loss", *per_level, *_CONTRASTIVE_METRICS)


def feature_extractor(
    encoder: VisionTransformer, device: torch.device | str, batch_size: int = 512
) -> FeatureExtractor:
    """Wrap an encoder for evaluation.

    Args:
        encoder: The encoder; it is moved to ``device``.
        device: Where to run.
        batch_size: Images per forward.

    Returns:
        A function from uint8 images (n, C, H, W), with pixels of 0 to 255, to the CLS tokens
        (n, D) and the means of the patch tokens (n, D), both fp32 on the CPU. Images of another
        dtype are a TypeError, because their scale is not known.
    """
    encoder = encoder.to(device)

    @torch.inference_mode()
    def extract(images: Tensor) -> Features:
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            raise TypeError(
                "images: expected a uint8 tensor (N, C, H, W) with pixels of 0 to 255, got "
                f"{getattr(images, 'dtype', type(images).__name__)}; pixels in [0, 1] become one "
                "by (255 * images).round().to(torch.uint8)"
            )
        was_training = encoder.training
        encoder.eval()
        cls, mean = [], []
        for batch in torch.split(images, batch_size):
            tokens = encoder(batch.to(device).float() / 255.0).float()
            cls.append(tokens[:, 0].cpu())
            mean.append(tokens[:, 1:].mean(dim=1).cpu())
        encoder.train(was_training)
        return Features(cls=torch.cat(cls), mean=torch.cat(mean))

    return extract


def _concatenate(masks: Sequence[PatchMasks]) -> PatchMasks:
    return PatchMasks(
        visible=torch.cat([mask.visible for mask in masks]),
        predicted=torch.cat([mask.predicted for mask in masks]),
    )
