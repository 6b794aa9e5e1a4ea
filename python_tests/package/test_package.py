"""The package itself: imports, version, compiled module, back ends and examples."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from repository import ROOT

import cjepa_kernels
from cjepa_kernels import backends, extras, nt_xent
from cjepa_kernels.backends import compiled_module


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_annotation_of_back_ends_has_every_name() -> None:
    """Editors read the values of ``backend=`` from ``Backend``."""
    module = sys.modules["cjepa_kernels.backends"]  # a function has the same name
    assert set(get_args(module.Backend)) == {"auto", *backends()}


def test_importing_needs_torch_alone() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        refused = {"numpy", "yaml", "lightning", "sklearn", "datasets", "typer", "rich", "PIL",
                   "matplotlib", "pydantic", "tensorboard", "pandas", "scipy", "open_clip",
                   "info_nce", "sentence_transformers", "lightly", "pytorch_metric_learning"}
        allowed_importers = ("torch",)
        if name.split(".")[0] in refused:
            frame = sys._getframe(1)
            while frame is not None:
                module = frame.f_globals.get("__name__", "")
                if module.split(".")[0] in allowed_importers:
                    return None
                if module.startswith("cjepa_kernels"):
                    raise AssertionError(f"{module} imports {name}")
                frame = frame.f_back
        return None
sys.meta_path.insert(0, Refuse())
import cjepa_kernels, cjepa_kernels.compat, torch
z = torch.randn(4, 3, requires_grad=True)
cjepa_kernels.nt_xent(z, torch.randn(4, 3)).loss.backward()
cjepa_kernels.create_loss_from_config({"type": "cjepa"})
assert "cjepa_kernels.train" not in sys.modules
assert "torch._dynamo" not in sys.modules, "it takes as long to import as torch itself"
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_missing_extra_is_named() -> None:
    hint = r"the extra \[train\] of cjepa_kernels \(pip install --no-build-isolation '\.\[train\]'"
    with pytest.raises(ImportError, match=hint):
        extras.require("a_module_that_is_not_there", extra="train")


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [("lightning", ["probe", "a.ckpt"], "train"), ("rich", ["bench", "--quick"], "bench")],
)
def test_command_line_without_the_extra_says_how_to_get_it(
    missing: str, arguments: list[str], extra: str
) -> None:
    code = f"""
import sys
sys.modules[{missing!r}] = None
sys.argv = ["cjepa", *{arguments}]
from cjepa_kernels.cli import main
main()
"""
    result = run_python(code)
    assert result.returncode == 2
    assert f"extra [{extra}] of cjepa_kernels" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_of_the_command_line_needs_no_extra() -> None:
    code = """
import sys
sys.modules["typer"] = None
from cjepa_kernels.cli import main
for arguments in ([], ["--help"], ["--version"]):
    sys.argv = ["cjepa", *arguments]
    main()
    print("end of the help")
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    helps = result.stdout.split("end of the help\n")
    assert helps.pop() == ""
    assert len(helps) == 3
    for text in helps:
        assert text.startswith(f"cjepa_kernels {cjepa_kernels.__version__}. Usage")
        assert "(extra [bench])" in text
        assert "(extra [train])" in text
        assert "pip install --no-build-isolation '.[bench]'" in text


def test_help_without_extras_names_every_command() -> None:
    pytest.importorskip("typer")
    from cjepa_kernels.cli import USAGE
    from cjepa_kernels.cli.application import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert names <= set(re.findall(r"\w+", USAGE))


def test_benchmark_needs_its_own_extra_alone() -> None:
    code = """
import sys
for name in ("lightning", "sklearn", "datasets", "yaml", "tensorboard"):
    sys.modules[name] = None
sys.argv = ["cjepa", "bench", "--dtype", "fp64"]
from cjepa_kernels.cli import main
main()
"""
    result = run_python(code)
    assert result.returncode == 2
    assert "--dtype: expected one of fp32, bf16, fp16, got 'fp64'" in result.stderr


