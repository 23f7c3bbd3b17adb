"""Tables as text for a terminal, a pipe or a log. Every table that a command prints is made here.

No number and no word is cut or broken. A row that is too wide for the terminal takes several lines. The first
line then holds the first cell:

    method                 length    n  score  read %       method
    ─────────────────────────────────────────────────         length    n  score  read %
    double_sparsity:k=512     16K  100   62.1   100/5       ────────────────────────────
                                                            double_sparsity:k=512
                                                                 16K  100   62.1   100/5
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.cells import cell_len

_BREAKS = re.compile(r"( +|(?<=[,:])(?=[A-Za-z_]))")  # spaces, and between the parts of a method's name
_GAP = _INDENT = "  "


def wrap(text: str, width: int) -> list[str]:
    """The lines of `text`, broken at spaces and between the parts of a method's name, which follow a comma or
    a colon and begin with a letter. A part that is wider than `width` is not broken; its line is longer."""
    lines = []
    for paragraph in text.split("\n"):
        line, *rest = _BREAKS.split(paragraph)
        for space, part in zip(rest[::2], rest[1::2], strict=True):
            if cell_len(line + space + part) <= width:
                line += space + part
            else:
                lines.append(line)
                line = part
        lines.append(line)
    return lines


class Table:
    """Rows of cells under `columns`. The first cell of a row is its name.

    numbers_from: the first column of numbers; the columns after it hold numbers too. None: no column does.
    Numbers are aligned to the right and never broken. Cells of text are broken by `wrap`, the first cell only
    where it is wider than the terminal.
    """

    def __init__(
        self, *columns: str, title: str = "", caption: str = "", numbers_from: int | None = None
    ) -> None:
        self.columns, self.title, self.caption = columns, title, caption
        self.rows: list[tuple[str, ...]] = []
        self._numbers_from = len(columns) if numbers_from is None else numbers_from
        self._rules: set[int] = set()  # the rows with a rule above them

    def add_row(self, *cells: str) -> None:
        """Add a row with one cell for each column. Raises ValueError for another number of cells."""
        if len(cells) != len(self.columns):
            raise ValueError(f"a row of {len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(cells)

    def add_section(self) -> None:
        """Draw a line between the rows so far and the rows that follow."""
        self._rules.add(len(self.rows))

    def text(self, width: int | None = None) -> str:
        """Title, columns, rows and caption, in lines of at most `width` cells. None: each row is one line."""
        head, *rows = self.lines(width)
        size = max(cell_len(line) for lines in (head, *rows) for line in lines)
        limit = width or max(size, 80)
        lines = wrap(self.title, limit) if self.title else []
        lines += [*head, "─" * size]
        for number, row in enumerate(rows):
            lines += ["─" * size, *row] if number in self._rules else row
        lines += wrap(self.caption, limit) if self.caption else []
        return "\n".join(lines)

    def lines(self, width: int | None = None) -> list[list[str]]:
        """The lines of the column names, followed by the lines of each row."""
        bands = self._bands(width)
        return [list(self._lines(cells, bands)) for cells in (self.columns, *self.rows)]

    def _bands(self, width: int | None) -> list[dict[int, int]]:
        """For each line of a row, the columns in it with their widths."""
        columns = list(enumerate(zip(self.columns, *self.rows, strict=True)))
        most = [max(_width(cell) for cell in cells) for _, cells in columns]
        least = [
            max(
                _width(cell) if row and i >= self._numbers_from else _least(cell)
                for row, cell in enumerate(cells)
            )
            for i, cells in columns
        ]
        room = sum(most) + len(_GAP) * (len(most) - 1) if width is None else width
        whole = [most[0], *least[1:]]
        if sum(whole) + len(_GAP) * (len(whole) - 1) <= room:
            return [_spread(range(len(whole)), whole, most, room)]
        groups, used = [[0]], room
        for i in range(1, len(least)):
            used += len(_GAP) + least[i]
            if used > room:
                groups.append([])
                used = len(_INDENT) + least[i]
            groups[-1].append(i)
        return [_spread(group, least, most, room - len(_INDENT) * (group[0] > 0)) for group in groups]

    def _lines(self, cells: Sequence[str], bands: Sequence[dict[int, int]]) -> Iterator[str]:
        for number, band in enumerate(bands):
            parts = {i: wrap(cells[i], width) for i, width in band.items()}
            if number and not any(cells[i] for i in band):
                continue
            for k in range(max(map(len, parts.values()))):
                texts = (self._set(i, parts[i][k] if k < len(parts[i]) else "", band[i]) for i in band)
                yield (_INDENT * (number > 0) + _GAP.join(texts)).rstrip()

    def _set(self, column: int, text: str, width: int) -> str:
        space = " " * (width - cell_len(text))
        return space + text if column >= self._numbers_from else text + space


def _spread(columns: Sequence[int], least: Sequence[int], most: Sequence[int], room: int) -> dict[int, int]:
    """Widths between `least` and `most` that fit into `room`. Columns that need the fewest cells to reach
    `most` are widened first."""
    widths = {i: least[i] for i in columns}
    spare = max(0, room - sum(widths.values()) - len(_GAP) * (len(widths) - 1))
    by_need = sorted(columns, key=lambda i: most[i] - least[i])
    for number, i in enumerate(by_need):
        more = min(most[i] - least[i], spare // (len(by_need) - number))
        widths[i] += more
        spare -= more
    return widths


def _width(cell: str) -> int:
    return max(map(cell_len, cell.split("\n")))


def _least(cell: str) -> int:
    """The width of the widest part that `wrap` does not break."""
    return max(map(cell_len, wrap(cell, 0)))
