"""Several runs trained at once: each as by itself, however they are stopped, and whatever becomes of the others."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from rapa_dist.config import resolve
from rapa_dist.coordinator import together
from rapa_dist.coordinator.run import start_run
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.together import train_together
from rapa_dist.errors import CheckpointError, DivergedError, UsageError

CONFIG = resolve(
    tiles=(4, 2, 1),
    channels=(4, 4, 4),
    pooling="mixed",
    dataset="builtin",
    limit_train=48,
    limit_test=20,
    epochs=3,
    batch_size=10,
    lr_decay_every=10,
    warmup_epochs=0,
    weight_decay=1e-4,
    augment=True,
    seed=0,
)
STEPS = 5  # an epoch; its last mini-batch is smaller


def runs(folder, *configs):
    return [(folder / str(number), config) for number, config in enumerate(configs)]


def seeds(number, config=CONFIG):
    return [replace(config, seed=seed) for seed in range(number)]


def train(wanted):
    return train_together(wanted, device="cpu", data_dir=None)


def end_of(path):
    """Return metrics, but for what no two runs have in common, and all weights of a run."""
    directory = RunDirectory(path)
    lines = [{name: value for name, value in line.items() if name != "wall"} for line in directory.metrics()]
    newest = directory.read_checkpoint(directory.find_checkpoint("newest"))
    return lines, [*newest.kernels, *(newest.digital[name] for name in sorted(newest.digital))]


def rows_of(path):
    """Return what every tile has computed, by tiles.json."""
    tiles = json.loads((path / "tiles.json").read_text())["tiles"]
    return {tile["tile"]: (tile["rows_forward"], tile["rows_backward"], tile["rows_update"]) for tile in tiles}


def assert_same(path, other):
    (lines, weights), (expected_lines, expected) = end_of(path), end_of(other)
    assert lines == expected_lines
    for weight, value in zip(weights, expected, strict=True):
        assert np.array_equal(weight, value)


def assert_close(path, other):
    (lines, weights), (expected_lines, expected) = end_of(path), end_of(other)
    for line, expected_line in zip(lines, expected_lines, strict=True):
        assert line["train_loss"] == pytest.approx(expected_line["train_loss"], rel=1e-4)
    for weight, value in zip(weights, expected, strict=True):
        np.testing.assert_allclose(weight, value, rtol=1e-3, atol=1e-4)


@pytest.fixture
def stopping(monkeypatch):
    """Return what has the next training stop after as many questions whether it should."""

    def after(questions):
        left = iter(range(questions))

        @contextmanager
        def asked():
            yield lambda: next(left, None) is None

        monkeypatch.setattr(together, "asked_to_stop", asked)

    yield after
    monkeypatch.undo()


@pytest.mark.parametrize("tiles", [(4, 2, 1), (1, 1, 1)])
def test_every_run_is_the_one_by_itself(tmp_path, tiles):
    wanted = runs(tmp_path, *seeds(2, replace(CONFIG, tiles=tiles)), replace(CONFIG, tiles=tiles, seed=7, lr=0.02))
    for (path, config), result in zip(wanted, train(wanted), strict=True):
        own = tmp_path / f"{path.name} alone"
        start_run(config, fabric="batched", address=None, data_dir=None, run_dir=own)
        assert_close(path, own)
        assert result.finished
        assert result.checkpoint == f"step-{3 * STEPS:09d}-epoch-00003"
        assert all(line["wall"]["networks"] == 3 for line in RunDirectory(path).metrics())
        assert rows_of(path) == rows_of(own)


@pytest.mark.parametrize("questions", [1, 4, 8, 10, 12, 16])
def test_runs_that_were_stopped_go_on_with_the_same_bits(tmp_path, stopping, questions):
    """Stopped within an epoch, between two tests, or before anything was done."""
    straight, stopped = runs(tmp_path / "straight", *seeds(2)), runs(tmp_path / "stopped", *seeds(2))
    train(straight)
    with pytest.MonkeyPatch.context():
        stopping(questions)
        assert not any(result.finished for result in train(stopped))
        stopping(10**6)
    assert all(result.finished for result in train(stopped))
    for (path, _), (other, _) in zip(stopped, straight, strict=True):
        assert_same(path, other)


def test_runs_that_are_not_level_are_brought_level(tmp_path, stopping):
    """As they are left by what was killed between two of their checkpoints."""
    straight, uneven = runs(tmp_path / "straight", *seeds(2)), runs(tmp_path / "uneven", *seeds(2))
    train(straight)
    stopping(15)  # an epoch, its tests, and the first steps of the next one
    train(uneven)
    (first, _), (second, _) = uneven
    assert RunDirectory(first).read_checkpoint(RunDirectory(first).find_checkpoint("newest")).progress.step_in_epoch > 0
    folder = second / "checkpoints"
    newest = RunDirectory(second).find_checkpoint("newest")
    for file in folder.glob(f"{newest.stem}*"):
        file.unlink()
    stopping(10**6)
    assert all(result.finished for result in train(uneven))
    for (path, _), (other, _) in zip(uneven, straight, strict=True):
        assert_close(path, other)
    networks = [line["wall"].get("networks", 1) for line in RunDirectory(first).metrics()]
    assert networks == [2, 1, 2]


def test_a_run_that_is_at_its_end_is_left_alone(tmp_path):
    wanted = runs(tmp_path, *seeds(2))
    train(wanted)
    (first, _), (second, _) = wanted
    shutil.rmtree(second)
    before = end_of(first)
    assert all(result.finished for result in train(wanted))
    assert end_of(first)[0] == before[0]
    assert len(end_of(second)[0]) == CONFIG.epochs


def test_one_that_diverges_ends_alone(tmp_path):
    wanted = runs(tmp_path, replace(CONFIG, lr=1e38, weight_decay=0.0), replace(CONFIG, seed=1))
    diverged, finished = train(wanted)
    assert isinstance(diverged, DivergedError)
    assert "λ = 1e+38" in str(diverged)
    assert finished.finished
    own = tmp_path / "alone"
    start_run(wanted[1][1], fabric="batched", address=None, data_dir=None, run_dir=own)
    assert_close(wanted[1][0], own)
    assert "DivergedError" in (wanted[0][0] / "log").read_text()


def test_nothing_is_trained_if_one_can_not_be_opened(tmp_path):
    wanted = runs(tmp_path, *seeds(2))
    train(wanted)
    (first, _), (second, _) = wanted
    shutil.rmtree(first)
    shutil.rmtree(second / "checkpoints")
    with pytest.raises(CheckpointError, match="its checkpoints are gone"):
        train(wanted)
    assert RunDirectory(first).metrics() == []
    RunDirectory(first).take()  # nobody holds it any more


def test_runs_of_different_machines_are_refused_before_anything_is_made(tmp_path):
    other = replace(CONFIG, tiles=(2, 1, 1), seed=1)
    with pytest.raises(UsageError, match=r"can't be trained together.*tiles: \(4, 2, 1\) → \(2, 1, 1\)"):
        train(runs(tmp_path, CONFIG, other))
    assert list(tmp_path.iterdir()) == []
