"""Opening the tiles of a model from Python."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from torch import nn

from rapa_dist.checks import check_choice
from rapa_dist.config import check_physics, chosen_physics
from rapa_dist.console import stderr
from rapa_dist.coordinator.recoveries import sentence
from rapa_dist.coordinator.session import Place, look_ahead, one_digital_thread
from rapa_dist.errors import UsageError
from rapa_dist.fabric import FABRICS
from rapa_dist.fabric.base import Fabric
from rapa_dist.fabric.lookout import Restart
from rapa_dist.nn.deploy import on_tiles
from rapa_dist.nn.layers import TiledLayer
from rapa_dist.nn.record import Images, arguments_of, record
from rapa_dist.physics.choosing import PhysicsChoice
from rapa_dist.physics.parameters import Physics


@contextmanager
def open_fabric(
    model: nn.Module,
    fabric: str = "ray",
    *,
    images: Images,
    physics: PhysicsChoice | Physics | str | None = None,
    seed: int = 0,
    step: int = 0,
    device: str = "cpu",
    address: str | None = None,
    nodes: int | None = None,
    name: str | None = None,
) -> Iterator[Fabric]:
    """Bring the tiles of a model up, and have its layers compute on them while the context is open.

    Their kernels are programmed into the tiles, and are back in the model afterwards. A tile whose process dies or
    hangs is replaced, and its work repeated: no bit changes. On `ray` and `serial`, which give the same bits, PyTorch
    computes on one thread meanwhile, so that sums do not depend on how many there are.

    Args:
        model: with layers on tiles, as `convert` leaves it.
        fabric: "ray", every tile an actor in a process of its own; "serial", in this process; "batched", all tiles of
            a layer as one product.
        images: the largest mini-batch that will pass through at once: a batch of images as the model takes them, or
            its shape, (images, channels, h, w); several for a model with several inputs.
        physics: what the tiles are like: a `Physics`, the name of a preset ("io", "gokmen-vlasov", …) or of a TOML
            file; None: ideal.
        seed: of the assignments, and of what tiles draw.
        step: steps that the model has been trained for: assignments are drawn for a step.
        device: where "batched" computes, "cpu" or "cuda".
        address: host:port of a Ray cluster; None: one that runs here already, else one is started.
        nodes: nodes of the cluster to use at most; None: all that offer tiles.
        name: of the tiles' actors, `<name>/L0/T003`, by which `rapa-dist stats` finds them; None: time and model.

    Yields:
        The fabric, whose `stats()` tells what every tile has done.

    Raises:
        UsageError: the model has no layers on tiles, does not take the images, or is on a fabric already.
        ClusterError: there is no Ray cluster with enough tiles, or too little memory.

    Example:
        >>> import torch, rapa_dist as rapa
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2))
        >>> summary = rapa.convert(model, tiles=4, images=(5, 1, 8, 8))
        >>> with rapa.open_fabric(model, "serial", images=(5, 1, 8, 8)) as fabric:
        ...     optimizer = rapa.RapaSGD(model, lr=0.1)
        ...     model(torch.zeros(5, 1, 8, 8)).sum().backward()
        ...     optimizer.step()
        ...     fabric.stats()[3].tile, fabric.stats()[3].rows_forward
        ('L0/T003', 45)
    """
    check_choice("fabric", fabric, FABRICS)
    if device != "cpu":
        if fabric != "batched":
            raise UsageError(f"device is for the fabric batched; {fabric} computes on the CPU. Leave one of them out.")
        from rapa_dist.fabric.batched import check_device

        check_device(device)
    layers = [layer for layer in model.modules() if isinstance(layer, TiledLayer)]
    if any(layer.attached for layer in layers):
        raise UsageError("The model is on a fabric already. Leave that one, or open one for another model.")
    chosen = chosen_physics(physics)
    check_physics(fabric, chosen)
    recording = record(model, images)
    recording = replace(recording, machine=recording.machine.with_physics(chosen, seed))
    largest = len(arguments_of(images)[0])
    look_ahead(fabric, address)
    place = Place(fabric, recording.machine, largest, device, nodes)
    called = name or f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{type(model).__name__}"
    kernels = [layer.kernels.detach().cpu().numpy().copy() for layer in recording.layers]
    with ExitStack() as clean_up:
        clean_up.callback(place.close)
        with redirect_stdout(sys.stderr):  # Ray prints its warnings to stdout
            place.connect(address)
            opened = place.open(kernels, called, Path.cwd() / called, _tell, step=step)
        if fabric != "batched":
            clean_up.enter_context(one_digital_thread())
        clean_up.enter_context(on_tiles(recording, opened, seed=seed, step=step))
        yield opened


def _tell(restart: Restart) -> None:
    stderr.print(sentence(restart), markup=False)
