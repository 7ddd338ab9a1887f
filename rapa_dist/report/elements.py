"""Pieces of the page: tables, numbers and times as HTML. They know nothing of a run."""

import html
import math
from collections.abc import Iterable, Sequence


def data_table(caption: str, head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of numbers with its caption, in a region that can be scrolled; the first cell heads its row."""
    titles = "".join(f'<th scope="col">{escaped(title)}</th>' for title in head)
    lines = "\n".join(
        f'<tr><th scope="row">{escaped(first)}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(caption)}"><table>'
        f"<caption>{escaped(caption)}</caption><thead><tr>{titles}</tr></thead><tbody>\n{lines}\n</tbody></table></div>"
    )


def fact_table(pairs: Iterable[tuple[str, str]]) -> str:
    """Return names and what they have as values, a row each."""
    lines = "\n".join(f'<tr><th scope="row">{escaped(key)}</th><td>{escaped(value)}</td></tr>' for key, value in pairs)
    return f'<table class="facts"><tbody>\n{lines}\n</tbody></table>'


def folded(summary: str, body: str) -> str:
    """Return HTML that is shown when its summary is asked for."""
    return f"<details><summary>{summary}</summary>{body}</details>"


def escaped(value: object) -> str:
    """Return a value as text that means nothing to a browser."""
    return html.escape(str(value))


def or_dash(value: float | None, form: str) -> str:
    """Return a number in a format, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def known_sum(values: Iterable[float | None]) -> float:
    """Return the sum; not a number if one is unknown, as in runs of older versions."""
    return sum(math.nan if value is None else value for value in values)


def duration(seconds: float | None) -> str:
    """Return a time in the unit in which people would say it."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"
