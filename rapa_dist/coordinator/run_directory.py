"""A run directory: configuration, environment, metrics, checkpoints and log of one run.

`metrics.jsonl` is the truth, one line per epoch, only ever appended to; everything else is a view.
"""

import contextlib
import errno
import io
import json
import os
import time
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w

from rapa_dist import files
from rapa_dist.config import FREE, TrainConfig, difference
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator import sessions
from rapa_dist.coordinator.checkpoint import Checkpoint
from rapa_dist.coordinator.metrics import parse_metrics
from rapa_dist.coordinator.own_files import check_own, check_writable, take_out_of_backups
from rapa_dist.errors import CheckpointError, RunDirectoryError, UsageError, VoidError
from rapa_dist.fields import TEXT
from rapa_dist.locks import lock_folder
from rapa_dist.names import is_utf8, printable

_CONFIG, _ENVIRONMENT, _METRICS, _LOG, _LOCK = "config.toml", sessions.FILE, "metrics.jsonl", "log", ".lock"
_CHECKPOINTS, _TILES, RAY_LOGS = "checkpoints", "tiles.json", "ray-logs"
_OWN_FILES, _OWN_FOLDERS = (_CONFIG, _ENVIRONMENT, _METRICS, _LOG, _LOCK, _TILES), (_CHECKPOINTS, RAY_LOGS)
_MOST, _MOST_METRICS = 1 << 24, 1 << 28  # bytes; hundreds of thousands of epochs
_RUNS = Path("runs")


