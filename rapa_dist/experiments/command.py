"""What `rapa-dist reproduce` does, from its options to the files that it leaves."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rapa_dist.analysis.plots import check_can_plot
from rapa_dist.config import check_fabric
from rapa_dist.console import stderr
from rapa_dist.data.load import check_name, load_dataset
from rapa_dist.errors import UsageError
from rapa_dist.experiments import figures, tables
from rapa_dist.experiments.cells import EXPERIMENTS, Protocol, cells_of
from rapa_dist.experiments.claims import claims, rows_of
from rapa_dist.experiments.runner import carry_out, jobs_of, missing
from rapa_dist.experiments.store import Store
from rapa_dist.fabric.address import find_address


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of `rapa-dist reproduce`."""

    experiment: str
    epochs: int
    limit_train: int | None
    limit_test: int | None
    lr_decay_every: int | None
    seeds: int
    cells: tuple[str, ...] | None
    dataset: str | None
    data_dir: Path | None
    output: Path | None
    adopt: tuple[Path, ...]
    fabric: str
    device: str
    jobs: int | None
    address: str | None


class Work:
    """An experiment that can be planned and carried out."""

    def __init__(self, request: Request, protocol: Protocol, store: Store) -> None:
        self._request, self._store = request, store
        self._cells = cells_of(request.experiment, request.cells)
        self._jobs = jobs_of(request.experiment, self._cells, request.seeds)
        for job in self._jobs:
            job.cell.config(protocol, job.seed)  # what can't work is refused before anything starts
            store.check_not_void(job.cell, job.seed, job.what)
        seeds = range(request.seeds)
        self._adopted = {path: store.place_for(path, self._cells, seeds) for path in request.adopt}

    @property
    def output(self) -> Path:
        """Where results are kept."""
        return self._store.path

    def plan(self) -> dict[str, Any]:
        """Return what there is to do; nothing is started or written."""
        left = missing(self._store, self._jobs)
        done = [job for job in self._jobs if job not in left]
        bound = self._request.experiment != "regularizer"
        lines = [f"protocol  {self._store.protocol.describe()}"] if bound else []
        lines += [f"output    {self._store.path}"]
        lines += [f"adopted   {place.name}: {path}" for path, place in self._adopted.items()]
        lines += [f"done      {job.name}" for job in done] + [f"to do     {job.name}" for job in left]
        lines += [] if bound else ["to do     regularizer"]
        return {
            "experiment": self._request.experiment,
            "protocol": self._store.protocol.as_dict(),
            "output": str(self._store.path),
            "done": [job.name for job in done],
            "to_do": [job.name for job in left],
            "text": "\n".join(lines) + "\n",
        }

    def run(self) -> dict[str, Any]:
        """Do what is missing, write table, figure and claims, and return them."""
        request, store = self._request, self._store
        store.take()
        try:
            for run_dir, place in self._adopted.items():
                store.adopt(run_dir, place)
                stderr.print(f"{run_dir} is taken for {place.name}", markup=False)
            if request.experiment == "regularizer":
                return self._regularizer()
            outcome = carry_out(
                store,
                self._jobs,
                fabric=request.fabric,
                device=request.device,
                at_most=request.jobs,
                address=request.address,
                data_dir=request.data_dir,
            )
            result = self._write()
        finally:
            store.release()
        if outcome.failed:
            result["text"] += "\nFailed:\n" + "".join(f"- {name}: {why}\n" for name, why in outcome.failed.items())
        if not outcome.finished:
            done = len(self._jobs) - len(missing(store, self._jobs))
            result["text"] = (
                f"Stopped with {done} of {len(self._jobs)} jobs done; the same command goes on from here.\n"
            )
        return result | {"failed": outcome.failed, "stopped": not outcome.finished}

    def _write(self) -> dict[str, Any]:
        name, store = self._request.experiment, self._store
        results = tables.Results(store)
        table = getattr(tables, name)(results)
        claimed = claims(results)
        store.write(f"{name}.md", table.encode())
        store.write("claims.md", claimed.encode())
        files = [f"{name}.md", "claims.md"]
        if figures.draw(name, results, store.path / f"{name}.svg"):
            files.append(f"{name}.svg")
        return self._result(table + "\n" + claimed, files) | {"claims": [row.as_dict() for row in rows_of(results)]}

    def _regularizer(self) -> dict[str, Any]:
        from rapa_dist.analysis.regularizer import along_training

        request, store = self._request, self._store
        found = along_training(dataset=store.protocol.dataset, data_dir=request.data_dir)
        found.pop("dataset")
        table = tables.regularizer(found)
        store.write("regularizer.md", table.encode())
        store.write("regularizer.json", (json.dumps(found, indent=1) + "\n").encode())
        figures.draw_regularizer(found, store.path / "regularizer.svg")
        return self._result(table, ["regularizer.md", "regularizer.json", "regularizer.svg"])

    def _result(self, text: str, files: list[str]) -> dict[str, Any]:
        written = [str(self._store.path / name) for name in files]
        for path in written:
            stderr.print(f"wrote {path}", markup=False)
        return {
            "experiment": self._request.experiment,
            "protocol": self._store.protocol.as_dict(),
            "files": written,
            "text": text,
        }


def prepare(request: Request) -> Work:
    """Look at everything that can be wrong, and return the work; nothing is started or written.

    Raises:
        RapaError: with the cause, and what to do.
    """
    cells_of(request.experiment, request.cells)
    if request.seeds < 1:
        raise UsageError(f"--seeds needs at least 1; it is {request.seeds}.")
    check_fabric(request.fabric)
    if request.fabric == "ray":
        raise UsageError(
            "--fabric ray has a process per tile; experiments train on batched or serial. Use one of them."
        )
    if request.jobs is not None and request.jobs < 1:
        raise UsageError(f"--jobs needs at least 1; it is {request.jobs}.")
    if request.device != "cpu" and request.fabric != "batched":
        raise UsageError(f"--device is for the fabric batched; --fabric {request.fabric} computes on the CPU.")
    from rapa_dist.fabric.batched import check_device

    found = None if request.experiment == "regularizer" else find_address(request.address)
    check_device(request.device, here=request.device == "cpu" or found is None)
    name = None if request.dataset is None else check_name(request.dataset)
    # images last: they may take a while
    planned = Protocol.scaled(epochs=request.epochs, lr_decay_every=request.lr_decay_every, dataset=name or "cifar10")
    if request.output is not None:
        _check_output(request.output)
    check_can_plot()
    data = load_dataset(name, data_dir=request.data_dir, limit_train=request.limit_train, limit_test=request.limit_test)
    protocol = replace(
        planned,
        dataset=data.name,
        limit_train=None if request.limit_train is None else len(data.train.labels),
        limit_test=None if request.limit_test is None else len(data.test.labels),
        data_fingerprint=data.fingerprint,
    )
    output = request.output or Path("reproduce") / data.name.partition(":")[0]
    _check_output(output)
    assert request.experiment in EXPERIMENTS
    return Work(request, protocol, Store(output, protocol, binding=request.experiment != "regularizer"))


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output is a folder, and {output} is none. Give another one.")
    above = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise UsageError(f"--output is {output}: {above} can't be written to. Correct that, or give another one.")
