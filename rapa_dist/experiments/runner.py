"""Carrying out an experiment: its jobs as Ray tasks, a core or a GPU each, and no job twice."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rapa_dist.console import counted, stderr
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.errors import ClusterError, RapaError
from rapa_dist.experiments.cells import Cell, analyses_of
from rapa_dist.experiments.jobs import TRAIN, do_as_here
from rapa_dist.experiments.store import Store
from rapa_dist.fabric.address import find_address
from rapa_dist.fabric.cluster import connect_to
from rapa_dist.fabric.running_code import installed_code
from rapa_dist.folders import expanded
from rapa_dist.interrupts import asked_to_stop, uninterrupted

_POLL_S = 0.25
_STOP_S = 120.0
_RETRIES = 3  # of a job whose process was killed; training goes on from its newest checkpoint


@dataclass(frozen=True, slots=True)
class Job:
    """Training a cell, or one analysis of it."""

    cell: Cell
    seed: int
    what: str

    @property
    def name(self) -> str:
        """Its name for people."""
        return f"{self.cell.name}-{self.seed} {self.what}"

    @property
    def trains(self) -> bool:
        """Whether it trains a network."""
        return self.what == TRAIN


@dataclass(slots=True)
class Outcome:
    """How an experiment ended."""

    finished: bool
    """False: it was asked to stop, and can be resumed."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why jobs failed, by name."""


def jobs_of(experiment: str, cells: list[Cell], seeds: int) -> list[Job]:
    """Return all jobs of an experiment, training first."""
    trainings = [Job(cell, seed, TRAIN) for seed in range(seeds) for cell in cells]
    analyses = [
        Job(cell, seed, what) for seed in range(seeds) for cell in cells for what in analyses_of(experiment, cell)
    ]
    return trainings + analyses


def missing(store: Store, jobs: list[Job]) -> list[Job]:
    """Return the jobs without a result."""
    return [job for job in jobs if store.result(job.cell, job.seed, job.what) is None]


def carry_out(
    store: Store,
    jobs: list[Job],
    *,
    fabric: str,
    device: str,
    at_most: int | None,
    address: str | None,
    data_dir: Path | None,
) -> Outcome:
    """Do what is missing, in its order, as many tasks at a time as the cluster has cores (or GPUs).

    Args:
        store: where results are kept as they come.
        jobs: all of the experiment.
        fabric: to train on.
        device: "cpu", or "cuda" for a GPU per task.
        at_most: tasks at a time; None: as many as the cluster has room for.
        address: the Ray cluster, as `rapa-dist train` takes it.
        data_dir: where data sets are.

    Raises:
        ClusterError: there is no cluster, or nothing on it that a job could run on.
    """
    left = missing(store, jobs)
    if not left:
        return Outcome(True)
    with _cluster(address, device, at_most) as slots, asked_to_stop() as stop:
        import ray

        remote: Any = ray.remote(num_cpus=1, max_retries=_RETRIES)
        task, code = remote(do_as_here), installed_code()

        def submit(job: Job) -> Any:
            config = job.cell.config(store.protocol, job.seed).as_dict()
            run = str(store.run_dir(job.cell, job.seed).absolute()), config
            given = data_dir or os.environ.get("RAPA_DIST_DATA")  # in the job's process it may mean another folder
            folder = str(expanded(given).absolute()) if given else None
            gpus = int(device == "cuda" and job.what == TRAIN)  # analyses compute on the CPU
            return task.options(num_gpus=gpus).remote(code, job.what, run, folder, fabric, device)

        return _Round(store, left, submit, slots).run(stop)


class Slots(NamedTuple):
    """How many tasks can be under way."""

    trainings: int
    all: int
    """With the analyses."""


