"""What a run writes to has to be its own: files and folders in its directory, which can be written to, and no links.

Looked at when the directory is taken, before anything is trained. Through a link a run would write into somebody else's
files, or delete them: where `checkpoints/` led to another run's, that one's were pruned.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from rapa_dist.errors import RunDirectoryError
from rapa_dist.files import kind_of, part_from_copies


def check_own(files: Iterable[Path], folders: Iterable[Path]) -> None:
    """Raise RunDirectoryError if one of these is there and something else, or a link.

    Args:
        files: of the run's directory.
        folders: likewise.
    """
    for paths, fits, expected in ((files, stat.S_ISREG, "a file"), (folders, stat.S_ISDIR, "a folder")):
        for path in paths:
            try:
                mode = path.lstat().st_mode
            except OSError:  # it is not there, or that will be said where it is read
                continue
            if not fits(mode):
                raise RunDirectoryError(
                    f"{path} is {kind_of(mode)}; expected {expected}. A run writes to files of its own alone: put what "
                    "belongs there in its place, or move it away."
                )


def check_writable(folder: Path, metrics: Path) -> None:
    """Raise RunDirectoryError if a run's folder of checkpoints or its metrics are there and can't be written to."""
    for path, how in ((folder, os.W_OK | os.X_OK), (metrics, os.W_OK)):
        if os.path.exists(path) and not os.access(path, how):
            raise RunDirectoryError(f"{path} can't be written to. Correct its permissions.")


def take_out_of_backups(files: Iterable[Path]) -> None:
    """See that what is appended to is in no backup by hard links, which would change with it.

    Raises:
        RunDirectoryError: a file can't be copied.
    """
    for path in files:
        try:
            part_from_copies(path)
        except OSError as error:
            raise RunDirectoryError(
                f"{path} has a second name elsewhere, and can't be copied: {error.strerror}. "
                "Make room there, or correct its permissions."
            ) from error
