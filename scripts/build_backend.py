"""What pip builds rapa-dist with: setuptools, and where the machine has no C compiler, one from PyPI besides."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  what is not said here is as setuptools has it

_spec = importlib.util.spec_from_file_location("recipe", Path(__file__).parents[1] / "rapa_dist/native/build.py")
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)


def get_requires_for_build_wheel(config_settings: Mapping | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + recipe.needed_to_build()


def get_requires_for_build_editable(config_settings: Mapping | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + recipe.needed_to_build()
