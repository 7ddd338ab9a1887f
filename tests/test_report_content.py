"""What the report reads and draws: runs under way, old, damaged; filters and curves against explicit arithmetic."""

import base64
import fcntl
import io
import json
import re
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from factories import initial_digital
from PIL import Image

from rapa_dist.cells import Cells
from rapa_dist.cli import main
from rapa_dist.config import resolve
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator.checkpoint import Checkpoint, Progress
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.initial import initial_kernels
from rapa_dist.inspection import RunStats, read_tile
from rapa_dist.layout import machine_of
from rapa_dist.report.content import gather
from rapa_dist.report.filters import filter_norms, filter_row, tile_similarity
from rapa_dist.report.page import render
from rapa_dist.similarity import similarity

CONFIG = resolve(
    tiles=(4, 2, 1),
    channels=(3, 2, 2),
    pooling="max",
    dataset="builtin",
    limit_train=None,
    limit_test=20,
    epochs=5,
    batch_size=10,
    lr_decay_every=25,
    warmup_epochs=1,
    weight_decay=1e-4,
    augment=True,
    seed=0,
)


def line(epoch: int) -> dict:
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "learning_rate": 0.05,
        "train_loss": 2.0 / epoch,
        "train_error_percent": 90.0 / epoch,
        "test_loss": 2.1 / epoch,
        "test_error_percent": 80.0 / epoch,
        "device_time_s": 0.25,
        "similarity": [0.01 * epoch, None, None],
        "wall": {"finished": "2026-11-24T12:00:00+00:00", "train_s": 1.0, "test_s": 0.5, "steps": 10, "step_ms": 100.0},
    }


@pytest.fixture
def run(tmp_path):
    """A run of five epochs of which three are done, without statistics of its tiles."""
    directory = RunDirectory.create(tmp_path / "run", CONFIG, None)
    for epoch in (1, 2, 3):
        directory.append_metrics(line(epoch))
    state = Checkpoint(
        config=CONFIG,
        arrays=tuple(array.name for array in machine_of(CONFIG).arrays),
        data_fingerprint="0123abcd",
        data_mean=[0.1, 0.2, 0.3],
        classes=tuple("0123456789"),
        progress=Progress(epoch=3, step=30, best_epoch=3),
        kernels=initial_kernels(machine_of(CONFIG), 0),
        digital=initial_digital(machine_of(CONFIG), 10, 0),
    )
    checkpoints.write(directory.checkpoint_folder, checkpoints.name_of(30, 3), state)
    directory.release()
    return directory.path


def edit_metrics(run, change):
    path = run / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(each)) + "\n" for each in lines))


def command(*arguments):
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


# --- what is read


def test_a_run_under_way_is_told_from_one_that_stopped(run):
    assert gather(run).status == "stopped after 3 of 5 epochs"
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = gather(run)
        assert content.status == "in progress: 3 of 5 epochs"
        assert "rapa-dist stats" in " ".join(content.missing)
    assert not gather(run).under_way


def test_a_line_that_is_just_being_written_is_left_for_later(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "st')
    assert [each["epoch"] for each in gather(run).metrics] == [1, 2, 3]


def test_a_run_of_before_similarity_was_recorded(run):
    edit_metrics(run, lambda each: {key: value for key, value in each.items() if key != "similarity"})
    content = gather(run)
    assert content.similarity(0) == ([], [])
    text = render(content)
    assert "trained by an older version" in text
    assert "Similarity over time</h2>" not in text


def test_similarity_of_resumed_runs_begins_where_it_was_recorded(run):
    edit_metrics(run, lambda each: each if each["epoch"] > 1 else each | {"similarity": None})
    assert gather(run).similarity(0) == ([2, 3], [0.02, 0.03])
    assert gather(run).similarity(1) == ([], [])


@pytest.mark.parametrize("text", ['{"epoch": 1}\n', "no JSON\n", "[]\n", "3\n"])
def test_damaged_metrics_are_refused(run, text):
    (run / "metrics.jsonl").write_text(text)
    result = command(run)
    assert result.exit_code == 1, result.output
    assert f"{run / 'metrics.jsonl'} can't be read" in result.stderr
    assert not (run / "report.html").exists()


def test_a_damaged_checkpoint_is_a_note_unless_it_was_asked_for(run):
    (path,) = (run / "checkpoints").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    content = gather(run)
    assert content.checkpoint is None
    assert "Filters can't be shown. Checkpoint" in " ".join(content.missing)
    result = command(run, "--checkpoint", path.stem)
    assert result.exit_code == 1
    assert "is damaged" in result.stderr


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run": "r", "silent": [], "tiles": [{"tile": "L0/T000"}]}'])
def test_damaged_statistics_are_a_note(run, text):
    (run / "tiles.json").write_text(text)
    assert "Statistics of the tiles can't be shown" in " ".join(gather(run).missing)


def write_tiles(run, *last_steps):
    """Write a tiles.json as of tiles that took their last steps in a training that ended."""
    tiles = []
    for tile, step in enumerate(last_steps):
        cells = Cells.volatile((76, 3))
        cells.program(np.ones((76, 3), np.float32), step)
        tiles.append(read_tile(cells, machine_of(CONFIG).arrays[0], tile))
    (run / "tiles.json").write_text(json.dumps(RunStats.of("run", tiles).as_dict()))


def test_statistics_of_the_training_that_ended_last_are_shown(run):
    write_tiles(run, 30, 30)
    content = gather(run)
    assert content.missing == []
    assert len(content.tiles.tiles) == 2
    assert "since the run was last started or resumed" in render(content)


def test_statistics_of_the_training_before_are_not_those_of_the_one_under_way(run):
    write_tiles(run, 30, 30)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = gather(run)
    assert content.tiles is None
    assert "ask this one, which is under way, with rapa-dist stats" in " ".join(content.missing)
    assert "Since the run was last started or resumed" not in render(content)


def test_statistics_of_the_training_before_are_not_those_of_one_that_was_cut_off(run):
    write_tiles(run, 20, 20)
    content = gather(run)
    assert content.tiles is None
    assert "of one before it, which came to step 20 of 30" in " ".join(content.missing)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "blocks": []}', '{"format": 1, "blocks": [{}]}'])
