"""The public interface of the package as plain data, and the changes that break its callers.

``python python_tests/support/public_interface.py --write`` records the interface of this tree in
``python_tests/package/public_interface.json``. A revision may add to the interface and must not
remove or change any of it. :func:`differences` lists what is missing or changed.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.requirements import Requirement
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "python_tests" / "package" / "public_interface.json"

# These import paths and their names must keep working, beside those that the documents name. None
# stands for the module's ``__all__``. Pickles of earlier releases find the classes by these paths.
IMPORT_PATHS: dict[str, Sequence[str] | None] = {
    "cjepa_kernels": None,
    "cjepa_kernels.backends": ("BackendStatus", "backends"),
    "cjepa_kernels.config": ("create_cjepa_loss_from_config", "create_loss_from_config"),
    "cjepa_kernels.distributed": None,
    "cjepa_kernels.functional": ("NTXentOutput", "cross_logsumexp", "nt_xent", "pair_similarity"),
    "cjepa_kernels.modules": None,
    "cjepa_kernels.modules.contrastive_jepa": ("ContrastiveJEPALoss",),
    "cjepa_kernels.modules.hjepa": ("HJEPALoss",),
    "cjepa_kernels.modules.nt_xent": ("NTXentLoss",),
    "cjepa_kernels.prediction": ("prediction_loss",),
    "cjepa_kernels.reference": ("CrossLogSumExp",),
    "cjepa_kernels.tokens": ("cls_tokens",),
}
# ``cjepa_kernels.distributed`` also lists names that the package itself uses. They can be imported,
# but no document describes them.
INTERNAL = frozenset({"Options", "STRATEGIES", "SharedGroup", "Strategy", "resolve_group"})
COMPLETION = {"--install-completion", "--show-completion"}  # Typer adds these options.
RUN_AS_MODULES = ("cjepa_kernels.bench",)


def describe() -> dict[str, Any]:
    """The interface of the package that Python imports, and of the files in this tree."""
    names = public_names()
    imported = {path: _import(path) for path in names}
    objects = {p: value for p, value in imported.items() if p.rpartition(".")[2] not in INTERNAL}
    return {
        "names": names,
        "signatures": {
            path: describe_signature(value) for path, value in objects.items() if callable(value)
        },
        "fields": {path: fields for path, value in objects.items() if (fields := _fields(value))},
        "modules": {
            path: describe_module_class(value)
            for path, value in objects.items()
            if inspect.isclass(value)
            and issubclass(value, nn.Module)
            and path.count(".") == 1  # This leaves out its other import paths.
        },
        "operators": describe_operators(),
        "loss_keys": describe_loss_keys(),
        "experiment_keys": describe_experiment_keys(),
        "commands": describe_commands(),
        "run_as_modules": [name for name in RUN_AS_MODULES if _runs_as_module(name)],
        "distribution": describe_distribution(),
        "environment": describe_environment(),
    }


def public_names() -> list[str]:
    """The dotted paths of ``IMPORT_PATHS`` and of what documents and examples import."""
    paths = set()
    for module, names in IMPORT_PATHS.items():
        listed = importlib.import_module(module).__all__ if names is None else names
        paths |= {f"{module}.{name}" for name in listed}
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for document in documents:
        text = document.read_text(encoding="utf-8")
        paths |= set(re.findall(r"^::: (cjepa_kernels\.[\w.]+)$", text, re.MULTILINE))
        for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            paths |= _imported(code)
    for example in (ROOT / "examples").glob("*.py"):
        paths |= _imported(example.read_text(encoding="utf-8"))
    return sorted(paths)


def _imported(code: str) -> set[str]:
    return {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cjepa_kernels")
        for alias in node.names
    }


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def describe_signature(function: Callable[..., Any]) -> list[dict[str, str]]:
    """Name, kind and default of every parameter. Annotations are left out and may change."""
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        entry = {"name": parameter.name, "kind": parameter.kind.name}
        if parameter.default is not inspect.Parameter.empty:
            default = parameter.default
            entry["default"] = default.__name__ if inspect.isfunction(default) else repr(default)
        parameters.append(entry)
    return parameters


def _fields(value: Any) -> list[str]:
    """Names of the fields of a result, in order."""
    if not inspect.isclass(value):
        return []
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    return list(getattr(value, "_fields", ()))


def describe_module_class(cls: type[nn.Module]) -> dict[str, Any]:
    """Methods, properties and attributes of a loss, and the keys of its results and its state."""
    module = _make_module(cls)
    own = {name: getattr(cls, name) for name in dir(cls) if name not in dir(nn.Module)}
    public = {name: value for name, value in own.items() if not name.startswith("_")}
    public["forward"] = cls.forward
    return {
        "methods": {n: describe_signature(v) for n, v in public.items() if inspect.isfunction(v)},
        "properties": sorted(n for n, value in public.items() if isinstance(value, property)),
        "settable": sorted(
            n for n, v in public.items() if isinstance(v, property) and v.fset is not None
        ),
        "attributes": sorted(n for n in vars(module) if n not in vars(nn.Module()) and n[0] != "_"),
        "children": sorted(
            [name for name, _ in module.named_children()]
            + [name for name, _ in module.named_parameters()]
        ),
        "results": sorted(_results(module)),
        "state": sorted(module.state_dict()),
    }


def _make_module(cls: type[nn.Module]) -> nn.Module:
    """A module of the class, with the options that give it all of its parameters."""
    if cls.__name__ == "NTXentLoss":
        return cls(learnable_temperature=True, return_logits=True)
    if cls.__name__ == "SupConLoss":
        return cls(learnable_temperature=True)
    if cls.__name__ == "HJEPALoss":
        return cls(num_hierarchies=2)
    if cls.__name__ == "ContrastiveJEPALoss":
        return cls(_make_module(_import("cjepa_kernels.HJEPALoss")))
    if cls.__name__ == "MomentumQueue":
        return cls(size=4, features=5)
    return cls()


def _results(module: nn.Module) -> Sequence[str]:
    """The keys of the result. A module that is not named here takes the two views of a batch."""
    if type(module).__name__ == "MomentumQueue":
        return ()  # it is never called
    levels = [torch.ones(3, 4, 5), torch.ones(3, 2, 5)]
    features = torch.ones(3, 5, 5, requires_grad=True)
    if type(module).__name__ == "HJEPALoss":
        return list(module(levels, levels))
    if type(module).__name__ == "ContrastiveJEPALoss":
        return list(
            module(levels, levels, context_features_i=features, context_features_j=features)
        )
    if type(module).__name__ == "SupConLoss":
        return list(module(features))
    return list(module(features[:, 0], features[:, 1]))


def describe_operators() -> dict[str, str]:
    """The schemas of all overloads, by ``name.overload``."""
    importlib.import_module("cjepa_kernels")
    return {
        str(schema).partition("(")[0]: str(schema)
        for schema in sorted(torch._C._jit_get_all_schemas(), key=str)
        if schema.name.startswith("cjepa_kernels::")
    }


def describe_loss_keys() -> dict[str, str]:
    """Keys of a ``loss`` section, with the default of the module's argument."""
    from cjepa_kernels import config

    defaults = {
        argument: parameter.default
        for cls in ("ContrastiveJEPALoss", "HJEPALoss")
        for argument, parameter in inspect.signature(
            _import(f"cjepa_kernels.{cls}")
        ).parameters.items()
    }
    arguments = {**config.JEPA_KEYS, **config.CONTRASTIVE_KEYS}
    return {
        key: repr(defaults[arguments[key]]) if key in arguments else ""
        for key in sorted(config.LOSS_KEYS)
    }