def test_an_import_error_inside_a_module_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("import another_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="another_that_is_missing"):
        extras.require("broken_module", extra="train")


def test_build_info() -> None:
    module = compiled_module()
    if module is None:
        pytest.skip("cjepa_kernels._C was not built: no compiler here")
    info = module.build_info()
    assert info["version"] == cjepa_kernels.__version__
    assert info["build_type"] == "Release"
    assert info["cxx_standard"] >= 201703
    assert info["instruction_sets"][0] == "baseline"
    assert info["hardware_threads"] >= 1
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if flags and info["target"] == "Linux x86_64":
        assert ("avx2" in info["instruction_sets"]) == (" avx2 " in flags and " fma " in flags)
        assert ("avx512" in info["instruction_sets"]) == (" avx512vl " in flags)
    assert info["instruction_set"] in info["instruction_sets"]


def test_the_compiled_module_holds_no_path_of_this_machine() -> None:
    """Paths could come from its checks, from PyTorch's headers or from a library search path."""
    module = compiled_module()
    if module is None:
        pytest.skip("cjepa_kernels._C was not built: no compiler here")
    content = Path(module.__file__ or "").read_bytes()
    assert b"csrc/cpu/operators.cpp" in content, "checks of the project have a relative path"
    torch_folder = str(Path(torch.__file__).parent)
    for path in (str(ROOT), torch_folder, sys.prefix, sys.base_prefix, str(Path.home())):
        if len(path) > len("/usr"):
            assert path.encode() not in content, path
    for piece in (b"site-packages", b"/tmp/"):
        assert piece not in content


def test_without_the_compiled_module_everything_else_works() -> None:
    code = """
import sys
sys.modules["cjepa_kernels._C"] = None
import cjepa_kernels, torch
assert "not built" in cjepa_kernels.backends()["native"].reason
assert cjepa_kernels.nt_xent(torch.eye(3), torch.eye(3)).accuracy == 1
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_importing_touches_no_gpu() -> None:
    """Once a process has called the GPU's driver, processes that it forks cannot use the GPU."""
    code = """
import torch
def touched(*args, **kwargs):
    raise AssertionError("asked for a device")
torch.cuda.is_available = torch.cuda.device_count = touched
import cjepa_kernels
assert cjepa_kernels.nt_xent(torch.eye(3), torch.eye(3)).accuracy == 1
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_backends_say_what_there_is_and_why_not() -> None:
    assert list(backends()) == ["triton", "native", "chunked", "reference"]
    for name, status in backends().items():
        assert status.reason
        if not status.available:
            with pytest.raises(RuntimeError, match=f'"{name}" was asked for and is not available'):
                nt_xent(torch.eye(2), torch.eye(2), backend=name)  # type: ignore[arg-type]
    assert backends()["chunked"].available
    assert backends()["reference"].available


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(cjepa_kernels.__file__).parent / "py.typed").exists()


def test_every_place_says_the_same_version() -> None:
    version = cjepa_kernels.__version__
    assert importlib.metadata.version("cjepa_kernels") == version
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0] == version
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation
    code = (
        "import sys; sys.argv = ['cjepa', '--version']; from cjepa_kernels.cli import main; main()"
    )
    assert run_python(code).stdout == f"cjepa_kernels {version}\n"


def test_metadata_of_the_installation() -> None:
    metadata = importlib.metadata.metadata("cjepa_kernels")
    documented_extras = {"bench", "bench-gpu", "docs", "lint", "test", "train", "triton", "yaml"}
    assert set(metadata.get_all("Provides-Extra") or ()) == documented_extras
    assert "Typing :: Typed" in (metadata.get_all("Classifier") or ())
    required = [
        line for line in importlib.metadata.requires("cjepa_kernels") or () if ";" not in line
    ]
    assert len(required) == 1
    assert required[0].startswith("torch>=")


LIBRARY = [
    name
    for _, name, _ in pkgutil.walk_packages(cjepa_kernels.__path__, "cjepa_kernels.")
    if not name.endswith("._C")
]


@pytest.mark.parametrize("name", LIBRARY)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_seven_examples() -> None:
    assert len(EXAMPLES) == 7


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(script: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    # If coverage is measured, a process that an example starts writes its data here.
    leftovers = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".coverage")]
    assert not leftovers, "the example left files behind"


NAMED_DEFAULTS = [
    (name, argument)
    for name in cjepa_kernels.__all__
    if callable(getattr(cjepa_kernels, name))
    for argument, parameter in inspect.signature(getattr(cjepa_kernels, name)).parameters.items()
    if isinstance(parameter.default, float) and argument != "hierarchy_weights"
]


@pytest.mark.parametrize(("name", "argument"), NAMED_DEFAULTS)
def test_docstrings_name_the_defaults_that_signatures_show_as_constants(
    name: str, argument: str
) -> None:
    function = getattr(cjepa_kernels, name)
    entry = rf"^ *{argument}:(?:.|\n)*?[Dd]efault ([0-9.e-]*[0-9])"
    documented = re.search(entry, function.__doc__, re.MULTILINE)
    assert documented is not None
    assert float(documented[1]) == inspect.signature(function).parameters[argument].default
