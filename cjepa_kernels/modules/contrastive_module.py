"""What the contrastive losses have in common: their settings, checked, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cjepa_kernels.backends import Backend, check_backend
from cjepa_kernels.definitions import Reduction
from cjepa_kernels.functional.checks import check_bool, check_in_range, check_reduction
from cjepa_kernels.modules.float_attribute import float_attribute
from cjepa_kernels.modules.temperature import TemperatureModule


class ContrastiveModule(TemperatureModule):
    """A contrastive loss with a temperature.

    Args:
        temperature: As for ``TemperatureModule``.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        reduction: ``mean``, ``sum`` or ``none``.
        eps: Lower bound on the norm used for normalisation.
        learnable_temperature: As for ``TemperatureModule``.
        temperature_shape: As for ``TemperatureModule``.
        backend: ``auto`` or a name from :func:`cjepa_kernels.backends`.
        return_dict: As for ``LossModule``.
    """

    eps: float = float_attribute("eps")

    def __init__(
        self,
        temperature: float,
        *,
        use_cosine_similarity: bool,
        reduction: Reduction,
        eps: float,
        learnable_temperature: bool,
        temperature_shape: Sequence[int],
        backend: Backend,
        return_dict: bool,
    ) -> None:
        super().__init__(
            temperature,
            learnable_temperature=learnable_temperature,
            temperature_shape=temperature_shape,
            return_dict=return_dict,
        )
        check_bool("use_cosine_similarity", use_cosine_similarity)
        check_reduction(reduction)
        check_in_range("eps", eps)
        check_backend(backend)
        self.use_cosine_similarity = use_cosine_similarity
        self.reduction: Reduction = reduction
        self.eps = eps
        self.backend: Backend = backend

    def _settings(self) -> dict[str, Any]:
        """The arguments of the loss's function that do not come with a batch."""
        return {
            "temperature": self.temperature,
            "use_cosine_similarity": self.use_cosine_similarity,
            "eps": self.eps,
            "reduction": self.reduction,
            "backend": self.backend,
        }

    def _own_settings(self) -> dict[str, Any]:
        """What a subclass shows beside the settings that all losses have."""
        return {}

    def extra_repr(self) -> str:
        """Settings as ``name=value``, for ``print(module)``."""
        learnable = {} if self.log_temperature is None else {"learnable_temperature": True}
        shown = {
            "temperature": self.describe_temperature(),
            **learnable,
            **self._own_settings(),
            "use_cosine_similarity": self.use_cosine_similarity,
            "reduction": self.reduction,
            "backend": self.backend,
        }
        return ", ".join(f"{name}={value}" for name, value in shown.items())
