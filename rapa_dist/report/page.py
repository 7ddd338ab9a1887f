"""The page: sections, tables and figures put together, in one file that needs no other."""

import shlex
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rapa_dist import __version__
from rapa_dist.console import counted
from rapa_dist.errors import RunDirectoryError, UsageError
from rapa_dist.files import write_whole
from rapa_dist.geometry import Pair
from rapa_dist.layout import machine_of
from rapa_dist.machine import TileArray
from rapa_dist.report import figures
from rapa_dist.report.content import Content, described, gather
from rapa_dist.report.elements import data_table, duration, escaped, fact_table, folded, known_sum, or_dash
from rapa_dist.report.filters import filter_norms, filter_row
from rapa_dist.report.frame import framed
from rapa_dist.report.likeness import similarity_section
from rapa_dist.report.style import SHEET
from rapa_dist.similarity import similarity

NAME = "report.html"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_OPEN_ROWS = 32  # rows of filters, or of a table, that are shown without being asked for
_TIMED = "Processor time is that of this machine."
_NOT_TIMED = "Processor time is not known tile by tile: on the fabric batched all tiles of a layer are one product."


def report(
    path: Path, *, output: Path | None = None, checkpoint: str = "newest", scaling: Path | None = None
) -> dict[str, Any]:
    """Write the report on a run and return what was written, and what is missing in it.

    Args:
        path: the run directory; its run may be under way.
        output: the HTML file to write; None for report.html in the run directory.
        checkpoint: "newest", "best" or a name: where the filters are taken from.
        scaling: a scaling.json; None for the one in the run directory, if there is one.

    Raises:
        UsageError: `output` does not end in .html, or `scaling` is no scaling.json.
        RunDirectoryError: this is no run directory, its metrics are damaged, or the file can't be written.
        CheckpointError: the checkpoint asked for is not there or not whole.
    """
    target = output if output is not None else path / NAME
    if target.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--output needs a name that ends in .html; it is {target}.")
    content = gather(path, checkpoint=checkpoint, scaling=scaling)
    text = render(content).encode(errors="backslashreplace")
    try:
        write_whole(target, text)
    except OSError as error:
        raise RunDirectoryError(f"Can't write {target}: {error.strerror}. Give another --output.") from error
    return {
        "run_dir": str(path),
        "report": str(target),
        "bytes": len(text),
        "epochs": len(content.metrics),
        "in_progress": content.under_way,
        "checkpoint": content.checkpoint_name,
        "missing": content.missing,
    }


