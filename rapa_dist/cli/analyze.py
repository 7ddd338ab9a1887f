"""`rapa-dist analyze`: what a trained network is made of, and what it withstands."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from rapa_dist.cli.images import where_options
from rapa_dist.cli.output import emit, json_option, show
from rapa_dist.cli.types import path
from rapa_dist.errors import UsageError

_run_dir = click.argument("run_dir", type=path)
_checkpoint = click.option(
    "--checkpoint", metavar="NAME", default="newest", show_default=True, help="newest, best, or a checkpoint's name."
)
_limit_test = click.option("--limit-test", type=int, metavar="N", help="Use N test images only.  [default: the run's]")
_where = where_options("Where the run's images are now.")
_plot = click.option("--plot", type=path, metavar="FILE.svg", help="Draw it, too.")


@click.group()
def analyze() -> None:
    """Look into a trained network: similarity of tiles, weights, votes, reduction, attacks; and into the theory."""


@analyze.command()
@_run_dir
@_checkpoint
@_plot
@json_option
def similarity(run_dir: Path, checkpoint: str, plot: Path | None, as_json: bool) -> None:
    """Print how similar the filters of a layer's tiles are: S, 1 where all are alike.

    Every tile starts from random filters of its own, and S is low as long as much of them is there. So beside S stand
    the projection of the tiles on their own starts (1 before training; what they have learnt along it counts in), what
    weight decay alone would have left of the start, and S of the rest: of what they have learnt but along the start.
    """
    from rapa_dist.analysis.learnt import similarities_of
    from rapa_dist.analysis.plots import plot_similarity
    from rapa_dist.coordinator.run_directory import RunDirectory
    from rapa_dist.layout import machine_of

    _check_plot(plot)
    directory = RunDirectory(run_dir)
    found = directory.find_checkpoint(checkpoint)
    trained = directory.read_checkpoint(found)
    if all(len(of_layer) < 2 for of_layer in trained.kernels):
        raise UsageError(f"The run in {run_dir} has one tile per layer: nothing to compare. Give a tiled run.")
    result = similarities_of(trained)
    widest = max(map(len, trained.arrays))

    def draw(target: Path) -> None:
        plot_similarity(target, trained.kernels, machine_of(trained.config).arrays)

    with _drawn(plot, draw):
        if as_json:
            emit({"run_dir": str(run_dir), "checkpoint": found.stem, "layers": list(trained.arrays), **result})
        else:
            rows = zip(trained.arrays, trained.kernels, *result.values(), strict=True)
            for name, kernels, value, along, decayed, rest in rows:
                shown = "one tile" if value is None else f"S = {value:.4f}"
                if along is not None and decayed is not None:
                    shown += (
                        f"  {100 * along:.0f} % along the random start, of which decay alone leaves "
                        f"{100 * decayed:.0f} %; S of the rest = {rest:.4f}"
                    )
                show(f"{name:<{widest}}  {len(kernels):4} tiles  {shown}")


@analyze.command()
@_run_dir
@_checkpoint
@_plot
@json_option
def weights(run_dir: Path, checkpoint: str, plot: Path | None, as_json: bool) -> None:
    """Print where weights lie between the bounds of their devices: 0 at the smallest, 1 at the largest."""
    from rapa_dist.analysis.plots import plot_positions
    from rapa_dist.analysis.weights import weights_of
    from rapa_dist.coordinator.run_directory import RunDirectory

    _check_plot(plot)
    directory = RunDirectory(run_dir)
    found = directory.find_checkpoint(checkpoint)
    trained = directory.read_checkpoint(found)
    result = weights_of(trained)
    widest = max(len(layer["layer"]) for layer in result["layers"])

    with _drawn(plot, lambda target: plot_positions(target, trained)):
        if as_json:
            emit({"run_dir": str(run_dir), "checkpoint": found.stem, **result})
        else:
            for layer in result["layers"]:
                low, median, high = layer["position_quartiles"]
                stuck = f", {layer['stuck']:,} of them stuck" if layer["stuck"] else ""
                show(
                    f"{layer['layer']:<{widest}}  {layer['weights']:9,} weights on {layer['device']}{stuck}  "
                    f"{layer['at_bound_percent']:.2f} % at a bound; half of them between {low:.3f} and {high:.3f}, "
                    f"median {median:.3f}"
                )


@analyze.command()
@_run_dir
@click.option("--votes", type=int, default=9, show_default=True, help="Most votes on an image.")
@_checkpoint
@_limit_test
@_where
@_plot
@json_option
def voting(
    run_dir: Path,
    votes: int,
    checkpoint: str,
    limit_test: int | None,
    where: Any,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Print the test error by the majority of 1, 2, … random assignments."""
    from rapa_dist.analysis.plots import plot_curves
    from rapa_dist.analysis.voting import voting as of_run

    _check_plot(plot)
    result = of_run(run_dir, votes=votes, checkpoint=checkpoint, limit_test=limit_test, where=where)

    def draw(target: Path) -> None:
        curve = ("majority", result["votes"], result["test_error_percent"])
        plot_curves(target, [curve], x="votes", y="test error (%)", title="Voting over random assignments")

    with _drawn(plot, draw):
        if as_json:
            emit(result)
        else:
            for number, error in zip(result["votes"], result["test_error_percent"], strict=True):
                show(f"{number:3} vote{'s' if number > 1 else ' '}  test error {error:.2f} %")
            show(f"single votes, mean  {result['mean_single_test_error_percent']:.2f} %")


