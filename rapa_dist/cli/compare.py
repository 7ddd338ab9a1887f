"""`rapa-dist compare`: whether two runs are the same, and if not, how far they are apart."""

from pathlib import Path
from typing import Any

import click

from rapa_dist.cli.columns import in_columns, printable
from rapa_dist.cli.output import emit, json_option, show
from rapa_dist.cli.types import path


@click.command()
@click.argument("a", type=path)
@click.argument("b", type=path)
@click.option(
    "--checkpoint",
    metavar="NAME",
    default="newest",
    show_default=True,
    help="Of a run: newest, best, or a checkpoint's name.",
)
@json_option
def compare(a: Path, b: Path, checkpoint: str, as_json: bool) -> None:
    """Compare A with B: configurations, images, curves and weights. Each is a run directory or a checkpoint.

    Weights are identical if all of them have the same bits; wall times and places are left out of it. The exit code is
    0 whether they are or not; with --json, weights_identical says so.

    \b
    Examples:
      rapa-dist compare runs/one runs/other
      rapa-dist compare runs/one runs/other --checkpoint best --json
      rapa-dist compare runs/one/checkpoints/step-000000500-epoch-00001.safetensors runs/one
    """  # noqa: D301 — click wants the backspace itself
    from rapa_dist.runs.comparison import compare as of

    result = of(a, b, checkpoint)
    if as_json:
        emit(result)
        return
    for side in ("a", "b"):
        about = result[side]
        weights = about["weights_sha256"][:16]
        show(f"{side.upper():14} {printable(about['path'])}, {about['checkpoint']}, weights {weights}…")
    show(f"configuration  {_settings(result['configuration'])}")
    show(f"images         {_images(result)}")
    show(f"curves         {_curves(result['curves'])}")
    show(f"weights        {'identical, bit by bit' if result['weights_identical'] else 'differ:'}")
    if not result["weights_identical"]:
        _show_tensors(result["tensors"])


def _settings(differing: dict[str, list[Any]]) -> str:
    return "; ".join(f"{name}: {one} → {other}" for name, (one, other) in differing.items()) or "identical"


def _images(result: dict[str, Any]) -> str:
    from rapa_dist.data.classes import listed

    fingerprints = [result[side]["data_fingerprint"] for side in ("a", "b")]
    text = f"identical, fingerprint {fingerprints[0]}"
    if not result["same_images"]:
        text = f"differ: fingerprint {fingerprints[0]} → {fingerprints[1]}"
    if result["classes"]:
        text += f"; classes {listed(result['classes'][0])} → {listed(result['classes'][1])}"
    return text


def _curves(curves: dict[str, Any]) -> str:
    from rapa_dist.console import counted

    if "not_compared_because" in curves:
        return f"not compared: {curves['not_compared_because']}"
    both, same = min(curves["epochs"]), curves["identical_epochs"]
    alike = len(set(curves["epochs"])) == 1
    text = (
        "no epoch in common"
        if not both
        else f"identical in {'all ' * (same == both and alike)}{counted(same, 'epoch')}"
    )
    if not alike:
        text += f"; A has {counted(curves['epochs'][0], 'epoch')}, B {curves['epochs'][1]:,}"
    if curves["differ_from_epoch"]:
        text += "; differ from epoch: " + ", ".join(f"{name} {e}" for name, e in curves["differ_from_epoch"].items())
    if "test_error_percent" in curves["differ_from_epoch"]:
        last = " → ".join(f"{value:.2f} %" for value in curves["test_error_percent"])
        text += f"; last test error {last}, largest difference {curves['largest_test_error_difference_percent']:.2f} "
        text += f"points in epoch {curves['largest_difference_epoch']}"
    return text


def _show_tensors(tensors: list[dict[str, Any]]) -> None:
    rows = [["tensor", "shape", "differing", "max |Δ|", "‖Δ‖/‖A‖"]]
    for tensor in tensors:
        one, other = ("–" if shape is None else "×".join(map(str, shape)) for shape in tensor["shapes"])
        if tensor["identical"]:
            figures = ["identical", "", ""]
        elif tensor["differing"] is None:
            figures = ["another shape", "", ""]
        else:
            relative = "–" if tensor["relative_norm"] is None else f"{tensor['relative_norm']:.3g}"
            figures = [f"{tensor['differing']:,}", f"{tensor['largest_difference']:.3g}", relative]
        rows.append([tensor["name"], one if one == other else f"{one} → {other}", *figures])
    show(in_columns(rows, right=(2, 3, 4)))
