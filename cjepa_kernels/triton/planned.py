"""Operators that repeat their launches from plans, without Python: csrc/cuda/planned_operator.h.

A call without a plan comes back to Python, to the overload ``.without_plan``, which runs the usual
code. When a call is repeated, that overload records what it launches and hands over a plan of it.
Triton is imported when a plan is first recorded.
"""

from __future__ import annotations

import importlib
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from cjepa_kernels.backends import HAS_TRITON, compiled_module, triton_is_interpreted
from cjepa_kernels.environment import note_problem
from cjepa_kernels.triton import allows_tf32, proved
from cjepa_kernels.triton.temperature import lowest_constant_temperature

Implementation = Callable[..., tuple[Any, ...]]

# Letters of csrc/cuda/planned_operator.h by type in a schema.
KINDS = {
    "Tensor": "t",
    "Tensor?": "o",
    "Tensor[]": "l",
    "float": "f",
    "float[]": "F",
    "bool": "b",
    "str": "s",
    "ScalarType?": "d",
}
# Numbers that kernels take as they are, so that a plan takes them as parameters. Another float
# belongs to the key.
PARAMETERS = ("temperature", "eps")
PARAMETER_KIND = "n"
FAILED = " failed in Python"  # csrc/cuda/planned_operator.cpp says so of an exception in Python.
FEATURES = ("z_i", "x")  # arguments whose dtype is that of the products, unless product_dtype is

_failure = threading.local()  # the last exception of this thread's calls without a plan
_refusals: dict[str, str] = {}
_kernels: dict[int, Any] = {}  # what Triton compiled, of all plans
_warned = False
_library: Any = None


def is_enabled() -> bool:
    """Whether operators get the kernels that replay plans, in this process.

    They do if plans may be used on some GPU: it is not known yet on which, because no device may be
    touched when the package is imported.
    """
    module = compiled_module()
    if not HAS_TRITON or triton_is_interpreted() or torch.version.cuda is None:
        return False
    if module is None or not hasattr(module, "register_planned_operator"):
        return False
    try:
        return proved.may_be_allowed("plans")
    except ValueError as error:
        note_problem(str(error))
        return False


def register(name: str, schema: str, implementation: Implementation, dispatch_key: str) -> None:
    """Give one direction of an operator the kernel that replays plans.

    Args:
        name: Its name in the namespace of the package: ``nt_xent`` or ``nt_xent_backward``.
        schema: Its schema, without a name.
        implementation: What runs without a plan.
        dispatch_key: For which tensors: "CUDA".
    """
    global _library
    if _library is None:
        _library = torch.library.Library("cjepa_kernels", "FRAGMENT")
    register_in(_library, name, schema, implementation, dispatch_key)


def register_in(
    library: Any, name: str, schema: str, implementation: Implementation, dispatch_key: str
) -> None:
    """The same in any library, whose namespace need not be that of the package."""
    module = _module()
    arguments, results = (_parse(part) for part in schema.split("->"))
    names = [name for _, name in arguments]
    numbers = [name for kind, name in arguments if kind == "float" and name in PARAMETERS]
    overload = f"{name}.without_plan"
    library.define(overload + schema)
    run = _without_plan(name, names, numbers, implementation)
    library.impl(overload, run, "CompositeExplicitAutograd")
    in_fp32 = [names.index(name) for name in ("product_dtype", *FEATURES) if name in names]
    module.register_planned_operator(
        name=f"{library.ns}::{name}",
        dispatch_key=dispatch_key,
        arguments="".join(
            PARAMETER_KIND if name in numbers else KINDS[kind] for kind, name in arguments
        ),
        results="".join(KINDS[kind] for kind, _ in results),
        boundaries=[
            [lowest_constant_temperature()] if name == "temperature" else [] for name in numbers
        ],
        without_plan="without_plan",
        fp32_arguments=in_fp32 if "product_dtype" in names else [],
        fp32_products=_fp32_products,
    )


def _module() -> Any:
    module = compiled_module()
    if module is None:
        raise RuntimeError("launch plans need the compiled module cjepa_kernels._C")
    return module


def _parse(part: str) -> list[tuple[str, str]]:
    """Type and name of each argument, or of each result, of a schema; a result may have no name."""
    pairs = [text.partition(" ") for text in part.strip(" ()").split(", ")]
    return [(kind, name) for kind, _, name in pairs]


def _fp32_products() -> int:
    return int(allows_tf32())


