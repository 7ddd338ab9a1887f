"""Choosing a physics: presets, single fields, layers, files; and what is refused, with what is said."""

import pytest

from rapa_dist.config import TrainConfig, check_physics, chosen_physics, resolve
from rapa_dist.errors import UsageError
from rapa_dist.physics.choosing import PhysicsChoice, choose
from rapa_dist.physics.parameters import (
    DEVICES,
    PERFECT,
    ConstantStepDevice,
    ExpStepDevice,
    IOParameters,
    LinearStepDevice,
    Physics,
    UpdateParameters,
)
from rapa_dist.physics.presets import DESCRIPTIONS, PRESETS


def test_presets_are_those_of_aihwkit():
    assert set(PRESETS) == set(DESCRIPTIONS)
    assert PRESETS["ideal"].is_ideal
    io = PRESETS["io"]
    assert (io.forward.out_bound, io.forward.out_noise, io.forward.inp_res, io.forward.out_res) == (
        20,
        0.1,
        1 / 126,
        1 / 510,
    )
    assert (io.forward.bound_management, io.backward.bound_management) == ("ITERATIVE", "NONE")
    assert io.device is None
    device = PRESETS["gokmen-vlasov"].device
    assert (device.dw_min, device.w_max, device.w_min, device.dw_min_dtod, device.dw_min_std) == (
        0.0016,
        1,
        -1,
        0.3,
        0.3,
    )
    ecram = PRESETS["ecram"].device
    assert isinstance(ecram, LinearStepDevice)
    assert (ecram.gamma_up, ecram.gamma_down, ecram.w_max, ecram.w_min) == (0.1153, 0.5085, 1.1724, -0.8276)
    reram = PRESETS["reram-es"].device
    assert isinstance(reram, ExpStepDevice)
    assert (reram.A_up, reram.A_down, reram.up_down, reram.write_noise_std) == (-1.18445, -0.081404, 0.259359, 75)


def test_single_fields_are_changed_by_their_names():
    found = choose("io", ["forward.out_noise=0.3", "backward.noise_management=none", "backward.inp_bound=2",
                          "device=linearstep", "device.gamma_up=0.2", "device.mult_noise=false"]).default  # fmt: skip
    assert found.forward.out_noise == 0.3
    assert (found.backward.noise_management, found.backward.inp_bound) == ("NONE", 2.0)
    assert found.device == LinearStepDevice(gamma_up=0.2, mult_noise=False)
    assert choose("gokmen-vlasov", ["device=none"]).default == PRESETS["io"]


@pytest.mark.parametrize(
    ("setting", "on"),
    [
        ("forward.out_noise=0.1", {"out_noise": 0.1}),
        ("forward.inp_res=0.1", {"inp_res": 0.1, "inp_bound": 1.0, "noise_management": "ABS_MAX"}),
        ("forward.out_res=0.1", {"out_res": 0.1, "out_bound": 12.0}),
        ("forward.w_noise=0.1", {"w_noise": 0.1}),
        ("forward.ir_drop=1", {"ir_drop": 1.0}),
    ],
)
def test_a_non_ideality_can_be_switched_on_alone(setting, on):
    off = {"inp_bound": 0.0, "inp_res": 0.0, "out_bound": 0.0, "out_res": 0.0, "out_noise": 0.0,
           "noise_management": "NONE", "bound_management": "NONE"}  # fmt: skip
    found = choose(None, [setting]).default
    assert found.forward == IOParameters(**off | on)
    assert found.backward == PERFECT
    assert found.device is None


def test_pulses_without_noise_and_devices_without_spread():
    found = choose("ideal", ["device=ConstantStep", "device.dw_min_dtod=0", "device.dw_min_std=0"]).default
    assert found.forward.is_perfect
    assert found.device == ConstantStepDevice(dw_min_dtod=0.0, dw_min_std=0.0)


def test_layers_have_their_own_by_number_or_name_whatever_the_order():
    choice = choose("io", ["0.forward.out_noise=0.5", "features.3.device=PowStep", "forward.inp_res=0.1"])
    assert choice.of(0, "features.0").forward.out_noise == 0.5
    assert choice.of(0, "features.0").forward.inp_res == 0.1
    assert choice.of(1, "features.3").device.kind == "PowStep"
    assert choice.of(2, "features.6") == choice.default
    choice.check_layers(["features.0", "features.3"])
    with pytest.raises(UsageError, match=r"features\.3.*Did you mean features\.2"):
        choice.check_layers(["features.0", "features.2"])


