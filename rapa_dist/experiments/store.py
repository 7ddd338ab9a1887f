"""Where an experiment's runs and results are kept. What is there is finished; nothing there is done again.

protocol.json               how everything here was trained
runs/<cell>-<seed>/         ordinary run directories
results/<cell>-<seed>.<what>.json   what came of training, or of an analysis
<experiment>.md, .svg, claims.md    made of the results
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from rapa_dist.config import TrainConfig, difference
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.errors import RapaError, RunDirectoryError, UsageError, VoidError
from rapa_dist.experiments.cells import Cell, Protocol
from rapa_dist.fields import check
from rapa_dist.files import cause, parse_json, read_file, write_whole
from rapa_dist.locks import lock_folder
from rapa_dist.revision import FIRST, check_revision

_PROTOCOL = "protocol.json"
_MOST = 1 << 26  # bytes of a result


class Store:
    """A folder of experiments under one protocol."""

    def __init__(self, path: Path, protocol: Protocol, *, binding: bool = True) -> None:
        """Look at a folder; nothing is made yet.

        Args:
            path: the folder.
            protocol: how its runs are trained.
            binding: whether what is to be done depends on the protocol.

        Raises:
            UsageError: it has results of another protocol.
            RapaError: it can't be read.
        """
        self.path, self.protocol, self._binding = path, protocol, binding
        self._lock: int | None = None
        self._bound()

    def _bound(self) -> bool:
        """Return whether the folder has a protocol; see that it is this one."""
        path = self.path / _PROTOCOL
        try:
            before = Protocol(**parse_json(read_file(path, _MOST)))
        except FileNotFoundError:
            return False
        except (OSError, ValueError, TypeError) as error:
            raise RapaError(f"{path} can't be read: {cause(error)}. Restore it, or give another --output.") from error
        if self._binding and (differs := before.differences(self.protocol)):
            raise UsageError(
                f"{self.path} has results of another protocol: {'; '.join(differs)}. "
                "Give the options that it was begun with, or another --output."
            )
        return True

    def take(self) -> None:
        """Make the folder, and lock it until `release`.

        Raises:
            UsageError: it has results of another protocol.
            RapaError: it can't be written to, or another process works in it.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.path / "runs", self.path / "results"):
                folder.mkdir(exist_ok=True)
            lock = lock_folder(self.path, ".lock")
            try:
                if not self._bound() and self._binding:
                    self.write(_PROTOCOL, (json.dumps(self.protocol.as_dict(), indent=1) + "\n").encode())
            except BaseException:
                os.close(lock)
                raise
            self._lock = lock
        except BlockingIOError:
            raise RunDirectoryError(f"{self.path} is in use by another process. Wait for it, or stop it.") from None
        except OSError as error:
            raise RapaError(f"Can't write to {self.path}: {error.strerror}. Give another --output.") from error

    def release(self) -> None:
        """Unlock the folder, which is bound to no protocol if nothing came of it. Safe to call twice."""
        if self._lock is not None:
            if not any(next((self.path / folder).iterdir(), None) for folder in ("runs", "results")):
                (self.path / _PROTOCOL).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    @property
    def seeds(self) -> int:
        """How many seeds of some cell there are results of, those before the last one that has any counted."""
        found = (re.search(r"-(\d+)\.\w+\.json$", path.name) for path in (self.path / "results").glob("*.json"))
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def run_dir(self, cell: Cell, seed: int) -> Path:
        """Return the directory of a cell's run."""
        return self.path / "runs" / f"{cell.name}-{seed}"

    def result(self, cell: Cell, seed: int, what: str) -> dict[str, Any] | None:
        """Return a result that is there, or None. If an earlier version's, of another network, "void" says why."""
        try:
            found = check(json.loads(read_file(self._file(cell, seed, what), _MOST)), {})
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RapaError(
                f"{self._file(cell, seed, what)} can't be read: {cause(error)}. Delete it to have it made again."
            ) from error
        config = cell.config(self.protocol, seed)
        try:
            if config.pooling is not None:
                check_revision(found.get("revision", FIRST), config.paper_machine, config.scheme, config.pooling)
        except VoidError as error:
            found["void"] = str(error)
        return found

    def check_not_void(self, cell: Cell, seed: int, what: str) -> None:
        """Raise UsageError if what is there of a job is an earlier version's, of another network."""
        run, result = RunDirectory(self.run_dir(cell, seed)), self.result(cell, seed, what)
        if result is not None and "void" in result:
            raise UsageError(
                f"{self._file(cell, seed, what)} is {result['void']}. Move it and {run.path} away to have the network "
                "trained anew, or give another --output."
            )
        if run.begun:
            _ = run.config  # what is void is refused

    def keep(self, cell: Cell, seed: int, what: str, result: dict[str, Any]) -> None:
        """Write a result, as a whole, with the revision of the network that it is of."""
        result = result | {"revision": cell.config(self.protocol, seed).revision}
        write_whole(self._file(cell, seed, what), (json.dumps(result, indent=1) + "\n").encode())

    def write(self, name: str, data: bytes) -> Path:
        """Write a table or a plot, as a whole, and return its path."""
        write_whole(self.path / name, data)
        return self.path / name

    def place_for(self, run_dir: Path, cells: list[Cell], seeds: range) -> Path:
        """Return where a run that was trained elsewhere belongs: to the cell whose configuration it has.

        Raises:
            UsageError: it fits no cell, how it differs from the nearest is said; or its place is taken.
        """
        directory = RunDirectory(run_dir)
        config = directory.config
        nearest: list[str] | None = None
        for cell in cells:
            for seed in seeds:
                differs = differences(config, cell.config(self.protocol, seed))
                if not differs:
                    self._check_images(directory)
                    self._check_free(run_dir, cell, seed)
                    return self.run_dir(cell, seed)
                if nearest is None or len(differs) < len(nearest):
                    nearest = differs
        difference = "; ".join(nearest or ["everything"])
        raise UsageError(
            f"The run in {run_dir} belongs to no cell of these tables; the nearest differs in {difference}."
        )

    def _check_images(self, directory: RunDirectory) -> None:
        """Raise UsageError unless a run was trained on the images of the protocol, wherever they lie."""
        wanted, of_protocol = self.protocol.data_fingerprint, self.protocol.dataset
        if wanted is None:
            same, found = directory.config.dataset == of_protocol, str(directory.config.dataset)
        else:
            found = directory.read_checkpoint(directory.find_checkpoint("newest")).data_fingerprint
            same, of_protocol = found == wanted, f"{of_protocol} with the fingerprint {wanted}"
        if not same:
            raise UsageError(
                f"The run in {directory.path} was trained on other images, {found}; here they are {of_protocol}. "
                f"Leave --adopt {directory.path} out, or give its --dataset and limits."
            )

    def _check_free(self, run_dir: Path, cell: Cell, seed: int) -> None:
        place = self.run_dir(cell, seed)
        there = [path for path in (place, *self.path.glob(f"results/{place.name}.*.json")) if os.path.lexists(path)]
        if there and place.resolve() != run_dir.resolve():
            raise UsageError(f"{there[0]} is there already. Remove it, or leave --adopt {run_dir} out.")

    def adopt(self, run_dir: Path, place: Path) -> None:
        """Take a run that was trained elsewhere for the one that belongs there.

        Raises:
            RapaError: it can't be linked.
        """
        try:
            if not os.path.lexists(place):
                place.symlink_to(run_dir.resolve())
        except OSError as error:
            raise RapaError(f"Can't link {run_dir} as {place}: {error.strerror}. Give another --output.") from error

    def _file(self, cell: Cell, seed: int, what: str) -> Path:
        return self.path / "results" / f"{cell.name}-{seed}.{what}.json"


def differences(one: TrainConfig, other: TrainConfig) -> list[str]:
    """Return in what two configurations differ, but for what changes rounding alone, and where the images lie."""
    return difference(one, other, but=("micro_batches", "dataset"))
