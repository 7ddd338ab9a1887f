"""What `rapa-dist analyze` finds, against definitions written out, and what it refuses."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch.testing import assert_close

from rapa_dist.analysis.attack import attack, gap_closed, perturb
from rapa_dist.analysis.reduction import reduce_kernels, reduce_run, strongest, untiled
from rapa_dist.analysis.voting import voting
from rapa_dist.analysis.wins import count_wins, wins_of
from rapa_dist.cli import main
from rapa_dist.config import POOLING_NAMES, resolve
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator.evaluation import as_images
from rapa_dist.coordinator.retest import retest
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.session import one_digital_thread
from rapa_dist.coordinator.trained import Trained
from rapa_dist.coordinator.trainer import initial_checkpoint
from rapa_dist.data import evaluation_batches, load_dataset
from rapa_dist.machine import IMAGE
from rapa_dist.networks.paper import PaperNetwork

SETTINGS = {
    "dataset": "builtin",
    "limit_train": 60,
    "limit_test": 40,
    "epochs": 1,
    "batch_size": 10,
    "lr_decay_every": 25,
    "warmup_epochs": 0,
    "weight_decay": 1e-4,
    "augment": False,
    "seed": 0,
    "channels": (6, 5, 4),
}


@pytest.fixture(autouse=True)
def _one_thread():
    with one_digital_thread():
        yield


@pytest.fixture
def make_run(tmp_path):
    """Make a run directory with one checkpoint, its weights drawn at random and large enough to matter."""

    def make(name="run", *, equal=False, with_checkpoint=True, images=(60, 40), **settings):
        config = resolve(**(SETTINGS | {"pooling": "max"} | settings))
        data = load_dataset("builtin", data_dir=None, limit_train=images[0], limit_test=images[1])
        start = initial_checkpoint(config, data)
        rng = np.random.default_rng(1)
        for kernels in start.kernels:
            kernels *= 2
            kernels[:, -1] = rng.normal(scale=0.1, size=kernels[:, -1].shape)
            if equal:
                kernels[:] = kernels[:1]
        for key, value in start.digital.items():
            if key.endswith("beta"):
                value[:] = rng.normal(scale=0.2, size=value.shape)
        directory = RunDirectory.create(tmp_path / name, config, None)
        directory.release()
        if with_checkpoint:
            checkpoints.write(directory.checkpoint_folder, checkpoints.name_of(0, 0), start)
        return tmp_path / name

    return make


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_majority_of_votes_is_what_evaluate_counts(make_run):
    run = make_run()
    result = voting(run, votes=4)
    assert result["votes"] == [1, 2, 3, 4]
    assert result["test_error_percent"] == [retest(run, votes=v)["test_error_percent"] for v in (1, 2, 3, 4)]
    assert result["single_test_error_percent"][0] == result["test_error_percent"][0]
    assert len(set(result["single_test_error_percent"])) > 1, "votes differ"


def test_of_every_channel_the_filter_with_the_largest_norm_is_taken_with_its_bias():
    kernels = np.random.default_rng(0).normal(size=(5, 26, 7)).astype(np.float32)
    kernels[:, -1] *= 100  # the bias is not part of the filter
    reduced = reduce_kernels(kernels, strongest(kernels[:, :-1]))
    for channel in range(7):
        norms = [sum(w * w for w in kernels[tile, :-1, channel]) for tile in range(5)]
        assert np.array_equal(reduced[:, channel], kernels[int(np.argmax(norms)), :, channel])


def test_wins_are_counted_window_by_window():
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
    outputs[..., :3, :3] = -1  # a window without activation has no winner
    tile_of_patch = rng.integers(-1, 4, 2 * 64)
    expected = np.zeros((4, 3), int)
    for image, y, x, channel in np.ndindex(2, 4, 4, 3):
        window = outputs[image, channel, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3]
        dy, dx = np.unravel_index(window.argmax(), window.shape)
        tile = tile_of_patch[image * 64 + (2 * y + dy) * 8 + 2 * x + dx]
        if window.max() > 0 and tile >= 0:
            expected[tile, channel] += 1
    largest, places = F.max_pool2d(torch.from_numpy(outputs), 3, 2, ceil_mode=True, return_indices=True)
    assert np.array_equal(wins_of(largest.numpy(), places.numpy(), tile_of_patch, 4), expected)


def test_winners_are_counted_over_the_training_images(make_run):
    trained = Trained.open(make_run())
    wins = count_wins(trained, 50)
    assert [None if of_layer is None else of_layer.shape for of_layer in wins] == [(16, 6), (4, 5), None]
    assert all(of_layer.sum() > 0 for of_layer in wins[:2])
    assert wins[0].sum(axis=0).max() <= 50 * 16 * 16


def test_wins_are_counted_over_images_of_all_classes(make_run, monkeypatch):
    trained = Trained.open(make_run())
    order = trained.data.train.labels.argsort(kind="stable")
    trained = replace(trained, data=replace(trained.data, train=trained.data.train.take(order)))
    seen = []

    def batches(subset, *arguments):
        seen.extend(subset.labels.tolist())
        return evaluation_batches(subset, *arguments)

    monkeypatch.setattr("rapa_dist.analysis.wins.evaluation_batches", batches)
    count_wins(trained, 30)
    assert len(seen) == 30
    assert len(set(seen)) > 6


@pytest.mark.parametrize("pooling", POOLING_NAMES)
def test_tiles_that_agree_are_reduced_to_an_ordinary_network_with_the_same_scores(make_run, pooling, tmp_path):
    run = make_run(equal=True, pooling=pooling)
    trained = Trained.open(run)
    saved = tmp_path / "reduced.pt"
    result = reduce_run(run, by="norm", output=saved)
    assert result["test_error_percent"] == result["tiled_test_error_percent"]
    assert_same_scores(loaded(saved, pooling), trained)


def test_an_untiled_networks_own_kernels_are_an_ordinary_network(make_run):
    """It has PyTorch's names, and conv2d agrees with the tiles."""
    trained = Trained.open(make_run(scheme="none"))
    network = untiled(trained, [of_layer[0] for of_layer in trained.checkpoint.kernels])
    assert list(network.state_dict()) == [
        f"{name}.{kind}" for name in ("conv0", "conv1", "conv2", "head") for kind in ("weight", "bias")
    ]
    assert_same_scores(network, trained)


