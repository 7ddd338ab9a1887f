"""The part of the package that is compiled: a plain library, called by `rapa_dist.native`.

Where it can't be built, NumPy computes instead; `rapa-dist doctor` says which, and why.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("rapa_dist/native")
spec = importlib.util.spec_from_file_location("recipe", FOLDER / "build.py")
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)


class BuildLibrary(build_ext):
    """Builds the library by its own recipe: the flags of this Python, and a user's, would change its bits."""

    def run(self) -> None:
        """Build it in place, or where the rest of the package is put together."""
        to = FOLDER if self.inplace else Path(self.build_lib) / FOLDER
        to.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in recipe.sources(FOLDER)}
        for path in recipe.sources(to):
            if path.name not in names:
                path.unlink()  # left from an earlier build; with it the library would pass for out of date
        try:
            recipe.build(to)
        except recipe.BuildError as error:
            sys.stderr.write(f"warning: tiles will multiply with NumPy, as the library can't be built: {error}\n")


files = recipe.sources(FOLDER)
setup(
    cmdclass={"build_ext": BuildLibrary},
    ext_modules=[
        Extension(
            "rapa_dist.native._library",
            sources=[str(path) for path in files if path.suffix == ".c"],
            depends=[str(path) for path in files],
            optional=True,
        )
    ],
)
