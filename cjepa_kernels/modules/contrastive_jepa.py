"""C-JEPA: a JEPA loss plus a contrastive loss on the CLS tokens of two views."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cjepa_kernels.backends import Backend
from cjepa_kernels.definitions import (
    CONTRASTIVE_TYPES,
    CONTRASTIVE_WEIGHT,
    EPS,
    JEPA_WEIGHT,
    TEMPERATURE,
    ContrastiveType,
    Reduction,
    Strategy,
)
from cjepa_kernels.distributed import resolve_group
from cjepa_kernels.functional import cls_tokens
from cjepa_kernels.functional.checks import (
    as_float,
    check_bool,
    check_floating_tensor,
    check_strategy,
    described,
    is_number,
)
from cjepa_kernels.functional.view_accuracy import view_accuracy
from cjepa_kernels.modules.float_attribute import float_attribute
from cjepa_kernels.modules.hjepa import Levels
from cjepa_kernels.modules.info_nce import InfoNCELoss
from cjepa_kernels.modules.loss_module import LossModule, LossResult
from cjepa_kernels.modules.nt_xent import NTXentLoss
from cjepa_kernels.modules.sup_con import SupConLoss


class ContrastiveJEPALoss(LossModule):
    """``jepa_weight`` x JEPA + ``contrastive_weight`` x contrastive loss of the CLS tokens.

    The weights are plain attributes: setting them takes effect at the next call. A term whose
    weight is 0 is computed for monitoring only, without a gradient.

    Args:
        jepa_loss: Module called as ``jepa_loss(predictions, targets, masks)`` that returns a dict
            with ``loss``, such as :class:`HJEPALoss`.
        jepa_weight: Weight of the JEPA term, finite and not negative. Default 1.0.
        contrastive_weight: Weight of the contrastive term, finite and not negative.
            Default 0.1.
        contrastive_temperature: Temperature of the contrastive term. Default 0.1.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        contrastive_on_context: Contrast the context features. The default takes the target
            features where they are given, which under an EMA encoder carry no gradient.
        reduction: Reduction of the contrastive term: ``mean``, ``sum`` or ``none``.
        eps: Lower bound on the norm used for normalisation. Default 1e-8.
        contrastive_type: The contrastive loss of the two views. ``nt_xent`` is the default.
            ``dcl``: NT-Xent without the positive in the sum. ``info_nce``: each view among the rows
            of the other view, in both directions, as CLIP trains. ``sup_con``: SupCon, which takes
            ``labels`` and has both views of all samples of a label as positives.
        backend: Back end of the contrastive term, see :func:`cjepa_kernels.backends`.
        distributed: Take the negatives from all ranks (True) or from those of a process group, as
            described for ``group`` in the function of the contrastive loss. With ``sup_con``, and
            with labels, every rank does the work of the whole batch.
        strategy: How the ranks work together: ``auto``, ``all_gather`` or ``ring``. There
            is no ring for ``sup_con``, nor for ``nt_xent`` and ``dcl`` with labels.
        return_dict: Return a dict. With False a call returns the loss alone, as most losses do, and
            the metrics of the last call are the attribute ``last_metrics``.

    Raises:
        ValueError, TypeError: A bad argument; the message names it.

    Source: the sum as in H-JEPA (github.com/jonwiggins/H-JEPA); NT-Xent from SimCLR, arXiv
    2002.05709; DCL, arXiv 2110.06848; SupCon, arXiv 2004.11362. The published C-JEPA (arXiv
    2410.19560) regularises with VICReg instead.

    Example:
        >>> from cjepa_kernels import HJEPALoss
        >>> loss_fn = ContrastiveJEPALoss(HJEPALoss(num_hierarchies=1))
        >>> patches = torch.ones(2, 4, 8)
        >>> features = torch.eye(2, 8)[:, None, :].requires_grad_()  # CLS at index 0
        >>> out = loss_fn([patches], [patches], features, features)
        >>> out["contrastive_accuracy"].item()
        1.0
    """

    jepa_weight: float = float_attribute("jepa_weight")
    contrastive_weight: float = float_attribute("contrastive_weight")

    def __init__(
        self,
        jepa_loss: nn.Module,
        jepa_weight: float = JEPA_WEIGHT,
        contrastive_weight: float = CONTRASTIVE_WEIGHT,
        contrastive_temperature: float = TEMPERATURE,
        use_cosine_similarity: bool = True,
        contrastive_on_context: bool = False,
        reduction: Reduction = "mean",
        eps: float = EPS,
        *,
        contrastive_type: ContrastiveType = "nt_xent",
        backend: Backend = "auto",
        distributed: bool | ProcessGroup = False,
        strategy: Strategy = "auto",
        return_dict: bool = True,
    ) -> None:
        super().__init__(return_dict=return_dict)
        if not isinstance(jepa_loss, nn.Module):
            raise TypeError(f"jepa_loss must be an nn.Module, got {type(jepa_loss).__name__}")
        if isinstance(jepa_loss, LossModule) and not jepa_loss.return_dict:
            raise ValueError("jepa_loss must return a dict, got a module with return_dict=False")
        for name, weight in (
            ("jepa_weight", jepa_weight),
            ("contrastive_weight", contrastive_weight),
        ):
            if not is_number(weight):
                raise TypeError(f"{name} must be a number, got {weight!r}")
            if not 0 <= as_float(weight) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {weight}")
        self.jepa_loss = jepa_loss
        self.jepa_weight = jepa_weight
        self.contrastive_weight = contrastive_weight
        check_bool("contrastive_on_context", contrastive_on_context)
        self.contrastive_on_context = contrastive_on_context
        if contrastive_type not in CONTRASTIVE_TYPES:
            raise ValueError(
                f"contrastive_type must be one of {list(CONTRASTIVE_TYPES)}, got "
                f"{contrastive_type!r}"
            )
        options: dict[str, Any] = {
            "temperature": contrastive_temperature,
            "use_cosine_similarity": use_cosine_similarity,
            "reduction": reduction,
            "eps": eps,
            "backend": backend,
        }
        self.contrastive: NTXentLoss | InfoNCELoss | SupConLoss
        check_strategy(strategy)
        if strategy == "ring" and contrastive_type == "sup_con":
            raise ValueError(
                'strategy must be "auto" or "all_gather" with contrastive_type="sup_con", '
                'got "ring"'
            )
        if contrastive_type == "info_nce":
            self.contrastive = InfoNCELoss(**options, symmetric=True, strategy=strategy)
        elif contrastive_type == "sup_con":
            self.contrastive = SupConLoss(**options)
        else:
            self.contrastive = NTXentLoss(
                **options, decoupled=contrastive_type == "dcl", strategy=strategy
            )
        self.distributed = distributed
        self._warned_no_gradient = False

    @property
    def contrastive_type(self) -> ContrastiveType:
        """Name of the contrastive loss."""
        if isinstance(self.contrastive, SupConLoss):
            return "sup_con"
        if isinstance(self.contrastive, InfoNCELoss):
            return "info_nce"
        return "dcl" if self.contrastive.decoupled else "nt_xent"

    @property
    def distributed(self) -> bool | ProcessGroup:
        """Whether negatives come from all ranks, or the process group that they come from."""
        return self.contrastive.distributed

    @distributed.setter
    def distributed(self, value: bool | ProcessGroup) -> None:
        self.contrastive.distributed = value

    @property
    def eps(self) -> float:
        """Lower bound on the norm that the contrastive term uses for normalisation."""
        return self.contrastive.eps

    def forward(
        self,
        predictions: Levels,
        targets: Levels,
        context_features_i: Tensor | None = None,
        context_features_j: Tensor | None = None,
        target_features_i: Tensor | None = None,
        target_features_j: Tensor | None = None,
        masks: Levels | None = None,
        *,
        context_features: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> LossResult:
        """Both terms, their weighted sum and the metrics.

        Args:
            predictions: One (B, N_l, D) tensor per level.
            targets: Same shapes.
            context_features_i: (B, N+1, D) context features of view i, CLS at index 0.
            context_features_j: Same for view j.
            target_features_i: (B, N+1, D) target features of view i.
            target_features_j: Same for view j.
            masks: Optional, one (B, N_l) bool tensor per level, True keeps the patch.
            context_features: Ignored beside a pair of views; alone it is an error.
            labels: (B,) integers. ``sup_con`` needs them. With ``nt_xent`` and ``dcl`` they are
                optional, and samples of equal label are then no negatives of each other.

        Returns:
            ``loss``, ``jepa_loss``, ``contrastive_loss``, ``contrastive_accuracy``,
            ``contrastive_pos_sim``, ``contrastive_neg_sim`` and the parts of the JEPA loss. With
            ``return_dict=False`` the loss alone. The accuracy is the share of anchors whose other
            view beats every negative; with labels, those are the rows of other labels. With
            ``sup_con`` the anchors of a batch of more than 256 samples are the views of 256.

        Raises:
            ValueError: No pair of features to contrast, wrong shapes, or labels that are missing or
                that the contrastive loss does not take.
        """
        self._check_labels(labels)
        features_i, features_j = self._choose_features(
            (context_features_i, context_features_j),
            (target_features_i, target_features_j),
            context_features,
        )
        with nullcontext() if self.jepa_weight else torch.no_grad():
            jepa = self.jepa_loss(predictions, targets, masks)
        with nullcontext() if self.contrastive_weight else torch.no_grad():
            contrastive = self._contrast(cls_tokens(features_i), cls_tokens(features_j), labels)

        terms = []
        if self.jepa_weight:
            terms.append(as_float(self.jepa_weight) * jepa["loss"])
        if self.contrastive_weight:
            self._warn_without_gradient(features_i, features_j)
            terms.append(as_float(self.contrastive_weight) * contrastive["loss"])
        # A weight of 0 leaves its term out, because 0 x NaN would still be NaN.
        loss = sum(terms[1:], terms[0]) if terms else 0.0 * jepa["loss"]
        return self._result(
            {
                **jepa,
                "loss": loss,
                "jepa_loss": jepa["loss"],
                "contrastive_loss": contrastive["loss"],
                "contrastive_accuracy": contrastive["accuracy"],
                "contrastive_pos_sim": contrastive["positive_similarity"],
                "contrastive_neg_sim": contrastive["negative_similarity"],
            }
        )

    def _check_labels(self, labels: Tensor | None) -> None:
        kind = self.contrastive_type
        if kind == "sup_con" and labels is None:
            raise ValueError("labels must be given with contrastive_type='sup_con', got None")
        if kind == "info_nce" and labels is not None:
            raise ValueError(
                "labels must be None with contrastive_type='info_nce', got "
                f"{described(labels)}; nt_xent, dcl and sup_con take labels"
            )

    def _contrast(self, z_i: Tensor, z_j: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """The contrastive loss and its metrics; (B, D) each."""
        loss_fn = self.contrastive
        if isinstance(loss_fn, NTXentLoss):
            return _as_dict(loss_fn(z_i, z_j, labels=labels))
        if isinstance(loss_fn, InfoNCELoss):
            return _as_dict(loss_fn(z_i, z_j))
        result = _as_dict(loss_fn(torch.stack([z_i, z_j], dim=1), labels))
        assert labels is not None
        accuracy = view_accuracy(
            z_i,
            z_j,
            labels,
            use_cosine_similarity=loss_fn.use_cosine_similarity,
            eps=loss_fn.eps,
            group=resolve_group(loss_fn.distributed),
            backend=loss_fn.backend,
        )
        return {**result, "accuracy": accuracy}

    def _choose_features(
        self,
        context: tuple[Tensor | None, Tensor | None],
        target: tuple[Tensor | None, Tensor | None],
        context_features: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        context_i, context_j = context
        target_i, target_j = target
        if not self.contrastive_on_context and target_i is not None and target_j is not None:
            name, pair = "target_features", (target_i, target_j)
        elif context_i is not None and context_j is not None:
            name, pair = "context_features", (context_i, context_j)
        elif context_features is not None:
            raise ValueError(
                "context_features alone holds one view and contrastive learning needs two views: "
                "pass context_features_i and context_features_j"
            )
        elif self.contrastive_on_context:
            raise ValueError(
                "contrastive_on_context=True but context_features not provided: pass "
                "context_features_i and context_features_j"
            )
        else:
            raise ValueError(
                "Either target_features or context_features must be provided for contrastive "
                "learning: pass the _i and _j views of one of them"
            )
        if pair[0].shape != pair[1].shape:
            raise ValueError(
                f"{name}_i and {name}_j must have the same shape, got {tuple(pair[0].shape)} and "
                f"{tuple(pair[1].shape)}"
            )
        for suffix, features in zip("ij", pair, strict=True):
            check_floating_tensor(f"{name}_{suffix}", features)
            if features.ndim != 3 or 0 in features.shape:
                raise ValueError(
                    f"{name}_{suffix} must be (B, N+1, D) with the CLS token at index 0, got "
                    f"{tuple(features.shape)}"
                )
        return pair

    def _warn_without_gradient(self, features_i: Tensor, features_j: Tensor) -> None:
        if (
            self._warned_no_gradient
            or torch.compiler.is_compiling()  # a warning would break the graph
            or not torch.is_grad_enabled()
            or features_i.requires_grad
            or features_j.requires_grad
        ):
            return
        self._warned_no_gradient = True
        warnings.warn(
            "the features chosen for the contrastive term carry no gradient (features of an EMA "
            "target encoder do not), so the term trains nothing; pass context features and set "
            "contrastive_on_context=True",
            UserWarning,
            stacklevel=3,
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for buffer in ("_jepa_weight", "_contrastive_weight"):  # buffers in H-JEPA's checkpoints
            state_dict.pop(prefix + buffer, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def get_loss_summary(self, loss_dict: dict[str, Tensor]) -> str:
        """A readable breakdown of the result of ``forward``; the host waits for it."""

        def value(key: str) -> float:
            return float(loss_dict[key].detach().mean())

        lines = [
            "C-JEPA Loss Summary:",
            f"  Total Loss: {value('loss'):.6f}",
            f"  JEPA Loss (weight={self.jepa_weight:.3f}): {value('jepa_loss'):.6f}",
            f"  Contrastive Loss (weight={self.contrastive_weight:.3f}): "
            f"{value('contrastive_loss'):.6f}",
            f"  Contrastive Accuracy: {value('contrastive_accuracy'):.4f}",
            f"  Positive Similarity: {value('contrastive_pos_sim'):.4f}",
            f"  Negative Similarity: {value('contrastive_neg_sim'):.4f}",
        ]
        levels = sorted(
            int(key[6:]) for key in loss_dict if key.startswith("loss_h") and key[6:].isdigit()
        )
        if levels:
            lines += ["", "JEPA Hierarchical Breakdown:"]
            lines += [f"  Level {level}: {value(f'loss_h{level}'):.6f}" for level in levels]
        return "\n".join(lines)

    def extra_repr(self) -> str:
        """Settings as ``name=value``, for ``print(module)``."""
        kind = self.contrastive_type
        return (
            f"{'' if kind == 'nt_xent' else f'contrastive_type={kind}, '}"
            f"jepa_weight={self.jepa_weight}, contrastive_weight={self.contrastive_weight}, "
            f"temperature={self.contrastive.describe_temperature()}, "
            f"contrastive_on_context={self.contrastive_on_context}"
        )


def _as_dict(result: LossResult) -> dict[str, Tensor]:
    """The result of a contrastive loss, which returns a dict here."""
    assert isinstance(result, dict)
    return result
