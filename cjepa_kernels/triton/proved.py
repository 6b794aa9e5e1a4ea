"""What has passed parity on a device, and whether a call may use it.

The kernels written in Gluon and the launch plans are chosen by themselves only for combinations
that ``proved.json`` lists. An environment variable asks for the others too, or switches all of
them off.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from cjepa_kernels.backends import triton_is_interpreted, triton_minor
from cjepa_kernels.environment import read_switch

Feature = Literal["gluon", "plans"]
Direction = Literal["forward", "backward"]
SWITCHES: dict[Feature, str] = {"gluon": "CJEPA_GLUON", "plans": "CJEPA_LAUNCH_PLANS"}
_TITLES: dict[Feature, str] = {"gluon": "Gluon kernels", "plans": "launch plans"}


@dataclass(frozen=True)
class Proof:
    """A combination that passed parity on a device.

    Attributes:
        feature: What passed.
        architecture: Ten times the compute capability of the device; 90 for 9.0.
        dtype: dtype to which operands are rounded, such as "bfloat16".
        smallest_features: Smallest number of features D.
        largest_features: Largest number of features D.
        operator: Name of the operator, such as "nt_xent".
        direction: Direction of the operator.
        triton: Minor version of Triton, such as "3.6".
        record: Name of the file in ``bench/results`` that shows it.
    """

    feature: Feature
    architecture: int
    dtype: str
    smallest_features: int
    largest_features: int
    operator: str
    direction: Direction
    triton: str
    record: str


@lru_cache
def proofs() -> tuple[Proof, ...]:
    """All entries of ``proved.json``."""
    entries = json.loads(Path(__file__).with_name("proved.json").read_text(encoding="utf-8"))
    return tuple(Proof(**entry) for entry in entries)


def is_proved(
    feature: Feature,
    *,
    architecture: int,
    dtype: torch.dtype,
    features: int,
    operator: str,
    direction: Direction,
) -> bool:
    """Whether the table has a combination, with this version of Triton.

    Args:
        feature: "gluon" or "plans".
        architecture: Ten times the compute capability, as ``configs.architecture`` gives it.
        dtype: dtype to which operands are rounded.
        features: Number of features D.
        operator: Name of the operator.
        direction: Direction of the operator.
    """
    return any(
        proof.feature == feature
        and proof.architecture == architecture
        and proof.dtype == str(dtype).removeprefix("torch.")
        and proof.smallest_features <= features <= proof.largest_features
        and proof.operator == operator
        and proof.direction == direction
        and proof.triton == _triton_minor()
        for proof in proofs()
    )


def is_allowed(
    feature: Feature,
    *,
    architecture: int,
    dtype: torch.dtype,
    features: int,
    operator: str,
    direction: Direction,
) -> bool:
    """Whether a call may use a feature: as its variable says or, if that is unset, if it is proved.

    The arguments are those of :func:`is_proved`.

    Raises:
        ValueError: The variable is neither 0 nor 1.
    """
    switch = read_switch(SWITCHES[feature])
    if switch is not None:
        return switch
    return is_proved(
        feature,
        architecture=architecture,
        dtype=dtype,
        features=features,
        operator=operator,
        direction=direction,
    )


def may_be_allowed(feature: Feature) -> bool:
    """Whether :func:`is_allowed` can be true for any call, on any GPU.

    Raises:
        ValueError: The feature's variable is neither 0 nor 1.
    """
    switch = read_switch(SWITCHES[feature])
    if switch is not None:
        return switch
    return any(x.feature == feature and x.triton == _triton_minor() for x in proofs())


def sentence(feature: Feature, architecture: int) -> str:
    """Where a feature is in use on GPUs of an architecture, and why not elsewhere.

    Raises:
        ValueError: The feature's variable is neither 0 nor 1.
    """
    title, variable = _TITLES[feature], SWITCHES[feature]
    switch = read_switch(variable)
    if switch is False:
        return f"{title} are switched off by {variable}=0"
    if switch:
        return f"{title} are used also where they have not passed parity on a GPU ({variable}=1)"
    proved = [
        proof
        for proof in proofs()
        if proof.feature == feature
        and proof.architecture == architecture
        and proof.triton == _triton_minor()
    ]
    capability = f"compute capability {architecture // 10}.{architecture % 10}"
    where = f"on a GPU of {capability} with Triton {_triton_minor()}"
    if not proved:
        return f"{title} are not used: none has passed parity {where} ({variable}=1 uses them)"
    calls = ", ".join(
        f"{x.operator} {x.direction} in {x.dtype} with {x.smallest_features} to "
        f"{x.largest_features} features"
        for x in proved
    )
    return f"{title} are used where they have passed parity {where}: {calls}"


def note() -> str:
    """Both sentences for the current GPU, or what is wrong with a variable.

    It is empty in Triton's interpreter, which runs neither.
    """
    if triton_is_interpreted():
        return ""
    major, minor = torch.cuda.get_device_capability()
    try:
        return "; ".join(sentence(feature, 10 * major + minor) for feature in SWITCHES)
    except ValueError as error:
        return str(error)


@lru_cache
def _triton_minor() -> str:
    return triton_minor()
