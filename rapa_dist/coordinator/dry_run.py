"""What `train --dry-run` does: all that can be wrong is looked at as for a run, and nothing is written or started."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rapa_dist.config import TrainConfig, check_physics
from rapa_dist.console import counted, stdout
from rapa_dist.coordinator.plan import plan, print_plan
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.run_images import Where, check_elsewhere, check_looks_same, look_at_images
from rapa_dist.data.classes import listed
from rapa_dist.data.look import Look, look
from rapa_dist.networks import PAPER

_CLASSES = 10
"""Of a data set that is still to be fetched, as most have; the machine hardly depends on it."""


def start(config: TrainConfig, *, fabric: str, data_dir: Path | None, run_dir: Path | None) -> dict[str, Any]:
    """Return the plan of a new run, with what its data are; arguments and errors are those of `start_run`."""
    RunDirectory.check_new(run_dir)
    check_physics(fabric, config.physics)
    seen = look(
        config.dataset,
        data_dir=data_dir,
        limit_train=config.limit_train,
        limit_test=config.limit_test,
        image_size=config.image_size,
    )
    return _planned(config, seen, fabric)


def resume(path: Path, config: TrainConfig, *, fabric: str, where: Where) -> dict[str, Any]:
    """Return the plan of a run that is to be resumed, with what its data are.

    Args:
        path: the run's directory.
        config: with the epochs that are wanted now.
        fabric: as for `resume_run`.
        where: where its images are.

    Raises:
        RapaError: as `resume_run` does.
    """
    from rapa_dist.coordinator import opening  # imports torch

    directory = RunDirectory(path)
    newest = opening.newest(directory)
    opening.check_progress(directory, config, newest)
    check_physics(fabric, config.physics)
    check_elsewhere(directory, config, newest, where)
    seen = look_at_images(directory, config, where)
    check_looks_same(directory, seen, newest)
    return _planned(config, seen, fabric)


def _planned(config: TrainConfig, seen: Look, fabric: str) -> dict[str, Any]:
    image = seen.image or config.image
    classes = _CLASSES if seen.classes is None else len(seen.classes)
    config = replace(config, dataset=seen.name, image=image, classes=classes)
    if config.network != PAPER:
        from rapa_dist.coordinator.learner import build  # imports torch

        config = build(config).config
    return plan(config, fabric) | {"data": asdict(seen)}


def show(described: dict[str, Any]) -> None:
    """Print what `start` or `resume` returned, on stdout."""
    data = described["data"]
    parts = [f"Data: {data['name']}, {data['state']}"]
    if data["classes"] is not None:
        parts.append(f"{len(data['classes']):,} classes ({listed(data['classes'])})")
        channels, h, w = data["image"]
        parts.append(f"images of {h} × {w} with {counted(channels, 'channel')}")
        parts.append(f"{data['train_images']:,} training and {data['test_images']:,} test images")
    parts.append(f"fingerprint {data['fingerprint'] or 'not known before they are read'}")
    stdout.print("; ".join(parts) + ".", markup=False)
    print_plan(described)
