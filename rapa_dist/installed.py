"""What the installation says of this program; nothing where its files are run without having been installed."""

from importlib.metadata import Distribution, PackageNotFoundError, distribution

NAME = "rapa-dist"


def version_of(package: str) -> str | None:
    """Return the version of a package; None: it is not installed."""
    found = _found(package)
    return None if found is None else found.version


def requirements() -> list[str]:
    """Return what this program needs, as its pyproject.toml names it."""
    found = _found(NAME)
    return [] if found is None else list(found.requires or ())


def python_bounds() -> str | None:
    """Return which Python this program needs, like ">=3.11,<3.14"."""
    found = _found(NAME)
    return None if found is None else found.metadata["Requires-Python"]


def _found(package: str) -> Distribution | None:
    try:
        return distribution(package)
    except PackageNotFoundError:
        return None
