"""A figure on the page, with its caption; or a note on why it is not there."""

from collections.abc import Callable

from rapa_dist.command_lines import no_matplotlib
from rapa_dist.report.content import Content


def framed(content: Content, draw: Callable[[], str], caption: str) -> str:
    """Return a figure with its caption; nothing, and a note, where there is no matplotlib."""
    try:
        picture = draw()
    except ImportError:
        note = no_matplotlib("Figures can't be drawn")
        if note not in content.missing:
            content.missing.append(note)
        return ""
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"