def test_a_file_says_the_same(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'preset = "io"\n[forward]\nout_noise = 0.3\n[device]\nkind = "LinearStep"\ngamma_up = 0.2\n'
        '[layers."features.3"]\ndevice = "none"\n[layers.0.forward]\ninp_res = 0.1\n'
    )
    found = choose(str(path), ["forward.out_res=0.2"])
    settings = ["forward.out_noise=0.3", "device=LinearStep", "device.gamma_up=0.2", "forward.out_res=0.2"]
    assert found.default == choose("io", settings).default
    assert found.of(0, "features.0").forward.inp_res == 0.1
    assert found.of(1, "features.3").device is None


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("gokmen", [], "--physics is one of ideal, io.*not “gokmen”"),
        ("io", ["forward.out_nois=1"], "Did you mean out_noise"),
        ("io", ["forwrd.out_noise=1"], "Did you mean forward"),
        ("io", ["out_noise=1"], "needs a group and a field"),
        ("io", ["forward.out_noise"], "needs a name, “=” and a value"),
        ("io", ["forward.out_noise=much"], "forward.out_noise needs a number; not “much”"),
        ("io", ["forward.out_noise=-1"], "out_noise needs a number from 0; it is -1"),
        ("io", ["forward.out_noise=nan"], "out_noise needs a finite number"),
        ("io", ["forward.inp_bound=2"], "inp_bound is 1 where there is noise management"),
        ("io", ["forward.noise_management=ABSMAX"], "Did you mean ABS_MAX"),
        ("io", ["backward.bound_management=ITERATIVE"], "backward.bound_management is NONE"),
        ("io", ["device.dw_min=0.1"], "needs a device, and there is none.*gokmen-vlasov"),
        ("io", ["device=Constant"], "Did you mean ConstantStep"),
        ("gokmen-vlasov", ["device.dw_min=0"], "device.dw_min needs a number above 0"),
        ("gokmen-vlasov", ["device.w_min=0.1"], "0 has to lie between device.w_min and device.w_max"),
        ("gokmen-vlasov", ["device.gamma_up=1"], "A field of “device” is one of"),
        ("gokmen-vlasov", ["device.lifetime=0.5"], "device.lifetime is a number of mini-batches above 1"),
        ("gokmen-vlasov", ["device.corrupt_devices_prob=2"], "share from 0 to 1"),
        ("gokmen-vlasov", ["update.desired_bl=0"], "update.desired_bl is a number of pulses from 1 to 64"),
        ("gokmen-vlasov", ["update.desired_bl=2.5"], "needs a whole number"),
        ("gokmen-vlasov", ["device.perfect_bias=perhaps"], "true or false"),
        ("missing.toml", [], "Can't read --physics missing.toml"),
    ],
)
def test_what_can_t_be_is_refused_and_said(name, settings, said):
    with pytest.raises(UsageError, match=said):
        choose(name, settings)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("forward = 3", "“forward” is a table"),
        ("[forwrd]\n", "Did you mean forward"),
        ("[forward]\nout_noise = ", "is no TOML file"),
        ("[layers.0]\nfoo = 1", "A field of layers.0"),
        ('preset = "foo"', "preset is one of"),
        ("[forward]\nis_perfect = 3", "is_perfect is true or false"),
    ],
)
def test_a_file_that_can_t_be_is_refused_and_named(tmp_path, content, said):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(UsageError, match=said) as raised:
        choose(str(path))
    assert str(path) in str(raised.value)


def test_a_configuration_keeps_it_and_comes_back():
    config = resolve(physics="ecram", physics_set=["0.forward.out_noise=0.5"])
    assert config.weight_decay == 0  # devices know nothing of it
    assert TrainConfig.from_dict(config.as_dict()) == config
    assert resolve(physics="ideal") == resolve()
    assert resolve(physics="io").weight_decay == resolve().weight_decay
    assert resolve(physics=Physics(device=ConstantStepDevice())).physics == PhysicsChoice(
        Physics(device=ConstantStepDevice())
    )


@pytest.mark.parametrize("device", DEVICES.values())
def test_every_device_comes_back_from_its_values(device):
    physics = Physics(device=device(dw_min=0.003), update=UpdateParameters(desired_bl=7))
    assert Physics.from_dict(physics.as_dict()) == physics


def test_weight_decay_and_a_fabric_without_physics_are_refused():
    with pytest.raises(UsageError, match=r"--weight-decay is a digital optimizer's.*device\.lifetime"):
        resolve(physics="ecram", weight_decay=1e-4)
    check_physics("batched", None)
    check_physics("serial", chosen_physics("io"))
    with pytest.raises(UsageError, match="batched has ideal tiles only"):
        check_physics("batched", chosen_physics("io"))
    with pytest.raises(UsageError, match="physics_set changes a preset or a file"):
        chosen_physics(Physics(), ["forward.out_noise=1"])
