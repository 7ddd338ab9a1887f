"""The configuration of a run: everything that its result depends on, and nothing else.

`--tiles` is the one dial; learning rate and decay follow from whether the network is tiled, and can be
overridden. A value that can't work is refused here, before anything starts.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from types import UnionType
from typing import Any, get_args, get_origin

from rapa_dist.checks import (
    check_at_least,
    check_choice,
    check_positive_integers,
    check_weight_decay,
    listed,
)
from rapa_dist.errors import UsageError
from rapa_dist.fabric import FABRICS
from rapa_dist.fields import shown
from rapa_dist.machine import IMAGE, Machine
from rapa_dist.networks import PAPER, check_network
from rapa_dist.physics.choosing import PhysicsChoice, choose
from rapa_dist.physics.from_aihwkit import from_aihwkit, is_aihwkit
from rapa_dist.physics.parameters import Physics
from rapa_dist.revision import FIRST, check_revision, revision_of
from rapa_dist.schemes import SCHEMES, check_tiles

POOLING_NAMES = ("max", "average", "stochastic", "mixed")
"""The pooling methods by their names on the command line."""
PAPER_CHANNELS = (32, 32, 64)
PAPER_TILES = (16, 4, 1)
ENLARGED_CHANNELS = (54, 64, 64)
"""Of the paper's "enlarged" network: untiled, with about as many weights as 32,32,64 on 16,4,1 tiles."""
DEFAULT_TILES = (16,)
"""Of any other network: of the layer with most patches; the others in proportion to theirs."""
INITS = ("xavier", "weights")
"""Where a run starts: every tile drawn independently (the paper), or all tiles of a layer with the model's weights."""
SCHEME_CHOICES = (*SCHEMES, "enlarged")
"""What `resolve` takes for a scheme: the schemes, and the enlarged network, whose scheme is "none"."""
_WEIGHT_DECAY = 1e-4
_FEW_TILES = 4
"""Behind the first layer: with fewer, cutting a mini-batch in two gains more than ringing them twice costs, and than
the coordinator takes for two halves instead of one whole."""
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
    """One training run, every value resolved. Build it with `resolve`.

    What only the network itself can tell (n_t of layers in proportion, parts of a mini-batch) is resolved when it is
    built, what only the images can tell (their shape, the number of classes) when they have been read.

    Example:
        >>> import rapa_dist as rapa
        >>> config = rapa.configure(network="alexnet", tiles=17, epochs=30)
        >>> isinstance(config, rapa.TrainConfig), config.scheme, config.learning_rate(25)
        (True, 'random', 0.037500000000000006)
    """

    network: str = PAPER
    """A preset's name, or package.module:factory."""
    channels: tuple[int, ...] | None = None
    """Of the paper's network: c_out of every layer. None for any other."""
    pooling: str | None = None
    """Of the paper's network: pooling method of all layers but the last, one of `POOLING_NAMES`. None for any other."""
    image: tuple[int, ...] | None = None
    """Channels, h and w of an image; None before the images have been read."""
    classes: int | None = None
    """Outputs of the network; None before the images have been read."""
    tiles: tuple[int, ...]
    """n_t of every layer, in the order in which they stand in the network; for "perforated", how many times fewer
    patches its one tile computes. A single number for several layers is that of the layer with most patches."""
    scheme: str
    """Tiling scheme, one of `SCHEMES`."""
    init: str = INITS[0]
    """What is programmed into the tiles at the start, one of `INITS`."""
    dataset: str | None = None
    """Data set; None, before the data is loaded, is the best one that can be had."""
    image_size: int | None = None
    """Pixels along both sides to which images are resized and cropped; None: as they are."""
    limit_train: int | None = None
    """Training images in use; None: all."""
    limit_test: int | None = None
    """Test images in use; None: all."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 10
    """Images in a mini-batch."""
    micro_batches: int | None = None
    """Parts that a mini-batch is cut into, so that tiles and coordinator work at the same time; None before the
    network is built."""
    lr: float
    """λ after the warm-up, before any decay."""
    lr_of: tuple[tuple[str, float], ...] = ()
    """By name of a layer a λ of its own, in the same proportion to λ all along."""
    lr_decay: float
    """γ: λ is multiplied by it every `lr_decay_every` epochs."""
    lr_decay_every: int = 25
    """Epochs between two decays of λ."""
    warmup_epochs: int = 1
    """First epochs, at λ / 50."""
    weight_decay: float = _WEIGHT_DECAY
    """Relative decay of all weights per step and unit of λ; 0 where weights are kept in devices."""
    physics: PhysicsChoice | None = None
    """What the tiles are like; None: ideal."""
    augment: bool = True
    """Whether training images are mirrored and changed in brightness at random."""
    seed: int = 0
    """Seed of everything that is drawn."""

    def __post_init__(self) -> None:
        check_network(self.network)
        check_choice("--scheme", self.scheme, SCHEMES)
        check_choice("--init", self.init, INITS)
        check_positive_integers("--tiles", self.tiles, None)
        if self.network == PAPER:
            self._check_paper()
        else:
            for option, value in (("--channels", self.channels), ("--pooling", self.pooling)):
                if value is not None:
                    raise UsageError(
                        f"{option} is for the paper's network; --network {self.network} has its own. Leave one of them "
                        "out."
                    )
        for name in ("epochs", "batch_size", "lr_decay_every"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("warmup_epochs", "seed"):
            check_at_least(name, getattr(self, name), 0)
        for name in ("limit_train", "limit_test", "micro_batches", "image_size", "classes"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        if self.image is not None and (len(self.image) != 3 or min(self.image) < 1):
            raise UsageError(f"An image has channels, h and w, each at least 1, like 3,32,32; not {self.image}.")
        for name, rate in (("--lr", self.lr), *((f"--lr-of {layer}", rate) for layer, rate in self.lr_of)):
            if not 0 < rate <= _LARGEST_FLOAT32:
                raise UsageError(f"{name} needs a number above 0 that fits into float32, like 0.05; it is {rate}.")
        if not 0 < self.lr_decay <= 1:
            raise UsageError(f"--lr-decay needs a factor above 0 and up to 1, like 0.75; it is {self.lr_decay}.")
        if self.physics is not None and self.physics.has_devices and self.weight_decay:
            raise UsageError(
                "--weight-decay is a digital optimizer's, and devices know nothing of it; it is "
                f"{self.weight_decay:g}. Leave it out, or give devices a lifetime: --physics-set device.lifetime=10000."
            )
        for rate in (self.lr, *(rate for _, rate in self.lr_of)):
            check_weight_decay(rate, self.weight_decay, given=())

    def _check_paper(self) -> None:
        """Raise UsageError unless the paper's network can be built; of planes only where they are known."""
        if self.channels is None or self.pooling is None:
            raise UsageError(f"The network {PAPER} needs --channels and --pooling.")
        check_positive_integers("--channels", self.channels, 100_000)
        check_choice("--pooling", self.pooling, POOLING_NAMES)
        if len(self.tiles) != len(self.channels):
            raise UsageError(
                f"--tiles needs one number for each of the {len(self.channels)} layers, like "
                f"{listed(PAPER_TILES)}; it has {len(self.tiles)}: {listed(self.tiles)}."
            )
        if self.image is None:
            return
        arrays = self.paper_machine.arrays
        for array in arrays:
            if array.index and min(array.passages[0].size) < 2:
                raise UsageError(
                    f"--channels has {len(self.channels)} layers, but pooling leaves no pixels after {array.index}. "
                    f"Use at most {array.index}."
                )
        for array, n_tiles in zip(arrays, self.tiles, strict=True):
            where = f"Layer {array.name} (--tiles {listed(self.tiles)})"
            check_tiles(self.scheme, n_tiles, where=where, plane=array.passages[0].out)

    @property
    def paper_machine(self) -> Machine:
        """The machine of the paper's network, by arithmetic alone; for any network see `rapa_dist.layout`."""
        assert self.channels is not None
        return Machine.build(channels=self.channels, tiles=self.tiles, scheme=self.scheme, image=self.image or IMAGE)

    @property
    def tiled(self) -> bool:
        """Whether some layer has several kernel matrices."""
        return self.scheme != "perforated" and max(self.tiles) > 1

    @property
    def reassigns(self) -> bool:
        """Whether every pass has an assignment of its own, drawn at random."""
        return self.scheme == "random" and self.tiled

    @property
    def revision(self) -> int:
        """The revision of its network; see `rapa_dist.revision`."""
        if self.network != PAPER or self.pooling is None:
            return FIRST
        return revision_of(self.paper_machine, self.scheme, self.pooling)

    def learning_rate(self, epoch: int) -> float:
        """Return λ in force in an epoch (counted from 0)."""
        if epoch < self.warmup_epochs:
            return self.lr / WARMUP_FACTOR
        return float(self.lr * self.lr_decay ** (epoch // self.lr_decay_every))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, and the network's revision; what is None is left out."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        values["lr_of"] = dict(self.lr_of) or None
        values["physics"] = self.physics and self.physics.as_dict()
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
        values = values if "network" in values else _BEFORE | values
        optional = {each.name for each in fields(cls) if each.default in (None, ())}
        if unknown := values.keys() - known:
            raise UsageError(f"Unknown setting in the configuration: {', '.join(sorted(unknown))}.")
        if missing := known - optional - values.keys():
            raise UsageError(f"The configuration lacks {', '.join(sorted(missing))}.")
        plain = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        if isinstance(rates := plain.get("lr_of", {}), dict):
            plain["lr_of"] = tuple(rates.items())
        if isinstance(physics := plain.get("physics"), dict):
            plain["physics"] = PhysicsChoice.from_dict(physics)
        for name, value in plain.items():
            if not _fits(kind[name], value):
                raise UsageError(f"In the configuration, {name} is {shown(value)}; expected {_name_of(kind[name])}.")
        try:
            config = cls(**{name: plain.get(name) for name in known})  # type: ignore[arg-type]
        except UsageError as error:  # nobody gave an option: in a file, settings go by the names of their fields
            raise UsageError(re.sub(r"--[a-z-]+", lambda found: _field(found[0]), str(error))) from None
        if config.pooling is not None:
            check_revision(revision, config.paper_machine, config.scheme, config.pooling)
        return config


def resolve(
    *,
    network: str = PAPER,
    tiles: int | tuple[int, ...] | None = None,
    scheme: str | None = None,
    channels: tuple[int, ...] | None = None,
    pooling: str | None = None,
    image: tuple[int, ...] | None = IMAGE,
    lr: float | None = None,
    lr_decay: float | None = None,
    micro_batches: int | None = None,
    weight_decay: float | None = None,
    physics: PhysicsChoice | Physics | str | None = None,
    physics_set: Sequence[str] = (),
    given: Collection[str] = (),
    **rest: Any,
) -> TrainConfig:
    """Return a configuration in which whatever is None has been derived.

    `scheme` "none" implies one tile per layer; one tile per layer implies `scheme` "none"; "enlarged" is "none"
    with the channels 54,64,64. λ and γ are the paper's: 0.05 and 0.75 with tiling, 0.005 and 0.5 without (§3).
    Mini-batches of the paper's network are cut in two where few tiles follow the first layer.

    All arguments are fields of `TrainConfig`, but for three: `physics` may also be the name of a preset or of a TOML
    file, `physics_set` changes single fields of it ("forward.out_noise=0.1"), and `given` are those that a user has
    chosen, so that an error about two of them names these.

    Example:
        >>> import rapa_dist as rapa
        >>> rapa.configure(tiles=(16, 4, 1)).lr, rapa.configure(scheme="none").lr
        (0.05, 0.005)
    """
    if scheme is not None:
        check_choice("--scheme", scheme, SCHEME_CHOICES)
    check_network(network)
    paper = network == PAPER
    if scheme == "enlarged":
        _check_enlarged(network, channels, (tiles,) if isinstance(tiles, int) else tiles)
        scheme, channels = "none", ENLARGED_CHANNELS
    tiles = (tiles,) if isinstance(tiles, int) else tiles
    if paper:
        channels, pooling = channels or PAPER_CHANNELS, pooling or POOLING_NAMES[0]
    if tiles is None:
        tiles = _default_tiles(channels, scheme)
    tiled = any(n_tiles != 1 for n_tiles in tiles)
    if scheme is None:
        scheme = "random" if tiled else "none"
    if lr is None:
        lr = 0.05 if tiled else 0.005
    if lr_decay is None:
        lr_decay = 0.75 if tiled else 0.5
    if micro_batches is None and paper:
        micro_batches = parts_of(tiles)
    chosen = chosen_physics(physics, physics_set)
    if weight_decay is None:
        weight_decay = 0.0 if chosen is not None and chosen.has_devices else _WEIGHT_DECAY
    if 0 < lr <= _LARGEST_FLOAT32:
        check_weight_decay(lr, weight_decay, given)
    return TrainConfig(
        network=network,
        tiles=tiles,
        scheme=scheme,
        channels=channels,
        pooling=pooling,
        image=image,
        lr=lr,
        lr_decay=lr_decay,
        micro_batches=micro_batches,
        weight_decay=weight_decay,
        physics=chosen,
        **rest,
    )


def chosen_physics(physics: PhysicsChoice | Physics | str | None, settings: Sequence[str] = ()) -> PhysicsChoice | None:
    """Return the physics that a user asks for, as `resolve` takes it; None where that is ideal.

    It may also be a configuration of aihwkit's.

    Raises:
        UsageError: it can't be.
    """
    if is_aihwkit(physics):
        physics = from_aihwkit(physics)
    if isinstance(physics, Physics):
        physics = PhysicsChoice(physics)
    if isinstance(physics, PhysicsChoice):
        if settings:
            raise UsageError("physics_set changes a preset or a file; change the fields of a Physics by replace().")
    else:
        physics = choose(physics, settings)
    return None if physics.is_ideal else physics


def parts_of(tiles: tuple[int, ...]) -> int:
    """Return into how many parts mini-batches are cut by default, given n_t of all layers."""
    return 2 if sum(tiles[1:]) < _FEW_TILES else 1


def _check_enlarged(network: str, channels: tuple[int, ...] | None, tiles: tuple[int, ...] | None) -> None:
    if network != PAPER:
        raise UsageError(f"--scheme enlarged is the paper's network with more channels; --network is {network}.")
    if channels not in (None, ENLARGED_CHANNELS):
        raise UsageError(
            f"--scheme enlarged is the untiled network with --channels {listed(ENLARGED_CHANNELS)}; "
            f"not {listed(channels or ())}. Use --scheme none for other channels."
        )
    if tiles is not None and set(tiles) != {1}:
        raise UsageError(
            f"--scheme enlarged is an untiled network, with one tile per layer; --tiles is {listed(tiles)}. "
            "Leave --tiles out, or use another scheme."
        )


def _default_tiles(channels: tuple[int, ...] | None, scheme: str | None) -> tuple[int, ...]:
    if channels is None:
        return (1,) if scheme == "none" else DEFAULT_TILES
    tiles = (1,) * len(channels) if scheme == "none" else PAPER_TILES
    if len(tiles) != len(channels):
        raise UsageError(
            f"--channels {listed(channels)} has another number of layers ({len(channels)}) than the default "
            f"tiles, {listed(tiles)}. Give --tiles with a number for every layer, too."
        )
    return tiles


def check_fabric(name: str) -> None:
    """Raise UsageError unless there is a fabric of this name."""
    check_choice("--fabric", name, FABRICS)


def check_physics(fabric: str, physics: PhysicsChoice | None) -> None:
    """Raise UsageError unless a fabric has such tiles."""
    if physics is not None and fabric == "batched":
        raise UsageError(
            "The fabric batched has ideal tiles only; converters, noise and devices are on ray and serial. Use one of "
            "them, or leave the physics out."
        )


_BEFORE = {"network": PAPER, "init": INITS[0], "micro_batches": 1}
"""What configurations stood for from before there was such a choice."""
_OF_IMAGES = ("image", "classes")
FREE = frozenset({"epochs", "dataset"})
"""Fields in which a run may differ from its checkpoints: how long it goes on, and where its images lie now."""


def difference(old: TrainConfig, new: TrainConfig, but: Collection[str] = ()) -> list[str]:
    """Return a line "name: old → new" for every field, `but` for those named, in which two configurations differ.

    What only the images tell counts where both know it.
    """
    names = (field.name for field in fields(TrainConfig) if field.name not in but)
    pairs = ((name, getattr(old, name), getattr(new, name)) for name in names)
    return [
        f"{name}: {before} → {after}"
        for name, before, after in pairs
        if before != after and not (name in _OF_IMAGES and None in (before, after))
    ]


def _fits(kind: Any, value: Any) -> bool:
    """Return whether a value from a file has the type of its field; True is no integer here, nor what no file needs."""
    if type(value) is int and abs(value) > _LARGEST_INTEGER:
        return False
    if isinstance(kind, UnionType):
        return any(_fits(each, value) for each in get_args(kind))
    if get_origin(kind) is tuple:
        items = get_args(kind)
        if items[-1] is Ellipsis:
            return isinstance(value, tuple) and all(_fits(items[0], item) for item in value)
        return isinstance(value, tuple) and len(value) == len(items) and all(map(_fits, items, value))
    return type(value) in ((int, float) if kind is float else (kind,))


def _field(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _name_of(kind: Any) -> str:
    """Return a type as people write it: "int", "int | None"."""
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
