import math
import re
from dataclasses import replace

import pytest

from rapa_dist.checks import parse_list
from rapa_dist.config import TrainConfig, check_fabric, difference, resolve
from rapa_dist.errors import UsageError
from rapa_dist.layout import machine_of

BASE = {
    "pooling": "max",
    "dataset": "builtin",
    "limit_train": None,
    "limit_test": None,
    "epochs": 10,
    "batch_size": 10,
    "lr_decay_every": 25,
    "warmup_epochs": 1,
    "weight_decay": 1e-4,
    "augment": True,
    "seed": 0,
}


def a_config(**changes):
    return resolve(**(BASE | changes))


def refused(*parts, **changes):
    """Assert that a configuration is refused with a message that holds all parts."""
    with pytest.raises(UsageError) as caught:
        a_config(**changes)
    for part in parts:
        assert part in str(caught.value)


# --- what is derived


def test_without_anything_said_it_is_the_papers_tiled_network():
    config = a_config()
    assert (config.tiles, config.scheme, config.channels) == ((16, 4, 1), "random", (32, 32, 64))
    assert (config.lr, config.lr_decay) == (0.05, 0.75)
    assert machine_of(config).n_weights == 192_704


def test_scheme_none_means_one_tile_per_layer_and_the_papers_untiled_rates():
    config = a_config(scheme="none")
    assert (config.tiles, config.lr, config.lr_decay) == ((1, 1, 1), 0.005, 0.5)


def test_one_tile_per_layer_means_scheme_none():
    config = a_config(tiles=(1, 1, 1))
    assert (config.scheme, config.lr, config.lr_decay) == ("none", 0.005, 0.5)


@pytest.mark.parametrize(
    ("tiles", "parts"), [((1, 1, 1), 2), ((64, 2, 1), 2), ((16, 4, 1), 1), ((32, 8, 2), 1), ((128, 32, 8), 1)]
)
def test_mini_batches_are_cut_in_two_where_few_tiles_follow_the_first_layer(tiles, parts):
    assert a_config(tiles=tiles).micro_batches == parts
    assert a_config(tiles=tiles, micro_batches=3).micro_batches == 3


def test_a_configuration_from_before_there_were_other_networks_is_of_the_papers():
    values = a_config().as_dict()
    for name in ("micro_batches", "network", "init", "image"):
        del values[name]
    config = TrainConfig.from_dict(values)
    assert (config.network, config.micro_batches, config.init, config.lr_of) == ("rapa", 1, "xavier", ())


def test_scheme_none_has_one_tile_for_every_layer_there_is():
    assert a_config(scheme="none", channels=(8, 8)).tiles == (1, 1)


def test_one_tiled_layer_makes_a_tiled_network():
    config = a_config(tiles=(1, 1, 2))
    assert (config.scheme, config.lr, config.lr_decay) == ("random", 0.05, 0.75)


def test_what_is_given_is_kept():
    config = a_config(scheme="none", lr=0.3, lr_decay=0.9)
    assert (config.lr, config.lr_decay) == (0.3, 0.9)


# --- the learning rate


def test_the_learning_rate_is_a_fiftieth_in_the_warm_up():
    config = a_config(lr=0.05, warmup_epochs=2)
    rates = [config.learning_rate(epoch) for epoch in range(4)]
    assert rates == pytest.approx([0.001, 0.001, 0.05, 0.05])


def test_the_learning_rate_decays_in_steps_counted_from_the_start_of_the_run():
    config = a_config(lr=0.05, lr_decay=0.75, lr_decay_every=25, warmup_epochs=5)
    for epoch, decays in ((5, 0), (24, 0), (25, 1), (49, 1), (50, 2), (399, 15)):
        assert config.learning_rate(epoch) == pytest.approx(0.05 * 0.75**decays)


def test_without_warm_up_the_first_epoch_has_the_full_rate():
    assert a_config(warmup_epochs=0, lr=0.02).learning_rate(0) == 0.02


