"""Arguments of the functions: checked, and in the form in which the operators take them."""

from __future__ import annotations

import math
from numbers import Real
from typing import SupportsFloat

import torch
from torch import Tensor

from cjepa_kernels.definitions import FLOATING, LARGEST, REDUCTIONS, SMALLEST, STRATEGIES

NO_COLUMN = 2**62  # in place of a positive that is out of range
NO_POSITIVE = -1  # in place of the positive of a row that has none
SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
LABELS = (*SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def described(value: object) -> str:
    """What an error says of an argument: the shape and dtype of a tensor, else the type."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return type(value).__name__


def check_strategy(strategy: str) -> None:
    """Raise unless ``strategy`` is known."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {list(STRATEGIES)}, got {strategy!r}")


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number: of Python or, as ``np.float32(0.1)``, of NumPy."""
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float, Real))


def as_float(value: SupportsFloat) -> float:
    """A number of any kind; an int beyond every float is infinite.

    A float stays the same object. For torch.compile another object is a result of the graph, and a
    new value of it would mean another compilation.
    """
    if type(value) is float:
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite positive number."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < as_float(value) < math.inf:  # torch.compile traces it for symbolic floats
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_in_range(name: str, value: float) -> None:
    """Raise unless ``value`` is a positive number that fp32 has, and its inverse too."""
    if type(value) is float and SMALLEST <= value <= LARGEST:  # the usual case, at little cost
        return
    check_positive(name, value)
    if not SMALLEST <= as_float(value) <= LARGEST:
        raise ValueError(f"{name} must lie between {SMALLEST} and {LARGEST}, got {value}")


def check_bool(name: str, value: bool) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_temperature(temperature: float | Tensor) -> None:
    """Raise unless ``temperature`` is a positive finite float, or a () or (1,) floating tensor."""
    if type(temperature) is float and SMALLEST <= temperature <= LARGEST:  # the usual case
        return
    if isinstance(temperature, Tensor):
        if temperature.shape not in ((), (1,)) or temperature.dtype not in FLOATING:
            raise ValueError(
                "temperature must be a float, or a floating-point tensor (fp64, fp32, bf16 or "
                f"fp16) of shape () or (1,), got {described(temperature)}"
            )
        return
    if not is_number(temperature):
        raise TypeError(
            f"temperature must be a float or a tensor of shape () or (1,), got {temperature!r}"
        )
    if not 0 < as_float(temperature) < math.inf:
        raise ValueError(f"Temperature must be positive, and finite, got {temperature}")
    if not SMALLEST <= as_float(temperature) <= LARGEST:
        raise ValueError(
            f"temperature must lie between {SMALLEST} and {LARGEST}, got {temperature}"
        )


def check_reduction(reduction: str) -> None:
    """Raise unless ``reduction`` is ``mean``, ``sum`` or ``none``."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {list(REDUCTIONS)}, got {reduction!r}")


