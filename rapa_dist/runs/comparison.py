"""Two runs, or two checkpoints, held against each other: configuration, images, curves, and weights bit by bit."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from rapa_dist.config import TrainConfig
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator.checkpoint import Checkpoint
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.weights import weights_sha256
from rapa_dist.errors import RunDirectoryError, UsageError
from rapa_dist.tile import Matrix

_NOT_COMPARED = ("epoch", "wall")


class Side:
    """One of the two: a checkpoint, and the metrics of its run up to there, where they are."""

    def __init__(self, path: Path, which: str) -> None:
        """Read it.

        Args:
            path: a run's directory, or one of the two files of a checkpoint.
            which: of a run the checkpoint: "newest", "best" or a name.

        Raises:
            RapaError: there is none, or it is damaged.
        """
        self.path = path
        self.checkpoint: Checkpoint
        self.metrics: list[dict[str, Any]] | None = None
        """A line for every epoch up to the checkpoint; None where they can't be read."""
        self.no_metrics = ""
        """Why not."""
        if path.suffix in (".safetensors", ".json") and not path.is_dir():
            self.file = path.with_suffix(".safetensors")
            self.checkpoint = checkpoints.read(self.file)
            directory = RunDirectory(path.absolute().parent.parent)
            if not directory.begun or directory.checkpoint_folder.name != path.absolute().parent.name:
                self.no_metrics = f"{path} lies in no run"
                return
        elif path.is_dir() or not path.exists():
            directory = RunDirectory(path)
            self.file = directory.find_checkpoint(which)
            self.checkpoint = directory.read_checkpoint(self.file)
        else:
            raise UsageError(f"{path} is neither a run directory nor a checkpoint. Give one that ends in .safetensors.")
        try:
            self.metrics = directory.metrics()[: self.checkpoint.progress.epoch]
        except (RunDirectoryError, OSError, ValueError) as error:
            self.no_metrics = str(error)

    def about(self) -> dict[str, Any]:
        """Return which it is."""
        return {
            "path": str(self.path),
            "checkpoint": self.file.stem,
            "epoch": self.checkpoint.progress.epoch,
            "step": self.checkpoint.progress.step,
            "weights_sha256": weights_sha256(self.checkpoint.weights),
            "data_fingerprint": self.checkpoint.data_fingerprint,
        }


def compare(one: Path, other: Path, which: str = "newest") -> dict[str, Any]:
    """Return in what two runs or checkpoints differ, and how far their weights are apart.

    Args:
        one: a run's directory, or a checkpoint.
        other: likewise.
        which: of a run the checkpoint: "newest", "best" or a name.

    Returns:
        `weights_identical`, whether all weights have the same bits; `configuration`, of every setting that differs
        both values; `same_images`, `classes` where they differ, `curves`, and of every tensor how far it is apart.

    Raises:
        RapaError: one of them can't be read.
    """
    a, b = Side(one, which), Side(other, which)
    about = a.about(), b.about()
    settings = _settings(a.checkpoint.config, b.checkpoint.config)
    if same_images := a.checkpoint.data_fingerprint == b.checkpoint.data_fingerprint:
        settings.pop("dataset", None)  # nothing but the place where they lie
    return {
        "a": about[0],
        "b": about[1],
        "weights_identical": about[0]["weights_sha256"] == about[1]["weights_sha256"],
        "configuration": settings,
        "same_images": same_images,
        "classes": None
        if a.checkpoint.classes == b.checkpoint.classes
        else [a.checkpoint.classes, b.checkpoint.classes],
        "curves": _curves(a, b),
        "tensors": _tensors(a.checkpoint.weights, b.checkpoint.weights),
    }


def _settings(a: TrainConfig, b: TrainConfig) -> dict[str, list[Any]]:
    pairs = {field.name: [getattr(a, field.name), getattr(b, field.name)] for field in fields(TrainConfig)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _curves(a: Side, b: Side) -> dict[str, Any]:
    """Return from which epoch on the metrics differ, as far as both have them.

    Returns:
        `epochs` of both; `identical_epochs`, how many of the first have no difference; `differ_from_epoch`, of every
        metric that differs the first epoch; and of the test errors the last ones and the largest difference.
    """
    if a.metrics is None or b.metrics is None:
        return {"not_compared_because": a.no_metrics or b.no_metrics}
    first: dict[str, int] = {}
    for x, y in zip(a.metrics, b.metrics, strict=False):
        for name in sorted((x.keys() & y.keys()).difference(_NOT_COMPARED)):
            if x[name] != y[name]:
                first.setdefault(name, x["epoch"])
    both = min(len(a.metrics), len(b.metrics))
    gaps = [abs(x["test_error_percent"] - y["test_error_percent"]) for x, y in zip(a.metrics, b.metrics, strict=False)]
    return {
        "epochs": [len(a.metrics), len(b.metrics)],
        "identical_epochs": min(first.values(), default=both + 1) - 1,
        "differ_from_epoch": first,
        "test_error_percent": [side.metrics[-1]["test_error_percent"] if side.metrics else None for side in (a, b)],
        "largest_test_error_difference_percent": max(gaps, default=None),
        "largest_difference_epoch": gaps.index(max(gaps)) + 1 if gaps else None,
    }


def _tensors(a: dict[str, Matrix], b: dict[str, Matrix]) -> list[dict[str, Any]]:
    return [_tensor(name, a.get(name), b.get(name)) for name in (*a, *(name for name in b if name not in a))]


def _tensor(name: str, a: Matrix | None, b: Matrix | None) -> dict[str, Any]:
    """Return how far apart a tensor is in both: ‖b − a‖ / ‖a‖ is null where ‖a‖ is 0, or the shapes differ."""
    about: dict[str, Any] = {"name": name, "shapes": [None if x is None else list(x.shape) for x in (a, b)]}
    about |= {"identical": False, "differing": None, "largest_difference": None, "relative_norm": None}
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return about
    x, y = (np.ascontiguousarray(side) for side in (a, b))
    difference = np.subtract(y, x, dtype=np.float64)
    norm = float(np.linalg.norm(x.astype(np.float64)))
    differing = _differing(x, y)
    return about | {
        "identical": differing == 0,
        "differing": differing,
        "largest_difference": float(np.abs(difference).max()),
        "relative_norm": float(np.linalg.norm(difference)) / norm if norm else (None if difference.any() else 0.0),
    }


def _differing(x: Matrix, y: Matrix) -> int:
    """Return how many numbers of two contiguous arrays of one type do not have the same bits."""
    bits = [np.frombuffer(side.tobytes(), np.uint8).reshape(-1, side.itemsize) for side in (x, y)]
    return int(np.any(bits[0] != bits[1], axis=1).sum())
