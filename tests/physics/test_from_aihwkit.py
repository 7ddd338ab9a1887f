"""Configurations of aihwkit: taken over whole, or what can't be is named; the real ones, too, where it is installed."""

import enum
from dataclasses import dataclass, field

import pytest

from rapa_dist.config import chosen_physics
from rapa_dist.errors import UsageError
from rapa_dist.physics.from_aihwkit import from_aihwkit, is_aihwkit
from rapa_dist.physics.parameters import ConstantStepDevice as Ours
from rapa_dist.physics.parameters import IOParameters, Physics, UpdateParameters
from rapa_dist.physics.presets import PRESETS


class Management(enum.Enum):  # aihwkit's have values like "AbsMax"
    NONE = "None"
    ABS_MAX = "AbsMax"
    AVERAGE_ABS_MAX = "AverageAbsMax"
    ITERATIVE = "Iterative"


class Pulses(enum.Enum):
    NONE = "None"
    STOCHASTIC_COMPRESSED = "StochasticCompressed"


@dataclass
class IO:
    is_perfect: bool = False
    out_noise: float = 0.06
    inp_asymmetry: float = 0.0
    noise_management: Management = Management.ABS_MAX
    bound_management: Management = Management.ITERATIVE


@dataclass
class Update:
    desired_bl: int = 31
    pulse_type: Pulses = Pulses.STOCHASTIC_COMPRESSED
    d_sparsity: bool = False


@dataclass
class ConstantStepDevice:
    construction_seed: int = 0
    dw_min: float = 0.001
    dw_min_dtod_log_normal: bool = False
    w_max: int = 1  # people write 1, too


@dataclass
class OwnPresetDevice(ConstantStepDevice):
    dw_min: float = 0.002


@dataclass
class IdealDevice:
    construction_seed: int = 0


@dataclass
class Piecewise:
    dw_min: float = 0.001


@dataclass
class Config:
    forward: IO = field(default_factory=IO)
    backward: IO = field(default_factory=IO)
    update: Update = field(default_factory=Update)
    device: object = field(default_factory=ConstantStepDevice)


for each in (Config, ConstantStepDevice):
    each.__module__ = "aihwkit.stand_in"


def test_everything_that_there_is_here_is_taken_over():
    config = Config(
        forward=IO(out_noise=0.2, noise_management=Management.NONE),
        update=Update(desired_bl=7),
        device=OwnPresetDevice(construction_seed=5),
    )
    assert is_aihwkit(config)
    expected = Physics(
        forward=IOParameters(out_noise=0.2, noise_management="NONE"),
        backward=IOParameters(bound_management="NONE"),
        update=UpdateParameters(desired_bl=7),
        device=Ours(dw_min=0.002, w_max=1.0),
    )
    assert from_aihwkit(config) == expected
    assert chosen_physics(config).default == expected


def test_an_ideal_device_is_none():
    assert from_aihwkit(Config(device=IdealDevice(), update=Update(pulse_type=Pulses.NONE))).device is None


def test_all_that_can_t_be_taken_over_is_named():
    config = Config(
        forward=IO(inp_asymmetry=0.1, noise_management=Management.AVERAGE_ABS_MAX),
        update=Update(d_sparsity=True, pulse_type=Pulses.NONE),
        device=ConstantStepDevice(dw_min_dtod_log_normal=True),
    )
    with pytest.raises(UsageError) as raised:
        from_aihwkit(config)
    for part in (
        "forward.inp_asymmetry=0.1",
        "forward.noise_management=AVERAGE_ABS_MAX",
        "update.d_sparsity",
        "device.dw_min_dtod_log_normal",
        "update.pulse_type=NONE with a device",
    ):
        assert part in str(raised.value)
    with pytest.raises(UsageError, match=r"device=Piecewise.*there are ConstantStep"):
        from_aihwkit(Config(device=Piecewise()))
    with pytest.raises(UsageError, match=r"takes a SingleRPUConfig.*IO has no forward and no backward"):
        from_aihwkit(IO())


def test_aihwkit_s_own_presets_are_those_here():
    presets = pytest.importorskip("aihwkit.simulator.presets")
    for name, theirs in {
        "idealized": presets.IdealizedPreset,
        "gokmen-vlasov": presets.GokmenVlasovPreset,
        "ecram": presets.EcRamPreset,
        "capacitor": presets.CapacitorPreset,
        "reram-es": presets.ReRamESPreset,
    }.items():
        assert from_aihwkit(theirs()) == PRESETS[name]
    configs = pytest.importorskip("aihwkit.simulator.configs")
    with pytest.raises(UsageError, match="noise_model; modifier; drift_compensation"):
        from_aihwkit(configs.InferenceRPUConfig())
