"""The options that say where a run's images are now, for all commands that look at them again."""

import functools
from collections.abc import Callable
from typing import Any

import click

from rapa_dist.cli.types import path, text


def where_options(dataset_help: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command --dataset and --data-dir, and passes them on as `where`.

    Args:
        dataset_help: what --dataset is for.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        default = "  [default: where the run found them]"

        @click.option("--dataset", type=text, metavar="NAME", help=dataset_help + default)
        @click.option("--data-dir", type=path, help=f"Where data sets are.{default}")
        @functools.wraps(command)
        def with_where(*, dataset: Any, data_dir: Any, **options: Any) -> None:
            from rapa_dist.coordinator.run_images import Where

            command(where=Where(dataset=dataset, data_dir=data_dir), **options)

        return with_where

    return decorate
