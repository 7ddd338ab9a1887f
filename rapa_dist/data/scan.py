"""What lies in PART/<class>/…: the images of each class, and all that is passed over, as nobody should miss it unsaid.

Images are the files that torchvision's ImageFolder takes for images, by their endings, in its order. Otherwise than
there, what is hidden is passed over, Unicode forms of a name are one, and a link back to a folder above is refused.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rapa_dist.console import counted
from rapa_dist.data import cache
from rapa_dist.errors import DataError
from rapa_dist.names import by_name, composed, is_utf8, printable

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of an image's name, in either case; ImageFolder's."""
_SYSTEM_FOLDERS = frozenset({"@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"})
"""What systems put between a user's folders, not called hidden by a dot."""
_ENDINGS_SHOWN = 5
_NO_ENDING = "without an ending"


@dataclass(slots=True)
class PassedOver:
    """Names of what was passed over, below the images' folder."""

    hidden_files: list[str] = field(default_factory=list)
    hidden_folders: list[str] = field(default_factory=list)
    beside_classes: list[str] = field(default_factory=list)
    """Files in PART itself."""
    otherwise: list[str] = field(default_factory=list)
    """Files in classes that end otherwise than images."""

    def sentence(self, folder: Path) -> str:
        """Return what was passed over in a folder, or ""."""
        parts = [
            f"{counted(len(names), noun)}{where} (the first, {printable(min(names, key=by_name))})"
            for noun, where, names in (
                ("hidden file", "", self.hidden_files),
                ("hidden folder", "", self.hidden_folders),
                ("file", " beside the class folders", self.beside_classes),
            )
            if names
        ]
        if self.otherwise:
            first = printable(min(self.otherwise, key=by_name))
            what = f"{endings(self.otherwise)} (the first, {first}), as images end in {', '.join(SUFFIXES)}"
            parts.append(what)
        return f"passed over in {printable(folder)}: {'; '.join(parts)}" if parts else ""


@dataclass(slots=True)
class Part:
    """One part of the images, PART/<class>/…; names are relative to the images' folder."""

    images: dict[str, list[str]] = field(default_factory=dict)
    """Of each class, by its composed name: in an order that no Unicode form of a name changes."""
    folders: dict[str, list[str]] = field(default_factory=dict)
    """Of each class: one, or several whose names differ in their Unicode form alone."""
    stamps: list[cache.Stamp] = field(default_factory=list)
    """What tells these images from any others."""


def scan(folder: Path, part: str, passed_over: PassedOver) -> Part:
    """Look at names, and at no contents.

    Args:
        folder: the images'.
        part: "train" or "test".
        passed_over: is added to.

    Raises:
        DataError: the name of a class can't be written down, or folders contain each other.
        OSError: something can't be read.
    """
    found = Part()
    for name in class_folders(folder / part):
        if not is_utf8(name):
            place = printable(folder / part / name)
            raise DataError(f"The class folder {place} is not named in UTF-8, so its name can't be stored. Rename it.")
        found.folders.setdefault(composed(name), []).append(f"{part}/{name}")
    for name, places in found.folders.items():
        files = [file for place in places for file in _images(folder, place, passed_over)]
        found.images[name] = [file for file, _ in files]
        found.stamps += [cache.stamp(file, status) for file, status in files]
    with os.scandir(folder / part) as entries:
        for entry in entries:
            relative = f"{part}/{entry.name}"
            if not entry.is_dir():
                names = passed_over.hidden_files if entry.name.startswith(".") else passed_over.beside_classes
                names.append(relative)
            elif is_hidden(entry.name):
                passed_over.hidden_folders.append(relative)
    return found


def class_folders(part: Path) -> list[str]:
    """Return the names of the folders in a part that are classes, sorted."""
    with os.scandir(part) as entries:
        return sorted((entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)), key=by_name)


def is_hidden(folder: str) -> bool:
    """Return whether a folder of this name is no user's."""
    return folder.startswith(".") or folder in _SYSTEM_FOLDERS


def endings(names: list[str]) -> str:
    """Return how many files end how: "12 .heic, 1 .txt"."""
    counts = Counter(os.path.splitext(name)[1].lower() or _NO_ENDING for name in names)
    shown = sorted(counts.items(), key=lambda each: (-each[1], each[0]))[:_ENDINGS_SHOWN]
    rest = len(names) - sum(number for _, number in shown)
    text = ", ".join(f"{number:,} {printable(ending)}" for ending, number in shown)
    return f"{text} and {rest:,} more" if rest else text


_Images = list[tuple[str, os.stat_result]]


def _images(folder: Path, place: str, passed_over: PassedOver) -> _Images:
    """Return the images below a class's folder: folder by folder, as their paths sort, and by name in each."""
    found = sorted(_walk(folder, place, (), passed_over), key=lambda each: by_name(each[0]))
    return [(f"{root}/{name}", status) for root, files in found for name, status in files]


def _walk(
    folder: Path, place: str, above: tuple[tuple[int, int], ...], passed_over: PassedOver
) -> Iterator[tuple[str, _Images]]:
    """Yield each folder with its images' names and states; links are followed, what is hidden is not looked into.

    Args:
        folder: the images'.
        place: where to begin, relative to it.
        above: device and inode of the folders that it lies in.
        passed_over: is added to.
    """
    about = os.stat(folder / place)
    here = (about.st_dev, about.st_ino)
    if here in above:
        raise DataError(f"{printable(folder / place)} is a link to a folder that it lies in. Remove the link.")
    files = []
    with os.scandir(folder / place) as entries:
        for entry in sorted(entries, key=lambda each: by_name(each.name)):
            name = entry.name
            if entry.is_dir():
                if is_hidden(name):
                    passed_over.hidden_folders.append(f"{place}/{name}")
                else:
                    yield from _walk(folder, f"{place}/{name}", (*above, here), passed_over)
            elif name.startswith("."):
                passed_over.hidden_files.append(f"{place}/{name}")
            elif name.lower().endswith(SUFFIXES):
                files.append((name, _state(entry)))
            else:
                passed_over.otherwise.append(f"{place}/{name}")
    yield place, files


def _state(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except OSError:  # a link that leads nowhere
        return entry.stat(follow_symlinks=False)