@analyze.command()
@_run_dir
@click.option("--by", default="norm", show_default=True, metavar="HOW", help="norm, or wins (of the max pooling).")
@click.option("--output", type=path, metavar="FILE.pt", help="Save PyTorch's state dict there.")
@_checkpoint
@click.option("--limit-train", type=int, metavar="N", help="Training images to count wins on.  [default: 2000]")
@_limit_test
@_where
@json_option
def reduce(
    run_dir: Path,
    by: str,
    output: Path | None,
    checkpoint: str,
    limit_train: int | None,
    limit_test: int | None,
    where: Any,
    as_json: bool,
) -> None:
    """Make one kernel matrix per layer of all tiles, and test it as an ordinary PyTorch network.

    Of every output channel the filter of one tile is taken: the one with the largest norm, or the one that most often
    wins the max pooling on training images. Layers that no max pooling follows go by the norm in both cases.
    """
    from rapa_dist.analysis.reduction import reduce_run

    result = reduce_run(
        run_dir,
        by=by,
        checkpoint=checkpoint,
        output=output,
        limit_train=limit_train,
        limit_test=limit_test,
        where=where,
    )
    if as_json:
        emit(result)
        return
    show(
        f"test error {result['tiled_test_error_percent']:.2f} % tiled, "
        f"{result['test_error_percent']:.2f} % reduced by {by}"
    )
    if by == "wins" and (others := [name for name, how in result["by_layer"].items() if how != by]):
        show(f"by norm, as no max pooling follows: {', '.join(others)}")
    if output is not None:
        show(f"state dict   {output}")


