"""What a run got over so far: told at once on stderr and in its log, and kept for the next line of its metrics."""

from datetime import UTC, datetime, timedelta
from typing import Any

from rapa_dist.coordinator.recovery import HUNG, TILE, Recovery
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.telling import tell
from rapa_dist.fabric.lookout import Restart


class Recoveries:
    """The recoveries of one run, as long as this process trains it."""

    def __init__(self, directory: RunDirectory) -> None:
        self.step = 0
        """Mini-batches trained since the start of the run."""
        self._directory = directory
        self._new: list[Recovery] = []

    def restarted(self, restart: Restart) -> None:
        """Take note of a tile whose process was replaced, a moment ago."""
        noticed = datetime.now(UTC) - timedelta(seconds=restart.seconds)
        self.note(
            Recovery(
                kind=HUNG if restart.hung else TILE,
                what=restart.tile,
                step=self.step,
                lost_steps=0,
                seconds=restart.seconds,
                at=noticed.isoformat(timespec="milliseconds"),
            ),
            f"{sentence(restart)[:-1]}, in step {self.step + 1})",
        )

    def note(self, recovery: Recovery, message: str) -> None:
        """Take note of a recovery.

        Args:
            recovery: what it was.
            message: the same for people, a line.
        """
        self._new.append(recovery)
        self._directory.log(f"recovery: {recovery}")
        tell(self._directory, message)

    def take(self) -> list[dict[str, Any]]:
        """Return those since the last call, as plain values."""
        new, self._new = self._new, []
        return [recovery.as_dict() for recovery in new]


def sentence(restart: Restart) -> str:
    """Return what became of a tile whose process was replaced."""
    what = "hung, was killed and is back" if restart.hung else "died and is back"
    return f"{restart.tile} {what}; its cycle was repeated ({restart.seconds:.1f} s)"
