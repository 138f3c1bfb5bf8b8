"""Results as a Markdown table, ready for the README."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """One line a row, the keys of the first row as headings; all columns but the first to the
    right."""
    heads = list(rows[0])
    lines = [heads, *([row[head] for head in heads] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    text = [
        " | ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    rule = " | ".join("-" * (width - 1) + (":" if i else "-") for i, width in enumerate(widths))
    return "\n".join(f"| {line} |" for line in (text[0], rule, *text[1:]))
