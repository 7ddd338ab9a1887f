"""Where an experiment's runs and results are kept. What is there is finished; nothing there is done again.

protocol.json               how everything here was trained
runs/<cell>-<seed>/         ordinary run directories
results/<cell>-<seed>.<what>.json   what came of training, or of an analysis
<experiment>.md, .svg, claims.md    made of the results
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from rapa_dist.config import TrainConfig, difference
from rapa_dist.coordinator.checkpoint import write_whole
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.errors import RapaError, RunDirectoryError, UsageError
from rapa_dist.experiments.cells import Cell, Protocol

_PROTOCOL = "protocol.json"


class Store:
    """A folder of experiments under one protocol."""

    def __init__(self, path: Path, protocol: Protocol) -> None:
        """Look at a folder; nothing is made yet.

        Raises:
            UsageError: it has results of another protocol.
            RapaError: it can't be read.
        """
        self.path, self.protocol = path, protocol
        self._lock: int | None = None
        try:
            found = json.loads((path / _PROTOCOL).read_bytes())
            before = Protocol(**found)
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError) as error:
            raise RapaError(
                f"{path / _PROTOCOL} can't be read: {error}. Restore it, or give another --output."
            ) from error
        if differs := before.differences(protocol):
            raise UsageError(
                f"{path} has results of another protocol: {'; '.join(differs)}. "
                "Give the options that it was begun with, or another --output."
            )

    def take(self) -> None:
        """Make the folder, and lock it until this process ends.

        Raises:
            RapaError: it can't be written to, or another process works in it.
        """
        try:
            for folder in (self.path / "runs", self.path / "results"):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_whole(self.path / _PROTOCOL, (json.dumps(self.protocol.as_dict(), indent=1) + "\n").encode())
        except BlockingIOError:
            self.release()
            raise RunDirectoryError(f"{self.path} is in use by another process. Wait for it, or stop it.") from None
        except OSError as error:
            raise RapaError(f"Can't write to {self.path}: {error.strerror}. Give another --output.") from error

    def release(self) -> None:
        """Unlock the folder. Safe to call twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def run_dir(self, cell: Cell, seed: int) -> Path:
        """Return the directory of a cell's run."""
        return self.path / "runs" / f"{cell.name}-{seed}"

    def result(self, cell: Cell, seed: int, what: str) -> dict[str, Any] | None:
        """Return a result that is there, or None."""
        try:
            found: dict[str, Any] = json.loads(self._file(cell, seed, what).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RapaError(
                f"{self._file(cell, seed, what)} can't be read: {error}. Delete it to have it made again."
            ) from error
        return found

    def keep(self, cell: Cell, seed: int, what: str, result: dict[str, Any]) -> None:
        """Write a result, as a whole."""
        write_whole(self._file(cell, seed, what), (json.dumps(result, indent=1) + "\n").encode())

    def write(self, name: str, data: bytes) -> Path:
        """Write a table or a plot, as a whole, and return its path."""
        write_whole(self.path / name, data)
        return self.path / name

    def adopt(self, run_dir: Path, cells: list[Cell], seeds: range) -> str:
        """Take a run that was trained elsewhere for the cell whose configuration it has; return its name.

        Raises:
            UsageError: it fits no cell; how it differs from the nearest is said.
        """
        config = RunDirectory(run_dir).config
        nearest: list[str] | None = None
        for cell in cells:
            for seed in seeds:
                differs = [line for line in difference(config, cell.config(self.protocol, seed)) if _matters(line)]
                if not differs:
                    self._link(run_dir, self.run_dir(cell, seed))
                    return f"{cell.name}-{seed}"
                if nearest is None or len(differs) < len(nearest):
                    nearest = differs
        raise UsageError(
            f"The run in {run_dir} is of no cell here; the nearest differs in {'; '.join(nearest or ['everything'])}."
        )

    def _link(self, run_dir: Path, place: Path) -> None:
        if place.exists():
            if place.resolve() == run_dir.resolve():
                return
            raise UsageError(f"{place} is there already. Remove it, or leave --adopt {run_dir} out.")
        place.symlink_to(run_dir.resolve())

    def _file(self, cell: Cell, seed: int, what: str) -> Path:
        return self.path / "results" / f"{cell.name}-{seed}.{what}.json"


def _matters(line: str) -> bool:
    """Whether a difference between configurations changes more than rounding."""
    return not line.startswith("micro_batches:")


def same_but_for_rounding(one: TrainConfig, other: TrainConfig) -> bool:
    """Return whether two configurations train the same network, whatever their mini-batches are cut into."""
    return not any(_matters(line) for line in difference(one, other))
