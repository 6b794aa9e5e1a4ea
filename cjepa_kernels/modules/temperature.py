"""The temperature of a contrastive loss: a number, or a parameter that is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cjepa_kernels.functional.checks import as_float, check_temperature
from cjepa_kernels.modules.loss_module import LossModule


class TemperatureModule(LossModule):
    """A loss with a temperature, which is learnable on request.

    Args:
        temperature: Float from 1e-30 to 1e30.
        learnable_temperature: Train log(temperature) as the parameter ``log_temperature``.
        temperature_shape: Shape of ``log_temperature``, () or (1,).
        return_dict: As for ``LossModule``.
    """

    def __init__(
        self,
        temperature: float,
        *,
        learnable_temperature: bool,
        temperature_shape: Sequence[int],
        return_dict: bool,
    ) -> None:
        super().__init__(return_dict=return_dict)
        check_float_temperature(temperature)
        if not isinstance(temperature_shape, Sequence) or tuple(temperature_shape) not in (
            (),
            (1,),
        ):
            raise ValueError(f"temperature_shape must be () or (1,), got {temperature_shape!r}")
        self._temperature = as_float(temperature)  # of a learnable one, the start
        self.log_temperature: nn.Parameter | None
        if learnable_temperature:
            self.log_temperature = nn.Parameter(torch.empty(tuple(temperature_shape)))
            self.reset_parameters()
        else:
            self.register_parameter("log_temperature", None)

    def reset_parameters(self) -> None:
        """Set a learnable temperature back to its first value."""
        if self.log_temperature is not None:
            self._fill(self.log_temperature, self._temperature)

    @property
    def temperature(self) -> float | Tensor:
        """The float in use, or exp(log_temperature) as a tensor when it is learnable."""
        if self.log_temperature is None:
            return self._temperature
        return self.log_temperature.exp()

    @temperature.setter
    def temperature(self, value: float) -> None:
        check_float_temperature(value)
        if self.log_temperature is None:
            self._temperature = as_float(value)
        else:
            self._fill(self.log_temperature, value)

    def _fill(self, parameter: nn.Parameter, temperature: float) -> None:
        with torch.no_grad():
            if parametrize.is_parametrized(self, "log_temperature"):
                # The attribute is computed from other parameters, which an assignment changes.
                value: Any = torch.full_like(parameter, math.log(temperature))
                self.log_temperature = value
            elif torch.compiler.is_compiling():
                # torch.compile would take math.log(temperature) for a constant and recompile for
                # every temperature. It turns a factor into a tensor.
                one = torch.ones((), dtype=torch.float64, device=parameter.device)
                parameter.copy_((one * temperature).log())
            else:
                parameter.fill_(math.log(temperature))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        stored, own = state_dict.get(f"{prefix}log_temperature"), self.log_temperature
        if isinstance(stored, Tensor) and own is not None and stored.numel() == own.numel() == 1:
            state_dict[f"{prefix}log_temperature"] = stored.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def describe_temperature(self) -> str:
        """The temperature for ``print``, or a formula where no process can read it alone."""
        if self.log_temperature is None:
            return f"{self._temperature:.6g}"
        log = self.log_temperature.detach()
        if type(log) is not Tensor or log.is_meta or log.numel() != 1:  # a shard has 0 or 1 numbers
            return "exp(log_temperature)"
        return f"{log.exp().item():.6g}"


def check_float_temperature(temperature: float) -> None:
    """Raise unless ``temperature`` is a number in range."""
    if isinstance(temperature, Tensor):
        raise TypeError(
            "temperature must be a float here; learnable_temperature=True trains it, and the "
            "functions take a tensor"
        )
    check_temperature(temperature)
