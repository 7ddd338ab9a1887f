"""Training from Python, for those who don't want to write a loop: what `rapa-dist train` calls, too."""

import copy
import sys
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rapa_dist.config import TrainConfig, check_fabric, resolve
from rapa_dist.coordinator.checkpoint import read
from rapa_dist.coordinator.learner import load_digital
from rapa_dist.coordinator.run import TOLERANCE, RunResult, Tolerance, resume_run, start_run
from rapa_dist.data.arrays import NAME, dataset_of
from rapa_dist.errors import UsageError
from rapa_dist.networks import FROM_PYTHON, provided
from rapa_dist.nn.convert import convert
from rapa_dist.nn.layers import TiledLayer


def train(
    config: TrainConfig | Mapping[str, Any],
    *,
    model: nn.Module | None = None,
    data: tuple[Any, Any] | None = None,
    fabric: str = "ray",
    run_dir: str | Path | None = None,
    resume: str | Path | None = None,
    device: str = "cpu",
    address: str | None = None,
    nodes: int | None = None,
    tolerance: Tolerance = TOLERANCE,
) -> RunResult:
    """Train a network as `rapa-dist train` does: with a run directory, checkpoints, metrics, and survival of kills.

    Args:
        config: how, as `configure` returns it, or what it takes: {"tiles": 16, "epochs": 20, "lr": 0.05}.
        model: what to train: its convolutions are put on tiles, and it has the weights of the newest checkpoint
            afterwards (`revert` makes an ordinary model of it again). None: the network that the configuration names.
        data: (train, test), each a `torch.utils.data.Dataset` of (image, label), or a pair of arrays (images, labels);
            see `rapa_dist.data.arrays.dataset_of`. None: the data set that the configuration names.
        fabric: "ray", "serial" or "batched".
        run_dir: the run's directory; None: one below `runs/`.
        resume: a run's directory, to go on from its newest checkpoint; model and data are given again.
        device: where "batched" computes, "cpu" or "cuda".
        address: host:port of a Ray cluster; None: one that runs here already, else one is started.
        nodes: nodes of the cluster to use at most; None: all that offer tiles.
        tolerance: how much trouble it takes before it stops.

    Returns:
        What the run came to; `as_dict()` has its errors.

    Raises:
        RapaError: with the cause, and what to do.

    Example:
        >>> import numpy as np, torch, rapa_dist as rapa
        >>> images, labels = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 2
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2))
        >>> data = (images, labels), (images, labels)
        >>> how = {"tiles": 4, "epochs": 1, "augment": False}
        >>> result = rapa.train(how, model=model, data=data, fabric="serial", run_dir=folder / "run")
        >>> result.finished, len(rapa.revert(model)[0].weight)
        (True, 4)
    """
    check_fabric(fabric)
    with ExitStack() as clean_up:
        clean_up.enter_context(redirect_stdout(sys.stderr))  # Ray prints its warnings to stdout
        clean_up.enter_context(torch.random.fork_rng(devices=[]))
        if model is not None:
            if any(isinstance(module, TiledLayer) for module in model.modules()):
                raise UsageError("The model is on tiles already. Give the ordinary model, as revert(model) makes it.")
            ordinary = copy.deepcopy(model).cpu()
            clean_up.enter_context(provided(lambda classes, image: copy.deepcopy(ordinary)))
        how = _resolved(config, model)
        images = None
        if data is not None:
            how = replace(how, dataset=NAME)
            images = dataset_of(*data, limit_train=how.limit_train, limit_test=how.limit_test)
        if resume is not None:
            if run_dir is not None:
                raise UsageError("run_dir and resume exclude each other: a resumed run stays in its directory.")
            result = resume_run(
                Path(resume),
                epochs=how.epochs,
                fabric=fabric,
                device=device,
                address=address,
                nodes=nodes,
                data_dir=None,
                tolerance=tolerance,
                data=images,
            )
        else:
            result = start_run(
                how,
                fabric=fabric,
                device=device,
                address=address,
                nodes=nodes,
                data_dir=None,
                run_dir=None if run_dir is None else Path(run_dir),
                tolerance=tolerance,
                data=images,
            )
        if model is not None:
            _take_over(model, result)
    return result


def _resolved(config: TrainConfig | Mapping[str, Any], model: nn.Module | None) -> TrainConfig:
    if isinstance(config, TrainConfig):
        if model is None:
            return config
        return replace(config, network=FROM_PYTHON, image=None, classes=None, channels=None, pooling=None)
    known = {field.name for field in fields(TrainConfig)}
    if unknown := config.keys() - known:
        raise UsageError(f"Unknown setting: {', '.join(sorted(unknown))}. There are: {', '.join(sorted(known))}.")
    own = {} if model is None else {"network": FROM_PYTHON, "image": None}
    return resolve(**(dict(config) | own), given=config.keys())


def _take_over(model: nn.Module, result: RunResult) -> None:
    """Put a model on tiles as its run had it, with the weights of the newest checkpoint."""
    directory = result.directory
    found = read(directory.checkpoint_folder / f"{result.checkpoint}.safetensors")
    config = found.config
    assert config.image is not None
    convert(model, config.tiles, scheme=config.scheme, images=(1, *config.image))
    load_digital(model, found.digital)
    with torch.no_grad():
        for name, kernels in zip(found.arrays, found.kernels, strict=True):
            layer = model.get_submodule(name)
            assert isinstance(layer, TiledLayer)
            layer.kernels.copy_(torch.from_numpy(kernels))