class _Round:
    """Tasks that are under way, and those that wait for their turn."""

    def __init__(
        self,
        store: Store,
        jobs: Sequence[Job],
        submit: Callable[[Job], Any],
        slots: Callable[[], Slots],
    ) -> None:
        self._store, self._submit, self._slots = store, submit, slots
        self._waiting, self._total = list(jobs), len(jobs)
        self._under_way: dict[Any, Job] = {}
        self._outcome = Outcome(True)
        self._told: dict[str, int] = {}
        self._done = 0

    def run(self, stop: Callable[[], bool]) -> Outcome:
        """Wait for all jobs, or until `stop` says so."""
        import ray

        while not stop():
            self._fill()
            if not self._under_way:
                return self._outcome
            done, _ = ray.wait(list(self._under_way), num_returns=1, timeout=_POLL_S)
            for reference in done:
                self._take(reference)
            self._show()
        if self._under_way:
            self._stop()
        self._outcome.finished &= not (self._under_way or self._waiting)
        return self._outcome

    def _fill(self) -> None:
        """Begin as many tasks as there is room for: analyses of what is trained, and the next ones to train."""
        self._give_up()
        room = self._slots()
        for job in sorted(filter(self._ready, self._waiting), key=lambda job: job.trains):
            trainings = sum(other.trains for other in self._under_way.values())
            if len(self._under_way) >= room.all or (job.trains and trainings >= room.trainings):
                return
            self._waiting.remove(job)
            self._under_way[self._submit(job)] = job

    def _ready(self, job: Job) -> bool:
        """Whether a job can begin: to train, or to analyse what is trained."""
        return job.trains or self._store.result(job.cell, job.seed, TRAIN) is not None

    def _give_up(self) -> None:
        """Take the analyses whose training failed for failed."""
        for job in list(self._waiting):
            if not job.trains and Job(job.cell, job.seed, TRAIN).name in self._outcome.failed:
                self._waiting.remove(job)
                self._outcome.failed[job.name] = "its network could not be trained"
                self._done += 1

    def _take(self, reference: Any) -> None:
        """Keep what a task came to."""
        import ray

        job = self._under_way.pop(reference)
        try:
            result = ray.get(reference)
        except ray.exceptions.RayError as error:
            result = {"error": str(error).strip().splitlines()[-1]}
        self._done += 1
        if result.get("stopped"):
            self._outcome.finished = False
        elif "error" in result:
            self._outcome.failed[job.name] = result["error"]
            stderr.print(f"{job.name} failed: {result['error']}", markup=False)
        else:
            self._store.keep(job.cell, job.seed, job.what, result)
            figure = f"  best test error {result['best_test_error_percent']:.2f} %" if job.trains else ""
            stderr.print(f"{self._done:3}/{self._total} {job.name} done{figure}", markup=False)

    def _show(self) -> None:
        """Print where a run stands: at first, and after each tenth, as far as its directory can be seen from here."""
        for job in self._under_way.values():
            if not job.trains:
                continue
            epochs = self._store.protocol.epochs
            try:
                metrics = RunDirectory(self._store.run_dir(job.cell, job.seed)).metrics()
            except RapaError:  # they are damaged, which the job itself will say
                continue
            done, standing = len(metrics), progress_of(metrics[-1], epochs) if metrics else ""
            told = 10 * done // epochs + (done > 0)
            if told > self._told.get(job.name, 0):
                self._told[job.name] = told
                stderr.print(f"        {job.cell.name}-{job.seed} {standing}", markup=False)

    def _stop(self) -> None:
        """Have the jobs under way save and end."""
        import ray

        stderr.print(f"Stopping what is under way ({len(self._under_way)}); what trains is saved", markup=False)
        for reference in self._under_way:
            ray.cancel(reference, force=False)
        done, _ = ray.wait(list(self._under_way), num_returns=len(self._under_way), timeout=_STOP_S)
        for reference in done:
            try:
                result = ray.get(reference)
            except ray.exceptions.RayError:
                continue
            if not result.keys() & {"stopped", "error"}:
                self._take(reference)


def progress_of(line: dict[str, Any], epochs: int) -> str:
    """Say how far a run is, given the line of its metrics for its newest epoch."""
    epoch, wall = line["epoch"], line["wall"]
    left_min = (epochs - epoch) * (wall["train_s"] + wall["test_s"]) / 60
    left = f"  about {left_min:.0f} min left" if left_min >= 1 else ""
    return f"epoch {epoch}/{epochs}  test error {line['test_error_percent']:.2f} %{left}"


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


@contextmanager
def _cluster(address: str | None, device: str, at_most: int | None) -> Iterator[Callable[[], Slots]]:
    """Join or start a Ray cluster, and return what says how many tasks it has room for now; leave or stop it."""
    found = find_address(address)
    stderr.print(f"{'Joining' if found else 'Starting'} a Ray cluster …", markup=False)
    with uninterrupted():
        cluster = connect_to(found, 0, gpus=_gpus() if device == "cuda" else 0)
    try:
        import ray

        kind = "GPU" if device == "cuda" else "CPU"

        def offered(kind: str) -> int:
            return int(ray.cluster_resources().get(kind, 0))  # type: ignore[no-untyped-call]

        def slots() -> Slots:
            most = at_most or sys.maxsize
            return Slots(max(1, min(most, offered(kind))), max(1, min(most, offered("CPU"))))

        if offered(kind) < 1:
            raise ClusterError(f"The Ray cluster at {cluster.address} offers no {kind}, and a job takes one.")
        stderr.print(
            f"Ray cluster at {cluster.address} ({cluster.description}): {counted(slots().trainings, 'job')} at a time",
            markup=False,
        )
        yield slots
    finally:
        with uninterrupted():
            cluster.close()