def check_floating_tensor(name: str, value: object) -> None:
    """Raise unless ``value`` is a tensor of fp64, fp32, bf16 or fp16."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be of fp64, fp32, bf16 or fp16, got {value.dtype}")


def check_views(
    z_i: Tensor, z_j: Tensor, *, allow_empty: bool, names: tuple[str, str] = ("z_i", "z_j")
) -> None:
    """Raise unless both are (B, D) or (B, N, D) embeddings of the same shape and device."""
    first, second = names
    check_floating_tensor(first, z_i)
    if isinstance(z_j, Tensor) and z_j.ndim == 1 and z_j.dtype in LABELS:
        raise TypeError(
            f"{second} must be the embeddings of the second view, got what looks like labels, a "
            f"tensor of shape {tuple(z_j.shape)} and dtype {z_j.dtype}: row k of {first} and row k "
            f"of {second} are a pair. cjepa_kernels.compat.pytorch_metric_learning.NTXentLoss "
            "takes embeddings and labels"
        )
    check_floating_tensor(second, z_j)
    shape = z_i.shape
    if shape != z_j.shape:
        raise ValueError(
            f"{first} and {second} must have the same shape, got {tuple(shape)} and "
            f"{tuple(z_j.shape)}"
        )
    if len(shape) not in (2, 3):
        raise ValueError(f"{first} and {second} must be (B, D) or (B, N, D), got {tuple(shape)}")
    if 0 in (shape[-1:] if allow_empty else shape):
        raise ValueError(
            f"{first} and {second} must hold at least one pair and one feature, got {tuple(shape)}"
        )
    check_same_device(f"{first} and {second}", z_i, z_j)


def check_rows(name: str, z: Tensor, *, letter: str = "M", may_be_empty: bool = False) -> None:
    """Raise unless it is a tensor of (M, D) features, M standing for ``letter``."""
    check_floating_tensor(name, z)
    if z.ndim != 2:
        raise ValueError(f"{name} must be ({letter}, D), got {tuple(z.shape)}")
    if 0 in (z.shape[1:] if may_be_empty else z.shape):
        least = "one feature" if may_be_empty else "one row and one feature"
        raise ValueError(f"{name} must hold at least {least}, got {tuple(z.shape)}")


def check_rectangle(x: Tensor, y: Tensor, *, names: tuple[str, str] = ("x", "y")) -> None:
    """Raise unless they are (M, D) and (N, D) features on the same device."""
    check_rows(names[0], x)
    of_negatives = names[1] == "negatives"
    check_rows(names[1], y, letter="K" if of_negatives else "N", may_be_empty=of_negatives)
    check_same_features(x, y, names=names)


def check_same_features(x: Tensor, y: Tensor, *, names: tuple[str, str]) -> None:
    """Raise unless the rows have as many features as each other and are on the same device."""
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same D, got {x.shape[1]} and {y.shape[1]} "
            "features"
        )
    check_same_device(f"{names[0]} and {names[1]}", x, y)


def as_positives(positives: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The checked columns of positives, as the operator takes them.

    The host reads numbers of a real tensor on the CPU alone. Elsewhere, on a GPU and under
    torch.compile, a number out of range becomes ``NO_COLUMN``, which the operator knows as wrong.
    For the operator -1 means that a row has no positive.
    """
    if not isinstance(positives, Tensor) or positives.dtype != torch.int64:
        got = positives.dtype if isinstance(positives, Tensor) else type(positives).__name__
        raise TypeError(f"positives must be a tensor of int64, got {got}")
    rows, columns = x.shape[0], y.shape[0]
    if positives.shape != (rows,):
        raise ValueError(
            f"positives must be ({rows},), one number for each row, got {tuple(positives.shape)}"
        )
    check_same_device("positives and the rows", positives, x)
    positives = positives.contiguous()
    if not host_reads(positives):
        return positives.where((positives >= 0) & (positives < columns), NO_COLUMN)
    smallest, largest = (int(bound) for bound in positives.aminmax())
    if smallest < 0 or largest >= columns:
        raise ValueError(
            f"positives must be numbers from 0 to {columns - 1}, the rows of the other side, got "
            f"{smallest if smallest < 0 else largest}"
        )
    return positives


def host_reads(numbers: Tensor) -> bool:
    """Whether the host may look at the numbers: not on a GPU, nor of a tensor without numbers."""
    if numbers.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return type(numbers) is Tensor  # no FakeTensor


def as_unique(positives: Tensor, columns: int) -> Tensor:
    """The checked positives, of which none may be repeated.

    Where the host does not read them, a repeated one becomes ``NO_COLUMN``.
    """
    inside = positives.clamp(0, columns - 1)
    times = positives.new_zeros(columns).index_add_(0, inside, torch.ones_like(positives))
    repeated = times[inside] > 1  # (M,)
    if not host_reads(positives):
        return positives.masked_fill(repeated, NO_COLUMN)
    if repeated.any():
        raise ValueError(
            "positives must name no row twice with symmetric=True, got "
            f"{int(positives[repeated][0])} more than once"
        )
    return positives


