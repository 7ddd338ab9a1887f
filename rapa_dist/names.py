"""Names of files as people read them, whatever bytes they are made of."""

import os
import unicodedata


def printable(name: object) -> str:
    r"""Return a name or path for a message: what is no UTF-8 as `\xff`, and signs that a terminal would obey escaped.

    >>> printable("cat\x1b[2J"), printable("cat\udcff.png")
    ('cat\\x1b[2J', 'cat\\xff.png')
    """
    return "".join(sign if sign.isprintable() else _escaped(sign) for sign in str(name))


def _escaped(sign: str) -> str:
    if "\udc80" <= sign <= "\udcff":  # how Python keeps a byte that is no UTF-8
        return f"\\x{ord(sign) - 0xDC00:02x}"
    return sign.encode("unicode_escape").decode("ascii")


def is_utf8(name: str | os.PathLike[str]) -> bool:
    """Return whether a file's name is UTF-8: only then can it be written into a file of text."""
    try:
        os.fspath(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def composed(name: str) -> str:
    """Return a name in the one of its Unicode forms in which an accent is part of its letter (NFC).

    macOS, archives and people write “é” as one sign or as two, which look alike and are different bytes.
    """
    return unicodedata.normalize("NFC", name)


def by_name(name: str) -> tuple[str, str]:
    """Return what names are sorted by, so that their order doesn't depend on their Unicode form."""
    return composed(name), name
