"""Checkpoints: one safetensors file with all weights, and a JSON sidecar that vouches for it.

Both are written beside their final place, flushed and renamed, the sidecar last: a checkpoint is there
when its sidecar is, and a process killed at any moment leaves none that can't be read. Nothing is ever
unpickled.

The safetensors file holds nothing that two equal runs don't have in common, so theirs have the same bytes. How far the
run has come stands in the sidecar alone: the length of the metrics, say, depends on times.
"""

import hashlib
import json
import math
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rapa_dist import files
from rapa_dist.config import TrainConfig
from rapa_dist.coordinator.weights import kernels_of, named, stored_of, weights_sha256
from rapa_dist.errors import CheckpointError, UsageError, VoidError
from rapa_dist.fabric.base import Kernels
from rapa_dist.fields import NUMBER, OBJECT, POSITIVE, TEXT, Kind, check, listing, shown, whole
from rapa_dist.files import cause, parse_json, read_file
from rapa_dist.networks import PAPER
from rapa_dist.tile import Matrix

FORMAT = 4
_KEEP = 3
_MOST_SIDECAR = 1 << 20  # bytes; the tensors' own header is as long
_NAME = re.compile(r"step-(\d{9,18})-epoch-(\d{5,18})\.json")
_FIELDS = {
    "config": OBJECT,
    "data_fingerprint": TEXT,
    "data_mean": listing(NUMBER),
    "classes": listing(TEXT),
    "arrays": listing(TEXT),
    "tensors": OBJECT,
    "weights_sha256": TEXT,
    "progress": OBJECT,
    "sha256": TEXT,
}
_TYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
_Shapes = dict[str, tuple[Any, ...]]
"""By name of a tensor its type and its lengths."""
_WAY_OUT = "Delete it with its other file to go on from the checkpoint before."


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a run has come: what has to be known, besides weights and configuration, to go on."""

    epoch: int = 0
    """Epochs that are finished, their test included."""
    step: int = 0
    """Mini-batches trained since the start of the run."""
    step_in_epoch: int = 0
    """Mini-batches trained in the epoch under way."""
    loss_sum: float = 0.0
    """Sum of the losses of the images of the epoch under way."""
    wrong: int = 0
    """Images of the epoch under way that were classified wrongly."""
    seen: int = 0
    """Images trained in the epoch under way."""
    train_s: float = 0.0
    """Wall time of training in the epoch under way, in seconds, in all the sessions that it has had."""
    test_s: float = 0.0
    """The same of its tests that were broken off."""
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    """What the sessions of the epoch under way that have ended got over."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl at this point."""
    best_epoch: int = 0
    """Epoch with the lowest test error so far, from 1; 0: none."""
    best_test_error_percent: float = 100.0
    """Its test error."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """Return the progress that `asdict` made values of.

        Raises:
            ValueError: a field is unknown or missing, or holds what it can't.
        """
        kinds: dict[Any, Kind] = {int: whole(), float: POSITIVE}
        found = cls(
            **check(values, {each.name: kinds.get(each.type, listing(OBJECT)) for each in fields(cls)}, exact=True)
        )
        if found.wrong > found.seen or found.step_in_epoch > found.step or found.best_epoch > found.epoch:
            raise ValueError(f"no run can be as far as {found}")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A run at one moment."""

    config: TrainConfig
    data_fingerprint: str
    """`DataSet.fingerprint` of the images that were trained on."""
    classes: tuple[str, ...]
    """What the outputs of the network stand for, by label."""
    progress: Progress
    arrays: tuple[str, ...]
    """Names of the layers on tiles, in the order in which an image first meets them."""
    kernels: Kernels
    """One array (n_t, k + 1, c_out) for each of them."""
    digital: dict[str, Matrix]
    """The digital side's parameters and buffers."""
    stored: dict[int, Matrix] = field(default_factory=dict)
    """By number of a layer what its devices store, (n_t, k + 1, c_out), where writing is noisy; else it is empty."""
    data_mean: list[float] = field(default_factory=list)
    """Mean of the training pixels per channel, 0…1: what the network subtracts from its input."""

    @property
    def weights(self) -> dict[str, Matrix]:
        """All weights by name."""
        return named(self.arrays, self.kernels, self.digital, self.stored)


