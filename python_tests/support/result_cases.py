"""Fixed inputs for every public function, module and operator, and the fingerprints of results.

``same_results.py`` runs this file in a process of its own with one revision's package:
``python result_cases.py GROUP OUT.json``. It uses public names only, so that it also runs with
revisions whose files lie elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import cjepa_kernels
from cjepa_kernels import (
    ContrastiveJEPALoss,
    HJEPALoss,
    NTXentLoss,
    create_loss_from_config,
    cross_logsumexp,
    nt_xent,
    pair_similarity,
    prediction_loss,
)
from cjepa_kernels.distributed import counting
from cjepa_kernels.tokens import cls_tokens

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "strided", "transposed")
TEMPERATURES = ("float", "tensor", "tensor of shape (1,)")
REDUCTIONS = ("mean", "sum", "none")
# ROWS are (B, D): one pair, odd sizes, and more than one tile.
ROWS = [(1, 1), (2, 3), (5, 16), (33, 17), (97, 40)]
RECTANGLES = [(1, 1, 1), (5, 3, 16), (33, 40, 17), (97, 130, 24)]  # (M, N, D)
PATCHES = [(1, 1), (7, 16), (3, 5, 17), (4, 33, 64), (2, 3, 200)]  # (B, D) or (B, N, D)

Results = dict[str, Any]
Case = tuple[str, Callable[[], Results]]


def make(name: str, *shape: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """A leaf with a gradient, whose random numbers depend only on the name and the shape."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {shape}".encode()))
    if layout == "strided":
        doubled = torch.randn(*(2 * n for n in shape), generator=generator, dtype=torch.float64)
        values = doubled.to(dtype)[tuple(slice(None, None, 2) for _ in shape)]
    else:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        if layout == "transposed":
            values = values.transpose(0, -1).contiguous().transpose(0, -1)
    return values.detach().requires_grad_()