@pytest.mark.parametrize("pooling", POOLING_NAMES)
def test_a_reduced_network_has_the_scores_of_tiles_that_all_hold_its_kernels(make_run, pooling, tmp_path):
    run = make_run(pooling=pooling)
    trained = Trained.open(run)
    reduce_run(run, by="norm", output=tmp_path / "reduced.pt")
    network = loaded(tmp_path / "reduced.pt", pooling)
    for kernels in trained.checkpoint.kernels:
        norms = (kernels[:, :-1] ** 2).sum(axis=1)  # (n_t, c_out)
        for channel, tile in enumerate(norms.argmax(axis=0)):
            kernels[:, :, channel] = kernels[tile, :, channel].copy()
    assert_same_scores(network, trained)


def loaded(path, pooling):
    """Return an ordinary network with the weights of a file."""
    network = PaperNetwork(10, IMAGE, channels=(6, 5, 4), pooling=pooling)
    network.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return network.eval()


def assert_same_scores(network, trained):
    """Assert that an ordinary network and a run's own tiles give the same scores to the same images."""
    pixels, _ = next(evaluation_batches(trained.data.test, trained.mean, 20))
    images = as_images(pixels)
    with trained.network() as tiled, torch.no_grad():
        expected = tiled.classify(images, (0, 0, 0))
        assert expected.std(dim=0).min() > 1e-2, "images differ in their scores"
        assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


