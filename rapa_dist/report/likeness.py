"""How similar the tiles are, over time; and how similar what they have learnt is."""

from rapa_dist.analysis.learnt import similarities_of
from rapa_dist.console import counted
from rapa_dist.layout import machine_of
from rapa_dist.report import figures
from rapa_dist.report.content import Content
from rapa_dist.report.elements import data_table, folded, or_dash
from rapa_dist.report.frame import framed


def similarity_section(content: Content) -> str:
    """Return the section on S: over the epochs, and of the checkpoint with the start and without it."""
    layers = [layer for layer in machine_of(content.config).arrays if content.similarity(layer.index)[0]]
    if not layers:
        return ""
    lines = [line for line in content.metrics if line.get("similarity")]
    head = ("epoch", *(f"{layer.name}, {counted(layer.n_tiles, 'tile')}" for layer in layers))
    rows = [(line["epoch"], *(or_dash(line["similarity"][layer.index], ".4f") for layer in layers)) for line in lines]
    caption = (
        "S: per output channel, the mean correlation coefficient between the filters of all pairs of tiles, averaged "
        "over channels; 1 where all tiles have the same filters. Each tile starts from random filters of its own, and "
        "S is low as long as much of them is left, whatever the tiles have learnt. Layers with one tile have none."
    )
    return (
        framed(content, lambda: figures.similarities(content), caption)
        + _similarity_of_learnt(content)
        + folded(f"S after {counted(len(rows), 'epoch')} as a table", data_table("Similarity S", head, rows))
    )


def _similarity_of_learnt(content: Content) -> str:
    """Return S of the checkpoint beside S of what its tiles have learnt, without their start."""
    if content.checkpoint is None:
        return ""
    rows = [
        (name, f"{value:.4f}", f"{100 * along:.0f} %", f"{100 * decayed:.0f} %", f"{rest:.4f}")
        for name, value, along, decayed, rest in zip(
            content.checkpoint.arrays, *similarities_of(content.checkpoint).values(), strict=True
        )
        if value is not None and along is not None and decayed is not None and rest is not None
    ]
    head = ("layer", "S", "along the random start", "decay alone leaves", "S of what was learnt beside")
    summary = f"Checkpoint {content.checkpoint_name}: kernels projected on their start, and S without that part"
    return data_table(summary, head, rows)
