"""Nodes that are lost, on disks that are full or not: on `serial`, with a stand-in for what can be lost."""

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rapa_dist import files
from rapa_dist.config import resolve
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator import rollback as rollbacks
from rapa_dist.coordinator import saving
from rapa_dist.coordinator import trainer as trainers
from rapa_dist.coordinator.checkpoint import Checkpoint, name_of
from rapa_dist.coordinator.recoveries import Recoveries
from rapa_dist.coordinator.rollback import Rollback
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.saving import Saver
from rapa_dist.coordinator.session import one_digital_thread
from rapa_dist.coordinator.trainer import Outcome, Trainer, initial_checkpoint
from rapa_dist.data import DataSet, load_dataset
from rapa_dist.demand import arena_floats
from rapa_dist.errors import CapacityError, ClusterError, NodeLostError
from rapa_dist.fabric import ray as ray_fabrics
from rapa_dist.fabric.doorbell import Cycle
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.layout import machine_of

CONFIG = resolve(
    tiles=(2, 1, 1),
    channels=(4, 4, 4),
    pooling="max",
    dataset="builtin",
    limit_train=40,
    limit_test=10,
    epochs=3,
    batch_size=10,
    lr_decay_every=10,
    warmup_epochs=1,
    weight_decay=1e-4,
    augment=True,
    seed=0,
)
STEPS = 4  # an epoch


class Fragile(SerialFabric):
    """Fails when the run is at given points: a step number, or an epoch that is tested and not saved."""

    spread = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.failures: list[tuple[int | str, ClusterError]] = []
        self.refusals: list[ClusterError] = []
        self.trainer: Trainer
        self.rescue = lambda: None

    def _fail(self, at: int | str) -> None:
        if self.failures and self.failures[0][0] == at:
            raise self.failures.pop(0)[1]

    def begin(self, array, cycle, *arguments, **named):
        if cycle == Cycle.FORWARD:
            self._fail(self.trainer.progress.step)
        return super().begin(array, cycle, *arguments, **named)

    def all_kernels(self):
        trainer, progress = self.trainer, self.trainer.progress
        copied = not trainer.snapshot_every or trainer.snapshot.progress.step == progress.step
        if progress.step_in_epoch == STEPS and copied:
            self._fail(f"end of epoch {progress.epoch + 1}")
        return super().all_kernels()

    def recover(self, lost, kernels, step, rooms):
        if self.refusals:
            raise self.refusals.pop(0)
        self.rescue()
        self.program(kernels, step)


class Silent:
    def trained(self, progress, steps_per_epoch, loss): ...
    def tested(self, done, total): ...
    def finished_epoch(self, metrics): ...


@dataclass
class Run:
    """A run that has not begun."""

    start: Checkpoint
    directory: RunDirectory
    fabric: Fragile
    saver: Saver
    rooms: Any = list
    patience_s: float = 60.0
    snapshot_every: int = 0

    def __call__(self, stop=lambda: False) -> Outcome:
        recoveries = Recoveries(self.directory)

        def train(start):
            arguments = (
                start,
                data(),
                self.fabric,
                self.directory,
                Silent(),
                recoveries,
                self.saver,
                self.snapshot_every,
            )
            self.fabric.trainer = Trainer(*arguments)
            return self.fabric.trainer

        rollback = Rollback(self.fabric, self.directory, self.saver, recoveries, self.rooms, self.patience_s)
        with one_digital_thread():
            return rollback.run(self.start, train, stop)

    @property
    def newest(self) -> Checkpoint:
        return checkpoints.read(checkpoints.latest(self.directory.checkpoint_folder))

    @property
    def metrics(self) -> list[dict]:
        return [{name: value for name, value in line.items() if name != "wall"} for line in self.directory.metrics()]


@cache
def data() -> DataSet:
    return load_dataset("builtin", limit_train=CONFIG.limit_train, limit_test=CONFIG.limit_test)


def a_run(path) -> Run:
    directory, start = RunDirectory.create(path, CONFIG, None), initial_checkpoint(CONFIG, data())
    checkpoints.write(directory.checkpoint_folder, name_of(0, 0), start)
    return Run(
        start,
        directory,
        Fragile(machine_of(CONFIG), arena_floats(machine_of(CONFIG), 10), start.kernels),
        Saver(directory, name_of(0, 0)),
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_fabrics, "RayFabric", Fragile)
    monkeypatch.setattr(saving, "_LAST_RETRY_S", 0.01)
    monkeypatch.setattr(saving, "_LEAVING_S", 0.05)
    monkeypatch.setattr(rollbacks, "_LOOK_S", 0.0)
    made = a_run(tmp_path / "run")
    yield made
    made.fabric.close()
    made.directory.release()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    made = a_run(tmp_path_factory.mktemp("undisturbed") / "run")
    made()
    made.fabric.close()
    made.directory.release()
    return made


@pytest.fixture
def disk(monkeypatch):
    """A disk on which there is room, until `full` is set."""
    state = {"full": False}

    def write(how):
        def it(path, data, **options):
            if state["full"]:
                raise OSError(28, "No space left on device")
            return how(path, data, **options)

        return it

    for name in ("write_whole", "append_whole"):
        monkeypatch.setattr(files, name, write(getattr(files, name)))
    return state


def lost(node: str = "b") -> NodeLostError:
    return NodeLostError(f"The node {node} is lost", node, node)