def test_an_attack_has_exactly_the_strength_that_was_asked_for():
    rng = np.random.default_rng(0)
    mean = torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    images = torch.from_numpy(rng.uniform(size=(4, 3, 32, 32)).astype(np.float32)) - mean
    direction = torch.from_numpy(rng.normal(size=(4, 3, 32, 32)).astype(np.float32)).sign()
    direction[3] = 0  # no gradient, no attack
    attacked = perturb(images, mean, direction, 33)
    for image, other, sign in zip(images[:3], attacked, direction, strict=False):
        x, noise = (image + mean).double(), (other - image).double()
        assert 20 * np.log10((x.norm() / noise.norm()).item()) == pytest.approx(33, abs=0.01)
        assert torch.equal(noise.sign().float(), sign)
    assert_close(attacked[3], images[3])
    clipped = perturb(images, mean, direction, 10, clip=True) + mean
    assert clipped.min() >= -1e-6
    assert clipped.max() <= 1 + 1e-6


def test_an_attack_goes_up_the_gradient_and_is_judged_on_what_was_right(make_run):
    """Against an ordinary network: gradient, step and judgement written out with autograd."""
    run = make_run(scheme="none")
    trained = Trained.open(run)
    network = untiled(trained, [of_layer[0] for of_layer in trained.checkpoint.kernels])
    pixels, labels = next(evaluation_batches(trained.data.test, trained.mean, 40))
    images, target = as_images(pixels).requires_grad_(), torch.from_numpy(labels)
    torch.nn.functional.cross_entropy(network(images), target, reduction="sum").backward()
    with torch.no_grad():
        right = network(images).argmax(dim=1) == target
        x = images + torch.tensor(trained.mean)[:, None, None]
        sign = images.grad.sign()
        step = x.flatten(1).norm(dim=1) / sign.flatten(1).norm(dim=1) * 10 ** (-20 / 20)
        still = right & (network(images + step[:, None, None, None] * sign).argmax(dim=1) == target)
    assert right.any()
    result = attack(run, snr_db=[20, 200])
    assert result["clean_accuracy_percent"] == pytest.approx(100 * right.double().mean().item())
    assert result["accuracy_percent"] == pytest.approx([100 * (still.sum() / right.sum()).item(), 100])
    assert result["judge_assignments"] == 1, "an untiled network has no others"


def test_attacks_on_a_tiled_network_are_judged_under_independent_assignments(make_run):
    run = make_run()
    independent = attack(run, snr_db=[15, 200], judge_assignments=3)
    same = attack(run, snr_db=[15, 200], same_assignment=True, judge_assignments=1)
    assert independent["judge_assignments"] == 3
    assert independent["accuracy_std"][0] is not None
    assert independent["accuracy_percent"][1] == same["accuracy_percent"][1] == 100
    assert same["accuracy_percent"][0] <= independent["accuracy_percent"][0], "the attacker knew who computes what"
    assert independent == attack(run, snr_db=[15, 200], judge_assignments=3)


def test_the_share_of_the_gap():
    assert gap_closed([80.0, 50.0, 100.0], [60.0, 60.0, 100.0]) == [50.0, -25.0, None]


# --- the command line


def test_every_analysis_prints_a_table_or_one_json_object(make_run, tmp_path):
    run, untiled_run = make_run(), make_run("untiled", scheme="none")
    pytest.importorskip("matplotlib")
    for arguments in (
        ("similarity", run, "--plot", tmp_path / "s.svg"),
        ("voting", run, "--votes", 2, "--plot", tmp_path / "v.svg"),
        ("reduce", run, "--by", "wins", "--limit-train", 10),
        ("attack", run, "--snr", "20,40", "--baseline", untiled_run, "--plot", tmp_path / "a.svg"),
        ("regularizer", "--epochs", 1, "--images", 50, "--plot", tmp_path / "r.svg"),
    ):
        plain, as_json = invoke("analyze", *arguments), invoke("analyze", *arguments, "--json")
        assert plain.exit_code == as_json.exit_code == 0, plain.output + as_json.output
        assert plain.stdout
        assert isinstance(json.loads(as_json.stdout), dict)
    for name in "svar":
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")


