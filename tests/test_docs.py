"""What the pages say of the repository is true: tests and files that they name exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import farspan
from farspan.runtime.hf.releases import ARCHITECTURES

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/families").glob("*.md")),
]
HISTORY = "LOG.md"  # it names files as they were then
TEST = re.compile(r"(tests/[\w/]+\.py)(?:::(\w+))?")
FILE = re.compile(r"`((?:attention|parallel|runtime|evals|cli|benchmarks|examples)/[\w/.]*)`")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


@cache
def functions(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_named_exists(page: Path) -> None:
    missing = []
    for file, name in TEST.findall(page.read_text()):
        path = ROOT / file
        if page.name != HISTORY and (not path.is_file() or (name and name not in functions(path))):
            missing.append(f"{file}::{name}")
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_named_exists(page: Path) -> None:
    text = page.read_text()
    named = [page.parent / link for link in LINK.findall(text)]
    if page.name != HISTORY:
        named += [ROOT / name for name in FILE.findall(text)]
    assert not [str(path) for path in named if not path.exists()]


def test_faults_name_many_tests() -> None:
    rows = [line for line in (ROOT / "docs" / "FAULTS.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| what goes wrong")]
    assert len(rows) > 40 and all(TEST.search(row.split(" | ")[-1]) for row in rows)


def test_every_method_has_a_definition_test() -> None:
    """Each registered method is compared with its definition, written apart in float64."""
    text = "\n".join(file.read_text() for file in (ROOT / "tests" / "laws").glob("test_definitions*.py"))
    assert not [name for name in farspan.methods() if not re.search(rf"\b{name}\b", text)]


def test_the_readmes_first_snippet_runs_as_it_stands(
    smollm2: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(farspan, "load", lambda _: smollm2)
    snippet = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    exec(compile(snippet, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith(" 4711") and re.search(r"decode +quest +\d", printed)


def test_the_readme_names_the_architectures_that_are_tested() -> None:
    """As "Qwen3-MoE" for Qwen3MoeForCausalLM, and so on."""
    text = re.sub(
        r"[\W_]", "", (ROOT / "README.md").read_text().partition("## Models")[2].partition("## The")[0]
    )
    kinds = {re.sub(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", "", x) for x in ARCHITECTURES}
    assert not [kind for kind in kinds if kind.lower() not in text.lower()]


def test_the_readmes_tables_do_not_break_a_methods_name() -> None:
    """A viewer breaks a line at a space or a hyphen of a table's cell: the spec of a method has neither."""
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    specs = [span for row in rows for span in re.findall(r"`([^`]+)`", row)]
    specs = [spec for spec in specs if re.match(r"\w+", spec)[0] in farspan.methods()]
    assert len(specs) > 30 and not [spec for spec in specs if re.search(r"[\s-]", spec)]
