"""Modules are reset, moved, copied, pickled and loaded, and take numbers of NumPy."""

from __future__ import annotations

import copy
import io
import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from overloads import BACKENDS
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cjepa_kernels import (
    ContrastiveJEPALoss,
    HJEPALoss,
    NTXentLoss,
    cross_logsumexp,
    nt_xent,
    pair_similarity,
    prediction_loss,
)

SHAPES = pytest.mark.parametrize("shape", [(), (1,)], ids=str)


def learnable(temperature: float = 0.2, **options: Any) -> NTXentLoss:
    return NTXentLoss(temperature, learnable_temperature=True, **options)


def temperature_of(module: NTXentLoss) -> float:
    return torch.as_tensor(module.temperature).item()


def test_a_temperature_of_one_element_is_a_temperature(backend: Any) -> None:
    x, y = torch.randn(2, 5, 4)
    for function in (nt_xent, cross_logsumexp):
        gradients = []
        for shape in ((), (1,)):
            temperature = torch.full(shape, 0.3, requires_grad=True)
            out: Any = function(x, y, temperature=temperature, backend=backend)
            out[0].sum().backward()
            assert temperature.grad is not None
            assert temperature.grad.shape == shape
            gradients.append((out, temperature.grad.reshape(())))
        torch.testing.assert_close(*gradients, rtol=0.0, atol=0.0)
        assert gradients[0][1] != 0


@pytest.mark.parametrize("shape", [(2,), (1, 1), (0,)], ids=str)
def test_other_shapes_of_a_temperature_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(\) or \(1,\), got a tensor of shape"):
        nt_xent(*torch.randn(2, 5, 4), temperature=torch.full(shape, 0.3))


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_learnable_temperature_of_either_shape(
    shape: tuple[int, ...], dtype: torch.dtype, backend: Any
) -> None:
    module = learnable(temperature_shape=shape, backend=backend).to(dtype)
    z = torch.randn(2, 5, 4)
    module(*z)["loss"].backward()
    parameter = module.log_temperature
    assert parameter is not None
    assert parameter.grad is not None
    assert parameter.shape == parameter.grad.shape == shape
    tau = parameter.detach().exp().reshape(()).requires_grad_()
    (expected,) = torch.autograd.grad(nt_xent(*z, temperature=tau, backend=backend).loss, tau)
    torch.testing.assert_close(parameter.grad.reshape(()), expected * tau.detach())


