"""The experiments as SVG, in the paper's form; drawn from results alone."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from rapa_dist.analysis.plots import plot_curves
from rapa_dist.experiments.cells import cells_of
from rapa_dist.experiments.tables import Results

_ALIKE = 0.1
"""S that the paper finds for `random`, and more; the figure goes up to this at least."""


def draw(experiment: str, results: Results, path: Path) -> bool:
    """Draw an experiment's figure, if there is something to draw; return whether there was."""
    return _FIGURES[experiment](results, path)


def _errors(experiment: str) -> Callable[[Results, Path], bool]:
    """Return what draws test error over epochs for every cell of a table."""

    def figure(results: Results, path: Path) -> bool:
        curves = []
        for cell in cells_of(experiment):
            found = results.of(cell)
            if found:
                errors = [mean(column) for column in zip(*(r["test_errors_percent"] for r in found), strict=True)]
                curves.append((cell.name, found[0]["epochs"], errors))
        if curves:
            plot_curves(path, curves, x="epoch", y="test error (%)", title="Test error while training", markers=False)
        return bool(curves)

    return figure


def _similarity(results: Results, path: Path) -> bool:
    """Draw S of the first layer at the end of training (Fig. 3 A has it over epochs)."""
    bars = []
    for cell in cells_of("figure3"):
        found = [r["similarity"][0] for r in results.of(cell, "similarity")]
        if found:
            bars.append((cell.name, mean(found)))
    if bars:
        from rapa_dist.analysis.plots import plot_bars

        plot_bars(
            path,
            bars,
            at_least=_ALIKE,
            y="similarity S, conv0",
            title="Similarity of the filters of a layer’s tiles",
        )
    return bool(bars)


def _attack(results: Results, path: Path) -> bool:
    """Draw accuracy over the signal-to-noise ratio (Fig. 4)."""
    curves = []
    for cell in cells_of("figure4"):
        found = results.of(cell, "attack")
        if found:
            accuracy = [mean(column) for column in zip(*(r["accuracy_percent"] for r in found), strict=True)]
            curves.append((cell.name, found[0]["snr_db"], accuracy))
    if curves:
        plot_curves(
            path,
            curves,
            x="signal-to-noise ratio (dB)",
            y="still correct, of what was correct before (%)",
            title="Fast gradient sign method",
        )
    return bool(curves)


def draw_regularizer(result: dict[str, Any], path: Path) -> None:
    """Draw the regulariser along a training run."""
    names = {"loss": "⟨L(θˢ)⟩", "loss_of_mean": "L(θ̄)", "regularizer": "R", "taylor": "R to second order"}
    curves = [(label, result["epochs"], result[name]) for name, label in names.items()]
    plot_curves(path, curves, x="epoch", y="sum over images", title="The regulariser along a training run")


_FIGURES: dict[str, Callable[[Results, Path], bool]] = {
    "table1": _errors("table1"),
    "table2": _errors("table2"),
    "figure3": _similarity,
    "figure4": _attack,
}