def as_mutual(positives: Tensor, z: Tensor) -> Tensor:
    """The checked rows of positives among the rows themselves, as the operator takes them.

    Where the host does not read them, a wrong number becomes ``NO_COLUMN``.
    """
    rows = z.shape[0]
    if not isinstance(positives, Tensor) or positives.dtype != torch.int64:
        got = positives.dtype if isinstance(positives, Tensor) else type(positives).__name__
        raise TypeError(f"positives must be a tensor of int64, got {got}")
    if positives.shape != (rows,):
        raise ValueError(
            f"positives must be ({rows},), one number for each row, got {tuple(positives.shape)}"
        )
    check_same_device("positives and the rows", positives, z)
    positives = positives.contiguous()
    number = torch.arange(rows, device=positives.device)
    inside = positives.clamp(0, rows - 1)
    is_mutual = (positives == inside) & (positives[inside] == number) & (inside != number)
    wrong = ~(is_mutual | (positives == NO_POSITIVE))  # (M,)
    if not host_reads(positives):
        return positives.masked_fill(wrong, NO_COLUMN)
    if wrong.any():
        row = int(number[wrong][0])
        raise ValueError(
            f"positives must hold {NO_POSITIVE} or a row from 0 to {rows - 1} whose positive is "
            f"the row itself, got {int(positives[row])} for row {row}"
        )
    return positives


def as_classes(labels: Tensor, rows: int, device: torch.device, *, of: str) -> Tensor:
    """The checked labels as the operator takes them: any numbers, of int64.

    Args:
        labels: Integers.
        rows: How many there must be.
        device: Where they must be.
        of: What each of them belongs to, for the error.
    """
    if not isinstance(labels, Tensor) or labels.dtype not in LABELS:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels must be a tensor of integers, got {got}")
    if labels.shape != (rows,):
        raise ValueError(f"labels must be ({rows},), one for each {of}, got {tuple(labels.shape)}")
    if labels.device != device:
        raise ValueError(
            f"labels must be on the device of the embeddings, {device}, got {labels.device}"
        )
    if labels.dtype == torch.uint64:  # whose largest numbers int64 does not have
        return labels.contiguous().view(torch.int64)
    return labels.to(torch.int64).contiguous()


def check_label_smoothing(value: float) -> None:
    """Raise unless ``value`` is a number from 0 to below 1."""
    if not is_number(value):
        raise TypeError(f"label_smoothing must be a number, got {value!r}")
    if not 0 <= as_float(value) < 1:
        raise ValueError(f"label_smoothing must lie from 0 to below 1, got {value}")


def check_ring_of_keys(strategy: str, *, in_batch_negatives: bool) -> None:
    """Raise for a ring of InfoNCE without the keys that would travel round it."""
    if strategy == "ring" and not in_batch_negatives:
        raise ValueError(
            'strategy must be "auto" or "all_gather" with in_batch_negatives=False, got "ring": '
            "the ranks exchange keys when they enqueue them, MomentumQueue(distributed=True)"
        )


def check_in_batch_negatives(value: bool, *, symmetric: bool) -> None:
    """Raise unless ``value`` is a bool that goes with ``symmetric``."""
    check_bool("in_batch_negatives", value)
    if symmetric and not value:
        raise ValueError(
            f"symmetric must be False with in_batch_negatives=False, got {symmetric}: the "
            "negatives of its second direction are the other queries of the batch"
        )


def check_same_device(names: str, a: Tensor, b: Tensor) -> None:
    """Raise unless both are on the same device."""
    if a.device != b.device:
        raise ValueError(f"{names} must be on the same device, got {a.device} and {b.device}")