@SHAPES
@pytest.mark.parametrize("other", [(), (1,)], ids=str)
def test_state_dicts_of_either_shape_load_into_either(
    shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    source, target = learnable(0.3, temperature_shape=shape), learnable(temperature_shape=other)
    state = nn.Sequential(source).state_dict()
    nn.Sequential(target).load_state_dict(state)
    assert state["0.log_temperature"].shape == shape
    assert target.log_temperature is not None
    assert target.log_temperature.shape == other
    assert temperature_of(target) == pytest.approx(0.3)


@pytest.mark.parametrize("shape", [(2,), (1, 1), 1, None, "1", (True, 1)], ids=str)
def test_bad_shapes_of_a_parameter_are_refused(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"temperature_shape must be \(\) or \(1,\), got"):
        learnable(temperature_shape=shape)


@SHAPES
def test_reset_restores_the_start_value(shape: tuple[int, ...]) -> None:
    module = learnable(0.25, temperature_shape=shape)
    module.temperature = 0.7
    assert temperature_of(module) == pytest.approx(0.7)
    module.reset_parameters()
    assert temperature_of(module) == pytest.approx(0.25)
    fixed = NTXentLoss(0.25)
    fixed.temperature = 0.7
    fixed.reset_parameters()  # a fixed temperature is no parameter and does not change
    assert fixed.temperature == 0.7


@SHAPES
def test_a_module_made_on_meta(shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        module = learnable(0.25, temperature_shape=shape)
        whole = ContrastiveJEPALoss(HJEPALoss())
        whole.contrastive = learnable()
    assert "temperature=exp(log_temperature)" in repr(module)
    assert "temperature=exp(log_temperature)" in repr(whole)
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert module.log_temperature is not None
    assert module.log_temperature.shape == shape
    assert module.log_temperature.item() == pytest.approx(math.log(0.25))
    assert "temperature=0.25," in repr(module)
    assert module(*torch.randn(2, 5, 4))["loss"].isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_meta_tensors_give_meta_tensors(backend: Any, dtype: torch.dtype, tensor: bool) -> None:
    """Results and gradients on the meta device have the shapes and dtypes of those on the CPU."""
    results: list[list[Any]] = []
    for device in ("cpu", "meta"):
        x, y = torch.randn(2, 5, 4).to(device, dtype).requires_grad_()
        tau: Any = torch.full((1,), 0.3, device=device, requires_grad=True) if tensor else 0.3
        outputs = [
            *nt_xent(x, y, temperature=tau, backend=backend),
            *cross_logsumexp(x, y, temperature=tau, backend=backend),
            prediction_loss(x, y, backend=backend),
            pair_similarity(x, y, backend=backend),
        ]
        module = NTXentLoss(backend=backend)(x, y)
        outputs += [module["loss"], module["accuracy"]]
        (gradient,) = torch.autograd.grad(outputs[0], x)
        outputs.append(gradient)
        assert {out.device.type for out in outputs} == {device}
        results.append([(out.shape, out.dtype) for out in outputs])
    assert results[0] == results[1]


def test_copies_and_pickles_are_equal_and_independent() -> None:
    module = ContrastiveJEPALoss(HJEPALoss(num_hierarchies=1))
    module.contrastive = learnable(0.3)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ):
        assert repr(other) == repr(module)
        other.contrastive.temperature = 0.5
        other.contrastive.reset_parameters()
        assert temperature_of(other.contrastive) == pytest.approx(0.3)
        other.contrastive.temperature = 0.5
        assert temperature_of(module.contrastive) == pytest.approx(0.3)


def copy_with_groups() -> list[Any]:
    """Run on each rank: whether copies share the group, and what pickling a loss gives."""
    world, other = torch.distributed.group.WORLD, torch.distributed.new_group([0, 1])
    answers: list[Any] = []
    for group in (world, other):
        module: Any = NTXentLoss(distributed=group)
        whole: Any = ContrastiveJEPALoss(HJEPALoss(), distributed=group)
        for copied in (copy.deepcopy(module), copy.deepcopy(whole).contrastive, copy.copy(module)):
            answers.append(copied.distributed is group and copied is not module)
        z = torch.randn(2, 3, 4)
        answers.append(bool((copy.deepcopy(module)(*z)["loss"] == module(*z)["loss"]).item()))
        for loss in (module, whole):
            try:
                loaded = pickle.loads(pickle.dumps(loss))
                answers.append(getattr(loaded, "contrastive", loaded).distributed)
            except TypeError as error:
                answers.append(str(error))
    return answers


def test_a_process_group_is_shared_by_copies(ranks: Any) -> None:
    processes: Ranks = ranks(2)
    for answers in processes.run(copy_with_groups):
        assert answers[:6] == [True] * 6  # pickle stores the default group as True
        assert answers[6:10] == [True] * 4
        for message in answers[10:]:
            assert "other than the default one cannot be pickled" in message
            assert "state_dict" in message


def test_distributed_is_checked_when_it_is_set() -> None:
    module = NTXentLoss()
    for bad in (1, None, "gloo"):
        with pytest.raises(TypeError, match="distributed must be a bool or a process group"):
            module.distributed = bad  # type: ignore[assignment]
    module.distributed = True
    assert module.distributed is True


class Bounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.tanh(x)

    def right_inverse(self, x: Tensor) -> Tensor:
        return torch.atanh(x / 2)


@SHAPES
def test_a_parametrized_temperature_can_be_set(shape: tuple[int, ...]) -> None:
    module = learnable(0.3, temperature_shape=shape)
    parametrize.register_parametrization(module, "log_temperature", Bounded())
    module.temperature = 0.5
    assert temperature_of(module) == pytest.approx(0.5)
    module.reset_parameters()
    assert temperature_of(module) == pytest.approx(0.3)
    module(*torch.randn(2, 5, 4))["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_a_replica_of_data_parallel_computes_the_same() -> None:
    """``nn.parallel.replicate`` turns the parameters into attributes of another module."""
    module, z = learnable(0.3), torch.randn(2, 5, 4)
    replica: Any = module._replicate_for_data_parallel()
    replica.log_temperature = module.log_temperature.detach().clone()
    torch.testing.assert_close(replica(*z), module(*z))


def test_the_training_programs_optimizer_spares_the_temperature_from_decay() -> None:
    pytest.importorskip("lightning")
    from train_experiments import tiny

    from cjepa_kernels.train.loop.module import CJEPAModule

    for shape in ((), (1,)):
        module = CJEPAModule(tiny(), (1, 8, 8), torch.zeros(1), torch.ones(1), total_steps=8)
        module.loss.contrastive = learnable(temperature_shape=shape)
        groups: Any = module.configure_optimizers().param_groups
        (decay,) = [
            group["weight_decay"]
            for group in groups
            for parameter in group["params"]
            if parameter is module.loss.contrastive.log_temperature
        ]
        assert decay == 0.0


@pytest.mark.parametrize(
    "number",
    [np.float16(0.5), np.float32(0.3), np.float64(0.3), np.int64(1), 1, Fraction(1, 4)],
    ids=repr,
)
@pytest.mark.filterwarnings("error:overflow")
def test_every_real_number_is_taken(number: Any) -> None:
    x, y = torch.randn(2, 5, 4, requires_grad=True)
    value = float(number)

    def results(n: Any, backend: Any) -> list[Tensor]:
        whole = ContrastiveJEPALoss(
            HJEPALoss(
                hierarchy_weights=[n, n], num_hierarchies=2, huber_delta=n, eps=n, smoothl1_beta=n,
                backend=backend,
            ),
            n, n, n, eps=n, contrastive_on_context=True, backend=backend,
        )  # fmt: skip
        found = [whole([x, x], [y, y], x[:, None], y[:, None])["loss"]]
        whole.jepa_loss.hierarchy_weights = [n, 1]  # type: ignore[assignment]
        whole.jepa_weight = whole.contrastive_weight = whole.contrastive.temperature = n
        found.append(whole([x, x], [y, y], x[:, None], y[:, None])["loss"])
        found += [
            nt_xent(x, y, temperature=n, eps=n, backend=backend).loss,
            cross_logsumexp(x, y, temperature=n, eps=n, backend=backend).row_lse,
            prediction_loss(x, y, smoothl1_beta=n, huber_delta=n, eps=n, backend=backend),
            pair_similarity(x, y, eps=n, backend=backend),
            HJEPALoss(hierarchy_weights=n, num_hierarchies=1, backend=backend)(x, y)["loss"],
            learnable(n, backend=backend)(x, y)["loss"],
        ]
        return found

    for backend in BACKENDS:
        torch.testing.assert_close(results(number, backend), results(value, backend))


@pytest.mark.parametrize(
    "bad", [True, np.True_, np.array(0.3), "0.3", None, 1 + 0j, [0.3]], ids=repr
)
def test_what_is_no_number_is_refused(bad: Any) -> None:
    z = torch.randn(2, 5, 4)
    with pytest.raises(TypeError, match="temperature must be a float"):
        nt_xent(*z, temperature=bad)
    with pytest.raises(TypeError, match="eps must be a number"):
        cross_logsumexp(*z, eps=bad)
    with pytest.raises(TypeError, match="smoothl1_beta must be a number"):
        prediction_loss(*z, smoothl1_beta=bad)
    with pytest.raises(TypeError, match="contrastive_weight must be a number"):
        ContrastiveJEPALoss(HJEPALoss(), contrastive_weight=bad)
    with pytest.raises(TypeError, match="hierarchy_weights must be numbers"):
        HJEPALoss(hierarchy_weights=[bad, 1, 1])


@pytest.mark.parametrize("huge", [10**400, -(10**400)], ids=["huge", "hugely_negative"])
def test_an_int_beyond_every_float_is_out_of_range(huge: int) -> None:
    z = torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match="Temperature must be positive, and finite"):
        nt_xent(*z, temperature=huge)
    with pytest.raises(ValueError, match="huber_delta must be positive and finite"):
        prediction_loss(*z, huber_delta=huge)
    with pytest.raises(ValueError, match="hierarchy_weights must be finite"):
        HJEPALoss(hierarchy_weights=huge)
    with pytest.raises(ValueError, match="jepa_weight must be finite"):
        ContrastiveJEPALoss(HJEPALoss(), jepa_weight=huge)