def _without_plan(
    name: str, names: Sequence[str], numbers: Sequence[str], implementation: Implementation
) -> Implementation:
    """What an operator calls in Python when there is no plan."""
    module = _module()
    operator = name.removesuffix("_backward")
    direction: proved.Direction = "forward" if operator == name else "backward"

    def without_plan(*args: Any) -> Any:
        try:
            if not module.wants_plan():
                return implementation(*args)
            arguments = dict(zip(names, args, strict=True))
            if not _may_record(operator, direction, arguments):
                return implementation(*args)
            parameters = {number: arguments[number] for number in numbers}
            return _record(name, implementation, args, parameters)
        except BaseException as error:
            # The exception may wait long for raise_original. It shall not keep tensors alive.
            traceback.clear_frames(error.__traceback__)
            _failure.error, _failure.call = error, module.call_count()
            args, arguments = (), {}
            raise

    return without_plan


def raise_original(error: RuntimeError) -> NoReturn:
    """Raise the exception in Python for which an operator failed, or ``error`` itself.

    The dispatcher hands on the words of an exception at best, and not its type, of which
    ``torch.OutOfMemoryError`` is one that programs look for.
    """
    found: BaseException | None = getattr(_failure, "error", None)
    if found is None or FAILED not in str(error):
        raise error
    _failure.error = None
    if _failure.call != _module().call_count():
        raise error
    try:
        raise found from None
    finally:
        del found  # It refers to this frame, and would live until the next garbage collection.


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    """All tensors among the arguments, also those in lists, in order."""
    flat = (x for arg in args for x in (arg if isinstance(arg, list) else (arg,)))
    return [x for x in flat if isinstance(x, Tensor)]


def _features(arguments: dict[str, Any]) -> Tensor:
    """The tensor whose dtype and number of features are those of the call."""
    if "predictions" in arguments:
        return arguments["predictions"][0]  # type: ignore[no-any-return]
    named = [arguments[name] for name in FEATURES if name in arguments]
    return (named or _tensors(list(arguments.values())))[0]


def _may_record(operator: str, direction: proved.Direction, arguments: dict[str, Any]) -> bool:
    """Whether a plan of this call may be used, and its launches can be recorded now."""
    from triton import knobs

    from cjepa_kernels.triton import configs

    rows = _features(arguments)
    if rows.dtype == torch.float64:
        return False
    if rows.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    hook = knobs.runtime.launch_enter_hook  # It would not see the launches of a plan.
    if hook is not None and getattr(hook, "calls", True):
        return False
    return proved.is_allowed(
        "plans",
        architecture=configs.architecture(rows.device),
        dtype=arguments.get("product_dtype") or rows.dtype,
        features=rows.shape[-1],
        operator=operator,
        direction=direction,
    )


def _record(
    name: str, implementation: Implementation, args: tuple[Any, ...], numbers: dict[str, float]
) -> Any:
    """Run a call and hand over its plan, if it can have one."""
    plans = importlib.import_module("cjepa_kernels.triton.plans")
    recording = importlib.import_module("cjepa_kernels.triton.recording")
    failure = ""
    try:
        with recording.record() as recorded:
            results = implementation(*args)
    except Exception as error:
        failure = _describe(error)
    if failure:
        # Recording holds more memory than the call alone. If the call fails too, that is its error.
        results = implementation(*args)
        _module().refuse_plan()
        _warn(failure)
        return results
    try:
        tensors = _tensors(args)
        lists = (results,) if isinstance(results, (Tensor, list)) else results
        plan = plans.make_plan(recorded, tensors=tensors, results=lists, numbers=numbers)
        _open_driver()
        with _on_device(tensors[0].device):
            _module().offer_plan(plan)
        # The driver's handles are good for as long as Triton's objects live.
        _kernels.update({id(x.compiled): x.compiled for x in recorded.launches})
    except plans.NoPlanError as error:
        _module().refuse_plan()
        _refusals[name] = str(error)  # Such a call goes on as it does without plans.
    except Exception as error:
        _module().refuse_plan()
        _warn(_describe(error))
    return results


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def refusals() -> dict[str, str]:
    """By operator, the reason why the last recording that gave no plan gave none."""
    return dict(_refusals)


def _open_driver() -> None:
    """Let plans find the driver and the streams of PyTorch."""
    libraries = Path(torch.__file__).parent / "lib"
    _module().open_driver("libcuda.so.1", str(libraries / "libtorch_cuda.so"))


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    """The device's context is current, because a plan belongs to the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _warn(reason: str) -> None:
    """Say once that calls go on without plans."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"a launch plan could not be made ({reason}); such calls launch their kernels from "
            "Python, which takes longer. CJEPA_LAUNCH_PLANS=0 silences this",
            stacklevel=2,
        )


def forget() -> None:
    """Forget all plans, after a change of how kernels are compiled."""
    module = compiled_module()
    if module is not None and hasattr(module, "forget_plans"):
        module.forget_plans()