def check_temperature_device(temperature: float | Tensor, name: str, z: Tensor) -> None:
    """Raise unless a tensor temperature is on the device of the features."""
    if isinstance(temperature, Tensor) and temperature.device != z.device:
        raise ValueError(
            f"temperature must be on the device of {name}, {z.device}, got {temperature.device}"
        )


def check_negatives_mask(mask: Tensor, z_i: Tensor) -> None:
    """Raise unless the mask is (B, B) of bool on the device of the views."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        hint = ""
        if isinstance(mask, Tensor) and mask.ndim == 1 and mask.dtype in LABELS:
            hint = "; pass labels of the samples as labels="
        raise TypeError(f"mask must be a bool tensor, got {got}{hint}")
    batch = z_i.shape[0]
    if mask.shape != (batch, batch):
        raise ValueError(
            f"mask must be ({batch}, {batch}), one entry a pair of samples, got {tuple(mask.shape)}"
        )
    if mask.device != z_i.device:
        raise ValueError(f"mask must be on the device of z_i, {z_i.device}, got {mask.device}")


def promote(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that ``torch.cat`` of them has."""
    if a.dtype == b.dtype:
        return a, b
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def without_arrays(temperature: float | Tensor, z: Tensor) -> float | Tensor:
    """A tensor in place of a NumPy number, which torch.compile would take for an array."""
    if isinstance(temperature, (float, Tensor)) or not torch.compiler.is_compiling():
        return temperature
    if hasattr(temperature, "__array__") and isinstance(z, Tensor):
        return torch.as_tensor(temperature, device=z.device)
    return temperature


def as_float_or_scalar(temperature: float | Tensor) -> float | Tensor:
    """A checked temperature as the back ends take it: a float, or a 0-dim tensor."""
    if not isinstance(temperature, Tensor):
        return as_float(temperature)
    return temperature.reshape(()) if temperature.ndim else temperature


def wide(temperature: float | Tensor) -> float | Tensor:
    """The temperature in fp32 or fp64.

    In the losses of anchors its gradient comes in two parts, that of the log-sum-exp and that of
    the positive. They nearly cancel, so neither may be rounded to half precision.
    """
    if not isinstance(temperature, Tensor):
        return temperature
    return temperature.to(torch.promote_types(temperature.dtype, torch.float32))


def split_temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """The operators' two arguments: a tensor or None, and a number for the case of None."""
    if isinstance(temperature, Tensor):
        return temperature, 1.0
    return None, temperature


def check_embeddings(name: str, x: object) -> None:
    """Raise unless it is a (B, N, D) or (B, D) tensor of a floating dtype."""
    check_floating_tensor(name, x)
    if isinstance(x, Tensor) and (x.ndim not in (2, 3) or 0 in x.shape):
        raise ValueError(f"{name} must be (B, N, D) or (B, D) and not empty, got {tuple(x.shape)}")


def check_target(names: tuple[str, str], prediction: Tensor, target: Tensor) -> None:
    """Raise unless the target has the prediction's shape and device, and a floating dtype."""
    check_floating_tensor(names[1], target)
    if prediction.shape != target.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same shape, got {tuple(prediction.shape)} "
            f"and {tuple(target.shape)}"
        )
    if prediction.device != target.device:
        raise ValueError(
            f"{names[0]} and {names[1]} must be on the same device, got {prediction.device} and "
            f"{target.device}"
        )


def check_rows_mask(name: str, mask: Tensor, prediction: Tensor) -> None:
    """Raise unless the mask is of bool, with the prediction's shape without D, on its device."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, got {got}")
    if mask.device != prediction.device:
        raise ValueError(
            f"{name} must be on the device of the predictions, {prediction.device}, got "
            f"{mask.device}"
        )
    if mask.shape != prediction.shape[:-1]:
        raise ValueError(
            f"{name} must be {tuple(prediction.shape[:-1])}, one entry a patch, got "
            f"{tuple(mask.shape)}"
        )