@analyze.command()
@_run_dir
@click.option("--snr", metavar="DB,DB,…", help="Signal-to-noise ratios in dB.  [default: 15,20,25,30,33,36,40,45,50]")
@click.option(
    "--baseline",
    type=path,
    metavar="RUN_DIR",
    help="An untiled run of the same images to compare with: with --checkpoint best its best one, else its newest.",
)
@click.option(
    "--gradient-assignments", type=int, default=1, show_default=True, help="Random assignments the attacker averages."
)
@click.option(
    "--judge-assignments",
    type=int,
    metavar="N",
    help="Random assignments that judge.  [default: 4; 1 where all are the same]",
)
@click.option("--same-assignment", is_flag=True, help="Judge under the attacker's own assignment.")
@click.option("--clip", is_flag=True, help="Cut attacked pixels off at 0 and 1.")
@_checkpoint
@_limit_test
@_where
@_plot
@json_option
def attack(
    run_dir: Path,
    snr: str | None,
    baseline: Path | None,
    gradient_assignments: int,
    judge_assignments: int | None,
    same_assignment: bool,
    clip: bool,
    checkpoint: str,
    limit_test: int | None,
    where: Any,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Attack by the fast gradient sign method, and print the accuracy on images that were classified correctly."""
    strengths = None if snr is None else _numbers("--snr", snr)
    from rapa_dist.analysis.attack import DEFAULT_SNR_DB, gap_closed
    from rapa_dist.analysis.attack import attack as on_run
    from rapa_dist.analysis.plots import plot_curves
    from rapa_dist.console import stderr
    from rapa_dist.experiments.verdicts import is_at_chance

    _check_plot(plot)
    of_baseline = "best" if checkpoint == "best" else "newest"
    if baseline is not None:
        _check_baseline(run_dir, checkpoint, baseline, of_baseline)
    settings: dict[str, Any] = {"snr_db": strengths or DEFAULT_SNR_DB, "checkpoint": checkpoint, "clip": clip}
    settings |= {"limit_test": limit_test, "where": where}
    result = on_run(
        run_dir,
        gradient_assignments=gradient_assignments,
        judge_assignments=judge_assignments,
        same_assignment=same_assignment,
        **settings,
    )
    label = f"{result['scheme']} {','.join(map(str, result['tiles']))}"
    curves = [(label, result["snr_db"], result["accuracy_percent"])]
    if baseline is not None:
        reference = on_run(baseline, **(settings | {"checkpoint": of_baseline}))
        result["baseline"] = reference
        result["gap_closed_percent"] = gap_closed(result["accuracy_percent"], reference["accuracy_percent"])
        curves.append(("untiled", reference["snr_db"], reference["accuracy_percent"]))
    for run, found in ((run_dir, result), (baseline, result.get("baseline"))):
        if found is not None and is_at_chance(found["clean_accuracy_percent"], found["chance_percent"]):
            stderr.print(
                f"Warning: {run} classifies {found['clean_accuracy_percent']:.1f} % correctly, and guessing would "
                f"{found['chance_percent']:.1f} %: what an attack does to so few images says little.",
                markup=False,
            )

    def draw(target: Path) -> None:
        title, y = "Fast gradient sign method", "still correct, of what was correct before (%)"
        plot_curves(target, curves, x="signal-to-noise ratio (dB)", y=y, title=title)

    with _drawn(plot, draw):
        if as_json:
            emit(result)
        else:
            _print_attack(result)


def _print_attack(result: dict[str, Any]) -> None:
    without = f"accuracy without attack {result['clean_accuracy_percent']:.2f} %"
    if "baseline" in result:
        without += f", of the baseline {result['baseline']['clean_accuracy_percent']:.2f} %"
    show(f"{without}; under attack, of the images that were classified correctly before:")
    for row, ratio in enumerate(result["snr_db"]):
        line = f"{ratio:6.1f} dB  accuracy {result['accuracy_percent'][row]:6.2f} %"
        if "baseline" in result:
            gap = result["gap_closed_percent"][row]
            share = "no gap" if gap is None else f"{gap:.1f} % of the gap closed"
            line += f"  baseline {result['baseline']['accuracy_percent'][row]:6.2f} %  {share}"
        show(line)


@analyze.command()
@click.option("--tiles", type=int, default=3, show_default=True, help="n_t, replicas of every parameter.")
@click.option("--side", type=int, default=2, show_default=True, help="Features: images of side × side grey pixels.")
@click.option("--epochs", type=int, default=20, show_default=True, help="Passes over the images.")
@click.option("--images", type=int, default=500, show_default=True, help="Images of two classes, at most.")
@click.option("--lr", type=float, default=0.02, show_default=True, help="Learning rate λ.")
@click.option("--samples", type=int, metavar="N", help="Estimate R from N choices.  [default: enumerate all]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything that is drawn.")
@click.option("--dataset", metavar="NAME", default="builtin", show_default=True, help="Where the images are from.")
@click.option("--data-dir", type=path, help="Where data sets are.")
@_plot
@json_option
def regularizer(
    tiles: int,
    side: int,
    epochs: int,
    images: int,
    lr: float,
    samples: int | None,
    seed: int,
    dataset: str,
    data_dir: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Train a tiled logistic regression and print ⟨L⟩ = L(θ̄) + R, the regulariser R, and its Taylor form."""
    from rapa_dist.analysis.plots import plot_curves
    from rapa_dist.analysis.regularizer import along_training
    from rapa_dist.data.load import check_name

    _check_plot(plot)
    result = along_training(
        n_tiles=tiles,
        side=side,
        epochs=epochs,
        images=images,
        learning_rate=lr,
        samples=samples,
        seed=seed,
        dataset=check_name(dataset),
        data_dir=data_dir,
    )

    def draw(target: Path) -> None:
        curves = [(label, result["epochs"], result[name]) for name, label in _REGULARIZER_CURVES]
        plot_curves(target, curves, x="epoch", y="sum over images", title="The regulariser along a training run")

    with _drawn(plot, draw):
        if as_json:
            emit(result)
        else:
            errors = result["regularizer_standard_error"]
            show(f"Sums over {result['images']} images{'; R ± its standard error' if errors else ''}")
            show("epoch        ⟨L⟩      L(θ̄)         R  R, 2nd order")
            for row, epoch in enumerate(result["epochs"]):
                numbers = (result[name][row] for name in ("loss", "loss_of_mean", "regularizer", "taylor"))
                spread = f"  R ± {errors[row]:.3f}" if errors else ""
                show(f"{epoch:5} {' '.join(f'{number:10.3f}' for number in numbers)}{spread}")


_REGULARIZER_CURVES = (
    ("loss", "⟨L(θˢ)⟩"),
    ("loss_of_mean", "L(θ̄)"),
    ("regularizer", "R"),
    ("taylor", "R to second order"),
)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    """Parse "20,30.5"."""
    numbers = []
    for part in text.split(","):
        try:
            numbers.append(float(part))
        except ValueError:
            raise UsageError(
                f"{option} needs numbers with commas between, like 20,30,40; “{part}” in “{text}” is not a number."
            ) from None
    return tuple(numbers)


@contextmanager
def _drawn(plot: Path | None, draw: Callable[[Path], None]) -> Iterator[None]:
    """Draw a plot, if one is wanted, after the numbers are shown, and also if they can't be."""
    from rapa_dist.console import stderr

    try:
        yield
    finally:
        if plot is not None:
            draw(plot)
            stderr.print(f"wrote {plot}", markup=False)


def _check_plot(path: Path | None) -> None:
    from rapa_dist.analysis.plots import check_can_plot
    from rapa_dist.files import check_target

    check_target("--plot", path)
    if path is not None:
        check_can_plot()


def _check_baseline(run_dir: Path, checkpoint: str, baseline: Path, of_baseline: str) -> None:
    """Read the checkpoints of both runs, and raise an error unless they can be compared."""
    from rapa_dist.coordinator.run_directory import RunDirectory

    config = RunDirectory(baseline).config
    if config.tiled:
        raise UsageError(
            f"--baseline needs an untiled run; the one in {baseline} has {','.join(map(str, config.tiles))} tiles. "
            "Train one with --scheme none."
        )
    run, reference = (
        directory.read_checkpoint(directory.find_checkpoint(which))
        for directory, which in ((RunDirectory(run_dir), checkpoint), (RunDirectory(baseline), of_baseline))
    )
    if run.data_fingerprint != reference.data_fingerprint:
        raise UsageError(
            f"--baseline needs a run of the same images; the one in {baseline} has others of {config.dataset} than the "
            f"one in {run_dir} has of {run.config.dataset}. Train one with the same --dataset and limits."
        )
