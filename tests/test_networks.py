"""Networks from the command line: what is refused before anything starts, and that all commands know their layers."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import rapa_dist as rapa
from rapa_dist.cli import main
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.errors import UsageError

SMALL = ("--dataset", "builtin", "--limit-train", "30", "--limit-test", "10", "--epochs", "1", "--fabric", "serial")


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder that holds the networks, as a user would stand in it; runs go elsewhere."""
    monkeypatch.chdir(Path(__file__).parent)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("network", "tiles", "words"),
    [
        ("resnet81", "1", ("--network is one of rapa, lenet", "Did you mean resnet18?")),
        ("small_networks", "1", ("package.module:factory", "not “small_networks”")),
        ("no_such_package:factory", "1", ("can't be imported", "No module named 'no_such_package'")),
        ("small_networks:resnet81", "1", ("small_networks has no resnet81", "Did you mean resnet18?")),
        ("small_networks:not_callable", "1", ("has to name a function or class", "not_callable is of type int")),
        ("small_networks:failing", "1", ("ValueError: no such thing", "small_networks.py, line", "in failing: raise")),
        ("small_networks:no_module", "1", ("has to return a torch.nn.Module; it returned str",)),
        ("small_networks:of_squares", "1", ("does not take images of the shape (3, 32, 32)", "mat1 and mat2")),
        ("small_networks:odd", "1", ("no attribute 'no_such_method'", "small_networks.py, line", "in forward")),
        ("small_networks:without_convolutions", "1", ("no convolution that can be put on tiles",)),
        ("small_networks:of_five_classes", "1", ("has to return scores (images, 10)", "a tensor (images, 5)")),
        ("small_networks:pooled", "4,1", ("first, second, third", "it has 2: 4, 1")),
        ("small_networks:pooled", "2000,1,1", ("first has 1,024 patches", "2,000")),
        ("alexnet", "4", ("of the shape (3, 32, 32)", "Output size is too small", "images of another size")),
        ("lenet", "0", ("at least 1",)),
    ],
)
def test_bad_input_of_networks_is_refused_before_anything_starts(here, network, tiles, words):
    done = invoke("train", *SMALL, "--network", network, "--tiles", tiles, "--run-dir", here)
    assert done.exit_code == 2, done.output
    said = " ".join(done.stderr.split())
    for part in words:
        assert part in said
    assert "Traceback" not in said
    assert not here.exists()


def test_bad_input_of_options_that_only_the_papers_network_has(here):
    for option in (("--channels", "4,4,4"), ("--pooling", "mixed"), ("--scheme", "enlarged")):
        done = invoke("train", *SMALL, "--network", "lenet", *option, "--run-dir", here)
        assert done.exit_code == 2
        assert option[0] in done.stderr
        assert not here.exists()


def test_planes_that_are_not_square_are_refused_for_schemes_of_squares_with_what_would_do(here, tmp_path):
    for number, (part, label) in enumerate(product(("train", "test"), "ab")):
        folder = tmp_path / "images" / part / label
        folder.mkdir(parents=True)
        Image.fromarray(np.full((24, 32, 3), 20 * number, np.uint8)).save(folder / "0.png")
    options = ("--dataset", f"images:{tmp_path / 'images'}", "--epochs", 1, "--fabric", "serial", "--run-dir", here)
    done = invoke(
        "train", *options, "--network", "small_networks:pooled", "--scheme", "image-overlap", "--tiles", "5,1,1"
    )
    assert done.exit_code == 2
    assert "first: image-overlap needs a square number" in done.stderr
    done = invoke(
        "train", *options, "--network", "small_networks:pooled", "--scheme", "image-overlap", "--tiles", "4,1,1"
    )
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a network of one's own."""
    path = tmp_path_factory.mktemp("pooled") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parent)
        done = invoke(
            "train", *SMALL, "--network", "small_networks:pooled", "--tiles", "4,2,1", "--epochs", 2, "--run-dir", path
        )
    assert done.exit_code == 0, done.output
    return path


def test_wins_are_counted_where_a_max_pooling_follows_and_it_is_said(here, trained):
    found = json.loads(invoke("analyze", "reduce", trained, "--by", "wins", "--json").stdout)
    assert found["by_layer"] == {"first": "wins", "second": "norm", "third": "norm"}
    said = invoke("analyze", "reduce", trained, "--by", "wins").stdout
    assert "by norm, as no max pooling follows: second, third" in said


@pytest.mark.parametrize(
    "command",
    [
        ("analyze", "similarity"),
        ("analyze", "voting", "--votes", "2"),
        ("analyze", "attack", "--snr", "20"),
        ("analyze", "reduce"),
        ("evaluate",),
        ("report",),
    ],
    ids=" ".join,
)
def test_commands_take_a_run_of_any_network(here, trained, command):
    done = invoke(*command, trained)
    assert done.exit_code == 0, done.output
    if "similarity" in command:
        assert [name for name in ("first", "second") if name in done.stdout] == ["first", "second"]


def test_a_run_whose_network_is_gone_says_where_it_was_looked_for(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "small_networks", raising=False)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if not entry.endswith("tests")])
    done = invoke("evaluate", trained)
    assert done.exit_code != 0
    assert "small_networks:pooled can't be imported" in " ".join(done.stderr.split())


def test_plan_and_the_dry_run_show_the_layers_by_name(here):
    planned = invoke("plan", "--network", "small_networks:pooled", "--image", "3,32,32", "--acceleration", "16")
    assert planned.exit_code == 0, planned.output
    dry = invoke("train", *SMALL, "--network", "small_networks:pooled", "--tiles", "16,4,1", "--dry-run")
    assert dry.exit_code == 0, dry.output
    for name in ("first", "second", "third"):
        assert name in planned.stdout
        assert name in dry.stdout


def test_a_run_of_a_network_of_ones_own_goes_on_in_pytorch(here, trained, tmp_path):
    saved = tmp_path / "reduced.pt"
    assert invoke("analyze", "reduce", trained, "--output", saved).exit_code == 0
    import small_networks

    model = small_networks.pooled(10, (3, 32, 32))
    model.load_state_dict(torch.load(saved, weights_only=True))
    assert RunDirectory(trained).config.network == "small_networks:pooled"


def test_bad_input_to_a_fabric():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 2))
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(UsageError, match="no layers on tiles"), rapa.open_fabric(model, "serial", images=images):
        pass
    rapa.convert(model, tiles=2, images=images)
    with pytest.raises(UsageError, match="fabric is one of"), rapa.open_fabric(model, "cloud", images=images):
        pass
    with pytest.raises(UsageError, match="takes images"), rapa.open_fabric(model, "serial", images=(2, 3, 8, 8)):
        pass
    with rapa.open_fabric(model, "serial", images=images):
        with pytest.raises(UsageError, match="on a fabric already"), rapa.open_fabric(model, "serial", images=images):
            pass
        optimizer = rapa.RapaSGD(model, lr=0.1)
        with pytest.raises(UsageError, match="call backward"):
            optimizer.step()
        late = model(images).sum()
    with pytest.raises(UsageError, match="the fabric was closed"):
        late.backward()
    assert model(images).shape == (2, 2), "it computes alone again"
