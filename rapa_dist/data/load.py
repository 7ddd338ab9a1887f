"""From a data set's name to its images.

Looked for, and fetched to: the folder that is given, else the one `$RAPA_DIST_DATA` names, else `~/.cache/rapa-dist`.
Only where neither is given, `~/data` and `/usr/share/datasets` are looked at too.
"""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from rapa_dist.console import home_as_tilde, work
from rapa_dist.data import builtin
from rapa_dist.data.cache import Decoded, home_cache, say
from rapa_dist.data.folder import NEEDED, is_image_folder, read_folder
from rapa_dist.data.official import OFFICIAL, read_official
from rapa_dist.data.resize import resized
from rapa_dist.data.sets import DataSet, ImageSet, make_dataset
from rapa_dist.errors import DataError, UsageError
from rapa_dist.folders import expanded, home
from rapa_dist.names import is_utf8, printable

NAMES = ("builtin", *OFFICIAL, "images:FOLDER")
"""What `load_dataset` takes as a name."""
IMAGES = "images:"
SYSTEM = Path("/usr/share/datasets")
"""Where Debian's packages of data sets put them."""
PARTS = (("train", "--limit-train"), ("test", "--limit-test"))


def load_dataset(
    name: str | None,
    *,
    data_dir: Path | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    image_size: int | None = None,
) -> DataSet:
    """Load a data set into memory.

    Args:
        name: one of `NAMES`; None takes CIFAR-10 if it is there or can be fetched, else the built-in set, with a
            warning.
        data_dir: where published data sets are looked for and fetched to; None as the module says.
        limit_train: number of training images to use, None for all (5,000 of the built-in set). The same number always
            gives the same images, and a smaller one some of them.
        limit_test: number of test images to use, None for all (1,000 of the built-in set).
        image_size: pixels along both sides to which images are resized, shorter side first, and cropped around their
            centre; None: they are left as they are.

    Raises:
        UsageError: the name is unknown, or a limit below 1.
        DataError: what was asked for by name is not there, damaged or inconsistent.
    """
    check_limits(limit_train, limit_test)
    return open_dataset(name, data_dir, image_size).limited(limit_train, limit_test)


def check_limits(limit_train: int | None, limit_test: int | None) -> None:
    """Raise UsageError unless these are numbers of images."""
    for limit, (_, option) in zip((limit_train, limit_test), PARTS, strict=True):
        if limit is not None and limit < 1:
            raise UsageError(f"{option} is a number of images, at least 1; got {limit}. Leave it out to use all.")


@dataclass(frozen=True, slots=True, kw_only=True)
class AllImages:
    """A data set of which as many images can be taken as are wanted, again and again."""

    name: str
    """In full, as `DataSet.name`."""
    decoded: Decoded | None
    """All images; None for the built-in set, which is drawn to measure."""
    image_size: int | None = None
    """To which they are resized; None: they are as they are wanted."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self.decoded.classes if self.decoded else builtin.CLASSES

    def limited(self, limit_train: int | None = None, limit_test: int | None = None, *, tell: bool = True) -> DataSet:
        """Return some of the images, as `load_dataset` does; `tell` the user where there are not so many."""
        check_limits(limit_train, limit_test)
        train, test = (self._part(part, limit, tell) for part, limit in enumerate((limit_train, limit_test)))
        return make_dataset(self.name, self.classes, train, test)

    def _part(self, part: int, limit: int | None, tell: bool) -> ImageSet:
        if self.decoded is None:
            n = builtin.DEFAULT[part] if limit is None else at_most(limit, builtin.MOST[part], part, tell)
            return resized(_draw(part, n), self.image_size)
        images = (self.decoded.train, self.decoded.test)[part]
        return resized(images.sample(at_most(limit, len(images), part, tell), part), self.image_size)


def open_dataset(name: str | None, data_dir: Path | None = None, image_size: int | None = None) -> AllImages:
    """Read all images of a data set; arguments and errors are those of `load_dataset`."""
    if name is None:
        try:
            return open_dataset("cifar10", data_dir, image_size)
        except DataError as error:
            say_substitute(error, data_dir)
            return open_dataset("builtin", data_dir, image_size)
    name = check_name(name)
    decoded = None if name == "builtin" else _decoded(name, data_dir, image_size)
    if decoded is not None and decoded.note:
        say(decoded.note)
    return AllImages(name=name, decoded=decoded, image_size=None if name.startswith(IMAGES) else image_size)


def image_of(name: str | None, image_size: int | None = None) -> tuple[int, int, int] | None:
    """Return channels, h and w of a data set's images as far as its name tells; None for a folder not yet read."""
    if name is not None and name.startswith(IMAGES):
        return None
    channels, side = (1, 28) if name in ("mnist", "fashion-mnist") else (3, 32)
    return channels, image_size or side, image_size or side


