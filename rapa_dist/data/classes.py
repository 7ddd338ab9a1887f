"""Classes by their names: whether the labels of two sets of images mean the same."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rapa_dist.errors import DataError
from rapa_dist.names import printable

_SHOWN = 8


def listed(names: Sequence[str]) -> str:
    """Return names for a message, shortened where they are many."""
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(printable, names[:_SHOWN])) + rest


def translate(known: Sequence[str], found: Sequence[str], name: str) -> tuple[npt.NDArray[np.int64] | None, str]:
    """Compare the classes of a network with those of images that it is to be tested on.

    The same names in the same order need nothing; in another order the labels are translated. A name in common that
    stands for different labels can't be mended, as the others have no counterpart. Names of which none is in
    another place are taken to be other words for the same: that is said.

    Args:
        known: names of the network's classes, by its label.
        found: names of the images' classes, by their label.
        name: of the images, for messages.

    Returns:
        The network's label for every label of the images, (classes,), or None where they are the same; and a
        sentence for the user, or "".

    Raises:
        DataError: they can't be compared.
    """
    both = f"The network's are {listed(known)}; those of {name} are {listed(found)}"
    if len(known) != len(found):
        raise DataError(
            f"The network knows {len(known)} classes, {name} has {len(found)}. {both}. Give a --dataset with the same "
            "classes."
        )
    if tuple(known) == tuple(found):
        return None, ""
    if sorted(known) == sorted(found):
        place = {of_network: label for label, of_network in enumerate(known)}
        table = np.array([place[of_images] for of_images in found], np.int64)
        return table, f"the classes of {name} have another order than the network's; they are matched by name. {both}"
    moved = [each for each in found if each in known and known.index(each) != found.index(each)]
    if moved:
        raise DataError(
            f"{listed(moved)}: in {name} not the same label as in the network, and not all classes have the same "
            f"names, so they can't be matched. {both}. Give a --dataset with the same classes."
        )
    return None, f"warning: the classes of {name} have other names than the network's; they are taken in order. {both}"
