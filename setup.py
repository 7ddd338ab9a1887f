"""The part of the package that is compiled: a plain library, called by `rapa_dist.native`.

Without a compiler NumPy computes instead; `rapa-dist doctor` says which.
"""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

FOLDER = "rapa_dist/native"
FILES = sorted(path for path in Path(FOLDER).iterdir() if path.suffix in (".c", ".h", ".inc"))
SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in FILES)).hexdigest()[:16]
FLAGS = ["-std=gnu11", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
# one rounding everywhere; the other two change no result, and loops with roots and comparisons become vectors
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

setup(
    ext_modules=[
        Extension(
            "rapa_dist.native._library",
            sources=[str(path) for path in FILES if path.suffix == ".c"],
            depends=[*(str(path) for path in FILES), "setup.py"],
            define_macros=[("RAPA_SOURCES", f'"{SOURCES}"')],  # by which a library that is out of date is known
            extra_compile_args=FLAGS,
            libraries=["m", "pthread"],
            optional=True,
        )
    ]
)
