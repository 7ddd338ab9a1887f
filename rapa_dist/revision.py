"""Which network a configuration stands for: what this version computes otherwise than earlier ones did.

A run, a checkpoint and a result keep the revision of their network. Where the same configuration and seed would give
another network today, an older one is void: it is neither continued nor looked into nor held against newer ones.
"""

from collections.abc import Iterable

from rapa_dist.errors import VoidError
from rapa_dist.machine import Machine

FIRST = 1
"""Of whatever says nothing about it."""
_SECOND = 2
_RELU = "earlier versions had the ReLU of conv0 before its pooling; the paper’s network has it behind"
_ROWS = "earlier versions gave the extra rows of an image always to the same tiles, and none to perforated networks"


def revision_of(machine: Machine, scheme: str, pooling: str) -> int:
    """Return the revision that a network has had since it last changed."""
    return _SECOND if any(_changes(machine, scheme, pooling)) else FIRST


def check_revision(found: object, machine: Machine, scheme: str, pooling: str) -> None:
    """Raise VoidError unless what was made by `found` is what this version would make."""
    expected = revision_of(machine, scheme, pooling)
    if type(found) is not int:
        raise VoidError(f"of revision {found!r} of the network, which is none")
    if found < expected:
        raise VoidError(f"void, as {'; and '.join(_changes(machine, scheme, pooling))}")
    if found > expected:
        raise VoidError(f"of revision {found} of the network, this version knows {expected}")


def _changes(machine: Machine, scheme: str, pooling: str) -> Iterable[str]:
    if pooling in ("average", "mixed"):
        yield _RELU
    shares = [array.perforation if scheme == "perforated" else array.n_tiles for array in machine.arrays]
    uneven = any(array.n_patches % share for array, share in zip(machine.arrays, shares, strict=True))
    if scheme in ("random", "perforated") and uneven:
        yield _ROWS