# --- what is refused, with the value and a way out


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"tiles": (16, 4)}, ("--tiles", "3 layers", "it has 2: 16,4", "16,4,1")),
        ({"tiles": (16, 4, 1, 1)}, ("--tiles", "3 layers", "it has 4: 16,4,1,1")),
        ({"tiles": ()}, ("--tiles", "3 layers", "it has 0")),
        ({"tiles": (16, 0, 1)}, ("--tiles", "at least 1", "it has 0", "(16, 0, 1)")),
        ({"tiles": (16, -4, 1)}, ("--tiles", "at least 1", "it has -4")),
        ({"tiles": (1025, 4, 1)}, ("Layer conv0", "1,024 patches", "1,025")),
        ({"tiles": (16, 257, 1)}, ("Layer conv1", "256 patches", "257")),
        ({"tiles": (16, 4, 65)}, ("Layer conv2", "64 patches", "65")),
        ({"tiles": (10**12, 4, 1)}, ("Layer conv0", "at most 1,024", "1,000,000,000,000")),
        (
            {"tiles": (12, 4, 1), "scheme": "alternate"},
            ("alternate", "conv0", "here are 12", "9 or 16", "random"),
        ),
        ({"tiles": (16, 4, 2), "scheme": "image-overlap"}, ("image-overlap", "conv2", "here are 2", "1 or 4")),
        ({"tiles": (1000, 4, 1), "scheme": "alternate"}, ("conv0", "here are 1000", "Use 961 or 1024")),
        ({"tiles": (16, 250, 1), "scheme": "alternate"}, ("conv1", "here are 250", "Use 225 or 256")),
        ({"tiles": (16, 4, 1), "scheme": "none"}, ("scheme none", "--tiles 16,4,1", "conv0", "here are 16", "random")),
    ],
)
def test_tiles_that_cannot_work_are_refused(changes, parts):
    refused(*parts, **changes)


@pytest.mark.parametrize("n_tiles", [1, 4, 16, 1024])
def test_as_many_tiles_as_patches_are_allowed(n_tiles):
    assert a_config(tiles=(n_tiles, 1, 1), scheme="image-overlap").tiles[0] == n_tiles


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"channels": (32, 0, 64)}, ("--channels", "it has 0")),
        ({"channels": (32, -1, 64)}, ("--channels", "it has -1")),
        ({"channels": (32, 10**9, 64)}, ("--channels", "at most 100,000", "1,000,000,000")),
        ({"channels": (32, 32)}, ("--channels 32,32 ", "default tiles, 16,4,1")),
    ],
)
def test_channels_that_cannot_work_are_refused(changes, parts):
    refused(*parts, **changes)


@pytest.mark.parametrize("layers", [5, 6, 7, 12])
def test_more_layers_than_pooling_leaves_pixels_for_are_refused(layers):
    """After five layers the plane is one pixel, which 3×3 pooling with stride 2 can't halve again."""
    sides = [32, 16, 8, 4, 2, 1]
    if layers < len(sides):
        assert len(machine_of(a_config(channels=(4,) * layers, scheme="none")).arrays) == layers
    else:
        refused("--channels", channels=(4,) * layers, scheme="none")


@pytest.mark.parametrize(
    ("changes", "suggestion"),
    [
        ({"scheme": "randm"}, "random"),
        ({"scheme": "alternating"}, "alternate"),
        ({"scheme": "image_overlap"}, "image-overlap"),
        ({"pooling": "mex"}, "max"),
        ({"pooling": "avrage"}, "average"),
    ],
)
def test_a_misspelt_name_gets_a_suggestion(changes, suggestion):
    ((option, value),) = changes.items()
    refused(f"--{option} is one of", value, f"Did you mean {suggestion}?", **changes)


def test_a_name_that_is_like_none_gets_the_list_alone():
    with pytest.raises(UsageError) as caught:
        a_config(pooling="zzz")
    assert str(caught.value) == "--pooling is one of max, average, stochastic, mixed; not “zzz”."


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("epochs", 0, ("--epochs", "at least 1", "it is 0")),
        ("epochs", -3, ("--epochs", "it is -3")),
        ("batch_size", 0, ("--batch-size", "at least 1", "it is 0")),
        ("micro_batches", 0, ("--micro-batches", "at least 1", "it is 0")),
        ("lr_decay_every", 0, ("--lr-decay-every", "at least 1")),
        ("warmup_epochs", -1, ("--warmup-epochs", "at least 0", "it is -1")),
        ("seed", -1, ("--seed", "at least 0", "it is -1")),
        ("limit_train", 0, ("--limit-train", "at least 1")),
        ("limit_test", -5, ("--limit-test", "at least 1", "it is -5")),
        ("lr", 0.0, ("--lr ", "above 0", "it is 0.0", "0.05")),
        ("lr", -0.1, ("--lr ", "it is -0.1")),
        ("lr", math.nan, ("--lr ", "it is nan")),
        ("lr", math.inf, ("--lr ", "it is inf")),
        ("lr_decay", 0.0, ("--lr-decay ", "above 0 and up to 1", "it is 0.0")),
        ("lr_decay", 1.5, ("--lr-decay ", "it is 1.5")),
        ("lr_decay", math.nan, ("--lr-decay ", "it is nan")),
        ("weight_decay", -1e-4, ("--weight-decay", "it is -0.0001")),
        ("weight_decay", 20.0, ("--weight-decay", "below 1 / λ", "it is 20.0")),
        ("weight_decay", math.nan, ("--weight-decay", "it is nan")),
    ],
)
def test_a_number_that_cannot_work_is_refused(name, value, parts):
    refused(*parts, **{name: value})


