"""One piece of work of an experiment, as it is done in a process of its own."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rapa_dist.config import TrainConfig
from rapa_dist.errors import RapaError, RunDirectoryError
from rapa_dist.fabric.running_code import RunningCode, installed_code

if TYPE_CHECKING:
    from rapa_dist.coordinator.run import RunResult
    from rapa_dist.coordinator.run_images import Where

Analysis = Callable[[Path, "Where"], dict[str, Any]]

TRAIN = "train"
SNR_DB = (15.0, 20.0, 25.0, 30.0, 33.0, 36.0, 40.0, 45.0, 50.0)


def do(what: str, run: tuple[str, dict[str, Any]], data_dir: str | None, fabric: str, device: str) -> dict[str, Any]:
    """Train a run, or analyse it; what it has already done is not repeated.

    Args:
        what: "train", or the name of an analysis.
        run: its directory, made if it is not there, and its configuration, as `TrainConfig.as_dict` returns it.
        data_dir: where data sets are.
        fabric: to train on.
        device: where the fabric "batched" computes.

    Returns:
        The result; {"error": why} if it failed for good; {"stopped": True} if it was asked to stop.
    """
    from rapa_dist.coordinator.run_images import Where

    path, config = Path(run[0]), TrainConfig.from_dict(run[1])
    folder = None if data_dir is None else Path(data_dir)
    try:
        _check_same(path, config)
        if what != TRAIN:
            return ANALYSES[what](path, Where(dataset=config.dataset, data_dir=folder))
        return _train(path, config, folder, fabric, device)
    except RapaError as error:
        return {"error": str(error)}
    except KeyboardInterrupt:
        return {"stopped": True}


def do_as_here(coordinator: RunningCode, *arguments: Any) -> dict[str, Any]:
    """Do the same in a process of Ray's, if that runs the coordinator's code.

    Raises:
        ClusterError: it does not.
    """
    coordinator.check(installed_code())
    return do(*arguments)


def _check_same(path: Path, config: TrainConfig) -> None:
    """Raise RunDirectoryError if a run is there which is trained in another way than it should be here."""
    from rapa_dist.coordinator.run_directory import RunDirectory
    from rapa_dist.experiments.store import differences

    directory = RunDirectory(path)
    if directory.begun and (found := differences(directory.config, config)):
        raise RunDirectoryError(
            f"The run in {path} is trained in another way than it should be here: {'; '.join(found)}. "
            "Move it away, and it is trained anew."
        )


def _train(path: Path, config: TrainConfig, data_dir: Path | None, fabric: str, device: str) -> dict[str, Any]:
    from rapa_dist.coordinator.run import resume_run, start_run
    from rapa_dist.coordinator.run_directory import RunDirectory

    where: dict[str, Any] = {"fabric": fabric, "device": device, "address": None, "data_dir": data_dir}
    if RunDirectory(path).begun:
        return _result(resume_run(path, epochs=None, dataset=config.dataset, **where))
    return _result(start_run(config, run_dir=path, **where))


def _result(outcome: "RunResult") -> dict[str, Any]:
    """Return what training came to."""
    if not outcome.finished:
        return {"stopped": True}
    from rapa_dist.coordinator.sessions import sessions_of

    metrics = outcome.directory.metrics()
    best = min(metrics, key=lambda line: line["test_error_percent"])
    environment = (sessions_of(outcome.directory.path) or [{}])[-1]
    trained = outcome.directory.config.as_dict()
    trained["dataset"] = re.sub(r"^images:.*/", "images:", trained["dataset"])  # where it lay is nobody's concern
    newest = outcome.directory.read_checkpoint(outcome.directory.find_checkpoint("newest"))
    return {
        "config": trained,
        "train_images": metrics[-1].get("train_images"),
        "test_images": metrics[-1].get("test_images"),
        "chance_percent": 100 / len(newest.classes),
        "best_test_error_percent": best["test_error_percent"],
        "best_epoch": best["epoch"],
        "best_train_error_percent": min(line["train_error_percent"] for line in metrics),
        "test_error_percent": metrics[-1]["test_error_percent"],
        "train_error_percent": metrics[-1]["train_error_percent"],
        "epochs": [line["epoch"] for line in metrics],
        "test_errors_percent": [line["test_error_percent"] for line in metrics],
        "train_errors_percent": [round(line["train_error_percent"], 3) for line in metrics],
        "similarity": metrics[-1].get("similarity"),
        "wall_s": round(sum(line["wall"]["train_s"] + line["wall"]["test_s"] for line in metrics), 1),
        "environment": {key: value for key, value in environment.items() if key not in ("argv", "options")},
    }


def _votes(number: int) -> Analysis:
    def vote(path: Path, where: "Where") -> dict[str, Any]:
        from rapa_dist.analysis.voting import voting

        return _without_place(voting(path, votes=number, where=where))

    return vote


def _reduced(path: Path, where: "Where") -> dict[str, Any]:
    from rapa_dist.analysis.reduction import reduce_run
    from rapa_dist.coordinator.run_directory import RunDirectory

    pooled_by_maximum = RunDirectory(path).config.pooling in ("max", "mixed")
    methods = ("norm", "wins") if pooled_by_maximum else ("norm",)
    return _without_place({f"by_{how}": reduce_run(path, by=how, where=where) for how in methods})


def _similarity(path: Path, where: "Where") -> dict[str, Any]:
    from rapa_dist.analysis.learnt import similarities_of
    from rapa_dist.coordinator.run_directory import RunDirectory

    directory = RunDirectory(path)
    trained = directory.read_checkpoint(directory.find_checkpoint("newest"))
    return similarities_of(trained)


def _attack(path: Path, where: "Where") -> dict[str, Any]:
    from rapa_dist.analysis.attack import attack

    return _without_place(attack(path, snr_db=SNR_DB, where=where))


def _without_place(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result without where its run and its data lay."""
    kept: dict[str, Any] = {
        name: _without_place(value) if isinstance(value, dict) else value
        for name, value in result.items()
        if name not in ("run_dir", "output")
    }
    if "dataset" in kept:
        kept["dataset"] = re.sub(r"^images:.*/", "images:", str(kept["dataset"]))
    return kept


ANALYSES: dict[str, Analysis] = {
    "votes5": _votes(5),
    "votes9": _votes(9),
    "reduced": _reduced,
    "similarity": _similarity,
    "attack": _attack,
}
"""By name; each takes a run's directory, and where its images are."""
