"""The text of tables: nothing is cut, names break only between their parts, lines keep to the width."""

from __future__ import annotations

import pytest

from farspan.runtime.report import LayerReport, PhaseReport, Report
from farspan.runtime.table import Table, wrap

PAIR = "antidiagonal:block=64,stride=8 + double_sparsity:k=1024,group_factor=2"


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (80, [PAIR]),
        (40, ["antidiagonal:block=64,stride=8 +", "double_sparsity:k=1024,group_factor=2"]),
        (
            20,
            [
                "antidiagonal:",
                "block=64,stride=8 +",
                "double_sparsity:",
                "k=1024,",
                "group_factor=2",
            ],
        ),
        (1, ["antidiagonal:", "block=64,", "stride=8", "+", "double_sparsity:", "k=1024,", "group_factor=2"]),
    ],
)
def test_names_break_between_their_parts(width: int, lines: list[str]) -> None:
    assert wrap(PAIR, width) == lines


def test_a_number_with_a_comma_or_a_colon_is_one_part() -> None:
    assert wrap("12,525 tokens at 10:30, /a/path:1", 1) == ["12,525", "tokens", "at", "10:30,", "/a/path:1"]
    assert wrap("two\nlines", 80) == ["two", "lines"] and wrap("", 5) == [""]


def made() -> Table:
    table = Table(
        "method", "length", "n", "score", title="ruler", caption="Read what is read.", numbers_from=1
    )
    table.add_row("dense", "1K", "20", "62.1")
    table.add_row("double_sparsity:k=512", "16K", "1000", "100.0")
    return table


def test_a_row_stands_on_one_line_where_it_fits() -> None:
    assert made().text(80).splitlines() == made().text().splitlines()
    assert made().text().splitlines() == [
        "ruler",
        "method                 length     n  score",
        "──────────────────────────────────────────",
        "dense                      1K    20   62.1",
        "double_sparsity:k=512     16K  1000  100.0",
        "Read what is read.",
    ]


def test_a_row_that_does_not_fit_takes_two_lines() -> None:
    assert made().text(41).splitlines() == [
        "ruler",
        "method",
        "  length     n  score",
        "─────────────────────",
        "dense",
        "      1K    20   62.1",
        "double_sparsity:k=512",
        "     16K  1000  100.0",
        "Read what is read.",
    ]


def test_a_narrow_terminal_takes_more_lines_and_cuts_nothing() -> None:
    assert made().text(16).splitlines() == [
        "ruler",
        "method",
        "  length     n",
        "  score",
        "────────────────",
        "dense",
        "      1K    20",
        "   62.1",
        "double_sparsity:",
        "k=512",
        "     16K  1000",
        "  100.0",
        "Read what is",
        "read.",
    ]


def test_text_cells_share_what_is_left_and_sections_are_ruled_off() -> None:
    table = Table("what", "found", "needed")
    table.add_row("torch", "2.13.0", "2.11 or newer and more words than fit")
    table.add_section()
    table.add_row("文字", "wide", "")
    assert table.text(31).splitlines() == [
        "what   found   needed",
        "─────────────────────────────",
        "torch  2.13.0  2.11 or newer",
        "               and more words",
        "               than fit",
        "─────────────────────────────",
        "文字   wide",
    ]


def test_a_row_has_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match="2 cells for 3 columns"):
        Table("a", "b", "c").add_row("1", "2")


def test_the_report_names_its_methods_whole() -> None:
    name = "double_sparsity:k=1024,group_factor=2,recipe=docs/results/recipe"
    phase = PhaseReport(name, calls=3, pairs=1, causal_pairs=3, kv_bytes=999_949, dense_bytes=1_234_567_890)
    layers = [LayerReport(0, {"prefill": PhaseReport("dense"), "decode": phase})]
    report = Report("Llama", layers)
    row = next(line for line in str(report).splitlines() if line.startswith("0 "))
    assert name in row and "33.3 %" in row and "999.9 kB" in row and "0.1 %" in row
    narrow = report.text(60).splitlines()
    assert any("recipe=docs/results/recipe" in line for line in narrow)
    assert max(map(len, narrow[: narrow.index(next(x for x in narrow if x.startswith("total:")))])) <= 60
