"""Saving a run: metrics and checkpoints, tried again and again where the disk is full or can't be written to.

Training goes on meanwhile. What could not be written is kept in memory, and the checkpoint before it stays whole.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from typing import Any

from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator.checkpoint import Checkpoint
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.sessions import resume_command
from rapa_dist.coordinator.telling import tell
from rapa_dist.errors import CheckpointError

PATIENCE_S = 600.0
"""For how long a run goes on that can't be saved, by default."""
_RETRY_S = 15.0
_LAST_RETRY_S = 1.0
_LEAVING_S = 10.0  # for a run that was asked to stop: whoever asked is waiting


class Saver:
    """Writes what a run has to leave behind: an epoch's line of metrics, and then the checkpoint that counts it.

    Both or none, so that no epoch is in metrics.jsonl alone. Where the process is killed between the two, resuming cuts
    the line off, and the epoch is trained again. A run has one, however often it goes back to a snapshot.
    """

    def __init__(
        self,
        directory: RunDirectory,
        newest: str,
        *,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Write nothing yet.

        Args:
            directory: the run's.
            newest: name of its newest checkpoint.
            patience_s: for how long it may be impossible to save.
            clock: seconds.
        """
        self.newest = newest
        """Name of the newest checkpoint on disk."""
        self._directory, self._patience_s, self._clock = directory, patience_s, clock
        self._written = directory.metrics_bytes
        self._lines: list[dict[str, Any]] = []
        self._checkpoint: tuple[str, Checkpoint, str | None] | None = None
        self._failing_since: float | None = None
        self._last_try = 0.0
        self._reason = ""

    def append(self, line: dict[str, Any]) -> int:
        """Keep a line of metrics for the next checkpoint; return the length in bytes that metrics.jsonl has with it."""
        self._lines.append(line)
        return self._written + sum(map(_size, self._lines))

    def rewind(self, n_bytes: int) -> None:
        """Take back the lines of metrics after a length that `append` returned, written or not.

        Raises:
            CheckpointError: nothing could be saved for too long.
        """
        lengths = list(accumulate(map(_size, self._lines), initial=self._written))[1:]
        self._lines = [line for line, length in zip(self._lines, lengths, strict=True) if length <= n_bytes]
        self._written = min(self._written, n_bytes)
        self._try()

    def save(self, name: str, checkpoint: Checkpoint, best: str | None) -> None:
        """Write the lines of metrics and a checkpoint, now or later; in the place of one that could not be written.

        Args:
            name: its name.
            checkpoint: what it holds; nobody changes that any more.
            best: name of the checkpoint with the lowest test error, which is kept.

        Raises:
            CheckpointError: nothing could be saved for too long.
        """
        self._checkpoint = name, checkpoint, best
        self._try()

    def retry(self) -> None:
        """Try again what is still to be written, if it is time to; call it often.

        Raises:
            CheckpointError: nothing could be saved for too long.
        """
        if self._failing_since is not None and self._clock() - self._last_try >= _RETRY_S:
            self._try()

    def settle(self, stop: Callable[[], bool]) -> None:
        """Return when everything is written.

        Args:
            stop: says whether somebody waits for the end: be patient no longer.

        Raises:
            CheckpointError: it can't be.
        """
        deadline = None
        while self._failing_since is not None:
            if deadline is None and stop():
                deadline = self._clock() + _LEAVING_S
            if deadline is not None and self._clock() > deadline:
                raise self._error()
            time.sleep(_LAST_RETRY_S)
            self._try()

    def _try(self) -> None:
        self._last_try = self._clock()
        try:
            self._write()
        except OSError as error:
            self._reason = f"{error.strerror or error}"
            if self._failing_since is None:
                self._failing_since = self._last_try
                tell(
                    self._directory,
                    f"warning: the run can't be saved in {self._directory.path}: {self._reason}. Training goes on, and "
                    f"it is tried again{self._limit()}. The newest checkpoint is {self.newest}.",
                )
            elif self._last_try - self._failing_since > self._patience_s:
                raise self._error() from error
            return
        if self._failing_since is not None:
            self._failing_since = None
            tell(self._directory, f"The run is saved again, in {self._directory.path}: checkpoint {self.newest}.")

    def _limit(self) -> str:
        return f", for {self._patience_s:.0f} s" if math.isfinite(self._patience_s) else ""

    def _write(self) -> None:
        if self._directory.metrics_bytes > self._written:
            self._directory.cut_metrics(self._written)
        if self._checkpoint is None:
            return
        name, checkpoint, best = self._checkpoint
        folder, written = self._directory.checkpoint_folder, self._written
        try:
            for line in self._lines:
                written = self._directory.append_metrics(line)
            checkpoints.write(folder, name, checkpoint)
        except OSError:
            with suppress(OSError):  # else the next try does it
                self._directory.cut_metrics(self._written)
            raise
        self._checkpoint, self.newest, self._written, self._lines = None, name, written, []
        self._directory.log(f"checkpoint {name}")
        checkpoints.prune(folder, best)

    def _error(self) -> CheckpointError:
        return CheckpointError(
            f"The run could not be saved in {self._directory.path} for too long: {self._reason}. The newest checkpoint "
            f"is {self.newest}; what was trained since is lost. Make room or correct permissions there, then resume "
            f"with: {resume_command(self._directory.path)}"
        )


def _size(line: dict[str, Any]) -> int:
    return len(json.dumps(line).encode()) + 1
