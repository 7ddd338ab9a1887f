"""Errors in somebody else's code, in one line: what was raised, and where in that code."""

import traceback
from pathlib import Path

_OWN = Path(__file__).parent


def shortened(error: BaseException, *but: str) -> str:
    """Return type, message and place of an error: the last line of code that is neither ours nor a library's.

    Args:
        error: what was raised.
        but: files whose lines are passed over as well.
    """
    text = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in but
        and not frame.filename.startswith(("<frozen", str(_OWN)))
        and "site-packages" not in frame.filename
    ]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{said} ({error.filename}, line {error.lineno})"
    if not frames:
        return said
    last = frames[-1]
    return f"{said} ({last.filename}, line {last.lineno}, in {last.name}: {last.line})"
