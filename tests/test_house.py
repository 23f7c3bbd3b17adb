"""The house itself: what is packaged, what an import loads, which way imports go."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import farspan

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OUTSIDE = {
    "tests",
    "benchmarks",
    "docs",
    "examples",
    "build",
    "dist",
    "demo-out",
    "out",
}  # folders that are not the package


def package_folders() -> set[str]:
    """Every folder of Python files that belongs to the package, by its dotted name."""
    folders = {file.parent.relative_to(ROOT) for file in ROOT.rglob("*.py")}
    inside = {folder for folder in folders if not folder.parts or folder.parts[0] not in OUTSIDE}
    return {
        ".".join(("farspan", *f.parts)) for f in inside if not any(part.startswith(".") for part in f.parts)
    }


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, cwd="/")


def test_every_package_is_listed():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert set(listed) == package_folders()
    assert listed == sorted(listed)
    missing = [name for name in listed if not (ROOT / Path(*name.split(".")[1:]) / "__init__.py").is_file()]
    assert not missing, "folders without __init__.py"


def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    # From a copy of the sources: building in place would leave a build folder for two workers to fight over.
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    built = subprocess.run([*pip, "-w", str(tmp_path), str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("farspan-*.whl"))) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "site")
    modules = {name for name in names if name.endswith(".py")}
    expected = {
        f"farspan/{file.relative_to(ROOT)}"
        for package in package_folders()
        for file in (ROOT / Path(*package.split(".")[1:])).glob("*.py")
    }
    assert modules == expected
    assert {"farspan/evals/html/report.css", "farspan/evals/html/report.html.j2"} <= set(names)
    assert "farspan/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); sys.meta_path[:] = "
        "[f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import farspan; farspan.methods(); farspan.patch; print(farspan.__file__)"
    )
    assert run(code).stdout.strip() == str(tmp_path / "site" / "farspan" / "__init__.py")


def test_import_loads_nothing_heavy():
    heavy = ["torch", "transformers", "numpy", "accelerate", "typer", "rich"]
    code = (
        f"import sys, json, farspan; dir(farspan); farspan.__version__; "
        f"print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    )
    result = run(code)
    assert json.loads(result.stdout) == [], result.stderr


def test_everything_offered_is_there():
    for name in farspan.__all__:
        assert getattr(farspan, name) is not None
    assert set(farspan.__all__) <= set(dir(farspan))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        farspan.nothing  # noqa: B018
    assert issubclass(farspan.SpecError, farspan.FarspanError) and issubclass(
        farspan.FarspanError, ValueError
    )


def test_import_has_no_side_effect_on_transformers():
    code = (
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "both = (AttentionInterface, AttentionMaskInterface)\n"
        "seen = lambda: [dict(registry._global_mapping) for registry in both]\n"
        "before = seen()\n"
        "import farspan\n"
        "for name in farspan.__all__: getattr(farspan, name)\n"
        "import farspan.runtime.hf\n"
        "farspan.methods()\n"
        "assert seen() == before"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def imports_of(file: Path, *, for_types: bool = False) -> set[str]:
    """Absolute dotted names a file imports, anywhere in it. for_types: those under `if TYPE_CHECKING`,
    too."""
    tree = ast.parse(file.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = ("farspan", *file.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only and not for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            found |= {stem, *(f"{stem}.{alias.name}" for alias in node.names)}
    return found


LAYERS = ["attention", "parallel", "runtime", "evals", "cli"]  # each may import those before it


@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_imports_go_down_only(number):
    above = tuple(f"farspan.{layer}" for layer in LAYERS[number + 1 :])
    wrong = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in (ROOT / LAYERS[number]).rglob("*.py")
        for name in imports_of(file)
        if any(name == layer or name.startswith(f"{layer}.") for layer in above)
    }
    assert not wrong


@pytest.mark.parametrize("layer", LAYERS)
def test_no_file_is_in_an_import_circle(layer):
    """Imports inside functions and for annotations count: they hide a circle and do not open it."""
    files = {
        ".".join(("farspan", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
        for file in (ROOT / layer).rglob("*.py")
    }
    imports = {
        name: {
            other
            for other in imports_of(file, for_types=True) & files.keys()
            if not f"{name}.".startswith(f"{other}.")
        }
        for name, file in files.items()
    }
    assert any(imports.values())
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the files


def tracked_files() -> list[Path]:
    """Every Python file of the repository that git knows or that is new."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in found.stdout.split() if (ROOT / name).is_file()]


def test_files_are_short():
    """A method is read at one sitting: 150 lines for a file that defines one, 400 for any other."""
    defining = {Path(sys.modules[cls.__module__].__file__) for cls in farspan.methods().values()}
    files = tracked_files()
    assert len(defining & set(files)) >= 20
    folders = {file.relative_to(ROOT).parts[0] for file in files}
    assert folders >= {*LAYERS, "tests", "benchmarks", "examples"}
    lines = {file: len(file.read_text().splitlines()) for file in files}
    long = {str(f.relative_to(ROOT)): n for f, n in lines.items() if n > (150 if f in defining else 400)}
    assert not long


def test_transformers_is_touched_in_two_folders():
    users = {
        str(file.relative_to(ROOT))
        for layer in LAYERS
        for file in (ROOT / layer).rglob("*.py")
        if any(re.match(r"transformers\b", name) for name in imports_of(file))
    }
    assert {user for user in users if not user.startswith("runtime/hf/")} == {
        "runtime/models/gguf.py",
        "runtime/models/load.py",
        "runtime/models/sentences.py",
    }


def test_constraints_satisfy_the_requirements():
    """Each pinned version lies in the range pyproject.toml allows, and every direct requirement is pinned."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *extras["evals"], *extras["dev"]]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{text} excludes {pins[name]}"
