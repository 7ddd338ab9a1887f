"""Checkpoints: one safetensors file with all weights, and a JSON sidecar that vouches for it.

Both are written beside their final place, flushed and renamed, the sidecar last: a checkpoint is there
when its sidecar is, and a process killed at any moment leaves none that can't be read. Nothing is ever
unpickled.

The safetensors file holds nothing that two equal runs don't have in common, so theirs have the same bytes. How far the
run has come stands in the sidecar alone: the length of the metrics, say, depends on times.
"""

import errno
import hashlib
import json
import os
import re
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rapa_dist.config import TrainConfig
from rapa_dist.coordinator.weights import named, weights_sha256
from rapa_dist.errors import CheckpointError, UsageError
from rapa_dist.fabric.base import Kernels
from rapa_dist.tile import Matrix

FORMAT = 2
_KEEP = 3
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A run at one moment."""

    config: TrainConfig
    data_fingerprint: str
    """`DataSet.fingerprint` of the images that were trained on."""
    classes: tuple[str, ...]
    """What the outputs of the network stand for, by label."""
    progress: Progress
    kernels: Kernels
    """One array (n_t, k + 1, c_out) per layer."""
    digital: dict[str, Matrix]
    """The digital side's parameters."""
    data_mean: list[float] = field(default_factory=list)
    """Mean of the training pixels per channel, 0…1: what the network subtracts from its input."""

    @property
    def weights(self) -> dict[str, Matrix]:
        """All weights by name."""
        return named(self.kernels, self.digital)


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
        "weights_sha256": weights_sha256(weights),
    }
    data = save(weights, metadata={"rapa_dist": json.dumps(about, sort_keys=True)})
    path = folder / f"{name}.safetensors"
    write_whole(path, data)
    about |= {"progress": asdict(checkpoint.progress), "sha256": hashlib.sha256(data).hexdigest()}
    about["sidecar_sha256"] = _seal(about)
    try:
        write_whole(path.with_suffix(".json"), (json.dumps(about, indent=2, sort_keys=True) + "\n").encode())
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
    try:
        data = path.read_bytes()
        about = json.loads(path.with_suffix(".json").read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"Checkpoint {path} is not whole: there is no {error.filename}. {_WAY_OUT}") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"The sidecar of checkpoint {path} can't be read: {error}. {_WAY_OUT}") from error
    if not isinstance(about, dict) or hashlib.sha256(data).hexdigest() != about.get("sha256"):
        raise CheckpointError(
            f"Checkpoint {path} is damaged: its {len(data):,} bytes are not those that its sidecar vouches for. "
            f"{_WAY_OUT}"
        )
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"Checkpoint {path} has format {about.get('format')}, expected {FORMAT}. Use the rapa-dist that wrote it."
        )
    if about.pop("sidecar_sha256", None) != _seal(about):
        raise CheckpointError(f"The sidecar of checkpoint {path} is damaged: it was changed or cut. {_WAY_OUT}")
    try:
        progress = Progress(**about.pop("progress"))
        del about["sha256"]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if json.loads(header["__metadata__"]["rapa_dist"]) != about:
            raise CheckpointError(f"Checkpoint {path}: sidecar and tensors tell different things. {_WAY_OUT}")
        tensors = load(data)
        config = TrainConfig.from_dict(about["config"])
        classes = tuple(about["classes"])
        if not all(isinstance(name, str) for name in classes):
            raise TypeError(f"classes are names; got {classes}")
        _check_shapes(tensors, config, len(classes), path)
        return Checkpoint(
            config=config,
            data_fingerprint=about["data_fingerprint"],
            data_mean=about["data_mean"],
            classes=classes,
            progress=progress,
            kernels=[tensors.pop(f"layers.{i}.tiles") for i in range(len(config.tiles))],
            digital=tensors,
        )
    except (SafetensorError, KeyError, TypeError, ValueError, UsageError) as error:
        raise CheckpointError(f"Checkpoint {path} can't be understood: {error!r}. {_WAY_OUT}") from error


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
    """Return the safetensors files of all complete checkpoints, oldest first (their names count steps)."""
    return sorted(p.with_suffix(".safetensors") for p in folder.glob("step-*.json"))


def name_of(step: int, epoch: int) -> str:
    """Return the name of the checkpoint after a step, with `epoch` epochs finished; names sort in time.

    No two states of a run share a name (an epoch may be trained and not yet tested), so a checkpoint is
    never overwritten by another one.
    """
    return f"step-{step:09d}-epoch-{epoch:05d}"


def prune(folder: Path, best: str | None) -> None:
    """Remove all checkpoints but the newest three and the best one, and what a killed writer left."""
    for path in checkpoints(folder)[:-_KEEP]:
        if path.stem != best:
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    vouched = {path.name for path in checkpoints(folder)}
    for path in [*folder.glob("step-*.safetensors"), *folder.glob(".*.partial")]:
        if path.name not in vouched:
            path.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old contents or the new ones, whatever happens, and whoever else does."""
    _clear_partials(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_target(option: str, path: Path | None) -> None:
    """Raise UsageError unless `write_whole` can write the file that was given with an option, if any; before any work.

    Args:
        option: its name.
        path: the file.
    """
    if path is None:
        return
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"{option} is {path}: there is no folder {folder}. Make it, or give another name.")
    if path.exists() and not path.is_file():  # a device would be replaced, too
        raise UsageError(f"{option} is a file to write, and {path} is none. Give another name.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(
            f"{option} is {path}: the folder {folder} can't be written to. "
            "Correct its permissions, or give another name."
        )


def _clear_partials(path: Path) -> None:
    """Remove what writers of a file left that were killed."""
    with suppress(OSError):
        for partial in path.parent.iterdir():
            written = re.fullmatch(r"\.(.*)\.(\d{1,9})-[0-9a-f]{8}\.partial", partial.name, re.DOTALL)
            if written is not None and written[1] == path.name and not _lives(int(written[2])):
                partial.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def append_whole(path: Path, data: bytes, *, durable: bool = False) -> int:
    """Append to a file all of `data` or nothing, and return its length then; `durable`: also if the power fails.

    Raises:
        OSError: it can't be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, data) < len(data):  # the disk took a part, and has no room for the rest
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                os.fsync(descriptor)  # over a network, a full disk may be noticed only here
        except OSError:
            os.ftruncate(descriptor, before)
            raise
        return before + len(data)
    finally:
        os.close(descriptor)


def _check_shapes(tensors: dict[str, Any], config: TrainConfig, classes: int, path: Path) -> None:
    machine = config.machine
    expected: dict[str, tuple[int, ...]] = {
        f"layers.{layer.index}.tiles": (layer.n_tiles, *layer.kernel_shape) for layer in machine.layers
    }
    expected |= machine.digital_shapes(classes, config.pooling)
    found = {name: value.shape for name, value in tensors.items()}
    if found != expected or any(value.dtype != np.float32 for value in tensors.values()):
        raise CheckpointError(
            f"Checkpoint {path} holds other tensors than its configuration: {found}, expected {expected}. {_WAY_OUT}"
        )