def say_substitute(error: DataError, data_dir: Path | None) -> None:
    """Say that the built-in set takes CIFAR-10's place, and why."""
    say(
        f"warning: {error}. The built-in set of drawn shapes takes its place; its errors can't be held against "
        f"the paper's{_at_hand(data_dir)}. Name a set with --dataset, and none takes its place."
    )


def check_name(name: str) -> str:
    """Return a data set's name in full: a folder of images by its absolute path.

    Raises:
        UsageError: there is no such data set, or its folder's name can't be written down.
    """
    if name.startswith(IMAGES):
        folder = name.removeprefix(IMAGES)
        if not folder:
            raise UsageError(f"{IMAGES} lacks the folder; {NEEDED}")
        folder = os.path.abspath(expanded(folder))
        if not is_utf8(folder):
            raise UsageError(
                f"The folder of images {printable(folder)} is not named in UTF-8, so its name can't be written into a "
                "run's files. Rename it, or name a link to it."
            )
        return IMAGES + folder
    if name in NAMES[:-1]:
        return name
    close = difflib.get_close_matches(name.lower(), NAMES[:-1], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if os.path.isdir(os.path.expanduser(name)):
        hint = f" Did you mean {IMAGES + name!r}?"
    raise UsageError(f"there is no data set {name!r}.{hint} There are: {', '.join(NAMES)}.")


def places(data_dir: Path | None) -> list[Path]:
    """Return the folders published data sets are looked for in; they are fetched to the first."""
    if data_dir is not None:
        return [expanded(data_dir).absolute()]
    named = os.environ.get("RAPA_DIST_DATA")
    if named:
        return [expanded(named).absolute()]
    at_home = home()
    more = [at_home / "data"] if at_home else []
    return [home_cache(), *more, *([SYSTEM] if SYSTEM.is_dir() else [])]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundDataSet:
    """Whether a data set is there."""

    name: str
    """As `load_dataset` takes it."""
    found: bool
    where: Path | None
    """The folder it lies in; None where it isn't found or needs none."""
    how: str
    """What it is where it is found, else how to get it."""


def find_datasets(data_dir: Path | None = None) -> list[FoundDataSet]:
    """Return which data sets are at hand, looking at names only: nothing is fetched, read or checked.

    Args:
        data_dir: as in `load_dataset`.
    """
    found = [FoundDataSet(name="builtin", found=True, where=None, how="drawn by the program, always there")]
    looked_at = places(data_dir)
    for name, data in OFFICIAL.items():
        where = next((place for place in looked_at if data.lies_in(place)), None)
        how = f"{data.title}, in its official format"
        if where is None:
            how = f"fetched by --dataset {name} where there is a network; or put {data.sources()} into {looked_at[0]}"
        found.append(FoundDataSet(name=name, found=where is not None, where=where, how=how))
    folders = [place for place in looked_at if is_image_folder(place)]
    found += [
        FoundDataSet(name=f"{IMAGES}{folder}", found=True, where=folder, how="a folder of images") for folder in folders
    ]
    if not folders:
        found.append(FoundDataSet(name=NAMES[-1], found=False, where=None, how=NEEDED))
    return found


def _at_hand(data_dir: Path | None) -> str:
    """Return a hint at a folder of images that lies where data are looked for, or nothing."""
    names = [data.name for data in find_datasets(data_dir) if data.found and data.name.startswith(IMAGES)]
    return f" (images at hand: --dataset {IMAGES}{home_as_tilde(names[0].removeprefix(IMAGES))})" if names else ""


def _decoded(name: str, data_dir: Path | None, image_size: int | None) -> Decoded:
    if name.startswith(IMAGES):
        return read_folder(Path(name.removeprefix(IMAGES)), image_size)
    looked_at = places(data_dir)
    return read_official(name, looked_at, looked_at[0])


def _draw(part: int, n: int) -> ImageSet:
    with work("drawing the built-in set", "images") as advance:
        return builtin.draw(part, n, advance)


def at_most(limit: int | None, n: int, part: int, tell: bool = True) -> int:
    """Return the number of images to use of n, and tell where that isn't the number asked for."""
    if limit is None:
        return n
    if limit > n and tell:
        say(f"warning: {limit:,} {PARTS[part][0]} images are wanted, and there are {n:,}; all are used")
    return min(limit, n)