def test_similarity_says_what_is_along_the_start_and_what_decay_leaves(make_run):
    doubled, equal = make_run(), make_run("equal", equal=True)
    shown = invoke("analyze", "similarity", doubled).stdout
    assert "200 % along the random start, of which decay alone leaves 100 %; S of the rest = 0.0000" in shown
    result = json.loads(invoke("analyze", "similarity", equal, "--json").stdout)
    assert result["similarity"] == pytest.approx([1, 1, None])
    assert result["start_projection"] == pytest.approx([0, 0, None])
    assert result["similarity_of_rest"] == pytest.approx([1, 1, None])


def test_an_attack_on_a_network_that_guesses_says_that_it_says_little(make_run):
    run = make_run()  # as it was initialised
    result = json.loads(invoke("analyze", "attack", run, "--snr", "30", "--json").stdout)
    assert result["chance_percent"] == 10
    said = "what an attack does to so few images says little"
    assert (said in invoke("analyze", "attack", run, "--snr", "30").stderr) == (result["clean_accuracy_percent"] < 20)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("voting", "RUN", "--votes", 0), ("--votes needs at least 1", "0")),
        (("voting", "UNTILED"), ("scheme none", "all votes would agree", "--scheme random")),
        (("voting", "FIXED"), ("scheme alternate", "--scheme random")),
        (("attack", "RUN", "--snr", "20,loud"), ("--snr needs numbers", "“loud”", "like 20,30,40")),
        (("attack", "RUN", "--snr", "nan"), ("--snr needs ratios", "nan")),
        (("attack", "RUN", "--snr", ""), ("--snr needs numbers",)),
        (("attack", "RUN", "--judge-assignments", 0), ("--judge-assignments needs at least 1",)),
        (("attack", "RUN", "--same-assignment", "--judge-assignments", 3), ("--same-assignment has one",)),
        (("attack", "RUN", "--baseline", "RUN"), ("--baseline needs an untiled run", "16,4,1", "--scheme none")),
        (("attack", "UNTILED", "--judge-assignments", 3), ("scheme none", "would be the same one", "--scheme random")),
        (("attack", "FIXED", "--gradient-assignments", 2), ("scheme alternate", "would be the same one")),
        (("attack", "RUN", "--limit-test", 0), ("at least 1; got 0",)),
        (("reduce", "RUN", "--by", "luck"), ("--by is norm or wins", "“luck”")),
        (("reduce", "UNTILED"), ("one kernel matrix per layer already",)),
        (("reduce", "RUN", "--output", "no/such/folder.pt"), ("there is no folder no/such",)),
        (("reduce", "RUN", "--output", "RUN"), ("--output is a file to write, and RUN is none",)),
        (("reduce", "RUN", "--output", "DEVICE"), ("DEVICE is none",)),
        (("similarity", "UNTILED"), ("one tile per layer", "Give a tiled run")),
        (("similarity", "RUN", "--plot", "no/such/plot.svg"), ("there is no folder no/such",)),
        *(
            ((*what, "--plot", "."), ("--plot is a file to write, and . is none", "another name"))
            for what in (("similarity", "RUN"), ("voting", "RUN"), ("attack", "RUN"), ("regularizer",))
        ),
        (("similarity", "RUN", "--checkpoint", "worst"), ("no checkpoint “worst”", "There are: step-")),
        (("similarity", "EMPTY"), ("There is no checkpoint in", "Give another run directory")),
        (("voting", "EMPTY"), ("There is no checkpoint in",)),
        (("attack", "NOWHERE"), ("is no run directory", "rapa-dist train")),
        (("similarity", "NOWHERE"), ("is no run directory", "rapa-dist train")),
        (("regularizer", "--side", 3), ("--side needs 1, 2, 4",)),
        (("regularizer", "--side", 8), ("can be combined in", "--samples")),
        (("regularizer", "--tiles", 0), ("--tiles needs at least 1",)),
        (("regularizer", "--samples", 1), ("--samples needs at least 2",)),
        (("regularizer", "--dataset", "cifar11"), ("cifar11", "cifar10")),
    ],
)
def test_bad_input_is_refused_with_what_to_do(make_run, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("DEVICE")
    for name, settings in (
        ("RUN", {}),
        ("UNTILED", {"scheme": "none"}),
        ("FIXED", {"scheme": "alternate"}),
        ("EMPTY", {"with_checkpoint": False}),
    ):
        if name in arguments:
            make_run(name, **settings)
    result = invoke("analyze", *arguments)
    assert result.exit_code in (1, 2), result.output
    assert not result.stdout
    for part in parts:
        assert part in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [("similarity", "RUN", "--plot", "p.svg"), ("reduce", "RUN", "--output", "p.pt")])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(make_run, tmp_path, monkeypatch, arguments):
    run = make_run("RUN")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr(RunDirectory, "read_checkpoint", lambda *_: pytest.fail("it is read"))
    result = invoke("analyze", *arguments)
    assert result.exit_code == 2, result.output
    assert "the folder . can't be written to. Correct its permissions" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [run.name]


