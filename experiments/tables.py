"""Tables in markdown."""

import statistics
from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with the first column flush left and the others flush right.

    Args:
        header: Titles of the columns.
        rows: Cells, as many per row as titles.

    Returns:
        Lines of markdown, padded so that they read well as plain text too.
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)]) + "\n"


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation.

    Args:
        values: Any number.
        form: Format of a number, such as ``"{:.2f}"``.

    Returns:
        "" for none, the value for one.
    """
    if not values:
        return ""
    text = form.format(statistics.fmean(values))
    return f"{text} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else text
