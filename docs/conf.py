"""Sphinx's configuration of these pages: ``make docs`` builds them into build/docs.

The methods and mixers of a family are listed from the registry at build time, so that no page can name a
parameter that is not there.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import farspan
from farspan.attention.hybrid import EncoderMixer, Mixer, encoder_mixers, mixers
from farspan.attention.hybrid.registry import parameters_of as mixer_parameters
from farspan.attention.method import AttentionMethod
from farspan.attention.spec import parameters_of

HERE = Path(__file__).parent
GENERATED = HERE / "generated"

project, author = "farspan", "The farspan authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme, html_title, html_baseurl = "furo", "farspan", ""
html_show_copyright = html_show_sourcelink = False
exclude_patterns = ["generated", "results"]
myst_heading_anchors = 4
autodoc_typehints, autodoc_member_order = "none", "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _docstring_as_rst)
    app.connect("source-read", _links_outside)
    app.connect("include-read", lambda app, path, doc, content: _links_outside(app, doc, content))
    GENERATED.mkdir(exist_ok=True)
    by_family: dict[str, list[type[AttentionMethod]]] = {}
    for method in farspan.methods().values():
        by_family.setdefault(method.family, []).append(method)
    for family, found in by_family.items():
        (GENERATED / f"{family}.md").write_text("\n".join(line for m in found for line in _method(m)))
    for page, known in (("mixers", mixers()), ("encoder_mixers", encoder_mixers())):
        lines = (line for name, mixer in known.items() for line in _mixer(name, mixer))
        (GENERATED / f"{page}.md").write_text("\n".join(lines))


def _docstring_as_rst(app: Any, kind: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    lines[:] = _rst(lines)


def _links_outside(app: Any, page: str, content: list[str]) -> None:
    """Links to the contributor's page stay links; files outside docs/ are named, since the site lacks them
    (tests/test_docs.py checks that they exist)."""
    text = re.sub(r"\]\((?:\.\./)?CONTRIBUTING\.md", "](contributing.md", content[0])
    text = text.replace("```mermaid", "```text")  # drawing it would take a script from elsewhere
    content[0] = re.sub(r"(?<!!)\[([^\]]*)\]\((?:\.\./|results/)[^)]*\)", r"\1", text)


def _method(method: type[AttentionMethod]) -> Iterator[str]:
    yield f"### `{method.name}`: {method.title}\n"
    yield f"For {' and '.join(sorted(method.phases, reverse=True))}. {_paper(method.paper)}\n"
    yield from _parameters(parameters_of(method))
    yield _docstring(method)


def _mixer(name: str, mixer: type[Mixer] | type[EncoderMixer]) -> Iterator[str]:
    yield f"### `{name}`: {mixer.title}\n"
    yield f"{_paper(mixer.paper)}\n"
    yield from _parameters(list(mixer_parameters(mixer).values()))
    yield _docstring(mixer)


def _parameters(found: Sequence[dataclasses.Field[Any] | inspect.Parameter]) -> Iterator[str]:
    if found:
        yield "| parameter | default |\n|---|---|"
        yield from (f"| `{one.name}` | {_value(one.default)} |" for one in found)
        yield ""


def _paper(arxiv: str) -> str:
    return f"Paper: [arXiv {arxiv}](https://arxiv.org/abs/{arxiv})." if arxiv else ""


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value != "" else "empty"


def _docstring(of: type) -> str:
    text = "\n".join(_rst((inspect.getdoc(of) or "").splitlines()))
    return f"```{{eval-rst}}\n{text}\n```\n"


def _rst(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText: lines such as "k: tokens to read." become a list."""
    written, item = [], False
    for line in lines:
        named = re.match(r"([a-z_]\w*(?:, [a-z_]\w*)*): ", line)
        if named:
            written += [*([] if item else [""]), f"- ``{named[1]}``: {line[named.end() :]}"]
            item = True
        elif item and line and not line.startswith("Raises"):
            written.append(f"  {line.strip()}")
        else:
            written += ["", line] if item and line else [line]
            item = False
    return [line.replace("|", "\\|") for line in written]
