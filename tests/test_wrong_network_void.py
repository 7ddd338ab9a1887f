"""What an earlier version made with another network is refused with a word about why, and marked where it stands."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
from click.testing import CliRunner

from rapa_dist.cli import main
from rapa_dist.config import TrainConfig, resolve
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.trainer import initial_checkpoint
from rapa_dist.data import load_dataset
from rapa_dist.errors import CheckpointError, UsageError, VoidError
from rapa_dist.experiments import figures, tables
from rapa_dist.experiments.cells import Protocol, cells_of
from rapa_dist.experiments.claims import claims, rows_of
from rapa_dist.experiments.command import Request, Work
from rapa_dist.experiments.store import Store
from rapa_dist.experiments.verdicts import Verdict

SETTINGS = {
    "dataset": "builtin",
    "limit_train": 20,
    "limit_test": 10,
    "epochs": 1,
    "batch_size": 10,
    "lr_decay_every": 1,
    "warmup_epochs": 0,
    "weight_decay": 1e-4,
    "augment": False,
    "seed": 0,
}
PROTOCOL = Protocol(dataset="builtin", limit_train=20, limit_test=10, epochs=1, lr_decay_every=1)
WHY = "had the ReLU of conv0 before its pooling"
CHANGED = [
    {"pooling": "average", "scheme": "none"},
    {"pooling": "mixed", "tiles": (16, 4, 1)},
    {"pooling": "max", "tiles": (48, 1, 1)},
    {"pooling": "stochastic", "tiles": (3, 1, 1), "scheme": "perforated"},
]
SAME = [
    {"pooling": "max", "tiles": (16, 4, 1)},
    {"pooling": "stochastic", "tiles": (128, 32, 8), "scheme": "perforated"},
    {"pooling": "max", "tiles": (9, 4, 1), "scheme": "image-pad"},
    {"pooling": "stochastic", "tiles": (5, 3, 1), "scheme": "random-fixed"},
]


def old(values):
    """A configuration as an earlier version wrote it."""
    return {name: value for name, value in values.items() if name != "revision"}


@pytest.mark.parametrize("settings", CHANGED)
def test_a_configuration_of_an_earlier_version_that_stood_for_another_network_is_void(settings):
    config = resolve(**SETTINGS | settings)
    assert TrainConfig.from_dict(config.as_dict()) == config
    with pytest.raises(VoidError, match="void, as earlier versions"):
        TrainConfig.from_dict(old(config.as_dict()))
    with pytest.raises(VoidError, match="revision 3 of the network, this version knows 2"):
        TrainConfig.from_dict(config.as_dict() | {"revision": 3})


@pytest.mark.parametrize("settings", SAME)
def test_a_configuration_of_an_earlier_version_whose_network_has_not_changed_is_as_good_as_ever(settings):
    config = resolve(**SETTINGS | settings)
    assert TrainConfig.from_dict(old(config.as_dict())) == config


@pytest.mark.parametrize("value", ["2", 2.0, True])
def test_a_revision_that_is_none_is_refused(value):
    with pytest.raises(UsageError, match="revision is"):
        TrainConfig.from_dict(resolve(**SETTINGS | SAME[0]).as_dict() | {"revision": value})


@pytest.fixture(scope="module")
def data():
    return load_dataset("builtin", data_dir=None, limit_train=20, limit_test=10)


def run_of(path, data, config=None, **settings):
    config = config or resolve(**SETTINGS | settings)
    directory = RunDirectory.create(path, config, None)
    directory.release()
    checkpoints.write(directory.checkpoint_folder, checkpoints.name_of(0, 0), initial_checkpoint(config, data))
    return directory


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--fabric", "serial", "--resume"),
        ("evaluate",),
        ("report",),
        ("analyze", "similarity"),
        ("analyze", "voting"),
        ("analyze", "reduce"),
        ("analyze", "attack"),
    ],
)
def test_an_old_run_is_neither_continued_nor_looked_into(tmp_path, data, command):
    directory = run_of(tmp_path / "run", data, pooling="average", tiles=(16, 4, 1))
    (directory.path / "config.toml").write_text(tomli_w.dumps(old(directory.config.as_dict())))
    done = CliRunner().invoke(main, [*command, str(directory.path)])
    assert done.exit_code == 1
    assert "is void, as earlier versions had the ReLU of conv0 before its pooling" in done.stderr
    assert "Train it anew" in done.stderr


@pytest.mark.parametrize("format_", [1, checkpoints.FORMAT])
def test_an_old_checkpoint_is_void(tmp_path, data, monkeypatch, format_):
    monkeypatch.setattr(checkpoints, "FORMAT", format_)
    monkeypatch.setattr(TrainConfig, "revision", 1)
    directory = run_of(tmp_path / "run", data, pooling="mixed", tiles=(16, 4, 1))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=f"is void, as .*{WHY}.*Train the network anew"):
        checkpoints.read(directory.find_checkpoint("newest"))


# --- experiments


def request_of(path, experiment, *, adopt=()):
    names = dict.fromkeys(("limit_train", "limit_test", "lr_decay_every", "cells", "dataset", "data_dir"))
    rest = {"jobs": None, "address": None, "fabric": "serial", "device": "cpu", "epochs": 1, "seeds": 1}
    return Request(experiment=experiment, output=path, adopt=adopt, **names | rest)


def test_old_results_of_average_pooling_are_not_taken_for_new_ones(tmp_path):
    store = Store(tmp_path, PROTOCOL)
    store.take()
    for name in ("random", "random-average"):
        (cell,) = cells_of("figure3", [name])
        store.keep(cell, 0, "train", {"best_test_error_percent": 1.0})
        path = tmp_path / "results" / f"{name}-0.train.json"
        assert json.loads(path.read_text())["revision"] == cell.config(PROTOCOL, 0).revision
        path.write_text('{"best_test_error_percent": 1.0}')
    store.release()
    Work(request_of(tmp_path, "table1"), PROTOCOL, store)  # max pooling alone
    with pytest.raises(UsageError, match=rf"random-average-0\.train\.json is void, as .*{WHY}.*Move it and"):
        Work(request_of(tmp_path, "figure3"), PROTOCOL, store)
    assert tables.Results(store).values(cells_of("figure3", ["random-average"])[0], "best_test_error_percent") == []


@pytest.mark.parametrize("adopted", [False, True])
def test_old_runs_of_average_pooling_are_neither_continued_nor_adopted(tmp_path, data, adopted):
    store = Store(tmp_path / "store", PROTOCOL)
    (cell,) = cells_of("figure3", ["random-average"])
    directory = run_of(tmp_path / "run" if adopted else store.run_dir(cell, 0), data, cell.config(PROTOCOL, 0))
    (directory.path / "config.toml").write_text(tomli_w.dumps(old(directory.config.as_dict())))
    request = request_of(store.path, "figure3", adopt=(directory.path,) if adopted else ())
    with pytest.raises(Exception, match=f"is void, as .*{WHY}"):
        Work(request, PROTOCOL, store)


class Kept:
    """Results with one number in all that is void, in place of a `Store`."""

    protocol, seeds = replace(PROTOCOL, limit_train=None), 1

    def result(self, cell, seed, what):
        error = 51.0 if cell.pooling in ("average", "mixed") else 20.0
        similarities = [error / 100, 0.1, None]
        names = ("similarity", "start_projection", "decay_leaves", "similarity_of_rest")
        result = {
            "train": {f"{kind}_error_percent": error for kind in ("best_test", "best_train", "test", "train")}
            | {"test_errors_percent": [error], "epochs": [1]},
            "votes5": {"test_error_percent": [error, error], "mean_single_test_error_percent": error},
            "reduced": {"by_norm": {"test_error_percent": error}},
            "similarity": dict.fromkeys(names, similarities),
        }.get(what)
        return result and result | ({"void": f"void, as earlier versions {WHY}"} if error > 50 else {})


def test_tables_print_void_results_as_void_and_claims_do_not_rest_on_them(tmp_path):
    results = tables.Results(Kept())
    rows = {row.split("|")[1].strip(): row for row in tables.table2(results).splitlines() if row.startswith("| `")}
    assert rows["`max`"].count("void") == rows["`stochastic`"].count("void") == 0
    assert rows["`average`"].count("| void: 51.00") == rows["`mixed`"].count("| void: 51.00") == 5
    lines = [line for line in tables.figure3(results).splitlines() if line.startswith("| `random` |")]
    assert [line.count("void: ") for line in lines] == [0, 7, 7, 0]
    for text in (tables.table2(results), tables.figure3(results), claims(results)):
        assert f"Void, as earlier versions {WHY}. " in text
    void = [row for row in rows_of(results) if row.verdict == Verdict.VOID]
    assert all("void: " in row.numbers for row in void)
    assert {row.claim.split(" (")[0] for row in void} == {
        "voting does nothing with average pooling",
        *(
            f"S {sign}{of} with {pooling} pooling"
            for of in ("", " of what the tiles have learnt")
            for sign, pooling in (("≈ 1", "average"), ("> 0.1", "mixed"))
        ),
    }
    assert all("51.0" not in row.numbers for row in rows_of(results) if row not in void)
    assert figures.draw("table2", results, tmp_path / "figure.svg") in (True, False)


def test_kept_results_of_average_and_mixed_pooling_are_marked():
    for path in (Path(__file__).parent.parent / "results").glob("reproduce-*.json"):
        for name, result in json.loads(path.read_text())["results"].items():
            first = result.get("config", {}).get("revision", 1) == result.get("revision", 1) == 1
            changed = "-average-" in name or "-mixed-" in name
            assert ("void" in result) == (changed and first), name