def describe_experiment_keys() -> dict[str, dict[str, Any]]:
    """Keys of an experiment by their dotted names, with their type and default."""
    from cjepa_kernels.train.config import config_from_dict, config_to_dict

    experiment = config_from_dict({})
    values = config_to_dict(experiment)
    keys = {}
    for name, field in type(experiment).model_fields.items():
        section = field.annotation
        if isinstance(section, type) and hasattr(section, "model_fields"):
            for key, inner in section.model_fields.items():
                keys[f"{name}.{key}"] = {
                    "takes": describe_type(inner.annotation),
                    "default": values[name][key],
                }
        else:
            keys[name] = {"takes": describe_type(field.annotation), "default": values[name]}
    return keys


def describe_type(annotation: Any) -> list[str]:
    """The alternatives that an annotation allows, without ranges: ``["int", "null"]``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return describe_type(arguments[0])
    if origin is Literal:
        return [repr(value) for value in arguments]
    if origin in (typing.Union, types.UnionType):
        return [alternative for part in arguments for alternative in describe_type(part)]
    if annotation is types.NoneType:
        return ["null"]
    name = getattr(origin or annotation, "__name__", str(annotation))
    if not arguments:
        return [name]
    return [f"{name}[{', '.join(' | '.join(describe_type(part)) for part in arguments)}]"]


def describe_commands() -> dict[str, dict[str, Any]]:
    """Options and arguments of every command. Those of ``cjepa`` itself have the key ``""``."""
    import typer

    from cjepa_kernels.cli.application import app

    group: Any = typer.main.get_command(app)
    commands = {"": group, **group.commands}
    return {name: _describe_parameters(command.params) for name, command in commands.items()}


def _describe_parameters(parameters: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Describe options by their names and arguments by their positions."""
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    return {
        f"argument {arguments.index(p) + 1}" if p in arguments else ", ".join(sorted(p.opts)): {
            "default": None if p.default is None else str(p.default),
            "required": p.required,
            "flag": getattr(p, "is_flag", False),
            "values": p.nargs,
        }
        for p in parameters
        if COMPLETION.isdisjoint(p.opts)
    }


