#!/usr/bin/env python
"""Draw the figures of docs/physics.md with the program's own products, devices and pulses.

scripts/draw_physics.py            # writes docs/physics/*.svg
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rapa_dist.physics.devices import draw_devices
from rapa_dist.physics.draws import Draws, Kind, key_of
from rapa_dist.physics.parameters import IOParameters
from rapa_dist.physics.periphery import Product
from rapa_dist.physics.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 4  # devices in a panel
DRAWS = Draws(key_of(0, 0, 0))
QUIET = IOParameters(out_noise=0.0, out_bound=20.0, bound_management="NONE")


def converters(axes: Any) -> None:
    """Draw what comes out of one weight of 0.5 over one input, beside a constant input of 1 that sets the scale."""
    inputs = np.linspace(-1, 1, 2001, dtype=np.float32)
    vectors = np.stack([inputs, np.ones_like(inputs)], axis=1)
    weights = np.array([[0.5], [0.0]], np.float32)
    for label, io in (
        ("7 and 9 bit (io)", QUIET),
        ("4 bit in", replace(QUIET, inp_res=1 / 14)),
        ("6 bit out, bound 0.4", replace(QUIET, out_res=1 / 62, out_bound=0.4)),
    ):
        axes.plot(inputs, Product(io, DRAWS).multiply(vectors, weights, 0)[0][:, 0], label=label, linewidth=1)
    axes.set(xlabel="input x", ylabel="output, weight 0.5", title="Converters")
    axes.legend(fontsize=7)


def noise(axes: Any) -> None:
    """Draw the distribution of an output with each noise alone."""
    rng = np.random.default_rng(0)
    vector, weights = rng.normal(size=64).astype(np.float32), (rng.normal(size=(64, 1)) * 0.1).astype(np.float32)
    vectors = np.tile(vector, (20_000, 1))
    off = IOParameters(inp_res=0.0, out_res=0.0, out_bound=0.0, out_noise=0.0, bound_management="NONE")
    exact = float(vector @ weights[:, 0])
    for label, fields in (
        ("out_noise = 0.1", {"out_noise": 0.1}),
        ("inp_noise = 0.05", {"inp_noise": 0.05}),
        ("w_noise = 0.02, ADDITIVE_CONSTANT", {"w_noise": 0.02, "w_noise_type": "ADDITIVE_CONSTANT"}),
        ("w_noise = 0.05, PCM_READ", {"w_noise": 0.05, "w_noise_type": "PCM_READ"}),
    ):
        found = Product(replace(off, **fields), DRAWS).multiply(vectors, weights, 1)[0][:, 0] - exact
        axes.hist(found, bins=80, histtype="step", density=True, label=label)
    axes.set(xlabel="output − exact", ylabel="density", title="Noise of a product of 64 inputs")
    axes.legend(fontsize=7)


def bound_management(axes: Any) -> None:
    """Draw what bound management makes of outputs beyond the bound."""
    inputs = np.linspace(0, 8, 801, dtype=np.float32)
    vectors, weights = np.ones((len(inputs), 64), np.float32), np.full((64, 1), 1 / 64, np.float32)
    for label, management in (("NONE", "NONE"), ("ITERATIVE", "ITERATIVE")):
        io = replace(QUIET, out_bound=2.0, noise_management="NONE", bound_management=management)
        scaled = [Product(io, DRAWS).multiply(vectors[:1], weights * factor, 0)[0][0, 0] for factor in inputs]
        axes.plot(inputs, scaled, label=f"bound_management = {label}", linewidth=1)
    axes.set(xlabel="exact output", ylabel="output, out_bound = 2", title="Bound management")
    axes.legend(fontsize=7)


def voltage_drop(axes: Any) -> None:
    """Draw how much voltage is lost in arrays of more and more inputs."""
    sizes = np.arange(16, 1025, 16)
    for scale in (0.5, 1.0, 2.0):
        io = IOParameters(
            inp_res=0.0, out_res=0.0, out_bound=0.0, out_noise=0.0, bound_management="NONE", ir_drop=scale
        )
        found = []
        for n in sizes:
            vectors, weights = np.ones((1, n), np.float32), np.full((n, 1), 0.3, np.float32)
            found.append(Product(io, DRAWS).multiply(vectors, weights, 0)[0][0, 0] / (0.3 * n))
        axes.plot(sizes, found, label=f"ir_drop = {scale:g}", linewidth=1)
    axes.set(xlabel="inputs, all at 1, weights 0.3", ylabel="output / exact", title="Voltage drop")
    axes.legend(fontsize=7)


def response(preset: str) -> Callable[[Any], None]:
    """Return what draws pulses up and down, given to some devices of a preset."""

    def draw(axes: Any) -> None:
        device = PRESETS[preset].device
        assert device is not None
        devices = draw_devices(device, (SHOWN, 1), DRAWS, bias=False)
        count = int(2.5 / device.dw_min) if device.dw_min < 0.01 else 400
        stored, places = np.zeros(SHOWN, np.float32), np.arange(SHOWN)
        seen = []
        for number in range(2 * count):
            numbers = DRAWS.normal(Kind.PULSES, number, np.array([0]), 2 * SHOWN)[0]
            devices.pulse(stored, places, np.full(SHOWN, number < count), numbers[:SHOWN])
            seen.append(stored + devices.write_noise * numbers[SHOWN:])
        every = max(1, count // 500)
        axes.plot(np.arange(2 * count)[::every], np.array(seen)[::every], linewidth=0.6)
        axes.axvline(count, color="0.6", linewidth=0.6)
        axes.set(xlabel=f"{count:,} pulses up, as many down", ylabel="weight", title=f"{device.kind} ({preset})")

    return draw


FIGURES: dict[str, Callable[[Any], None]] = {
    "converters": converters,
    "noise": noise,
    "bound-management": bound_management,
    "voltage-drop": voltage_drop,
    **{preset: response(preset) for preset, physics in PRESETS.items() if physics.device is not None},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "physics")
    folder = parser.parse_args().out

    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "physics"  # the same file every time
    for name, draw in FIGURES.items():
        figure = Figure(figsize=(4.5, 3), layout="constrained")
        draw(figure.subplots())
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        print(folder / f"{name}.svg")


if __name__ == "__main__":
    main()
