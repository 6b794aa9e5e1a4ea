"""The results of the loss modules: a dict, or the loss alone."""

from __future__ import annotations

from torch import Tensor, nn

from cjepa_kernels.functional.checks import check_bool

LossResult = dict[str, Tensor] | Tensor


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
            return result
        self.last_metrics = {key: x.detach() for key, x in result.items() if key != "loss"}
        return result["loss"]