def write(folder: Path, name: str, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint as `<name>.safetensors` and `<name>.json` and return the former's path.

    Raises:
        OSError: it can't be written; the checkpoints that were there are untouched.
    """
    weights = checkpoint.weights
    about: dict[str, Any] = {
        "format": FORMAT,
        "config": checkpoint.config.as_dict(),
        "data_fingerprint": checkpoint.data_fingerprint,
        "data_mean": checkpoint.data_mean,
        "classes": list(checkpoint.classes),
        "arrays": list(checkpoint.arrays),
        "tensors": {name: [value.dtype.name, *value.shape] for name, value in weights.items()},
        "weights_sha256": weights_sha256(weights),
    }
    data = save(weights, metadata={"rapa_dist": json.dumps(about, sort_keys=True)})
    path = folder / f"{name}.safetensors"
    files.write_whole(path, data)
    about |= {"progress": asdict(checkpoint.progress), "sha256": hashlib.sha256(data).hexdigest()}
    about["sidecar_sha256"] = _seal(about)
    try:
        files.write_whole(path.with_suffix(".json"), (json.dumps(about, indent=2, sort_keys=True) + "\n").encode())
    except OSError:
        path.unlink(missing_ok=True)  # nobody vouches for it, and it takes room
        raise
    return path


def _seal(about: dict[str, Any]) -> str:
    """Return the checksum of a sidecar's own contents."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def read(path: Path) -> Checkpoint:
    """Read the checkpoint whose safetensors file is `path`.

    Raises:
        CheckpointError: it is missing, truncated, tampered with, or of another version.
    """
    about = _read_sidecar(path)
    try:
        check(about, _FIELDS)
        _check_not_void(about["config"], path)
        config, progress = TrainConfig.from_dict(about["config"]), Progress.from_dict(about.pop("progress"))
        if config.classes not in (None, len(about["classes"])):
            raise ValueError(f"it has {len(about['classes'])} classes, its configuration {config.classes}")
        shapes = _shapes(config, about["arrays"], about["tensors"])
        data = _read_tensors(path, shapes, about.pop("sha256"))
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if parse_json(header["__metadata__"]["rapa_dist"].encode()) != about:
            raise CheckpointError(f"Checkpoint {path}: sidecar and tensors tell different things. {_WAY_OUT}")
        tensors = load(data)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError, UsageError) as error:
        raise CheckpointError(f"Checkpoint {path} can't be understood: {cause(error)}. {_WAY_OUT}") from error
    _check_tensors(tensors, shapes, path)
    return Checkpoint(
        config=config,
        data_fingerprint=about["data_fingerprint"],
        data_mean=about["data_mean"],
        classes=tuple(about["classes"]),
        progress=progress,
        arrays=tuple(about["arrays"]),
        kernels=[tensors.pop(kernels_of(name)) for name in about["arrays"]],
        stored={
            index: tensors.pop(stored_of(name))
            for index, name in enumerate(about["arrays"])
            if stored_of(name) in tensors
        },
        digital=tensors,
    )