@pytest.mark.parametrize(
    "arguments",
    [
        ("similarity", "RUN"),
        ("voting", "RUN", "--votes", 1),
        ("attack", "RUN", "--snr", 30),
        ("regularizer", "--epochs", 1, "--images", 10),
    ],
)
def test_the_numbers_are_there_even_if_they_cannot_be_drawn(make_run, tmp_path, monkeypatch, arguments):
    pytest.importorskip("matplotlib")
    make_run("RUN")
    monkeypatch.chdir(tmp_path)

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rapa_dist.analysis.plots.write_whole", full)
    for kind in ([], ["--json"]):
        result = invoke("analyze", *arguments, "--plot", "p.svg", *kind)
        assert result.exit_code == 2, result.output
        assert "No space left on device" in result.stderr
        assert result.stdout


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"with_checkpoint": False}, ("There is no checkpoint in",)),
        ({"images": (60, 39)}, ("--baseline needs a run of the same images", "with the same --dataset and limits")),
    ],
)
def test_a_baseline_that_is_none_is_refused_before_the_attack(make_run, monkeypatch, settings, parts):
    run, baseline = make_run(), make_run("baseline", scheme="none", **settings)
    monkeypatch.setattr("rapa_dist.analysis.attack.attack", lambda *_, **__: pytest.fail("it attacks"))
    result = invoke("analyze", "attack", run, "--baseline", baseline)
    assert result.exit_code in (1, 2), result.output
    for part in (str(baseline), *parts):
        assert part in result.stderr


@pytest.mark.parametrize(
    ("which", "of_run", "of_baseline"),
    [
        ("newest", 2, 2),
        ("best", 1, 1),
        (checkpoints.name_of(6, 1), 1, 2),
    ],
)
def test_a_run_at_its_best_is_compared_with_the_baselines_best(make_run, which, of_run, of_baseline):
    paths = []
    for name, scheme in (("run", "random"), ("baseline", "none")):
        paths.append(make_run(name, scheme=scheme, epochs=2))
        folder = paths[-1] / "checkpoints"
        (first,) = checkpoints.checkpoints(folder)
        for epoch in (1, 2):
            progress = checkpoints.Progress(epoch=epoch, step=6 * epoch, best_epoch=1)
            checkpoints.write(
                folder, checkpoints.name_of(6 * epoch, epoch), replace(checkpoints.read(first), progress=progress)
            )
    done = invoke("analyze", "attack", paths[0], "--baseline", paths[1], "--checkpoint", which, "--snr", 30, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["epoch"], result["baseline"]["epoch"]) == (of_run, of_baseline)
