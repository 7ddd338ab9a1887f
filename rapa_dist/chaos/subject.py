"""The run that mischief is done to: a training in a process of its own, and its tiles' cells, seen from outside."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from rapa_dist.cells import Word
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.errors import ClusterError
from rapa_dist.fabric.registry import registrations
from rapa_dist.fabric.scratch import map_existing

_LOOK_S = 0.001
_PATIENCE_S = 180.0  # for a run to get on
_HEAD = 4096  # bytes of the cells that hold the words


class Subject:
    """One run, which is started, disturbed and resumed until it is finished."""

    def __init__(
        self,
        directory: Path,
        shared: Path,
        options: Sequence[str],
        environment: dict[str, str],
        before: Sequence[str] = (),
    ) -> None:
        """Start nothing yet.

        Args:
            directory: the run's directory, not there yet.
            shared: the folder that it has for shared memory; nobody else uses it.
            options: of `rapa-dist train`.
            environment: of its process.
            before: what to put before its command, where it is to run elsewhere.
        """
        self.directory = directory
        self._shared, self._options, self._environment, self._before = shared, options, environment, before
        self._process: subprocess.Popen[bytes] | None = None
        self._words: list[memoryview] = []
        self._output = directory.with_name(f"{directory.name}.stderr")
        self.launches = 0

    def launch(self) -> None:
        """Start the run, or go on with it where it was killed."""
        begun = (self.directory / "config.toml").exists()
        what = ["--resume", str(self.directory)] if begun else [*self._options, "--run-dir", str(self.directory)]
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                [*self._before, sys.executable, "-m", "rapa_dist", "train", *what, *self._where()],
                stdout=subprocess.DEVNULL,
                stderr=output,
                env=self._environment,
                start_new_session=True,
            )
        self._words = []
        self.launches += 1

    def _where(self) -> list[str]:
        at = self._environment.get("RAY_ADDRESS")
        return ["--address", at or "local"]

    @property
    def exit_code(self) -> int | None:
        """How its process ended; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    @property
    def last_lines(self) -> str:
        """What it said last."""
        return "\n".join(self._output.read_text(errors="replace").splitlines()[-15:])

    def wait_until(self, condition: Callable[[], bool], what: str) -> bool:
        """Wait for something that a run comes to; return whether it did, before it ended.

        Raises:
            ClusterError: it does not in any time.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            if self.exit_code is not None:
                return condition()
            if time.monotonic() > deadline:
                raise ClusterError(f"The run does not get on: {what} for {_PATIENCE_S:.0f} s.\n{self.last_lines}")
            time.sleep(_LOOK_S)
        return True

    def step(self) -> int:
        """Return the training steps that all tiles which can be seen here have committed; -1 before they are up."""
        if not self._words:
            self._find()
        if not self._words or any(words[Word.PID] == 0 for words in self._words):
            return -1
        return int(min(words[Word.STEP] for words in self._words))

    def pids(self) -> list[int]:
        """Return the tiles' processes."""
        return [int(words[Word.PID]) for words in self._words]

    def _find(self) -> None:
        assert self._process is not None
        for registration in registrations(self._shared):  # written when all tiles are up
            if registration.pid != self._process.pid:  # of the run before, while this one sweeps it up, which locks it
                continue
            with suppress(OSError, ValueError):
                files = sorted(registration.folder.glob("cells-*"), key=lambda file: int(file.name.partition("-")[2]))
                self._words = [memoryview(map_existing(file, _HEAD))[:_HEAD].cast("Q") for file in files]

    def saves(self) -> bool:
        """Return whether a checkpoint is being written right now."""
        folder = self.directory / "checkpoints"
        with suppress(OSError):
            return any(name.endswith(".partial") for name in os.listdir(folder))
        return False

    def kill(self) -> None:
        """Kill the coordinator, and nothing else, and look whether its newest checkpoint can be read.

        Raises:
            CheckpointError: it can't.
        """
        self.signal(signal.SIGKILL)
        folder = self.directory / "checkpoints"
        if folder.is_dir() and (found := checkpoints.checkpoints(folder)):
            checkpoints.read(found[-1])

    def signal(self, number: int) -> None:
        """Send the coordinator a signal and wait until it has ended."""
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(timeout=_PATIENCE_S)

    def close(self) -> None:
        """End it, if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