def _read_sidecar(path: Path) -> dict[str, Any]:
    try:
        about = parse_json(read_file(path.with_suffix(".json"), _MOST_SIDECAR))
        if not isinstance(about, dict):
            raise ValueError(f"an object is expected, not {shown(about)}")
        sealed = about.pop("sidecar_sha256", None) == _seal(about)
    except FileNotFoundError as error:
        raise CheckpointError(f"Checkpoint {path} is not whole: there is no {error.filename}. {_WAY_OUT}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"The sidecar of checkpoint {path} can't be read: {cause(error)}. {_WAY_OUT}") from error
    if about.get("format") != FORMAT:
        _check_not_void(about.get("config"), path)
        raise CheckpointError(
            f"Checkpoint {path} has format {shown(about.get('format'))}, expected {FORMAT}. "
            "Use the rapa-dist that wrote it."
        )
    if not sealed:
        raise CheckpointError(f"The sidecar of checkpoint {path} is damaged: it was changed or cut. {_WAY_OUT}")
    return about


def _read_tensors(path: Path, shapes: _Shapes, sha256: str) -> bytes:
    """Return the contents of a safetensors file that the sidecar vouches for."""
    try:
        data = read_file(
            path,
            _bytes(shapes) + 2 * _MOST_SIDECAR,
        )
    except FileNotFoundError as error:
        raise CheckpointError(f"Checkpoint {path} is not whole: there is no {error.filename}. {_WAY_OUT}") from None
    except OSError as error:
        raise CheckpointError(f"Checkpoint {path} can't be read: {cause(error)}. {_WAY_OUT}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(
            f"Checkpoint {path} is damaged: its {len(data):,} bytes are not those that its sidecar vouches for. "
            f"{_WAY_OUT}"
        )
    return data


def _check_not_void(config: Any, path: Path) -> None:
    """Raise CheckpointError if a configuration stood for another network; whatever else is wrong with it passes."""
    try:
        TrainConfig.from_dict(config)
    except VoidError as error:
        raise CheckpointError(f"Checkpoint {path} is {error}. Train the network anew.") from None
    except (UsageError, TypeError, ValueError, AttributeError):
        return


def latest(folder: Path) -> Path:
    """Return the newest checkpoint in a folder.

    Raises:
        CheckpointError: there is none.
    """
    if not (found := checkpoints(folder)):
        raise CheckpointError(
            f"There is no checkpoint in {folder}: it belongs to no run, or to one that was stopped before its first. "
            "Give another run directory, or start a new run."
        )
    return found[-1]


def checkpoints(folder: Path) -> list[Path]:
    """Return the safetensors files of all complete checkpoints, oldest first (their names count steps).

    Raises:
        CheckpointError: the folder can't be read.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(
            f"The folder {folder} can't be read: {error.strerror}. Correct its permissions."
        ) from error
    found = [match for match in map(_NAME.fullmatch, names) if match]
    found.sort(key=lambda match: (int(match[1]), int(match[2])))
    return [folder / f"{match[0].removesuffix('.json')}.safetensors" for match in found]


def entries(folder: Path) -> list[Path]:
    """Return whatever is called like a file of a checkpoint in a folder; nothing where that can't be read."""
    with suppress(OSError):
        return [folder / name for name in os.listdir(folder) if name.startswith("step-")]
    return []


def name_of(step: int, epoch: int) -> str:
    """Return the name of the checkpoint after a step, with `epoch` epochs finished; names sort in time.

    No two states of a run share a name (an epoch may be trained and not yet tested), so a checkpoint is
    never overwritten by another one.
    """
    return f"step-{step:09d}-epoch-{epoch:05d}"


def prune(folder: Path, best: str | None) -> None:
    """Remove all checkpoints but the newest three and the best one, and what a killed writer left.

    What can't be removed stays, and no link to another folder is followed: the files there are another run's.
    """
    if folder.is_symlink():
        return
    with suppress(OSError, CheckpointError):
        _prune(folder, best)


def _prune(folder: Path, best: str | None) -> None:
    for path in checkpoints(folder)[:-_KEEP]:
        if path.stem != best:
            _remove(path.with_suffix(".json"))
            _remove(path)
    vouched = {path.name for path in checkpoints(folder)}
    for name in set(os.listdir(folder)) - vouched:
        if re.fullmatch(r"step-.*\.safetensors|\..*\.partial", name, re.DOTALL):
            _remove(folder / name)


def _remove(path: Path) -> None:
    with suppress(OSError):  # a folder that somebody put there, say
        path.unlink(missing_ok=True)


def _shapes(config: TrainConfig, arrays: list[str], tensors: dict[str, Any]) -> _Shapes:
    """Return type and shape of the tensors that a checkpoint has, by name, as its sidecar lists them.

    Raises:
        ValueError: it lists something else, or kernels that are not those of the configuration.
    """
    kind = listing(whole())
    found: _Shapes = {}
    for name, listed in tensors.items():
        if not isinstance(listed, list) or not listed or listed[0] not in _TYPES:
            raise ValueError(f"tensors.{name} is {shown(listed)}, expected a type and lengths")
        found[name] = (listed[0], *check({name: listed[1:]}, {name: kind})[name])
    if unlisted := {kernels_of(name) for name in arrays} - found.keys():
        raise ValueError(f"{', '.join(sorted(unlisted))} is not among its tensors")
    if config.network == PAPER:
        expected = {kernels_of(a.name): ("float32", a.n_tiles, *a.kernel_shape) for a in config.paper_machine.arrays}
        kernels = {kernels_of(name): found[kernels_of(name)] for name in arrays}
        if kernels != expected:
            raise ValueError(f"its kernels are {kernels}, expected {expected}")
    return found


def _bytes(shapes: _Shapes) -> int:
    return sum(np.dtype(kind).itemsize * math.prod(lengths) for kind, *lengths in shapes.values())


def _check_tensors(tensors: dict[str, Any], expected: _Shapes, path: Path) -> None:
    found = {name: (value.dtype.name, *value.shape) for name, value in tensors.items()}
    if found != expected:
        raise CheckpointError(
            f"Checkpoint {path} holds other tensors than its sidecar: {found}, expected {expected}. {_WAY_OUT}"
        )
    if not all(np.isfinite(value).all() for value in tensors.values()):
        raise CheckpointError(f"Checkpoint {path} holds weights that are no finite numbers. {_WAY_OUT}")
