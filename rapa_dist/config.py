"""The configuration of a run: everything that its result depends on, and nothing else.

`--tiles` is the one dial; learning rate and decay follow from whether the network is tiled, and can be
overridden. A value that can't work is refused here, before anything starts.
"""

import difflib
import math
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from math import isqrt
from typing import Any, get_args

from rapa_dist.errors import UsageError
from rapa_dist.fabric import FABRICS
from rapa_dist.fields import shown
from rapa_dist.machine import Machine, TileArray
from rapa_dist.revision import FIRST, check_revision, revision_of
from rapa_dist.schemes import SCHEMES, SQUARE_SCHEMES

POOLING_NAMES = ("max", "average", "stochastic", "mixed")
"""The pooling methods by their names on the command line."""
PAPER_CHANNELS = (32, 32, 64)
PAPER_TILES = (16, 4, 1)
ENLARGED_CHANNELS = (54, 64, 64)
"""Of the paper's "enlarged" network: untiled, with about as many weights as 32,32,64 on 16,4,1 tiles."""
SCHEME_CHOICES = (*SCHEMES, "enlarged")
"""What `resolve` takes for a scheme: the schemes, and the enlarged network, whose scheme is "none"."""
_FEW_TILES = 8
"""Behind the first layer: with fewer, cutting a mini-batch in two gains more than ringing them twice costs."""
MIXTURE_SLOPE = 10.0
"""µ of mixed pooling (§3)."""
MIXTURE_START = 2 / MIXTURE_SLOPE
"""β of every channel at the start: a share of 0.88 for the maximum (§3)."""
WARMUP_FACTOR = 50
"""λ is divided by this in the warm-up epochs (§3)."""
_LARGEST_FLOAT32 = 3.4e38
_LARGEST_INTEGER = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run, every value resolved. Build it with `resolve`."""

    tiles: tuple[int, ...]
    """n_t of every layer; for "perforated", how many times fewer patches its one tile computes."""
    scheme: str
    """Tiling scheme, one of `SCHEMES`."""
    pooling: str
    """Pooling method of all layers but the last, one of `POOLING_NAMES`."""
    channels: tuple[int, ...]
    """c_out of every layer."""
    dataset: str | None
    """Data set; None, before the data is loaded, is the best one that can be had."""
    limit_train: int | None
    """Training images in use; None: all."""
    limit_test: int | None
    """Test images in use; None: all."""
    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Images in a mini-batch."""
    micro_batches: int
    """Parts that a mini-batch is cut into, so that tiles and coordinator work at the same time."""
    lr: float
    """λ after the warm-up, before any decay."""
    lr_decay: float
    """γ: λ is multiplied by it every `lr_decay_every` epochs."""
    lr_decay_every: int
    """Epochs between two decays of λ."""
    warmup_epochs: int
    """First epochs, at λ / 50."""
    weight_decay: float
    """Relative decay of all weights per step and unit of λ."""
    augment: bool
    """Whether training images are mirrored and changed in brightness at random."""
    seed: int
    """Seed of everything that is drawn."""

    def __post_init__(self) -> None:
        _check_positive_integers("--channels", self.channels, 100_000)
        _check_positive_integers("--tiles", self.tiles, None)
        if len(self.tiles) != len(self.channels):
            raise UsageError(
                f"--tiles needs one number for each of the {len(self.channels)} layers, like "
                f"{_listed(PAPER_TILES)}; it has {len(self.tiles)}: {_listed(self.tiles)}."
            )
        most = sum(array.passages[0].size[0] > 1 for array in self.machine.arrays)
        if most < len(self.channels):
            raise UsageError(
                f"--channels has {len(self.channels)} layers, but pooling leaves no pixels after {most}. "
                f"Use at most {most}."
            )
        _check_choice("--scheme", self.scheme, SCHEMES)
        _check_choice("--pooling", self.pooling, POOLING_NAMES)
        for layer, n_tiles in zip(self.machine.arrays, self.tiles, strict=True):
            _check_tiles(self.scheme, layer, n_tiles, len(self.tiles))
        for name in ("epochs", "batch_size", "micro_batches", "lr_decay_every"):
            _check_at_least(name, getattr(self, name), 1)
        for name in ("warmup_epochs", "seed"):
            _check_at_least(name, getattr(self, name), 0)
        for name in ("limit_train", "limit_test"):
            if getattr(self, name) is not None:
                _check_at_least(name, getattr(self, name), 1)
        if not 0 < self.lr <= _LARGEST_FLOAT32:
            raise UsageError(f"--lr needs a number above 0 that fits into float32, like 0.05; it is {self.lr}.")
        if not 0 < self.lr_decay <= 1:
            raise UsageError(f"--lr-decay needs a factor above 0 and up to 1, like 0.75; it is {self.lr_decay}.")
        _check_weight_decay(self.lr, self.weight_decay, given=())

    @property
    def machine(self) -> Machine:
        """The machine that the run emulates."""
        return Machine.build(channels=self.channels, tiles=self.tiles, scheme=self.scheme)

    @property
    def reassigns(self) -> bool:
        """Whether every pass has an assignment of its own, drawn at random."""
        return self.scheme == "random" and self.machine.tiled

    @property
    def revision(self) -> int:
        """The revision of its network; see `rapa_dist.revision`."""
        return revision_of(self.machine, self.scheme, self.pooling)

    def learning_rate(self, epoch: int) -> float:
        """Return λ in force in an epoch (counted from 0)."""
        if epoch < self.warmup_epochs:
            return self.lr / WARMUP_FACTOR
        return float(self.lr * self.lr_decay ** (epoch // self.lr_decay_every))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, and the network's revision; what is None is left out."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {name: value for name, value in values.items() if value is not None} | {"revision": self.revision}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Return the configuration that `as_dict` was called on.

        Raises:
            UsageError: a field is unknown or missing, or has a value that can't work.
            VoidError: it stood for another network when it was written.
        """
        revision = values.get("revision", FIRST)
        if type(revision) is not int:
            raise UsageError(f"In the configuration, revision is {shown(revision)}; expected {_name_of(int)}.")
        values = {name: value for name, value in values.items() if name != "revision"}
        kind = {field.name: field.type for field in fields(cls)}
        known = kind.keys()
        values = {"micro_batches": 1} | values  # in configurations from before there were any
        optional = {"dataset", "limit_train", "limit_test"}
        if unknown := values.keys() - known:
            raise UsageError(f"Unknown setting in the configuration: {', '.join(sorted(unknown))}.")
        if missing := known - optional - values.keys():
            raise UsageError(f"The configuration lacks {', '.join(sorted(missing))}.")
        plain = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        for name, value in plain.items():
            if not _fits(kind[name], value):
                raise UsageError(f"In the configuration, {name} is {shown(value)}; expected {_name_of(kind[name])}.")
        try:
            config = cls(**{name: plain.get(name) for name in known})  # type: ignore[arg-type]
        except UsageError as error:  # nobody gave an option: in a file, settings go by the names of their fields
            raise UsageError(re.sub(r"--[a-z-]+", lambda found: _field(found[0]), str(error))) from None
        check_revision(revision, config.machine, config.scheme, config.pooling)
        return config


def resolve(
    *,
    tiles: tuple[int, ...] | None = None,
    scheme: str | None = None,
    channels: tuple[int, ...] | None = None,
    lr: float | None = None,
    lr_decay: float | None = None,
    micro_batches: int | None = None,
    given: Collection[str] = (),
    **rest: Any,
) -> TrainConfig:
    """Return a configuration in which whatever is None has been derived.

    `scheme` "none" implies one tile per layer; one tile per layer implies `scheme` "none"; "enlarged" is "none"
    with the channels 54,64,64. λ and γ are the paper's: 0.05 and 0.75 with tiling, 0.005 and 0.5 without (§3).
    Mini-batches are cut in two where few tiles follow the first layer.

    All arguments are fields of `TrainConfig`, but `given`: which of them a user has chosen, so that an error about two
    of them names these.
    """
    if scheme is not None:
        _check_choice("--scheme", scheme, SCHEME_CHOICES)
    if scheme == "enlarged":
        if channels not in (None, ENLARGED_CHANNELS):
            raise UsageError(
                f"--scheme enlarged is the untiled network with --channels {_listed(ENLARGED_CHANNELS)}; "
                f"not {_listed(channels or ())}. Use --scheme none for other channels."
            )
        if tiles is not None and set(tiles) != {1}:
            raise UsageError(
                f"--scheme enlarged is an untiled network, with one tile per layer; --tiles is {_listed(tiles)}. "
                "Leave --tiles out, or use another scheme."
            )
        scheme, channels = "none", ENLARGED_CHANNELS
    channels = channels or PAPER_CHANNELS
    if tiles is None:
        tiles = (1,) * len(channels) if scheme == "none" else PAPER_TILES
        if len(tiles) != len(channels):
            raise UsageError(
                f"--channels {_listed(channels)} has another number of layers ({len(channels)}) than the default "
                f"tiles, {_listed(tiles)}. Give --tiles with a number for every layer, too."
            )
    tiled = any(n_tiles != 1 for n_tiles in tiles)
    if scheme is None:
        scheme = "random" if tiled else "none"
    if lr is None:
        lr = 0.05 if tiled else 0.005
    if lr_decay is None:
        lr_decay = 0.75 if tiled else 0.5
    if micro_batches is None:
        micro_batches = 2 if sum(tiles[1:]) < _FEW_TILES else 1
    if "weight_decay" in rest and 0 < lr <= _LARGEST_FLOAT32:
        _check_weight_decay(lr, rest["weight_decay"], given)
    return TrainConfig(
        tiles=tiles, scheme=scheme, channels=channels, lr=lr, lr_decay=lr_decay, micro_batches=micro_batches, **rest
    )


def parse_list(option: str, text: str) -> tuple[int, ...]:
    """Parse "16,4,1".

    Raises:
        UsageError: a part is no integer; it is named.
    """
    numbers = []
    for part in text.split(","):
        try:
            numbers.append(int(part))
        except ValueError:
            raise UsageError(
                f"{option} needs integers with commas between, like 16,4,1; “{part}” in “{text}” is none."
            ) from None
    return tuple(numbers)


def check_fabric(name: str) -> None:
    """Raise UsageError unless there is a fabric of this name."""
    _check_choice("--fabric", name, FABRICS)


FREE = frozenset({"epochs", "dataset"})
"""Fields in which a run may differ from its checkpoints: how long it goes on, and where its images lie now."""


def difference(old: TrainConfig, new: TrainConfig, but: Collection[str] = ()) -> list[str]:
    """Return a line "name: old → new" for every field, `but` for those named, in which two configurations differ."""
    names = (field.name for field in fields(TrainConfig) if field.name not in but)
    pairs = ((name, getattr(old, name), getattr(new, name)) for name in names)
    return [f"{name}: {before} → {after}" for name, before, after in pairs if before != after]


def _fits(kind: Any, value: Any) -> bool:
    """Return whether a value from a file has the type of its field; True is no integer here, nor what no file needs."""
    if type(value) is int and abs(value) > _LARGEST_INTEGER:
        return False
    if kind == tuple[int, ...]:
        return isinstance(value, tuple) and all(_fits(int, item) for item in value)
    return type(value) in ((int, float) if kind is float else get_args(kind) or (kind,))


def _field(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def _check_weight_decay(lr: float, weight_decay: float, given: Collection[str]) -> None:
    """Raise UsageError unless a step leaves something of every weight; what is named is what was given."""
    if 0 <= weight_decay * lr < 1:
        return
    why = "each step multiplies all weights by 1 - λ · weight decay"
    if not 0 <= weight_decay < math.inf or not lr > 0:
        raise UsageError(f"--weight-decay needs a number from 0, like 0.0001; it is {weight_decay}.")
    if "lr" not in given:
        raise UsageError(
            f"--weight-decay needs a number from 0 to below 1 / λ, here {1 / lr:g}; it is {weight_decay}: {why}."
        )
    if "weight_decay" not in given:
        raise UsageError(
            f"--lr needs a number below {1 / weight_decay:g} where the weight decay is {weight_decay:g}, its default; "
            f"it is {lr:g}: {why}."
        )
    raise UsageError(
        f"--lr {lr:g} and --weight-decay {weight_decay:g} need a product below 1; it is {lr * weight_decay:g}: {why}. "
        "Use a smaller one of the two."
    )


def _name_of(kind: Any) -> str:
    """Return a type as people write it: "int", "int | None"."""
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def _check_tiles(scheme: str, layer: TileArray, n_tiles: int, n_layers: int) -> None:
    number = layer.index + 1
    if scheme == "none" and n_tiles != 1:
        raise UsageError(
            f"--scheme none means one tile per layer; layer {number} has {n_tiles}. "
            f"Use --tiles {_listed((1,) * n_layers)}, leave --tiles out, or use --scheme random."
        )
    if n_tiles > layer.n_patches:
        raise UsageError(
            f"Layer {number} has {layer.n_patches:,} patches per image, so at most {layer.n_patches:,} tiles can "
            f"work on it; --tiles gives it {n_tiles:,}."
        )
    root = isqrt(n_tiles)
    if scheme in SQUARE_SCHEMES and root * root != n_tiles:
        raise UsageError(
            f"{scheme} needs a square number of tiles per layer; layer {number} has {n_tiles}. "
            f"Use {root**2} or {(root + 1) ** 2}, or --scheme random."
        )


def _check_positive_integers(option: str, values: tuple[int, ...], most: int | None) -> None:
    for value in values:
        if value < 1 or (most is not None and value > most):
            bound = f" and at most {most:,}" if most is not None else ""
            raise UsageError(f"{option} needs numbers of at least 1{bound}; it has {value:,} in {values}.")


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"--{name.replace('_', '-')} needs at least {least}; it is {value}.")


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"{option} is one of {', '.join(choices)}; not “{value}”.{hint}")
