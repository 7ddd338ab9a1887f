"""The only place that imports torchvision, and everything that is asked of it.

Beside a CPU build of torch, PyPI's torchvision can't load its compiled operators, and `import torchvision` fails
because it registers fake kernels for operators that aren't there (pytorch/vision#9337). Reading data sets needs none.
"""

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rapa_dist.data.sets import ImageSet
from rapa_dist.errors import DataError

MISSING_OPERATORS = "operator torchvision::nms does not exist"
META_REGISTRATIONS = "torchvision._meta_registrations"


@cache
def torchvision() -> ModuleType:
    """Import torchvision, without its fake kernels where the real ones can't be loaded.

    Raises:
        DataError: it is missing, or can't be imported for another reason.
    """
    try:
        with _quiet():
            try:
                return importlib.import_module("torchvision")
            except RuntimeError as error:
                if MISSING_OPERATORS not in str(error):
                    raise
                sys.modules[META_REGISTRATIONS] = ModuleType(META_REGISTRATIONS)
                return importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        message = (
            f"torchvision, which reads data sets, can't be imported: {error}. Reinstall it to fit the installed torch."
        )
        raise DataError(message) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionStatus:
    """How torchvision is here."""

    version: str | None
    """None where it can't be imported."""
    operators: bool
    """Whether its compiled operators load. `rapa-dist` needs none of them."""
    problem: str | None
    """Why it can't be imported, or why its operators don't load; None where all is well."""


def vision_status() -> VisionStatus:
    """Return torchvision's state for `rapa-dist doctor`; imports it, which takes seconds."""
    try:
        module = torchvision()
    except DataError as error:
        return VisionStatus(version=None, operators=False, problem=str(error))
    operators = bool(module.extension._has_ops())
    problem = (
        None if operators else "its compiled operators don't fit the installed torch; reading data sets needs none"
    )
    return VisionStatus(version=str(module.__version__), operators=operators, problem=problem)


def checksums(kind: str) -> dict[str, str]:
    """Return the MD5 sums of the files that are fetched for a published data set, by file name."""
    datasets = torchvision().datasets
    if kind in ("mnist", "fashion-mnist"):
        return dict({"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}[kind].resources)
    if kind == "svhn":
        return {datasets.SVHN.split_list[part][1]: datasets.SVHN.split_list[part][2] for part in ("train", "test")}
    loader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    return {loader.filename: loader.tgz_md5}


def is_whole(path: Path, md5: str) -> bool:
    """Return whether a file is there and has the checksum."""
    return bool(torchvision().datasets.utils.check_integrity(str(path), md5))


def read_official(kind: str, root: Path) -> tuple[tuple[str, ...], ImageSet, ImageSet]:
    """Read "cifar10", "cifar100" or "svhn" from where its files lie, through torchvision.

    An archive that lies there in one piece is unpacked first; nothing is fetched.

    Returns:
        The names of the classes, the training set and the test set.

    Raises:
        RuntimeError: files are missing or don't have their checksum, in torchvision's words.
        OSError: they can't be read, or the archive can't be unpacked.
    """
    datasets = torchvision().datasets
    with _quiet():
        if kind == "svhn":
            classes = tuple(str(digit) for digit in range(10))
            train, test = (datasets.SVHN(str(root), split=part) for part in ("train", "test"))
            return (
                classes,
                _image_set(_from_nchw(train.data), train.labels),
                _image_set(_from_nchw(test.data), test.labels),
            )
        loader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
        # torchvision only unpacks an archive when it is asked to download, which it doesn't do if the archive is whole.
        unpack = is_whole(root / loader.filename, loader.tgz_md5)
        train, test = (loader(str(root), train=part, download=unpack) for part in (True, False))
    return tuple(train.classes), _image_set(train.data, train.targets), _image_set(test.data, test.targets)


def _from_nchw(images: Any) -> Any:
    return images.transpose(0, 2, 3, 1)


def _image_set(images: Any, labels: Any) -> ImageSet:
    return ImageSet(images=np.ascontiguousarray(images), labels=np.asarray(labels, dtype=np.int64))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torchvision's and pickle's deprecation warnings from users, who can do nothing about them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