class RunDirectory:
    """The files of one run. While open, no other process can write to them."""

    def __init__(self, path: Path) -> None:
        """Open the directory of an existing run; use `create` for a new one.

        Raises:
            RunDirectoryError: its name can't be written down.
        """
        if not is_utf8(path):
            raise RunDirectoryError(
                f"The run directory {printable(path)} is not named in UTF-8, so its name can't be written into its "
                "files. Rename it, or give another name."
            )
        self.path = path
        self.name = path.resolve().name
        self._lock: int | None = None

    @classmethod
    def create(
        cls, path: Path | None, config: TrainConfig, data_dir: Path | None, options: Sequence[str] = ()
    ) -> "RunDirectory":
        """Make the directory of a new run and take it.

        Args:
            path: where; None for `runs/<utc>-<dataset>-<tiles>`.
            config: written to config.toml.
            data_dir: where the data was looked for, for a later resume.
            options: of `rapa-dist train`, to resume it as it is started.

        Raises:
            RunDirectoryError: it can't be made, or it has a run or other files in it.
        """
        directory = cls(path if path is not None else _fresh_path(config))
        with contextlib.ExitStack() as undo:
            try:
                for folder in reversed([directory.path, *directory.path.parents]):
                    if not folder.is_dir():
                        # whoever may read a run is its owner's to say
                        folder.mkdir(mode=0o700 if folder == directory.path else 0o777)
                        undo.callback(_remove, folder)
                directory._refuse_if_used()
                there = set(os.listdir(directory.path))
                for name in {_LOCK, _ENVIRONMENT, _CHECKPOINTS} - there:
                    undo.callback(_remove, directory.path / name)
                directory.take()
                undo.callback(directory.release)
                directory.checkpoint_folder.mkdir(exist_ok=True)
                directory.add_session(options, data_dir)
                # the configuration comes last: with it the directory is one that can be resumed
                directory.write_config(config)
            except OSError as error:
                raise directory._not_made(error) from error
            undo.pop_all()
        return directory

    @classmethod
    def check_new(cls, path: Path | None) -> None:
        """Look, and write nothing, whether `create` can make the directory of a new run.

        Raises:
            RunDirectoryError: it can't, or the directory has a run or other files in it.
        """
        directory = cls(path if path is not None else _RUNS / "new")
        try:
            if directory.path.is_dir():
                directory._refuse_if_used()
            above = directory.path.absolute()
            while not above.exists():
                above = above.parent
            if not above.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(above, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise directory._not_made(error) from error

    def _refuse_if_used(self) -> None:
        # what a process that was killed in `create` before its last line leaves does not count
        found = {entry.name for entry in self.path.iterdir() if not entry.name.endswith(".partial")}
        if self.begun:
            raise RunDirectoryError(
                f"There is a run in {self.path} already. Give another --run-dir, or resume that run: "
                f"{sessions.resume_command(self.path)}"
            )
        leftovers = {_LOCK, _ENVIRONMENT, *([] if checkpoints.checkpoints(self.checkpoint_folder) else [_CHECKPOINTS])}
        if others := sorted(found - leftovers):
            more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
            raise RunDirectoryError(
                f"The folder {self.path} is not empty, and there is no run in it: it has {', '.join(others[:3])}{more}."
                " Give another --run-dir, one that is new or empty."
            )

    def _not_made(self, error: OSError) -> RunDirectoryError:
        return RunDirectoryError(f"Can't make the run directory {self.path}: {error.strerror}. Give another --run-dir.")

    def take(self) -> None:
        """Lock the directory until `release`.

        Raises:
            RunDirectoryError: another process has it, it can't be written to, or something in it is no file or folder
                of its own.
        """
        check_own((self.path / name for name in _OWN_FILES), (self.path / name for name in _OWN_FOLDERS))
        check_own(checkpoints.entries(self.checkpoint_folder), ())
        try:
            self._lock = lock_folder(self.path, _LOCK)
        except BlockingIOError:
            raise RunDirectoryError(
                f"The run directory {self.path} is in use by another process, which trains in it right now. "
                "Wait for it, or stop it."
            ) from None
        except OSError as error:
            raise RunDirectoryError(
                f"Can't write to the run directory {self.path}: {error.strerror}. Correct its permissions, or its name."
            ) from error
        try:
            check_writable(self.checkpoint_folder, self.path / _METRICS)
            take_out_of_backups((self.path / _METRICS, self.path / _LOG))
        except RunDirectoryError:
            self.release()
            raise

    def release(self) -> None:
        """Unlock the directory. Safe to call twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def begun(self) -> bool:
        """Whether there is a run in it, which can be resumed."""
        return os.path.exists(self.path / _CONFIG)

    @property
    def config(self) -> TrainConfig:
        """The configuration that the run was started with.

        Raises:
            RunDirectoryError: this is no run directory, or its configuration can't be read.
        """
        try:
            found = TrainConfig.from_dict(tomllib.loads(files.read_file(self.path / _CONFIG, _MOST).decode()))
            if found.dataset is None:  # it would be looked for anew
                raise ValueError("The configuration lacks dataset")
            return found
        except OSError as error:
            raise RunDirectoryError(
                f"{self.path} is no run directory: its {_CONFIG} can't be read ({files.cause(error)}). "
                f"Give one that `rapa-dist train` made, like those in {_RUNS}/."
            ) from None
        except VoidError as error:
            raise RunDirectoryError(
                f"The run in {self.path} is {error}. Train it anew, in another --run-dir."
            ) from None
        except (ValueError, UsageError, RecursionError) as error:  # no UTF-8, no TOML, or no configuration
            raise RunDirectoryError(
                f"The {_CONFIG} in {self.path} can't be understood: {files.cause(error)}. "
                f"Restore it; the .json files in {_CHECKPOINTS}/ have its values, too."
            ) from error

    def write_config(self, config: TrainConfig) -> None:
        """Record a configuration: a new run's, or one that was changed on resuming (more epochs)."""
        files.write_whole(self.path / _CONFIG, tomli_w.dumps(config.as_dict()).encode())

    @property
    def checkpoint_folder(self) -> Path:
        """Where the checkpoints are."""
        return self.path / _CHECKPOINTS

    def find_checkpoint(self, which: str) -> Path:
        """Return the safetensors file of a checkpoint: "newest", "best" (lowest test error) or one by its name.

        Raises:
            RunDirectoryError: this is no run directory.
            CheckpointError: there is no such checkpoint; those there are are named.
        """
        folder = self.checkpoint_folder
        if not os.path.isdir(folder):
            _ = self.config  # what is no run directory at all is said to be none
        newest = checkpoints.latest(folder)
        if which == "newest":
            return newest
        found = checkpoints.checkpoints(folder)
        if which == "best":
            epoch = self.read_checkpoint(newest).progress.best_epoch
            which = next((p.stem for p in found if epoch and p.stem.endswith(f"-epoch-{epoch:05d}")), which)
        if (path := folder / f"{which}.safetensors") not in found:
            names = ", ".join(p.stem for p in found)
            raise CheckpointError(f"There is no checkpoint “{which}” in {folder}. There are: {names}.")
        return path

    def read_checkpoint(self, path: Path) -> Checkpoint:
        """Read one of the run's checkpoints.

        Raises:
            CheckpointError: it can't be read, or is of another configuration than the run; the difference is shown.
        """
        found = checkpoints.read(path)
        if differs := difference(self.config, found.config, but=FREE):
            raise CheckpointError(
                f"Checkpoint {path} is of another configuration than {self.path / _CONFIG}: {'; '.join(differs)}. "
                "Restore the file that was changed."
            )
        if (name := checkpoints.name_of(found.progress.step, found.progress.epoch)) != path.stem:
            raise CheckpointError(
                f"Checkpoint {path} is {name} by what it holds: it was renamed. Give it its name back, or delete it."
            )
        return found

    def append_metrics(self, line: dict[str, Any]) -> int:
        """Append one line to metrics.jsonl, whole or not at all, and return the length of the file then, in bytes.

        Raises:
            OSError: it can't be written.
        """
        return files.append_whole(self.path / _METRICS, json.dumps(line).encode() + b"\n", durable=True)

    @property
    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl."""
        try:
            return os.stat(self.path / _METRICS).st_size
        except OSError:
            return 0

    def check_metrics(self, n_bytes: int) -> None:
        """Raise RunDirectoryError if the metrics are shorter than they were when the checkpoint was written."""
        length = self.metrics_bytes
        if length < n_bytes:
            raise RunDirectoryError(
                f"{self.path / _METRICS} has {length:,} bytes, but had {n_bytes:,} when the checkpoint was written. "
                "It was damaged: restore it, or start a new run."
            )

    def cut_metrics(self, n_bytes: int) -> None:
        """Drop the metrics of epochs that will be trained again.

        Raises:
            RunDirectoryError: as `check_metrics` does.
        """
        self.check_metrics(n_bytes)
        if self.has_metrics:
            os.truncate(self.path / _METRICS, n_bytes)

    @property
    def has_metrics(self) -> bool:
        """Whether an epoch has ever been finished."""
        return os.path.exists(self.path / _METRICS)

    def metrics(self, n_bytes: int | None = None) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, or of its first bytes.

        Raises:
            RunDirectoryError: they can't be read, or are damaged.
        """
        path = self.path / _METRICS
        try:
            return parse_metrics(files.read_file(path, _MOST_METRICS)[:n_bytes])
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise RunDirectoryError(
                f"{path} can't be read: {files.cause(error)}. It was damaged: restore it, or start a new run."
            ) from error

    def write_tiles(self, stats: dict[str, Any]) -> None:
        """Record what the tiles did since the run was started or resumed, unless that was nothing."""
        if stats["total"]["rows_forward"]:
            files.write_whole(self.path / _TILES, (json.dumps(stats, indent=1) + "\n").encode())

    def log(self, message: str) -> None:
        """Append a line with the time to the log; a log that can't be written stops nothing."""
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
        with contextlib.suppress(OSError):
            files.append_whole(self.path / _LOG, f"{stamp} {message}\n".encode(errors="backslashreplace"))

    def log_stream(self) -> io.TextIOBase:
        """Return a file that passes on to the log what others print into it."""
        return _LogStream(self)

    @property
    def data_dir(self) -> Path | None:
        """Where the run looked for its data; None: in the usual places."""
        recorded = sessions.read(self.path).get("data_dir")
        return Path(recorded) if recorded and TEXT.fits(recorded) else None

    def add_session(self, options: Sequence[str], data_dir: Path | None = None) -> None:
        """Record by what command, with what and when the run is started or resumed.

        Args:
            options: of `rapa-dist train`, to resume it in the same way.
            data_dir: where it looks for its data; None: where it did before, or in the usual places.

        Raises:
            OSError: it can't be written.
        """
        sessions.add(self.path, options, data_dir)


class _LogStream(io.TextIOBase):
    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    def write(self, text: str) -> int:
        if text.strip():
            self._directory.log(text.strip())
        return len(text)


def _remove(path: Path) -> None:
    """Remove a file or a folder that is empty, if it can be."""
    with contextlib.suppress(OSError):
        path.rmdir() if path.is_dir() else path.unlink()


def _fresh_path(config: TrainConfig) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    kind = str(config.dataset).partition(":")[0]
    path = _RUNS / f"{stamp}-{kind}-{'x'.join(map(str, config.tiles))}"
    candidate, number = path, 1
    while candidate.exists():  # two runs may start in one second
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
