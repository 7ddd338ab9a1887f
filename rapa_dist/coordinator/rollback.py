"""Past the loss of a node: back to the newest snapshot, the lost tiles to the nodes that are left, and on from there.

A tile whose process dies finds its kernel in its cells. A node takes its cells along, so that all tiles have to go back
to a moment of which the coordinator has a copy; the steps since are trained again, with the same bits.
"""

import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from rapa_dist.coordinator.checkpoint import Checkpoint
from rapa_dist.coordinator.recoveries import Recoveries
from rapa_dist.coordinator.recovery import NODE, Recovery
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.saving import Saver
from rapa_dist.coordinator.telling import tell
from rapa_dist.coordinator.trainer import Outcome, Trainer
from rapa_dist.errors import CapacityError, ClusterError, NodeLostError, RapaError
from rapa_dist.fabric.base import Fabric
from rapa_dist.fabric.placement import Room

NODE_PATIENCE_S = 60.0
"""How long a run waits for a node that can take the place of a lost one, by default."""
_LOOK_S = 1.0
_SAY_S = 10.0

Train = Callable[[Checkpoint], Trainer]
"""Make what trains on from a checkpoint."""


class Rollback:
    """Trains a run to its end, whatever nodes are lost on the way."""

    def __init__(
        self,
        fabric: Fabric,
        directory: RunDirectory,
        saver: Saver,
        recoveries: Recoveries,
        rooms: Callable[[], Sequence[Room]],
        patience_s: float = NODE_PATIENCE_S,
    ) -> None:
        """Look after a run.

        Args:
            fabric: its tiles.
            directory: its files.
            saver: what its trainers write them with.
            recoveries: told of every node that was replaced.
            rooms: returns the nodes that tiles may be placed on now.
            patience_s: how long to wait for a node where those that are left have too little room.
        """
        self._fabric, self._directory, self._saver, self._recoveries = fabric, directory, saver, recoveries
        self._rooms, self._patience_s = rooms, patience_s

    def run(self, start: Checkpoint, train: Train, stop: Callable[[], bool]) -> Outcome:
        """Train from a checkpoint on; the fabric's tiles have its kernels.

        Raises:
            ClusterError: a node was lost, and none took its place in time, or the cluster fails in another way; what
                was trained up to the newest snapshot is on disk, or it is said why not.
            CheckpointError: nothing could be saved for too long.
        """
        trainer = train(start)
        while True:
            try:
                return trainer.run(stop)
            except NodeLostError as lost:
                snapshot = trainer.snapshot
                tell(self._directory, str(lost))
                noticed, at, reached = time.monotonic(), datetime.now(UTC), trainer.progress.step
                if not self._replace(lost, trainer, stop):
                    return Outcome(False, self._save(trainer))
                self._saver.rewind(snapshot.progress.metrics_bytes)
                trainer = train(trainer.start_again())
                self._note(lost, snapshot.progress.step, reached, time.monotonic() - noticed, at)
            except ClusterError:
                tell(self._directory, self._rescue(trainer))
                raise

    def _replace(self, lost: NodeLostError, trainer: Trainer, stop: Callable[[], bool]) -> bool:
        """Place the lost tiles elsewhere and program all; return False if it was asked to stop meanwhile."""
        from rapa_dist.fabric.ray import RayFabric

        assert isinstance(self._fabric, RayFabric)  # the others have no nodes to lose
        snapshot, deadline, said = trainer.snapshot, time.monotonic() + self._patience_s, -_SAY_S
        while not stop():
            try:
                self._fabric.recover(lost, snapshot.kernels, snapshot.progress.step, self._rooms)
                self._fabric.restore(snapshot.kernels, snapshot.stored)
                return True
            except (NodeLostError, CapacityError) as error:
                left = deadline - time.monotonic()
                why = "The nodes that are left have too few tiles"
                if isinstance(error, NodeLostError):
                    lost, why = error, str(error)
                if left <= 0:
                    raise ClusterError(
                        f"{lost}; and no node took its place within {self._patience_s:g} s (--node-patience). "
                        f"{'' if error is lost else f'{error} '}{self._rescue(trainer)}"
                    ) from error
                if error is lost or time.monotonic() - said > _SAY_S:
                    said = time.monotonic()
                    limit = f" {left:.0f} s" if math.isfinite(left) else ""
                    tell(self._directory, f"{why}; waiting{limit} for another one")
                time.sleep(_LOOK_S)
            except ClusterError as error:
                raise ClusterError(f"{lost}. {error} {self._rescue(trainer)}") from error
        return False

    def _save(self, trainer: Trainer) -> str:
        """Save the newest snapshot, and what could not be saved before; return its name."""
        self._saver.rewind(trainer.snapshot.progress.metrics_bytes)
        trainer.save_snapshot()
        self._saver.settle(lambda: True)
        return self._saver.newest

    def _rescue(self, trainer: Trainer) -> str:
        """Save the newest snapshot before the run ends, if that can be; return what came of it."""
        try:
            return f"Saved: {self._save(trainer)}."
        except RapaError as error:
            return str(error)

    def _note(self, lost: NodeLostError, step: int, reached: int, seconds: float, at: datetime) -> None:
        self._recoveries.note(
            Recovery(
                kind=NODE,
                what=lost.address,
                step=reached,
                lost_steps=reached - step,
                seconds=round(seconds, 3),
                at=at.isoformat(timespec="milliseconds"),
            ),
            f"Its tiles are on other nodes now ({seconds:.1f} s); back from step {reached} to {step}",
        )
