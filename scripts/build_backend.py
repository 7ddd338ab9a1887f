"""How pip builds the package: with setuptools, and where the machine has no C compiler with Zig's, from PyPI.

Run as a program it prints what has to be installed besides setuptools, for who builds without isolation.
"""

import os
import shutil
import sysconfig

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  what is not said here is as setuptools has it

ZIG = "ziglang>=0.14,<0.18"


def extra_requirements() -> list[str]:
    """Return what it takes to compile here, besides what the machine has."""
    configured = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    return [] if shutil.which(configured.split()[0]) else [ZIG]


def get_requires_for_build_wheel(config_settings=None):
    """Return what building a wheel takes."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *extra_requirements()]


def get_requires_for_build_editable(config_settings=None):
    """Return what an editable installation takes."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *extra_requirements()]


if __name__ == "__main__":
    print("\n".join(extra_requirements()))