def render(content: Content) -> str:
    """Return the page as HTML; what it can't show is added to `content.missing`."""
    sections = [
        ("curves", "Errors and loss", _curves(content)),
        ("time", "Device time and wall time", _time(content)),
        ("tiles", "Tiles and their load", _tiles(content)),
        ("filters", "Filters per tile", _filters(content)),
        ("similarity", "Similarity over time", similarity_section(content)),
        ("scaling", "Scaling", _scaling(content)),
        ("configuration", "Configuration", _configuration(content)),
        ("environment", "Environment", _environment(content)),
    ]
    shown = [(key, title, body) for key, title, body in sections if body]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in shown)
    body = "\n".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>\n{text}</section>'
        for key, title, text in shown
    )
    config = content.config
    about = (
        f"{config.dataset} · {','.join(map(str, config.tiles))} tiles · scheme {config.scheme} · "
        f"{config.pooling} pooling · {content.status}"
    )
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escaped(content.name)} · rapa-dist report</title>
<style>{SHEET}</style>
</head>
<body>
<header>
<p class="kicker">rapa-dist: training report</p>
<h1>{escaped(content.name)}</h1>
<p class="soft">{escaped(about)}</p>
{_cards(content)}
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{_notes(content)}
{body}
</main>
<footer><p>Written {made} by rapa-dist {__version__} from {escaped(content.path.resolve())}. Device time is what the
emulated arrays would take; wall time is what this program took.</p></footer>
</body>
</html>
"""


def _cards(content: Content) -> str:
    config, lines, best = content.config, content.metrics, content.best
    tiles, weights = len(machine_of(config).tiles), machine_of(config).n_weights
    cards = [("Tiles", f"{tiles:,}", f"{weights:,} weights on them")]
    if lines and best:
        last = lines[-1]
        device_s = known_sum(line.get("device_time_s") for line in lines)
        wall_s = known_sum(line["wall"].get("train_s") for line in lines)
        cards = [
            ("Best test error", f"{best['test_error_percent']:.2f} %", f"in epoch {best['epoch']:,}"),
            ("Last test error", f"{last['test_error_percent']:.2f} %", f"after {counted(last['epoch'], 'epoch')}"),
            ("Last train error", f"{last['train_error_percent']:.2f} %", f"loss {last['train_loss']:.4f}"),
            *cards,
            ("Device time", duration(device_s), "to train, on the emulated arrays"),
            ("Wall time", duration(wall_s), "to train, here"),
        ]
    items = "".join(f"<div><dt>{name}</dt><dd>{value}<small>{small}</small></dd></div>" for name, value, small in cards)
    return f'<dl class="cards">{items}</dl>'


def _notes(content: Content) -> str:
    if not content.missing:
        return ""
    items = "".join(f"<li>{escaped(note)}</li>" for note in content.missing)
    return f'<div class="note" role="note"><strong>Not in this report</strong><ul>{items}</ul></div>'


def _curves(content: Content) -> str:
    lines = content.metrics
    if not lines:
        return ""
    rows = [
        (
            line["epoch"],
            f"{line['learning_rate']:.4g}",
            f"{line['train_loss']:.4f}",
            f"{line['train_error_percent']:.2f}",
            f"{line['test_loss']:.4f}",
            f"{line['test_error_percent']:.2f}",
            or_dash(line["wall"].get("step_ms"), ".2f"),
        )
        for line in lines
    ]
    head = ("epoch", "λ", "train loss", "train error %", "test loss", "test error %", "wall time, ms/step")
    caption = (
        "Train error and loss are those of the augmented training images while the network learnt from them, test "
        "error and loss those after the epoch. Point at a curve for its values."
    )
    return framed(content, lambda: figures.curves(content), caption) + folded(
        f"{counted(len(lines), 'epoch')} as a table", data_table("Every epoch", head, rows)
    )


def _time(content: Content) -> str:
    lines = content.metrics
    if not lines:
        return ""
    walls = [line["wall"] for line in lines]
    steps = [wall["step_ms"] for wall in walls if wall.get("step_ms")]
    device, tests = ([line.get(key) for line in lines] for key in ("device_time_s", "test_device_time_s"))
    trained_s, tested_s = (known_sum(wall.get(key) for wall in walls) for key in ("train_s", "test_s"))
    facts = [
        ("Device time of an epoch’s training, and of its test", f"{duration(device[-1])}, {duration(tests[-1])}"),
        ("Device time of all training", duration(known_sum(device))),
        ("Device time of all tests", duration(known_sum(tests))),
        ("Device time of both", duration(known_sum(device) + known_sum(tests))),
        ("Wall time of all training", duration(trained_s)),
        ("Wall time of all tests", duration(tested_s)),
        ("Wall time of both", duration(trained_s + tested_s)),
        ("Wall time of a step, median of the epochs", f"{median(steps):.2f} ms" if steps else "–"),
    ]
    chart = ""
    if steps:
        caption = "Wall time depends on the machine and on what else it does; device time only on rows and tiles."
        chart = framed(content, lambda: figures.step_times(content), caption)
    return fact_table(facts) + chart


def _tiles(content: Content) -> str:
    stats = content.tiles
    if stats is None:
        return ""
    timed = figures.timed(stats)
    head = ("layer", "tiles", "rows forward", "rows backward", "updates", "device s", "busy s", "util %", "imbalance")
    layers = [
        (
            total.name,
            f"{total.tiles:,}",
            f"{total.rows_forward:,}",
            f"{total.rows_backward:,}",
            f"{total.updates:,}",
            f"{total.device_time_s:.4g}",
            or_dash(total.busy_s if timed else None, ".4g"),
            or_dash(100 * total.utilisation if timed else None, ".1f"),
            or_dash(total.load_imbalance, ".4f"),
        )
        for total in (*stats.layers, stats.total)
    ]
    tile_head = ("tile", "rows forward", "rows backward", "updates", "device s", "busy s", "util %", "restarts", "‖K‖")
    tiles = [
        (
            tile.tile,
            f"{tile.rows_forward:,}",
            f"{tile.rows_backward:,}",
            f"{tile.updates:,}",
            f"{tile.device_time_s:.4g}",
            or_dash(tile.busy_s if timed else None, ".4g"),
            or_dash(100 * tile.utilisation if timed else None, ".1f"),
            f"{tile.restarts:,}",
            f"{tile.kernel_norm:.3f}",
        )
        for tile in stats.tiles
    ]
    caption = (
        "Load of every tile. A layer waits for the bar that is highest; imbalance is the rows of the busiest tile over "
        f"the mean. {_TIMED if timed else _NOT_TIMED} Point at a bar for its tile."
    )
    summary = (
        "Training and tests together, since the run was last started or resumed. Device time of a layer is that of its "
        "slowest tile over all mini-batches (where tiles take turns with extra rows, it waits up to a row per "
        "mini-batch longer), and of the machine the sum over its layers; busy is processor time; no rows go backward "
        "in a layer that takes the images, as nobody needs the errors of its input."
    )
    return (
        framed(content, lambda: figures.load(stats), caption)
        + data_table(summary, head, layers)
        + folded(f"{counted(len(tiles), 'tile')} as a table", data_table("Every tile", tile_head, tiles))
    )


def _filters(content: Content) -> str:
    checkpoint = content.checkpoint
    if checkpoint is None:
        return ""
    progress = checkpoint.progress
    rows, parts = [], []
    for array, kernels in zip(machine_of(content.config).arrays, checkpoint.kernels, strict=True):
        filters = array.filters(kernels)
        norms = filter_norms(filters)
        found = similarity(filters)
        rows.append(
            (
                array.name,
                f"{len(kernels):,}",
                f"{norms.shape[1]:,}",
                f"{norms.min():.3f}",
                f"{norms.mean():.3f}",
                f"{norms.max():.3f}",
                or_dash(found, ".4f"),
            )
        )
        parts.append(f"<h3>{escaped(array.name)}</h3>")
        geometry = array.passages[0]
        if array.index == 0 and array.k in (geometry.places, 3 * geometry.places):
            parts.append(_first_layer(filters, geometry.kernel))
        parts.append(_likeness(content, array, filters))
    head = ("layer", "tiles", "filters per tile", "smallest norm", "mean norm", "largest norm", "similarity S")
    when = f"after {counted(progress.step, 'step')}, {counted(progress.epoch, 'epoch')}"
    note = f"Checkpoint {content.checkpoint_name}: {when}. Norms leave the bias out."
    return data_table(note, head, rows) + "".join(parts)


def _first_layer(filters: Any, size: Pair) -> str:
    def row(tile: int) -> str:
        what = f"Filters of tile L0/T{tile:03d}, {filters.shape[2]} channels"
        source = filter_row(filters[tile], size)
        return f'<span>T{tile:03d}</span><img src="{source}" alt="{what}" title="{what}">'

    rows = [row(tile) for tile in range(len(filters))]
    shown = f'<div class="filters">{"".join(rows[:_OPEN_ROWS])}</div>'
    if rest := rows[_OPEN_ROWS:]:
        shown += folded(counted(len(rest), "more tile"), f'<div class="filters">{"".join(rest)}</div>')
    caption = (
        f"A row for each tile, a column for each output channel: {size[0]} × {size[1]} pixels. "
        "Each filter is scaled by its largest weight; mid-grey is 0."
    )
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _likeness(content: Content, array: TileArray, filters: Any) -> str:
    caption = (
        "Left: correlation coefficient of the filters of two tiles, mean over the output channels (S is the mean of "
        "all pairs). Right: the norm of every filter, bias left out."
        if len(filters) > 1
        else "The norm of every filter, bias left out. With one tile there is nothing to be similar to."
    )
    return framed(content, lambda: figures.likeness(array, filters), caption)


def _scaling(content: Content) -> str:
    if content.scaling is None:
        return ""
    try:
        return _measured(content, content.scaling)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # somebody else's file
        content.missing.append(f"Scaling can't be shown: scaling.json holds what it should not: {described(error)}.")
        return ""


def _measured(content: Content, measured: dict[str, Any]) -> str:
    from rapa_dist.scaling.plot import block_title, name_of_first

    first_name = name_of_first(measured)
    rows = []
    for block in measured["blocks"]:
        for configuration in block["configurations"]:
            first = configuration["layers"][0]["cycles"]["all"]
            rows.append(
                (
                    block_title(block["time_dilation"]),
                    ",".join(map(str, configuration["tiles"])),
                    f"{configuration['step']['wall_ms']['median']:,.1f}",
                    f"{first['wall_ms']['median']:,.2f}",
                    f"{first['speed_up']:.2f} ×",
                    or_dash(first.get("efficiency"), ".3f"),
                )
            )
    head = ("mode", "tiles", "step, ms", f"{first_name}’s cycles, ms", f"speed-up of {first_name}", "efficiency")
    caption = (
        f"Speed-up of {first_name}’s cycles over one tile, and where a step’s time goes, as rapa-dist scale measured "
        "them."
    )

    def draw() -> str:
        source = figures.scaling(measured)
        return f'<img class="plate" src="{source}" alt="{caption} The numbers are in the table.">'

    return framed(content, draw, caption) + data_table("Wall times, medians", head, rows)


def _configuration(content: Content) -> str:
    values = content.config.as_dict().items()
    return fact_table((key, ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for key, v in values)


def _environment(content: Content) -> str:
    if not content.sessions:
        return ""
    facts = [
        (f"command line of {session.get('started')}", shlex.join(map(str, argv)) if isinstance(argv, list) else "–")
        for session in content.sessions
        for argv in [session.get("argv")]
    ]
    for key, value in content.sessions[-1].items():
        match key, value:
            case "memory_bytes", int():
                facts.append(("memory", f"{value / 2**30:.1f} GiB"))
            case "argv" | "options" | "started", _:
                pass
            case _, dict():
                facts.append((key, ", ".join(f"{name} {item}" for name, item in value.items())))
            case _:
                facts.append((key, "–" if value is None else str(value)))
    return fact_table(facts)