def _runs_as_module(name: str) -> bool:
    return importlib.util.find_spec(f"{name}.__main__") is not None


def describe_distribution() -> dict[str, Any]:
    """The parts of ``pyproject.toml`` that users rely on when they install the package."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pytest depends on it.

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return {
        "name": project["name"],
        "python": project["requires-python"],
        "dependencies": sorted(project["dependencies"]),
        "extras": {extra: _packages(extras[extra]) for extra in sorted(extras)},
        "scripts": project["scripts"],
    }


def _packages(requirements: Sequence[str]) -> list[str]:
    parsed = [Requirement(text) for text in requirements]
    return sorted(r.name + (f"[{','.join(sorted(r.extras))}]" if r.extras else "") for r in parsed)


def describe_environment() -> list[str]:
    """The environment variables that documents name and sources read."""
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {
        name
        for document in documents
        for name in re.findall(r"(?<!-D)\bCJEPA_\w+", document.read_text(encoding="utf-8"))
    }
    sources = [ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    for folder in ("cjepa_kernels", "csrc"):
        sources += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h")]
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    read = set(re.findall(r"\bCJEPA_\w+", text))
    return sorted(named & read)


def differences(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """The entries of ``recorded`` that ``present`` lacks or changes. Additions are not listed.

    Args:
        recorded: An interface as :func:`describe` returns it.
        present: The interface to compare with it.

    Returns:
        One line for each difference, with the entry, its recorded value and its present value.
    """
    lines = _missing("public name", recorded["names"], present["names"])
    lines += _each("signature", recorded, present, part="signatures", compare=_changed_signature)
    lines += _each("fields of", recorded, present, part="fields", compare=_changed_fields)
    lines += _each("class", recorded, present, part="modules", compare=_changed_class)
    lines += _each("operator", recorded, present, part="operators", compare=_changed_schema)
    lines += _each(
        "key of the loss section", recorded, present, part="loss_keys", compare=_changed_value
    )
    lines += _each(
        "key of an experiment", recorded, present, part="experiment_keys", compare=_changed_key
    )
    lines += _each("command", recorded, present, part="commands", compare=_changed_command)
    lines += _missing("python -m", recorded["run_as_modules"], present["run_as_modules"])
    lines += _changed_distribution(recorded["distribution"], present["distribution"])
    return lines + _missing("variable", recorded["environment"], present["environment"])


def _missing(what: str, recorded: Sequence[str], present: Sequence[str]) -> list[str]:
    return [f"{what} {name}: removed" for name in recorded if name not in present]


def _each(
    what: str,
    recorded: Mapping[str, Any],
    present: Mapping[str, Any],
    part: str,
    compare: Callable[[Any, Any], list[str]],
) -> list[str]:
    """Compare the entries of one part of the interface, which is a mapping."""
    lines = _missing(what, list(recorded[part]), list(present[part]))
    for name, entry in recorded[part].items():
        if name in present[part]:
            lines += [f"{what} {name}: {line}" for line in compare(entry, present[part][name])]
    return lines


def _changed_value(recorded: Any, present: Any) -> list[str]:
    return [] if recorded == present else [f"was {recorded!r}, is {present!r}"]


def _changed_signature(
    recorded: Sequence[Mapping[str, str]], present: Sequence[Mapping[str, str]]
) -> list[str]:
    before = {parameter["name"]: parameter for parameter in recorded}
    now = {parameter["name"]: parameter for parameter in present}
    lines = _missing("argument", list(before), list(now))
    for name, parameter in before.items():
        if name in now:
            lines += [f"argument {name}: {x}" for x in _changed_value(parameter, now[name])]
    for name, parameter in now.items():
        optional = "default" in parameter or parameter["kind"].startswith("VAR_")
        if name not in before and not optional:
            lines.append(f"argument {name}: new, and without a default")
    positions_before, positions_now = _positional(recorded), _positional(present)
    if positions_now[: len(positions_before)] != positions_before and not lines:
        lines.append(f"positions were {positions_before}, are {positions_now}")
    return lines


def _positional(parameters: Sequence[Mapping[str, str]]) -> list[str]:
    return [p["name"] for p in parameters if p["kind"].startswith("POSITIONAL")]


def _changed_fields(recorded: Sequence[str], present: Sequence[str]) -> list[str]:
    """Callers may unpack a result by position, so one more field is also a change."""
    return _changed_value(list(recorded), list(present))


def _changed_class(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    lines = _each("method", recorded, present, part="methods", compare=_changed_signature)
    for part, what in (
        ("properties", "property"),
        ("settable", "settable property"),
        ("children", "module or parameter"),
        ("results", "result"),
    ):
        lines += _missing(what, recorded[part], present[part])
    # An attribute may become a property, because callers read both alike.
    readable = [*present["attributes"], *present["properties"], *present["children"]]
    lines += _missing("attribute", recorded["attributes"], readable)
    # load_state_dict refuses a state with a missing key and a state with an unknown key.
    return lines + [
        f"state: {line}" for line in _changed_value(recorded["state"], present["state"])
    ]


def _changed_schema(recorded: str, present: str) -> list[str]:
    before, now = torch._C.parse_schema(recorded), torch._C.parse_schema(present)
    if now.is_backward_compatible_with(before):
        return []
    return [f"was {recorded}, is {present}"]


def _changed_key(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    lines = _missing("type", recorded["takes"], present["takes"])
    return lines + [
        f"default {line}" for line in _changed_value(recorded["default"], present["default"])
    ]


def _changed_command(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    lines = _missing("parameter", list(recorded), list(present))
    for name, before in recorded.items():
        for part, value in before.items():
            if name in present:
                changes = _changed_value(value, present[name][part])
                lines += [f"{name}: {part} {change}" for change in changes]
    return lines + [
        f"{name}: new, and required"
        for name, now in present.items()
        if name not in recorded and now["required"]
    ]


def _changed_distribution(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    lines = []
    for part in ("name", "python", "dependencies"):
        lines += [f"{part}: {line}" for line in _changed_value(recorded[part], present[part])]
    lines += _each("script", recorded, present, part="scripts", compare=_changed_value)
    return lines + _each(
        "extra",
        recorded,
        present,
        part="extras",
        compare=lambda old, new: _missing("package", old, new),
    )


def main() -> None:
    """Print what differs from the record, or write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="Record the present interface.")
    present = describe()
    if parser.parse_args().write:
        RECORD.write_text(json.dumps(present, indent=1) + "\n", encoding="utf-8")
        return
    lines = differences(json.loads(RECORD.read_text(encoding="utf-8")), present)
    print("\n".join(lines) or "The public interface contains everything that is recorded.")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