def assert_same_run(one: Run, other: Run) -> None:
    assert one.metrics == other.metrics
    assert one.newest.progress.metrics_bytes == one.directory.metrics_bytes
    assert one.saver.newest == other.saver.newest == name_of(3 * STEPS, 3)
    for ours, theirs in zip(one.newest.kernels, other.newest.kernels, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("at", [STEPS * 2 + 1, "end of epoch 2"], ids=str)
def test_a_node_that_is_lost_takes_no_line_and_no_bit_along(run, undisturbed, disk, at, full):
    disk["full"] = full
    run.fabric.failures = [(at, lost())]
    run.fabric.rescue = lambda: disk.update(full=False)
    assert run().finished
    assert_same_run(run, undisturbed)


def test_the_wall_time_of_an_epoch_has_that_of_its_lost_steps_and_of_the_wait(run, monkeypatch):
    """All that takes time is to look whether to stop: 10 s, for each of four steps, two of them twice, and in between.

    The node is lost in the fourth step, behind the snapshot after the second.
    """
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(trainers, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    run.snapshot_every = 2
    run.fabric.failures = [(3, lost())]

    def look() -> bool:
        clock.now += 10
        return False

    assert run(look).finished
    first, *others = (line["wall"] for line in run.directory.metrics())
    assert (first["train_s"], first["steps"]) == (10 * (4 + 1 + 2), 4)
    assert all((wall["train_s"], wall["steps"]) == (40, 4) for wall in others)


def test_a_snapshot_in_the_middle_of_an_epoch_has_the_wall_time_up_to_it(run, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(trainers, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    run.snapshot_every = 2
    run.fabric.failures = [(3, ClusterError("The head is gone"))]

    def look() -> bool:
        clock.now += 10
        return False

    with pytest.raises(ClusterError, match="The head is gone"):
        run(look)
    assert (run.newest.progress.step, run.newest.progress.train_s) == (2, 30), "the third step is under way by then"


def test_a_checkpoint_that_could_not_be_written_is_not_forgotten_with_the_node(run, undisturbed, disk):
    """The line of metrics that it counts neither, where the run then ends."""
    disk["full"] = True
    run.fabric.failures = [(STEPS * 2 + 1, lost()), (STEPS * 2 + 1, ClusterError("The head is gone"))]
    run.fabric.rescue = lambda: disk.update(full=False)
    with pytest.raises(ClusterError, match="The head is gone"):
        run()
    assert run.newest.progress.epoch == 2
    assert run.metrics == undisturbed.metrics[:2]


@pytest.mark.parametrize("refusal", [CapacityError("Too little room."), ClusterError("The head is gone.")], ids=repr)
def test_a_run_that_ends_while_the_disk_is_full_says_so_and_leaves_what_is_there(run, disk, refusal):
    run.fabric.failures = [(STEPS * 2 + 1, lost())]
    run.fabric.refusals = [refusal]
    run.patience_s = 0
    disk["full"] = True
    with pytest.raises(
        ClusterError, match=r"b is lost.*could not be saved.*No space left.*newest checkpoint is step-0"
    ):
        run()
    run.directory.check_metrics(run.newest.progress.metrics_bytes)


def test_a_checkpoint_that_is_there_is_not_written_again(run, disk):
    run.fabric.failures = [(0, lost())]
    run.fabric.refusals = [CapacityError("Too little room.")]
    run.patience_s = 0
    disk["full"] = True
    with pytest.raises(ClusterError, match=rf"Too little room\. Saved: {name_of(0, 0)}\."):
        run()
    assert run.newest.progress == run.start.progress


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize(("at", "step"), [(STEPS + 2, STEPS + 2), ("end of epoch 2", 2 * STEPS)])
def test_whatever_ends_a_run_the_newest_snapshot_is_saved(run, refused, at, step):
    gone = ClusterError("The head is gone.")
    run.snapshot_every = 1
    run.fabric.failures = [(at, lost() if refused else gone)]
    run.fabric.refusals = [gone]
    with pytest.raises(ClusterError, match="The head is gone"):
        run()
    assert run.newest.progress.step == step
    assert [line["epoch"] for line in run.metrics] == [1]


def test_a_run_that_is_asked_to_stop_while_it_waits_for_a_node_is_saved(run):
    run.snapshot_every = 1
    run.fabric.failures = [(STEPS + 2, lost())]
    run.fabric.refusals = [CapacityError("Too little room.")] * 3
    outcome = run(lambda: 0 < len(run.fabric.refusals) < 2)
    assert outcome == Outcome(False, name_of(STEPS + 2, 1))
    assert run.newest.progress.step == STEPS + 2


def test_nodes_that_are_lost_again_and_again_are_not_waited_for_forever(run, monkeypatch):
    now = 0.0

    class Clock:
        monotonic = staticmethod(lambda: now)

        @staticmethod
        def sleep(seconds):
            nonlocal now
            now += seconds

    monkeypatch.setattr(rollbacks, "time", Clock)
    monkeypatch.setattr(rollbacks, "_LOOK_S", 1.0)
    run.fabric.failures = [(2, lost())]
    run.fabric.refusals = [lost(f"c{number}") for number in range(100)]
    with pytest.raises(ClusterError, match=r"c60 is lost; and no node took its place within 60 s .*\. Saved: step-0"):
        run()
    run.fabric.failures, run.fabric.refusals = [(2, lost())], [lost("c"), CapacityError("Too little room.")]
    assert run().finished