def test_damaged_scaling_is_a_note_unless_it_was_asked_for(run, text):
    path = run / "scaling.json"
    path.write_text(text)
    assert "Scaling can't be shown" in " ".join(gather(run).missing)
    result = command(run, "--scaling", path)
    assert result.exit_code == 2
    assert f"--scaling: {path} is no scaling.json" in result.stderr


def test_without_matplotlib_there_are_tables_and_filters(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = command(run)
    assert result.exit_code == 0, result.output
    assert "matplotlib is missing" in result.stderr
    text = (run / "report.html").read_text()
    assert "pip install &#x27;matplotlib" in text
    assert "<svg" not in text
    assert text.count("<img") == CONFIG.tiles[0]
    assert "26.67" in text


# --- what is drawn


def test_every_point_of_a_curve_says_its_value(run):
    titles = re.findall(r"<use [^>]*><title>([^<]*)</title></use>", render(gather(run)))
    for epoch in (1, 2, 3):
        for said in (f"train error, epoch {epoch}: {90 / epoch:.4g} %", f"test loss, epoch {epoch}: {2.1 / epoch:.4g}"):
            assert titles.count(said) == 1
        assert titles.count(f"conv0, 4 tiles, epoch {epoch}: {0.01 * epoch:.4g}") == 1


def test_figures_take_their_colours_from_the_page(run):
    text = render(gather(run))
    figures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--series-1)" in figures
    assert "var(--ink)" in figures
    for colour in ("#123456", "#123457", "#0072b2"):
        assert colour not in figures
    names = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert names <= set(re.findall(r"(--[\w-]+):", text))


def test_a_row_of_filters_has_their_weights():
    kernel = np.random.default_rng(0).normal(size=(76, 4)).astype(np.float32)
    kernel[:75, 2] = 0
    head, _, data = filter_row(kernel[:-1], (5, 5)).partition(",")
    assert head == "data:image/png;base64"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert pixels.shape == (5, 4 * 6 - 1, 4)
    for channel in range(4):
        largest = max(abs(kernel[:75, channel]).max(), 1e-30)
        for y in range(5):
            for x in range(5):
                for colour in range(3):
                    weight = kernel[(y * 5 + x) * 3 + colour, channel] / largest
                    assert abs(pixels[y, 6 * channel + x, colour] - (127.5 + 127.5 * weight)) <= 0.51
    assert (pixels[:, 5::6, 3] == 0).all()
    assert (pixels[:, 0::6, 3] == 255).all()


def test_similarity_of_two_tiles_is_the_mean_correlation_of_their_filters():
    kernels = np.random.default_rng(1).normal(size=(3, 11, 4)).astype(np.float32)
    found = tile_similarity(kernels[:, :-1])
    for i in range(3):
        for j in range(3):
            each = [np.corrcoef(kernels[i, :-1, c], kernels[j, :-1, c])[0, 1] for c in range(4)]
            assert found[i, j] == pytest.approx(np.mean(each), abs=1e-6)
    assert found[~np.eye(3, dtype=bool)].mean() == pytest.approx(similarity(kernels[:, :-1]))
    assert filter_norms(kernels[:, :-1])[2, 1] == pytest.approx(np.sqrt((kernels[2, :-1, 1] ** 2).sum()), rel=1e-6)
