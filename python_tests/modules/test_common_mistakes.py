"""Mistakes of people who come from other projects get errors that say what to do."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from cjepa_kernels import InfoNCELoss, NTXentLoss


@pytest.mark.parametrize(
    ("make", "name", "reference"),
    [
        (NTXentLoss, "memory_bank_size", "cjepa_kernels.compat.lightly.NTXentLoss"),
        (NTXentLoss, "gather_distributed", "distributed=True, .*compat.lightly.NTXentLoss"),
        (InfoNCELoss, "negative_mode", "cjepa_kernels.compat.info_nce.InfoNCE"),
        (InfoNCELoss, "local_loss", "cjepa_kernels.compat.open_clip.ClipLoss"),
        (InfoNCELoss, "gather_with_grad", "cjepa_kernels.compat.open_clip.ClipLoss"),
    ],
)
def test_an_argument_of_another_project(make: Any, name: str, reference: str) -> None:
    with pytest.raises(
        TypeError, match=rf"got an unexpected keyword argument '{name}': .*{reference}"
    ):
        make(**{name: 0})
    assert name not in inspect.signature(make).parameters


def test_another_unknown_argument_has_the_error_of_python() -> None:
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'margin'$"):
        NTXentLoss(margin=0.1)


def result() -> Any:
    z = torch.randn(4, 3, requires_grad=True)
    return NTXentLoss()(z, torch.randn(4, 3))


@pytest.mark.parametrize(
    "use", [lambda x: 0.5 * x, lambda x: x / 2, lambda x: x + torch.ones(()), lambda x: -x]
)
def test_the_dict_taken_for_a_number(use: Any) -> None:
    with pytest.raises(TypeError, match=r"is no number: use .*\[\"loss\"\], .* return_dict=False"):
        use(result())


@pytest.mark.parametrize("name", ["backward", "item", "detach", "dtype"])
def test_the_dict_taken_for_the_loss(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"no '{name}': .*\[\"loss\"\], .* return_dict=False"):
        getattr(result(), name)
    with pytest.raises(AttributeError, match=r"^'LossDict' object has no attribute 'logits'$"):
        result().logits  # noqa: B018  (the look-up is what is tried)


def test_the_result_is_a_dict() -> None:
    out = result()
    assert isinstance(out, dict)
    assert repr(out) == repr(dict(out))
    assert not hasattr(out, "backward")
    assert {**out} == out
    detached = type(out)({key: x.detach() for key, x in out.items()})
    for other in (pickle.loads(pickle.dumps(detached)), copy.deepcopy(detached)):
        assert type(other) is type(out)
        assert all(torch.equal(other[key], x) for key, x in detached.items())


def test_tools_of_pytorch_look_into_it() -> None:
    out = result()
    doubled = _pytree.tree_map(lambda x: 2 * x, out)
    assert type(doubled) is type(out)
    assert torch.equal(doubled["loss"], 2 * out["loss"])
    assert len(_pytree.tree_leaves(out)) == len(out)


def test_a_compiled_module_returns_a_dict() -> None:
    def loss(z: Tensor) -> Tensor:
        value: Tensor = NTXentLoss()(z, z.flip(0))["loss"]
        return value

    z = torch.randn(4, 3)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert torch.equal(compiled(z), loss(z))
