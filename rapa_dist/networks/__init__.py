"""Networks by name, as ordinary PyTorch modules: presets, and whatever module somebody else has.

A factory is called with the number of classes and the shape of an image, (channels, h, w), and returns a module whose
outputs are scores (images, classes). Nothing is imported before it is asked for.
"""

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rapa_dist.errors import UsageError
from rapa_dist.shortened import shortened

PAPER = "rapa"
"""The paper's network: Caffe's "Full" CIFAR-10 network."""
PRESETS = {
    PAPER: "rapa_dist.networks.paper:PaperNetwork",
    "lenet": "rapa_dist.networks.lenet:LeNet",
    "alexnet": "rapa_dist.networks.alexnet:AlexNet",
    "vgg11": "rapa_dist.networks.vgg:VGG11",
    "resnet18": "rapa_dist.networks.resnet:ResNet18",
}
USUAL_IMAGES = {"lenet": (1, 28, 28), "alexnet": (3, 224, 224)}
"""Channels, h and w of the images that a preset was made for, where they are not those of the paper."""
FROM_PYTHON = "python:model"
"""Stands for a model that was given from Python, see `provided`."""
Factory = Callable[..., Any]

_provided: list[Factory] = []

_OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def check_network(name: str) -> None:
    """Raise UsageError unless this is the name of a preset, or has the form package.module:factory."""
    if name in PRESETS or _OWN.fullmatch(name):
        return
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(
        f"--network is one of {', '.join(PRESETS)}, or package.module:factory for one of your own; not “{name}”.{hint}"
    )


def make(name: str, classes: int, image: tuple[int, ...], **options: Any) -> Any:
    """Return a new network.

    Args:
        name: as `check_network` takes it.
        classes: its outputs.
        image: channels, h and w of an image.
        options: further arguments of a preset.

    Raises:
        UsageError: its factory can't be imported or called, or returns no module.
    """
    check_network(name)
    factory = _imported(name)
    try:
        module = factory(classes, image, **options)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"--network {name} can't be built for {classes} classes and images of {_sizes(image)}: "
            f"{shortened(error, __file__)}. Its factory is called with the number of classes and "
            "(channels, h, w)."
        ) from error
    from torch import nn

    if not isinstance(module, nn.Module):
        raise UsageError(
            f"--network {name} has to return a torch.nn.Module; it returned {type(module).__name__}. "
            "Name a function that makes the network, or its class."
        )
    return module


@contextmanager
def provided(factory: Factory) -> Iterator[None]:
    """Have a factory make the network `FROM_PYTHON` for a while."""
    _provided.append(factory)
    try:
        yield
    finally:
        _provided.pop()


def _imported(name: str) -> Factory:
    if name == FROM_PYTHON:
        if not _provided:
            raise UsageError(
                "The network of this run was given from Python. Pass it again: rapa_dist.train(…, model=model)."
            )
        return _provided[-1]
    module_name, _, path = PRESETS.get(name, name).partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)  # last: what stands there hides nothing that is installed
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(
            f"--network {name} can't be imported: {shortened(error, __file__)}. It is looked for where Python looks "
            "for modules, and in the current folder."
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    for part in path.split("."):
        if not hasattr(found, part):
            known = [each for each in dir(found) if not each.startswith("_")]
            near = difflib.get_close_matches(part, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UsageError(f"--network {name}: {module_name} has no {path}.{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(
            f"--network {name} has to name a function or class, called with the number of classes and "
            f"(channels, h, w); {path} is of type {type(found).__name__}."
        )
    return found  # type: ignore[no-any-return]


def _sizes(image: tuple[int, ...]) -> str:
    return " × ".join(map(str, image))