@pytest.mark.parametrize("changes", [{"weight_decay": 0.0}, {"lr_decay": 1.0}, {"warmup_epochs": 0}, {"limit_test": 1}])
def test_numbers_at_the_edge_are_allowed(changes):
    ((name, value),) = changes.items()
    assert getattr(a_config(**changes), name) == value


# --- lists


@pytest.mark.parametrize(
    ("text", "numbers"), [("16,4,1", (16, 4, 1)), (" 16, 4 ,1", (16, 4, 1)), ("7", (7,)), ("0,-1,+2", (0, -1, 2))]
)
def test_lists_are_numbers_with_commas_between(text, numbers):
    assert parse_list("--tiles", text) == numbers


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("16,four,1", "four"),
        ("16,4.5,1", "4.5"),
        ("16,4,", ""),
        ("", ""),
        ("16;4;1", "16;4;1"),
        ("1e3,4,1", "1e3"),
        ("--5,4,1", "--5"),
        ("5-,4,1", "5-"),
        ("+-5,4,1", "+-5"),
        ("²,4,1", "²"),
        ("1 6,4,1", "1 6"),
    ],
)
def test_a_list_with_something_else_in_it_is_refused_by_that_part(text, part):
    with pytest.raises(UsageError, match=re.escape(f"“{part}”")) as caught:
        parse_list("--tiles", text)
    assert "--tiles" in str(caught.value)
    assert "16,4,1" in str(caught.value)


def test_a_number_with_thousands_of_digits_is_refused():
    with pytest.raises(UsageError, match="--tiles"):
        parse_list("--tiles", "9" * 5000)


def test_a_misspelt_fabric_gets_a_suggestion():
    check_fabric("serial")
    check_fabric("ray")
    with pytest.raises(UsageError, match=r"--fabric .* Did you mean serial\?"):
        check_fabric("seriel")


# --- as plain values, and back


@pytest.mark.parametrize(
    "config",
    [
        a_config(),
        a_config(scheme="none", limit_train=100, limit_test=50, augment=False),
        a_config(dataset=None),
    ],
)
def test_a_configuration_survives_being_written_as_plain_values(config):
    values = config.as_dict()
    assert all(isinstance(value, bool | int | float | str | list | dict) for value in values.values())
    assert TrainConfig.from_dict(values) == config


def test_an_unknown_setting_is_refused_by_name():
    with pytest.raises(UsageError, match="momentum"):
        TrainConfig.from_dict(a_config().as_dict() | {"momentum": 0.9})


def test_a_missing_setting_is_refused_by_name():
    values = a_config().as_dict()
    del values["epochs"], values["tiles"]
    with pytest.raises(UsageError, match="epochs, tiles"):
        TrainConfig.from_dict(values)


def test_plain_values_are_checked_like_others():
    with pytest.raises(UsageError, match=r"^epochs needs"):
        TrainConfig.from_dict(a_config().as_dict() | {"epochs": 0})


def test_the_difference_names_every_field_with_both_values():
    old = a_config()
    new = replace(old, tiles=(4, 4, 1), lr=0.1)
    assert difference(old, new) == ["tiles: (16, 4, 1) → (4, 4, 1)", "lr: 0.05 → 0.1"]
    assert difference(old, old) == []


def test_a_configuration_can_not_be_changed():
    with pytest.raises(AttributeError):
        a_config().epochs = 5


def test_enlarged_is_the_untiled_network_with_more_channels():
    config = a_config(scheme="enlarged")
    assert (config.scheme, config.tiles, config.channels, config.lr) == ("none", (1, 1, 1), (54, 64, 64), 0.005)
    assert machine_of(config).n_weights == 193_032, "the paper's count"
    with pytest.raises(UsageError, match=r"--scheme enlarged is .* --channels 54,64,64; not 32,32,64"):
        a_config(scheme="enlarged", channels=(32, 32, 64))


def test_perforated_has_one_tile_per_layer_and_the_learning_rate_of_tiling():
    config = a_config(scheme="perforated")
    assert (config.tiles, config.lr, config.lr_decay) == ((16, 4, 1), 0.05, 0.75)
    assert [layer.n_tiles for layer in machine_of(config).arrays] == [1, 1, 1]
    assert [layer.perforation for layer in machine_of(config).arrays] == [16, 4, 1]
    assert machine_of(config).n_weights == 79_328, "one kernel matrix per layer"


@pytest.mark.parametrize("scheme", ["image-pad", "image-overlap", "alternate"])
def test_schemes_of_regions_need_a_square_number_of_tiles(scheme):
    with pytest.raises(UsageError, match=f"conv1 .*: {scheme} needs a square number of tiles; here are 8"):
        a_config(scheme=scheme, tiles=(16, 8, 1))
