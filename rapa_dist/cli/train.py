"""`rapa-dist train`: train a RAPA ConvNet on tiles."""

import sys
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from rapa_dist.cli.output import emit, json_option, outcome, show
from rapa_dist.cli.types import path, patience, text
from rapa_dist.config import INITS, TrainConfig
from rapa_dist.errors import UsageError
from rapa_dist.networks import PAPER, PRESETS
from rapa_dist.physics.presets import IDEAL
from rapa_dist.physics.presets import PRESETS as PHYSICS

_DEFAULT = {field.name: field.default for field in fields(TrainConfig)}


@click.command()
@click.option(
    "--network",
    metavar="NAME",
    help=f"{', '.join(PRESETS)}, or package.module:factory, called with the number of classes and (channels, h, w).  "
    f"[default: {PAPER}, the paper's]",
)
@click.option(
    "--tiles",
    metavar="N,N,N",
    help="Tiles n_t of every convolution; or, but for the paper's network, one number for that with most patches, the "
    "others in proportion.  [default: 16,4,1; 16 for other networks]",
)
@click.option(
    "--scheme",
    metavar="NAME",
    help="Tiling scheme: none, random, random-fixed, alternate, image-overlap, image-pad or perforated; or enlarged, "
    "the untiled network with channels 54,64,64.  [default: random; none with one tile per layer]",
)
@click.option(
    "--pooling",
    metavar="NAME",
    help="Of the paper's network: pooling of all layers but the last: max, average, stochastic or mixed.  "
    "[default: max]",
)
@click.option(
    "--channels", metavar="N,N,N", help="Of the paper's network: output channels of every layer.  [default: 32,32,64]"
)
@click.option(
    "--init",
    metavar="NAME",
    help="xavier: every tile is drawn independently, as in the paper; weights: all tiles of a layer start with the "
    f"network's own.  [default: {INITS[0]}]",
)
@click.option(
    "--dataset",
    metavar="NAME",
    help="builtin, cifar10, cifar100, svhn, mnist, fashion-mnist, or images:FOLDER with train/<class>/… and "
    "test/<class>/….  [default: cifar10 if it is there or can be fetched, else builtin]",
)
@click.option(
    "--image-size",
    type=int,
    metavar="N",
    help="Resize images, shorter side to N pixels, and crop them to N × N around their centre.  [default: as they are]",
)
@click.option("--data-dir", type=path, help="Where data sets are, or are downloaded to.")
@click.option("--limit-train", type=int, metavar="N", help="Use N training images only.")
@click.option("--limit-test", type=int, metavar="N", help="Use N test images only.")
@click.option("--epochs", type=int, help=f"Passes over the training images.  [default: {_DEFAULT['epochs']}]")
@click.option("--batch-size", type=int, help=f"Images in a mini-batch.  [default: {_DEFAULT['batch_size']}]")
@click.option(
    "--micro-batches",
    type=int,
    metavar="N",
    help="Parts of a mini-batch, so that tiles and coordinator work at the same time; the update stays one.  "
    "[default: 2; 1 with 8 or more tiles behind the first layer, or with batch normalisation]",
)
@click.option("--lr", type=float, help="Learning rate λ.  [default: 0.05 with tiling, 0.005 without]")
@click.option(
    "--lr-of",
    multiple=True,
    metavar="LAYER=λ",
    help="A learning rate of its own for a layer, by its name; it decays like λ.  May be given several times.",
)
@click.option("--lr-decay", type=float, help="Factor γ on λ.  [default: 0.75 with tiling, 0.5 without]")
@click.option("--lr-decay-every", type=int, help=f"Epochs between decays.  [default: {_DEFAULT['lr_decay_every']}]")
@click.option("--warmup-epochs", type=int, help=f"First epochs, at λ/50.  [default: {_DEFAULT['warmup_epochs']}]")
@click.option(
    "--weight-decay",
    type=float,
    help=f"Relative decay of weights per step and λ.  [default: {_DEFAULT['weight_decay']:g}; 0 with devices]",
)
@click.option(
    "--physics",
    type=text,
    metavar="NAME",
    help=f"What the tiles are like: {', '.join(PHYSICS)}; or a TOML file.  [default: {IDEAL}]",
)
@click.option(
    "--physics-set",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Change a field of that, by aihwkit's names: forward.out_noise=0.1, device.dw_min_dtod=0, device=none; of one "
    "layer: 0.forward.inp_res=0.1.  May be given several times.",
)
@click.option("--augment/--no-augment", default=None, help="Mirror and brighten training images.  [default: augment]")
@click.option("--seed", type=int, help=f"Seed of everything that is drawn.  [default: {_DEFAULT['seed']}]")
@click.option(
    "--fabric",
    default="ray",
    show_default=True,
    metavar="NAME",
    help="Where the tiles live: ray, every one a process; serial, in this process; batched, as one product per layer.",
)
@click.option("--device", metavar="NAME", help="Where the fabric batched computes: cpu or cuda.  [default: cpu]")
@click.option(
    "--address",
    type=text,
    metavar="HOST:PORT",
    help="Ray cluster to use, or “local” to start one.  "
    "[default: RAY_ADDRESS, else a cluster already running here, else one started for the run]",
)
@click.option("--nodes", type=int, metavar="N", help="Use N nodes of the cluster at most.  [default: all with tiles]")
@click.option(
    "--node-patience",
    type=patience,
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for a node in place of a lost one, if those left have too few tiles.",
)
@click.option(
    "--snapshot-every",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    metavar="STEPS",
    help="On several nodes, copy all weights every so often: what is trained again if a node is lost.  0: never.",
)
@click.option("--run-dir", type=path, help="Directory for the run.  [default: runs/<utc>-…]")
@click.option(
    "--resume",
    type=path,
    metavar="RUN_DIR",
    help="Go on with a run from its newest checkpoint.",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Stop if a tile dies more often than this without making progress.",
)
@click.option(
    "--save-patience",
    type=patience,
    metavar="SECONDS",
    default=600,
    show_default=True,
    help="Stop if the run can't be saved for so long, as where the disk is full.",
)
@click.option("--live", is_flag=True, help="Show in place what every tile does; needs a terminal.")
@click.option("--dry-run", is_flag=True, help="Print the plan, look at the data, and start nothing.")
@json_option
def train(
    fabric: str,
    device: str | None,
    address: str | None,
    nodes: int | None,
    node_patience: float,
    snapshot_every: int,
    data_dir: Path | None,
    run_dir: Path | None,
    resume: Path | None,
    live: bool,
    dry_run: bool,
    max_restarts: int,
    save_patience: float,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a network whose convolutions are on tiles; every tile is a Ray actor in a process of its own.

    The train error of an epoch is a running one: of augmented images, each as the network was when it was trained on
    it. The test error is of plain images at the end of the epoch, and so can be the lower one.

    \b
    Examples:
      rapa-dist train --tiles 16,4,1
      rapa-dist train --dataset images:photos --limit-train 10000 --epochs 20
      rapa-dist train --network alexnet --tiles 17,4,1,1,1 --dataset images:photos --image-size 64
      rapa-dist train --network my_networks:small --tiles 16
      rapa-dist train --resume runs/20261123T120000Z-builtin-16x4x1
    """  # noqa: D301 — click wants the backspace itself
    from rapa_dist.checks import parse_list, parse_rates
    from rapa_dist.config import check_fabric

    check_fabric(fabric)
    given = {name: value for name, value in settings.items() if value not in (None, ())}
    if "lr_of" in given:
        given["lr_of"] = parse_rates("--lr-of", given["lr_of"])
    for name in ("tiles", "channels"):
        if name in given:
            given[name] = parse_list(f"--{name}", given[name])
    if "dataset" in given:
        from rapa_dist.data.load import check_name

        given["dataset"] = check_name(given["dataset"])
    if device is not None:
        if fabric != "batched":
            raise UsageError(
                f"--device is for the fabric batched; this run's fabric is {fabric}, which computes on the CPU. "
                "Add --fabric batched, or leave --device out."
            )
        from rapa_dist.fabric.batched import check_device

        check_device(device)
    device = device or "cpu"
    if address is not None and fabric != "ray":
        raise UsageError(f"--address is for the fabric ray; --fabric {fabric} uses no cluster. Leave one of them out.")
    if nodes is not None and fabric != "ray":
        raise UsageError(f"--nodes is for the fabric ray; --fabric {fabric} uses no cluster. Leave one of them out.")
    if nodes is not None and nodes < 1:
        raise UsageError(f"--nodes needs at least 1; it is {nodes}.")
    if resume is not None and run_dir is not None:
        raise UsageError("--run-dir and --resume exclude each other: a resumed run stays in its directory.")

    if dry_run:
        from rapa_dist.coordinator import dry_run as dry
        from rapa_dist.coordinator.run_images import Where

        if resume is None:
            described = dry.start(_resolve(given), fabric=fabric, data_dir=data_dir, run_dir=run_dir)
        else:
            where = Where(dataset=given.pop("dataset", None), data_dir=data_dir)
            described = dry.resume(resume, _resumed(resume, given), fabric=fabric, where=where)
        if as_json:
            emit(described)
        else:
            dry.show(described)
        return

    from rapa_dist.coordinator.run import Tolerance, resume_run, start_run

    tolerance = Tolerance(
        restarts=max_restarts,
        save_patience_s=save_patience,
        node_patience_s=node_patience,
        snapshot_every=snapshot_every,
    )
    with redirect_stdout(sys.stderr):  # Ray prints its warnings to stdout
        if resume is None:
            config = _resolve(given)
            result = start_run(
                config,
                fabric=fabric,
                device=device,
                address=address,
                nodes=nodes,
                data_dir=data_dir,
                run_dir=run_dir,
                live=live,
                tolerance=tolerance,
            )
        else:
            _resumed(resume, given)  # a contradiction is an error before anything else is touched
            result = resume_run(
                resume,
                epochs=given.get("epochs"),
                dataset=given.get("dataset"),
                fabric=fabric,
                device=device,
                address=address,
                nodes=nodes,
                data_dir=data_dir,
                live=live,
                tolerance=tolerance,
            )
    with outcome(0 if result.finished else 130, f"Nothing is lost: the run is in {result.directory.path}."):
        if as_json:
            emit(result.as_dict())
        else:
            show(result.summary())


def _resolve(given: dict[str, Any]) -> Any:
    from rapa_dist.config import resolve
    from rapa_dist.data.load import image_of

    return resolve(**given, image=image_of(given.get("dataset"), given.get("image_size")), given=given.keys())


def _resumed(path: Path, given: dict[str, Any]) -> Any:
    """Return the configuration of a run to resume, with what may be changed changed.

    Raises:
        RunDirectoryError: it is no run directory.
        UsageError: an option contradicts the run; all differences are listed.
    """
    from dataclasses import replace

    from rapa_dist.config import ENLARGED_CHANNELS, FREE, chosen_physics
    from rapa_dist.coordinator.run_directory import RunDirectory

    if given.get("scheme") == "enlarged":
        given = given | {"scheme": "none", "channels": ENLARGED_CHANNELS}
    if "physics" in given or "physics_set" in given:
        given["physics"] = chosen_physics(given.get("physics"), given.pop("physics_set", ()))
    config = RunDirectory(path).config
    differs = [
        f"{name}: {getattr(config, name)} → {value}"
        for name, value in given.items()
        if name not in FREE and value != getattr(config, name)
    ]
    if differs:
        raise UsageError(
            f"The run in {path} has another configuration: {'; '.join(differs)}. "
            "Leave these options out to resume it, or start a new run without --resume."
        )
    return replace(config, **given)
