"""What an experiment consists of: cells, each a configuration of one run, and the analyses of its network."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rapa_dist.config import TrainConfig, resolve
from rapa_dist.console import counted
from rapa_dist.errors import UsageError

EXPERIMENTS = ("table1", "table2", "figure3", "figure4", "regularizer")
_PAPER_EPOCHS, _PAPER_DECAY_EVERY = 400, 25
POOLINGS = ("max", "average", "mixed", "stochastic")
LARGE_TILES = (128, 32, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How all cells of an experiment are trained; two results can be compared only under the same one."""

    dataset: str
    limit_train: int | None = None
    limit_test: int | None = None
    epochs: int
    lr_decay_every: int
    batch_size: int = 10
    warmup_epochs: int = 1
    weight_decay: float = 1e-4
    augment: bool = True
    data_fingerprint: str | None = None
    """Of the images, which decides what they are; None: not looked at, as in experiments of earlier versions."""

    @classmethod
    def scaled(cls, *, epochs: int, lr_decay_every: int | None = None, **rest: Any) -> "Protocol":
        """Return one with the paper's decay schedule, every 25 of 400 epochs, scaled to the number of epochs."""
        every = max(1, round(_PAPER_DECAY_EVERY * epochs / _PAPER_EPOCHS)) if lr_decay_every is None else lr_decay_every
        for option, number in (("--epochs", epochs), ("--lr-decay-every", every)):
            if number < 1:
                raise UsageError(f"{option} needs at least 1; it is {number}.")
        return cls(epochs=epochs, lr_decay_every=every, **rest)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)

    def differences(self, other: "Protocol") -> list[str]:
        """Return a line "name: this → other" for every field that differs."""
        mine, theirs = self.as_dict(), other.as_dict()
        if None not in (self.data_fingerprint, other.data_fingerprint):
            mine.pop("dataset")  # where they lie may change
        else:
            mine.pop("data_fingerprint")
        return [f"{name}: {mine[name]} → {theirs[name]}" for name in mine if mine[name] != theirs[name]]

    def describe(self) -> str:
        """Return it in words, without where the data lay."""
        name = self.dataset
        if name.startswith("images:"):
            name = f"images:{Path(name.removeprefix('images:')).name}"
        images = "all" if self.limit_train is None else f"{self.limit_train:,}"
        tested = "all" if self.limit_test is None else f"{self.limit_test:,}"
        return (
            f"{name}, {images} training and {tested} test images, {counted(self.epochs, 'epoch')}, λ decays every "
            f"{self.lr_decay_every}, mini-batches of {self.batch_size}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One network of a table."""

    name: str
    scheme: str
    pooling: str = "max"
    tiles: tuple[int, ...] | None = None
    """None: the scheme's own, 16,4,1 or 1,1,1."""
    lr: float | None = None
    lr_decay: float | None = None
    """None: the paper's."""

    def config(self, protocol: Protocol, seed: int) -> TrainConfig:
        """Return the configuration of its run."""
        shared = protocol.as_dict()
        del shared["data_fingerprint"]
        return resolve(
            scheme=self.scheme,
            tiles=self.tiles,
            pooling=self.pooling,
            lr=self.lr,
            lr_decay=self.lr_decay,
            seed=seed,
            **shared,
        )


def _cell(scheme: str, pooling: str = "max") -> Cell:
    return Cell(name=scheme if pooling == "max" else f"{scheme}-{pooling}", scheme=scheme, pooling=pooling)


LARGE = Cell(name="random-128x32x8", scheme="random", tiles=LARGE_TILES)
QUICK_NONE = Cell(name="none-quick", scheme="none", lr=0.01, lr_decay=0.9)
"""The untiled network with the other learning rate that §3 names, which a short protocol does not starve."""
TABLE_1_SCHEMES = (
    "none",
    "perforated",
    "enlarged",
    "random-fixed",
    "random",
    "image-overlap",
    "image-pad",
    "alternate",
)
_CELLS = {
    "table1": [*map(_cell, TABLE_1_SCHEMES), QUICK_NONE],
    "table2": [_cell(scheme, pooling) for pooling in POOLINGS for scheme in ("none", "enlarged", "random")],
    "figure3": [
        *(_cell("random", pooling) for pooling in POOLINGS),
        *map(_cell, ("random-fixed", "image-overlap", "image-pad", "alternate")),
    ],
    "figure4": [_cell("none"), _cell("random"), LARGE],
    "regularizer": [],
}


def cells_of(experiment: str, names: Sequence[str] | None = None) -> list[Cell]:
    """Return the cells of an experiment, or some of them.

    Raises:
        UsageError: there is no such experiment or cell; a similar one is suggested.
    """
    if experiment not in EXPERIMENTS:
        raise UsageError(f"There is no experiment “{experiment}”; {_choices(experiment, EXPERIMENTS)}")
    cells = {cell.name: cell for cell in _CELLS[experiment]}
    if names and not cells:
        raise UsageError(f"{experiment} has no cells to choose from. Leave --cells out.")
    for name in names or ():
        if name not in cells:
            raise UsageError(f"{experiment} has no cell “{name}”; {_choices(name, tuple(cells))}")
    return [cell for cell in cells.values() if names is None or cell.name in names]


def analyses_of(experiment: str, cell: Cell) -> list[str]:
    """Return the analyses that an experiment makes of a cell's trained network, by their names in `jobs`."""
    if experiment == "table2" and cell.scheme == "random":
        return ["votes5", "reduced", "similarity"]
    if experiment == "table1" and cell.scheme == "random":
        return ["similarity"]
    if experiment == "figure3":
        return ["similarity"]
    if experiment == "figure4":
        return ["attack", *(["votes9"] if cell is LARGE or cell.name == LARGE.name else [])]
    return []


def _choices(name: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"choose from {', '.join(choices)}.{hint}"