def make_mask(name: str, *shape: int, share: float = 0.3) -> Tensor:
    """A bool tensor that is True with the given probability."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {shape}".encode()))
    return torch.rand(*shape, generator=generator) < share


def make_temperature(kind: str, value: float, dtype: torch.dtype) -> float | Tensor:
    """A temperature in one of the three ways in which callers give it."""
    if kind == "float":
        return value
    temperature = torch.tensor(value, dtype=dtype)
    return (temperature if kind == "tensor" else temperature.reshape(1)).requires_grad_()


def with_gradients(outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> Results:
    """The outputs, and the gradients of a weighted sum of all differentiable outputs."""
    results = dict(outputs)
    total: Any = 0.0
    for output in outputs.values():
        if isinstance(output, Tensor) and output.requires_grad:
            weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype)
            total = total + (output * weights.view(output.shape)).sum().double()
    leaves = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    if isinstance(total, Tensor) and leaves:
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        results |= {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    return results


def choose(combinations: Iterable[Any], step: int) -> list[Any]:
    """Every ``step``-th combination. Steps of 7 and 23 still include each value of each option."""
    return list(combinations)[::step]


def nt_xent_cases(backend: str, step: int, large: bool) -> Iterator[Case]:
    """NT-Xent over dtypes, shapes, options, masks, temperatures, strides and mixed dtypes."""
    combinations = itertools.product(
        DTYPES, ROWS, (True, False), REDUCTIONS, (False, True), TEMPERATURES, LAYOUTS
    )
    chosen = choose(combinations, step)
    if large:  # With more rows the native kernel uses larger blocks.
        chosen += [
            (torch.float32, (800, 24), True, "mean", False, "float", "contiguous"),
            (torch.bfloat16, (773, 33), False, "none", True, "tensor", "strided"),
        ]
    for number, (dtype, shape, cosine, reduction, masked, kind, layout) in enumerate(chosen):
        value = (0.1, 0.5, 0.02)[number % 3]
        second = torch.float32 if number % 5 == 4 and dtype != torch.float64 else dtype
        name = f"nt_xent[{backend}] {shape} {dtype} then {second} {layout} {reduction}" + (
            f" cosine={cosine} masked={masked} temperature={value} ({kind})"
        )

        def run(
            shape: tuple[int, int] = shape,
            dtypes: tuple[torch.dtype, torch.dtype] = (dtype, second),
            layout: str = layout,
            masked: bool = masked,
            kind: str = kind,
            value: float = value,
            options: Mapping[str, Any] = {"use_cosine_similarity": cosine, "reduction": reduction},
        ) -> Results:
            z_i = make("z_i", *shape, dtype=dtypes[0], layout=layout)
            z_j = make("z_j", *shape, dtype=dtypes[1])
            mask = make_mask("mask", shape[0], shape[0]) if masked else None
            temperature = make_temperature(kind, value, dtypes[0])
            out = nt_xent(z_i, z_j, temperature=temperature, mask=mask, backend=backend, **options)
            inputs = {"z_i": z_i, "z_j": z_j, "temperature": temperature}
            return with_gradients(out._asdict(), inputs)

        yield name, run

    def three_dimensions() -> Results:
        z = make("z", 3, 4, 16, dtype=torch.float32)
        out = nt_xent(z, z.flip(2), eps=1.0, backend=backend)
        return with_gradients(out._asdict(), {"z": z})

    def without_gradient() -> Results:
        z_i, z_j = (make(n, 97, 40, dtype=torch.float32).detach() for n in ("z_i", "z_j"))
        return dict(nt_xent(z_i, z_j, backend=backend)._asdict())

    def autocast() -> Results:
        z_i, z_j = (make(n, 33, 40, dtype=torch.float32) for n in ("z_i", "z_j"))
        with torch.autocast("cpu", torch.bfloat16):
            out = nt_xent(z_i, z_j, backend=backend)
        return with_gradients(out._asdict(), {"z_i": z_i, "z_j": z_j})

    yield f"nt_xent[{backend}] of (B, N, D), large eps", three_dimensions
    yield f"nt_xent[{backend}] without a gradient", without_gradient
    yield f"nt_xent[{backend}] under autocast", autocast


def cross_logsumexp_cases(backend: str, step: int, large: bool) -> Iterator[Case]:
    """Both log-sum-exps with the gradients of x, of y and of both, and similarities of pairs."""
    combinations = itertools.product(
        DTYPES, RECTANGLES, (True, False), TEMPERATURES, ("xy", "x", "y"), LAYOUTS
    )
    chosen = choose(combinations, step)
    if large:
        chosen.append((torch.float32, (700, 901, 24), True, "tensor", "xy", "contiguous"))
    for number, (dtype, (m, n, d), cosine, kind, sides, layout) in enumerate(chosen):
        value = (0.1, 0.5, 0.02)[number % 3]

        def run(
            shapes: tuple[tuple[int, int], tuple[int, int]] = ((m, d), (n, d)),
            dtype: torch.dtype = dtype,
            cosine: bool = cosine,
            kind: str = kind,
            value: float = value,
            sides: str = sides,
            layout: str = layout,
        ) -> Results:
            x = make("x", *shapes[0], dtype=dtype, layout=layout)
            y = make("y", *shapes[1], dtype=dtype)
            temperature = make_temperature(kind, value, dtype)
            out = cross_logsumexp(
                x if "x" in sides else x.detach(),
                y if "y" in sides else y.detach(),
                temperature=temperature,
                use_cosine_similarity=cosine,
                backend=backend,
            )
            return with_gradients(out._asdict(), {"x": x, "y": y, "temperature": temperature})

        yield (
            f"cross_logsumexp[{backend}] {(m, n, d)} {dtype} {layout} cosine={cosine} "
            f"temperature={value} ({kind}) gradient of {sides}",
            run,
        )
    for dtype, shape, cosine in itertools.product(DTYPES, ROWS, (True, False)):

        def pairs(
            dtype: torch.dtype = dtype, shape: tuple[int, int] = shape, cosine: bool = cosine
        ) -> Results:
            x, y = (make(n, *shape, dtype=dtype) for n in ("x", "y"))
            out = pair_similarity(x, y, use_cosine_similarity=cosine, backend=backend)
            return with_gradients({"similarity": out}, {"x": x, "y": y})

        yield f"pair_similarity[{backend}] {shape} {dtype} cosine={cosine}", pairs


def prediction_loss_cases(backend: str, step: int, large: bool) -> Iterator[Case]:
    """The prediction loss over its types, normalisations, masks, reductions and strides."""
    normalizations = ({"normalize_embeddings": False}, {}, {"target_norm": "layer"})
    combinations = itertools.product(
        DTYPES,
        PATCHES,
        ("smoothl1", "mse", "huber"),
        normalizations,
        (False, True),
        REDUCTIONS,
        (False, True),
        LAYOUTS,
    )
    chosen = choose(combinations, step)
    if large:
        chosen.append((torch.float32, (9, 200, 384), "huber", {}, True, "mean", True, "strided"))
    for dtype, shape, loss_type, normalization, masked, reduction, both, layout in chosen:

        def run(
            dtype: torch.dtype = dtype,
            shape: tuple[int, ...] = shape,
            masked: bool = masked,
            both: bool = both,
            layout: str = layout,
            options: Mapping[str, Any] = {
                "loss_type": loss_type,
                "reduction": reduction,
                **normalization,
            },
        ) -> Results:
            prediction = make("prediction", *shape, dtype=dtype, layout=layout)
            target = make("target", *shape, dtype=dtype)
            loss = prediction_loss(
                prediction,
                target if both else target.detach(),
                mask=make_mask("mask", *shape[:-1], share=0.6) if masked else None,
                smoothl1_beta=0.7,
                huber_delta=1.3,
                backend=backend,
                **options,
            )
            return with_gradients({"loss": loss}, {"prediction": prediction, "target": target})

        yield (
            f"prediction_loss[{backend}] {shape} {dtype} {layout} {loss_type} {normalization} "
            f"masked={masked} {reduction} both={both}",
            run,
        )


def module_cases(backend: str) -> Iterator[Case]:
    """The modules, the CLS tokens, and a loss from a configuration."""
    for dtype, reduction, target_norm, loss_type, masked in itertools.product(
        (torch.float32, torch.bfloat16),
        REDUCTIONS,
        (None, "layer"),
        ("smoothl1", "mse", "huber"),
        (False, True),
    ):

        def hierarchy(
            dtype: torch.dtype = dtype,
            masked: bool = masked,
            options: Mapping[str, Any] = {
                "reduction": reduction,
                "target_norm": target_norm,
                "loss_type": loss_type,
            },
        ) -> Results:
            loss_fn = HJEPALoss(
                num_hierarchies=3,
                hierarchy_weights=[1.0, 0.5, 0.25],
                detach_targets=False,
                backend=backend,
                **options,
            )
            patches = (8, 4, 2)
            predictions = [make(f"p{k}", 3, n, 24, dtype=dtype) for k, n in enumerate(patches)]
            targets = [make(f"t{k}", 3, n, 24, dtype=dtype) for k, n in enumerate(patches)]
            masks = [make_mask(f"m{k}", 3, n, share=0.6) for k, n in enumerate(patches)]
            out = loss_fn(predictions, targets, masks if masked else None)
            inputs = {f"p{k}": x for k, x in enumerate(predictions)}
            return with_gradients(out, inputs | {f"t{k}": x for k, x in enumerate(targets)})

        yield (
            f"HJEPALoss[{backend}] {dtype} {reduction} {target_norm} {loss_type} masked={masked}",
            hierarchy,
        )

    def contrastive_jepa() -> Results:
        loss_fn = ContrastiveJEPALoss(
            HJEPALoss(num_hierarchies=2, backend=backend),
            contrastive_on_context=True,
            backend=backend,
        )
        features = [make(f"f{k}", 7, 5, 24, dtype=torch.float32) for k in range(2)]
        predictions = [make(f"p{k}", 7, n, 24, dtype=torch.float32) for k, n in enumerate((4, 2))]
        targets = [make(f"t{k}", 7, n, 24, dtype=torch.float32) for k, n in enumerate((4, 2))]
        out = loss_fn(predictions, targets, *features)
        inputs = {f"f{k}": x for k, x in enumerate(features)}
        return with_gradients(out, inputs | {f"p{k}": x for k, x in enumerate(predictions)})

    def learnable_temperature() -> Results:
        loss_fn = NTXentLoss(0.07, learnable_temperature=True, return_logits=True, backend=backend)
        z_i, z_j = (make(n, 9, 16, dtype=torch.float32) for n in ("z_i", "z_j"))
        inputs = {"z_i": z_i, "z_j": z_j, "log_temperature": loss_fn.log_temperature}
        return with_gradients(loss_fn(z_i, z_j), inputs)

    def configured() -> Results:
        section = {"type": "cjepa", "num_hierarchies": 1, "target_norm": "layer"}
        loss_fn = create_loss_from_config({"loss": {**section, "backend": backend}})
        features = [make(f"f{k}", 7, 5, 24, dtype=torch.float32) for k in range(2)]
        prediction = make("p", 7, 4, 24, dtype=torch.float32)
        out = loss_fn(prediction, prediction.detach().flip(0), *features)
        return with_gradients(out, {"f0": features[0], "prediction": prediction})

    yield f"ContrastiveJEPALoss[{backend}]", contrastive_jepa
    yield f"NTXentLoss[{backend}] with a learnable temperature and logits", learnable_temperature
    yield f"create_loss_from_config[{backend}]", configured


def cls_token_cases() -> Iterator[Case]:
    """The rows of the CLS token and their gradient."""
    for dtype, shape in itertools.product(DTYPES, [(1, 1, 1), (3, 5, 17), (4, 33, 64)]):

        def run(dtype: torch.dtype = dtype, shape: tuple[int, ...] = shape) -> Results:
            features = make("features", *shape, dtype=dtype)
            return with_gradients({"rows": cls_tokens(features)}, {"features": features})

        yield f"cls_tokens {shape} {dtype}", run


def operator_cases(overload: str) -> Iterator[Case]:
    """Operators and their backwards as registered, with every result that they save."""
    for dtype, cosine, as_tensors in itertools.product(
        (torch.float32, torch.bfloat16, torch.float64), (True, False), (False, True)
    ):
        suffix = f".{overload} {dtype} cosine={cosine}" + (" numbers as tensors" * as_tensors)

        def similarities(
            name: str,
            dtype: torch.dtype = dtype,
            cosine: bool = cosine,
            as_tensors: bool = as_tensors,
        ) -> Results:
            values = {
                "mask": make_mask("mask", 40, 40),
                "positives": None,
                "classes": torch.arange(40) % 7,
                "temperature_tensor": None,
                "temperature": 0.2,
                "use_cosine_similarity": cosine,
                "eps": 1e-8,
                "reduction": "mean",
                "product_dtype": None,
                # Only the default overload saves exponentials.
                "keep": overload == "default",
                "of_x": True,
                "of_y": True,
            }
            for tensor, rows in (("z_i", 40), ("z_j", 40), ("x", 40), ("y", 57)):
                values[tensor] = make(tensor, rows, 24, dtype=dtype).detach()
            return call_both_directions(name, overload, values, as_tensors)

        def predictions(
            dtype: torch.dtype = dtype, cosine: bool = cosine, as_tensors: bool = as_tensors
        ) -> Results:
            shapes = [(3, 8, 24), (3, 4, 24)]
            values = {
                "predictions": [make("p", *s, dtype=dtype).detach() for s in shapes],
                "targets": [make("t", *s, dtype=dtype).detach() for s in shapes],
                "masks": [make_mask("m", *s[:-1], share=0.6) for s in shapes],
                "weights": [1.0, 0.5],
                "loss_type": "smoothl1",
                "normalization": "l2" if cosine else "layer",
                "threshold": 0.7,
                "eps": 1e-8,
                "reduction": "mean",
                "targets_too": True,
                "grad_unweighted": None,
            }
            return call_both_directions("prediction_loss", overload, values, as_tensors)

        yield f"operator nt_xent{suffix}", lambda run=similarities: run("nt_xent")
        yield (
            f"operator cross_logsumexp{suffix}",
            lambda run=similarities: run("cross_logsumexp"),
        )
        yield (
            f"operator self_logsumexp{suffix}",
            lambda run=similarities: run("self_logsumexp"),
        )
        yield f"operator prediction_loss{suffix}", predictions


def call_both_directions(
    name: str, overload: str, values: dict[str, Any], as_tensors: bool
) -> Results:
    """The results of an operator and of its backward, by the names in their schemas."""
    suffix = "_dynamic" if as_tensors else ""
    results: Results = {}
    for operator_name in (f"{name}{suffix}", f"{name}{suffix}_backward"):
        operator = getattr(getattr(torch.ops.cjepa_kernels, operator_name), overload)
        arguments = [a for a in operator._schema.arguments if a.name in values]
        with torch.no_grad():
            outputs = operator(
                **{a.name: _as_argument(values[a.name], str(a.type)) for a in arguments}
            )
        named = {
            result.name: output
            for result, output in zip(operator._schema.returns, outputs, strict=True)
        }
        results |= named
        values = values | named
        values |= {
            f"grad_{name}": torch.ones_like(value)
            for name, value in named.items()
            if isinstance(value, Tensor) and f"grad_{name}" not in values
        }
    return results


def _as_argument(value: Any, kind: str) -> Any:
    """Turn a number into a tensor if the operator takes its numbers as tensors."""
    is_number = isinstance(value, float) or (isinstance(value, list) and type(value[0]) is float)
    return torch.tensor(value, dtype=torch.float64) if is_number and kind == "Tensor" else value


def rank_cases() -> Iterator[Case]:
    """Losses of two processes: values, gradients and, of NT-Xent, the bytes that they send."""
    for backend, strategy, dtype, equal, reduction in itertools.product(
        ("reference", "chunked", "native"),
        ("all_gather", "ring"),
        (torch.float32, torch.bfloat16),
        (True, False),
        ("mean", "none"),
    ):
        if backend == "reference" and strategy == "ring":
            continue  # The reference refuses the ring.
        options = {"backend": backend, "strategy": strategy, "reduction": reduction}

        def run(
            dtype: torch.dtype = dtype,
            equal: bool = equal,
            options: Mapping[str, Any] = options,
        ) -> Results:
            rank = dist.get_rank()
            pairs = 9 if equal else (5, 12)[rank]
            z_i, z_j = (make(f"{n}{rank}", pairs, 16, dtype=dtype) for n in ("z_i", "z_j"))
            temperature = torch.tensor(0.2, requires_grad=True)
            group = dist.group.WORLD
            with counting() as counts:
                out = nt_xent(z_i, z_j, temperature=temperature, group=group, **options)
                inputs = {"z_i": z_i, "z_j": z_j, "temperature": temperature}
                results = with_gradients(out._asdict(), inputs)
            sent = {name: getattr(counts, name) for name in ("forward_bytes", "backward_bytes")}
            return results | sent | {"flops": counts.flops}

        yield f"ranks {options} {dtype} equal={equal}", run
    for loss, backend, dtype in itertools.product(
        ("dcl", "labels", "sup_con"), ("chunked", "native"), (torch.float32, torch.bfloat16)
    ):

        def run_other(
            loss: str = loss, backend: Any = backend, dtype: torch.dtype = dtype
        ) -> Results:
            rank = dist.get_rank()
            pairs = (5, 12)[rank]
            z_i, z_j = (make(f"{n}{rank}", pairs, 16, dtype=dtype) for n in ("z_i", "z_j"))
            temperature = torch.tensor(0.2, requires_grad=True)
            inputs = {"z_i": z_i, "z_j": z_j, "temperature": temperature}
            options: dict[str, Any] = {
                "temperature": temperature,
                "backend": backend,
                "group": dist.group.WORLD,
            }
            labels = torch.arange(pairs) % 4
            out: Any
            if loss == "sup_con":
                out = cjepa_kernels.sup_con(torch.cat([z_i, z_j]), labels.repeat(2), **options)
            elif loss == "labels":
                out = nt_xent(z_i, z_j, labels=labels, **options)
            else:
                out = nt_xent(z_i, z_j, decoupled=True, strategy="ring", **options)
            return with_gradients(out._asdict(), inputs)

        yield f"ranks {loss} {backend} {dtype}", run_other


def cases_of(group: str, quick: bool) -> Iterator[Case]:
    """All cases of a group of :data:`GROUPS`."""
    step = 23 if quick else 7
    if group == "triton":
        yield from nt_xent_cases("triton", 97 if quick else 29, large=False)
        yield from cross_logsumexp_cases("triton", 97 if quick else 29, large=False)
        yield from prediction_loss_cases("triton", 97 if quick else 29, large=False)
        yield from itertools.islice(operator_cases("triton"), 6 if quick else None)
        return
    if group == "ranks":
        yield from rank_cases()
        return
    for backend in (
        ("native",) if group.startswith("native") else ("reference", "chunked", "native")
    ):
        yield from nt_xent_cases(backend, step, large=not quick)
        yield from cross_logsumexp_cases(backend, step, large=not quick)
        yield from prediction_loss_cases(backend, step, large=not quick)
        yield from module_cases(backend)
    yield from operator_cases("default")
    if group == "functions":
        yield from operator_cases("chunked")
        yield from cls_token_cases()


def fingerprint(value: Any) -> str:
    """A hash of a tensor's bytes, shape and dtype, with its sum, or the text of another value."""
    if isinstance(value, Tensor):
        # contiguous() does not change the stride of a tensor with one element, but clone() does.
        copied = value.detach().clone(memory_format=torch.contiguous_format)
        content = copied.flatten().view(torch.uint8).numpy().tobytes()
        described = f"{value.dtype} {tuple(value.shape)}".encode()
        digest = hashlib.sha256(described + content).hexdigest()[:16]
        return f"{digest} sum {value.double().sum().item():.9g}"
    if isinstance(value, (list, tuple)):
        return " | ".join(fingerprint(part) for part in value)
    return repr(value)


