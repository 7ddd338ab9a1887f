"""Rows of text in columns, whole however narrow the terminal is: a line that is cut or folded can't be searched."""

from collections.abc import Collection, Sequence


def in_columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Return a line for each row, its columns two blanks apart.

    Args:
        rows: all with as many columns, the heading first.
        right: columns that are set flush right, as numbers are.
    """
    from rich.cells import cell_len, set_cell_size

    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            " " * (width - cell_len(text)) + text if number in right else set_cell_size(text, width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def printable(text: str) -> str:
    """Return text that neither moves the cursor nor breaks the terminal's encoding, whatever a folder is called."""
    return "".join(each if each.isprintable() else "�" for each in text)
