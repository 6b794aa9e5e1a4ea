"""The results of the loss modules: a dict, or the loss alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from cjepa_kernels.functional.checks import check_bool

LossResult = dict[str, Tensor] | Tensor


class LossDict(dict[str, Tensor]):
    """A dict of the loss and its metrics. Its only difference from a dict is one error message."""

    def __getattr__(self, name: str) -> Any:
        message = f"{type(self).__name__!r} object has no attribute {name!r}"
        if hasattr(Tensor, name):
            message = (
                f"a loss module returns a dict, which has no {name!r}: use "
                'loss_fn(...)["loss"], or make the module with return_dict=False'
            )
        raise AttributeError(message)

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError(
            'a loss module returns a dict, which is no number: use loss_fn(...)["loss"], or make '
            "the module with return_dict=False"
        )

    __add__ = __radd__ = __mul__ = __rmul__ = __truediv__ = __sub__ = __rsub__ = __neg__ = _refuse


def _flatten(result: LossDict) -> tuple[list[Tensor], list[str]]:
    return list(result.values()), list(result)


def _unflatten(values: Iterable[Any], keys: Any) -> LossDict:
    return LossDict(zip(keys, values, strict=True))


# PyTorch's own tools, DistributedDataParallel among them, look into exact dicts and into the
# classes that are registered.
_pytree.register_pytree_node(
    LossDict,
    _flatten,
    _unflatten,
    serialized_type_name=f"{__name__}.{LossDict.__name__}",
)


class LossModule(nn.Module):
    """A loss with monitoring metrics.

    Args:
        return_dict: Return a dict with ``loss`` and the metrics. Otherwise a call returns the loss,
            and the metrics of the last call are the attribute ``last_metrics``.
    """

    # For modules that were pickled before they had these attributes.
    return_dict: bool = True
    last_metrics: dict[str, Tensor] = {}  # noqa: RUF012  (each call assigns a new dict)

    def __init__(self, *, return_dict: bool = True) -> None:
        super().__init__()
        check_bool("return_dict", return_dict)
        self.return_dict = return_dict
        self.last_metrics = {}

    def _result(self, result: dict[str, Tensor]) -> LossResult:
        """Return the dict, or only its ``loss`` and note the others."""
        if self.return_dict:
            # A compiled graph returns what it has in hand, without a call of Python.
            return result if torch.compiler.is_compiling() else LossDict(result)
        self.last_metrics = {key: x.detach() for key, x in result.items() if key != "loss"}
        return result["loss"]