def run_cases(cases: Iterator[Case]) -> dict[str, dict[str, str]]:
    """The fingerprints of all results by case. An error is a result as well."""
    results = {}
    for name, run in cases:
        try:
            outputs = run()
        except Exception as error:
            outputs = {"error": f"{type(error).__name__}: {error}"}
        assert name not in results, f"two cases are called {name}"
        results[name] = {key: fingerprint(value) for key, value in outputs.items()}
    return results


def _run_rank(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    results = run_cases(rank_cases())
    Path(directory, f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


def run_ranks() -> dict[str, dict[str, str]]:
    """Run the cases of two processes. Each rank's results have the rank in their name."""
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_run_rank, args=(directory,), nprocs=2)
        return {
            f"rank {rank}, {name}": results
            for rank in range(2)
            for name, results in json.loads(Path(directory, f"{rank}.json").read_text()).items()
        }


def main() -> None:
    """Run one group and write its fingerprints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group")
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    expected, imported = os.environ["PYTHONPATH"], Path(cjepa_kernels.__file__).parents[1]
    if imported != Path(expected):
        raise RuntimeError(f"expected the package in {expected}, found it in {imported}")
    torch.set_num_threads(2)  # With two threads, kernels divide their loops.
    if arguments.group == "ranks":
        results = run_ranks()
    else:
        results = run_cases(cases_of(arguments.group, arguments.quick))
    arguments.out.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
