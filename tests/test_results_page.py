"""docs/RESULTS.md has the tables that the committed results make."""

from __future__ import annotations

import re

import pytest

from benchmarks import tables


def test_the_page_is_what_the_command_makes() -> None:
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run `make tables`"
    marked = re.findall(r"^<!-- (\w+) -->$", text, re.MULTILINE)
    assert sorted(marked) == sorted(tables.TABLES), "each table once"


def test_a_changed_table_is_made_anew_and_prose_stays() -> None:
    page = tables.filled("Prose.\n<!-- decode_step -->\nold\n<!-- /decode_step -->\n| by | hand |\n")
    assert page.startswith("Prose.\n<!-- decode_step -->\n| step |") and page.endswith("| by | hand |\n")
    dense = next(row for row in tables.rows_of("decode_step") if row["step"] == "dense")
    assert f"| `dense` | {dense['ms']:.1f} | {dense['times faster']:.1f} |" in page and "old" not in page
    with pytest.raises(KeyError, match="no_such"):
        tables.filled("<!-- no_such -->\n<!-- /no_such -->\n")
