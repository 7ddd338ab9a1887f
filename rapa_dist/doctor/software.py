"""What is installed: Python, the packages, and whether their compiled parts load."""

import os
import shlex
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rapa_dist.check import Check
from rapa_dist.command_lines import pip_install
from rapa_dist.errors import UsageError
from rapa_dist.installed import NAME, python_bounds, requirements, version_of
from rapa_dist.native import SETTING, Lack, build, native

_REPAIR = "Run scripts/rapa-dist in the clone, which sets up .venv again"


def check_python() -> Check:
    """Hold Python's version against what the package asks for."""
    version = ".".join(map(str, sys.version_info[:3]))
    return judge_python(version, python_bounds())


def judge_python(version: str, bounds: str | None) -> Check:
    """Say whether a version of Python is within the bounds; without an installation there are none."""
    found = {"version": version, "bounds": bounds, "executable": sys.executable}
    if bounds is None or version in SpecifierSet(bounds):
        return Check("Python", "ok", version, quantities=found)
    fix = f"rapa-dist needs Python {bounds}. Install one of these, delete .venv, and run scripts/rapa-dist."
    return Check("Python", "failed", version, fix, found)


def check_packages() -> Check:
    """Hold the versions of the packages against the bounds of pyproject.toml."""
    if version_of(NAME) is None:
        value = "not known: rapa-dist is run from its files, without having been installed"
        return Check("packages", "warning", value, f"{_REPAIR}.")
    needed = [requirement for line in requirements() if (requirement := Requirement(line)).marker is None]
    return judge_packages(needed, {requirement.name: version_of(requirement.name) for requirement in needed})


def judge_packages(needed: list[Requirement], versions: dict[str, str | None]) -> Check:
    """Say which versions are missing or out of bounds."""
    unfit = [
        requirement
        for requirement in needed
        if (version := versions[requirement.name]) is None
        or not requirement.specifier.contains(version, prereleases=True)
    ]
    value = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    found = {"versions": versions, "unfit": [requirement.name for requirement in unfit]}
    if unfit:
        wanted = [f"{requirement.name}{requirement.specifier}" for requirement in unfit]
        return Check("packages", "failed", value, f"{_REPAIR}, or: {pip_install(wanted)}", found)
    return Check("packages", "ok", value, quantities=found)


def check_torch() -> Check:
    """Import PyTorch; say which build it is."""
    name = "PyTorch"
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check(name, "failed", f"can't be imported: {error}", f"{_REPAIR}.")
    threads = torch.get_num_threads()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    kind = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    found = {"version": torch.__version__, "threads": threads, "gpus": gpus}
    value = f"{torch.__version__}, {kind}, {threads} threads"
    if gpus:
        value += f"; {', '.join(gpus)}"
    return Check(name, "ok", value, quantities=found)


def check_products() -> Check:
    """Look whether tiles multiply with the library in C, or with NumPy, and what to do about it."""
    name = "products"
    try:
        found = native()
    except UsageError as error:
        return Check(name, "failed", f"not with {SETTING} as it is set", str(error))
    quantities = {"native": found.library is not None, "detail": found.vectors, "compiler": found.compiler}
    if found.library is not None:
        return Check(name, "ok", f"{found}, compiled by {found.compiler}", quantities=quantities)
    if found.lack is Lack.SWITCHED_OFF:
        return Check(name, "ok", str(found), quantities=quantities)
    slower = "Tiles compute all the same, but slower, and with other bits than where the library is. "
    return Check(name, "warning", str(found), slower + advice(found.lack, build.FOLDER), quantities)


def advice(lack: Lack | None, folder: Path) -> str:
    """Return what to do for a library that a folder lacks."""
    again = f"`{shlex.join([sys.executable, '-m', build.__package__])}`"
    if lack is Lack.NO_VECTORS:
        return "There is nothing to mend here; processors since about 2014 have what it takes."
    if lack is not Lack.NOT_BUILT:
        return f"Build it again: {again}."
    try:
        why = (folder / build.FAILURE).read_text(errors="replace").strip()
    except OSError:
        return f"Build it: {again}."
    if not why.startswith(build.NO_COMPILER):
        return f"Build it again when what the compiler said is mended: {again}. It said: {why}"
    return (
        f"When it was to be built, {why}. Install one (Debian, Ubuntu: apt-get install gcc libc6-dev), or the one that "
        f"PyPI has: {pip_install([build.ZIG])}; then {again}."
    )


def check_blas() -> Check:
    """Look which BLAS NumPy multiplies with, and whether a tile can keep it to one thread."""
    import numpy as np
    import threadpoolctl

    libraries = [library for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]
    found = {"numpy_version": np.__version__, "libraries": libraries}
    if not libraries:
        fix = (
            "threadpoolctl knows none here, so a tile can't keep it to one thread: set OMP_NUM_THREADS=1. "
            "NumPy from PyPI comes with OpenBLAS."
        )
        return Check("BLAS", "warning", "none found in NumPy", fix, found)
    names = {f"{library['internal_api']} {library['version'] or ''}".strip() for library in libraries}
    threads = max(library["num_threads"] for library in libraries)
    kernels = ", ".join(sorted({str(library.get("architecture", "unknown")) for library in libraries}))
    value = f"{', '.join(sorted(names))}, kernels for {kernels}; {threads} threads here, 1 in a tile"
    if forced := os.environ.get("OPENBLAS_CORETYPE"):
        fix = (
            f"OPENBLAS_CORETYPE={forced} has OpenBLAS compute as for that processor, whatever is here: bits may then "
            "be the same on other machines, but the tiles' products may take twice as long. Unset it for speed."
        )
        return Check("BLAS", "warning", value, fix, found)
    return Check("BLAS", "ok", value, quantities=found)
