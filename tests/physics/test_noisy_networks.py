"""Networks on tiles with physics: what is counted, tested on other tiles, and opened from Python."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import rapa_dist as rapa
from rapa_dist.analysis.weights import weights_of
from rapa_dist.coordinator.retest import retest
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.errors import UsageError
from rapa_dist.physics.choosing import PhysicsChoice
from rapa_dist.physics.devices import draw_devices
from rapa_dist.physics.draws import Draws, key_of
from rapa_dist.physics.presets import PRESETS

SMALL = {"channels": (8, 8, 4), "tiles": (4, 2, 1), "epochs": 2, "limit_train": 60, "limit_test": 40}
NARROW = replace(PRESETS["gokmen-vlasov"], device=rapa.ConstantStepDevice(dw_min=0.01, w_max=0.1, w_min=-0.1))


def trained(folder, **changes):
    return rapa.train(SMALL | {"dataset": "builtin"} | changes, fabric="serial", run_dir=folder).directory.path


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("clean") / "run")


def model_of(**changes):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2))
    rapa.convert(model, tiles=4, images=(5, 1, 8, 8))
    return model


def step(model, fabric, **options):
    with rapa.open_fabric(model, fabric, images=(5, 1, 8, 8), **options) as opened:
        optimizer = rapa.RapaSGD(model, lr=0.5, weight_decay=0.0)
        torch.nn.functional.cross_entropy(model(torch.ones(5, 1, 8, 8)), torch.tensor([0, 1, 0, 1, 1])).backward()
        optimizer.step()
        return opened.stats(), opened.all_kernels()


def test_weights_begin_within_their_devices_bounds_and_saturation_is_counted():
    stats, kernels = step(model_of(), "serial", physics=NARROW, seed=3)
    shape = kernels[0].shape[1:]
    for tile, (told, kernel) in enumerate(zip(stats, kernels[0], strict=True)):
        devices = draw_devices(NARROW.device, shape, Draws(key_of(3, 0, tile)), bias=True)
        at_bound = (kernel == devices.b_max) | (kernel == devices.b_min)
        assert np.all((kernel <= devices.b_max) & (kernel >= devices.b_min))
        assert told.saturated == pytest.approx(at_bound.mean())
        assert told.saturated > 0.2  # of weights drawn as widely as these
        assert told.trains
        assert told.pulses
        assert told.mean_bl >= 1


def test_ideal_tiles_count_none_of_it():
    stats, _ = step(model_of(), "serial")
    assert {(tile.trains, tile.pulses, tile.repeated, tile.saturated) for tile in stats} == {(0, 0, 0, 0.0)}


def test_a_preset_s_name_does_and_weight_decay_does_not():
    _, one = step(model_of(), "serial", physics="io", seed=1)
    _, same = step(model_of(), "serial", physics=PRESETS["io"], seed=1)
    _, other = step(model_of(), "serial", physics="io", seed=2)
    np.testing.assert_array_equal(one[0], same[0])
    assert np.any(one[0] != other[0])
    model = model_of()
    with rapa.open_fabric(model, "serial", images=(5, 1, 8, 8), physics="ecram"):
        rapa.RapaSGD(model, lr=0.5, weight_decay=0.1)
        with pytest.raises(UsageError, match=r"weight_decay is 0\.1, and the devices"):
            model(torch.ones(5, 1, 8, 8)).sum().backward()
    with (
        pytest.raises(UsageError, match="batched has ideal tiles only"),
        rapa.open_fabric(model, "batched", images=(5, 1, 8, 8), physics="io"),
    ):
        pass


def test_a_network_trained_clean_is_tested_on_noisy_tiles(clean):
    ideal = retest(clean)
    assert retest(clean, physics="ideal")["test_error_percent"] == ideal["test_error_percent"]
    noisy = retest(clean, physics="io", physics_set=["forward.out_noise=30"], times=3)
    assert len(noisy["test_errors_percent"]) == 3
    assert noisy["test_error_percent"] == pytest.approx(np.mean(noisy["test_errors_percent"]))
    assert noisy["test_error_spread"] == pytest.approx(np.std(noisy["test_errors_percent"], ddof=1))
    assert noisy["test_loss"] > ideal["test_loss"] + 0.1  # so much noise leaves little
    again = retest(clean, physics="io", physics_set=["forward.out_noise=30"], times=3)
    assert again == noisy
    assert noisy["physics"]["forward"]["out_noise"] == 30


def test_fields_alone_change_the_run_s_own_tiles(tmp_path):
    path = trained(tmp_path / "run", physics="gokmen-vlasov")
    own = retest(path)
    assert retest(path, physics_set=["forward.out_noise=0.1"])["test_loss"] == own["test_loss"]  # as it is anyway
    assert retest(path, physics_set=["forward.out_noise=0"])["test_loss"] != own["test_loss"]


def test_votes_and_repetitions_make_sense_on_noisy_tiles_without_random_assignment(tmp_path):
    path = trained(tmp_path / "run", tiles=(1, 1, 1))
    with pytest.raises(UsageError, match="all tests would agree"):
        retest(path, times=2)
    assert retest(path, times=2, votes=3, physics="io")["votes"] == 3


def test_a_run_says_how_many_weights_their_devices_can_t_hold(tmp_path):
    path = trained(tmp_path / "run", physics=PhysicsChoice(NARROW), epochs=1)
    assert "are beyond the bounds of their devices, and begin at the bound" in (path / "log").read_text()


def test_a_run_says_when_its_learning_rate_fills_every_train(tmp_path):
    path = trained(tmp_path / "run", physics="gokmen-vlasov", lr=20.0, epochs=1)
    assert "ask for 1,250 pulses, and a train has at most 31" in (path / "log").read_text()


def test_weights_are_held_against_their_devices_bounds(tmp_path, clean):
    path = trained(tmp_path / "run", physics=PhysicsChoice(NARROW), epochs=1)
    directory = RunDirectory(path)
    checkpoint = directory.read_checkpoint(directory.find_checkpoint("newest"))
    layer = weights_of(checkpoint)["layers"][0]
    devices = [
        draw_devices(NARROW.device, (76, 8), Draws(key_of(0, 0, tile)), bias=True) for tile in range(SMALL["tiles"][0])
    ]
    b_max, b_min = np.stack([each.b_max for each in devices]), np.stack([each.b_min for each in devices])
    kernels = checkpoint.kernels[0]
    assert layer["at_bound_percent"] == pytest.approx(100 * np.mean((kernels >= b_max) | (kernels <= b_min)))
    assert 0 < layer["at_bound_percent"] < 100
    where = (kernels.astype(float) - b_min) / (b_max.astype(float) - b_min)
    np.testing.assert_allclose(layer["position_quartiles"], np.percentile(where, (25, 50, 75)), rtol=1e-6)
    (layer_stats,) = [each for each in json.loads((path / "tiles.json").read_text())["layers"] if each["layer"] == 0]
    assert 100 * layer_stats["saturated"] == pytest.approx(layer["at_bound_percent"])
    clean = RunDirectory(clean)
    with pytest.raises(UsageError, match="kept in exact numbers"):
        weights_of(clean.read_checkpoint(clean.find_checkpoint("newest")))
