"""Small runs on small images, for tests of what is told by their files."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from rapa_dist.cli import main
from rapa_dist.data import download, load_dataset

CLASSES = ("cat", "dog", "newt")


def make_images(folder: Path, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    """Make images that differ from other such folders in their pixels alone: names, sizes and times are the same."""
    rng = np.random.default_rng(seed)
    for part, n in (("train", 4), ("test", 2)):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                path = folder / part / name / f"{i}.bmp"
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
                os.utime(path, (10**9, 10**9))
    return folder


def train(*arguments: object) -> Result:
    """Train a small network for two epochs, or as the arguments say."""
    small = ["--channels", "2,2,2", "--tiles", "4,1,1", "--epochs", 2, "--fabric", "serial"]
    return invoke("train", *small, *arguments)


def invoke(*arguments: object) -> Result:
    """Carry out a command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def train_twins(folder: Path) -> tuple[Path, Path]:
    """Train two runs of the same configuration on the same images; the second one is ended and resumed on the way."""
    dataset = ["--dataset", f"images:{make_images(folder / 'images')}"]
    for arguments in (
        [*dataset, "--run-dir", folder / "one"],
        [*dataset, "--run-dir", folder / "other", "--epochs", 1],
        ["--resume", folder / "other"],
    ):
        result = train(*arguments)
        assert result.exit_code == 0, result.output
    return folder / "one", folder / "other"


def move(twins: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Copy a run and its images; return both. The copy does not find the images: it looks where there are none."""
    run = shutil.copytree(twins[0], tmp_path / "run")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace(str(twins[0].parent), str(tmp_path / "gone")))
    return run, shutil.copytree(twins[0].parent / "images", tmp_path / "elsewhere")


def newest(run: Path) -> Path:
    """Return the newest checkpoint of a run."""
    return max((run / "checkpoints").glob("*.safetensors"))


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of its metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def fingerprint(images: Path) -> str:
    """Return that of a folder of images."""
    return load_dataset(f"images:{images}").fingerprint


def nobody(url: str) -> None:
    """Stand for a network that is not there."""
    raise download.Unreachable("no connection")
