"""Physics by name: aihwkit's presets (1.2.0, src/aihwkit/simulator/presets), with its numbers."""

from collections.abc import Mapping
from dataclasses import replace

from rapa_dist.physics.parameters import (
    ConstantStepDevice,
    ExpStepDevice,
    IOParameters,
    LinearStepDevice,
    Physics,
    PulsedDevice,
)

_FORWARD = IOParameters(out_bound=20.0, out_noise=0.1)  # PresetIOParameters
_BACKWARD = replace(_FORWARD, bound_management="NONE")


def _with(device: PulsedDevice | None) -> Physics:
    return Physics(forward=_FORWARD, backward=_BACKWARD, device=device)


IDEAL = "ideal"
PRESETS: Mapping[str, Physics] = {
    IDEAL: Physics(),
    "io": _with(None),
    "idealized": _with(ConstantStepDevice(dw_min=0.0002, up_down_dtod=0.0, w_max=1.0, w_min=-1.0)),
    "gokmen-vlasov": _with(ConstantStepDevice(dw_min=0.0016, w_max=1.0, w_min=-1.0)),
    "ecram": _with(
        LinearStepDevice(
            dw_min=0.002,
            dw_min_dtod=0.1,
            w_max=1.1724,
            w_max_dtod=0.05,
            w_min=-0.8276,
            w_min_dtod=0.05,
            gamma_up=0.1153,
            gamma_down=0.5085,
        )
    ),
    "capacitor": _with(
        LinearStepDevice(
            dw_min=0.005,
            dw_min_dtod=0.1,
            up_down_dtod=0.06,
            w_max=1.0,
            w_max_dtod=0.07,
            w_min=-1.0,
            w_min_dtod=0.07,
            gamma_up=0.05,
            gamma_down=0.05,
            gamma_up_dtod=0.01,
            gamma_down_dtod=0.01,
            mult_noise=False,
            lifetime=1e6,
            lifetime_dtod=0.3,
        )
    ),
    "reram-es": _with(
        ExpStepDevice(
            dw_min=0.00135,
            dw_min_dtod=0.2,
            dw_min_std=5.0,
            up_down=0.259359,
            up_down_dtod=0.05,
            w_max=1.0,
            w_min=-1.0,
            A_up=-1.18445,
            A_down=-0.081404,
            gamma_up=5.0,
            gamma_down=5.0,
            a=-0.5,
            b=-0.5,
            write_noise_std=75.0,
        )
    ),
}
DESCRIPTIONS: Mapping[str, str] = {
    IDEAL: "exact products and updates",
    "io": "converters of 7 and 9 bit and noise of the output; exact updates",
    "idealized": "as io, on devices with steps five times as small as they were wanted",
    "gokmen-vlasov": "as io, on resistive devices with 1,200 states",
    "ecram": "as io, on electro-chemical memory",
    "capacitor": "as io, on capacitors, which leak",
    "reram-es": "as io, on resistive memory whose steps depend exponentially on the weight",
}
"""Of each preset, for people."""
