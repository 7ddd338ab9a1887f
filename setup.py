"""The part of the package that is compiled: a plain library, called by `rapa_dist.native`.

Without a compiler NumPy computes instead; `rapa-dist doctor` says which.
"""

import hashlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

FOLDER = "rapa_dist/native"
FILES = sorted(
    path for path in Path(FOLDER).iterdir() if path.suffix in (".c", ".h", ".inc") and not path.name.startswith(".")
)


def digest() -> str:
    """Return what the library is known by: rapa_dist.native holds it against the files that it finds."""
    found = hashlib.sha256()
    for path in FILES:
        contents = path.read_bytes()
        found.update(f"{path.name} {len(contents)}\n".encode() + contents)
    return found.hexdigest()[:16]


FLAGS = ["-std=gnu11", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
# one rounding everywhere; the other two change no result, and loops with roots and comparisons become vectors
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

# what a run's bits depend on besides the sources: nothing else may change how the library rounds
rounding = hashlib.sha256(" ".join(FLAGS).encode()).hexdigest()[:8]

has_compiler = os.environ.get("CC") or shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
if not has_compiler and importlib.util.find_spec("ziglang"):  # build_backend.py has asked for it
    zig = f"{sys.executable} -m ziglang cc -mcpu=baseline"  # as the other compilers do, not the machine's own
    os.environ |= {"CC": zig, "LDSHARED": f"{zig} -shared"}
    FLAGS.append("-fno-sanitize=undefined")  # which Zig turns on by itself

setup(
    ext_modules=[
        Extension(
            "rapa_dist.native._library",
            sources=[str(path) for path in FILES if path.suffix == ".c"],
            depends=[*(str(path) for path in FILES), "setup.py"],
            define_macros=[("RAPA_SOURCES", f'"{digest()} {rounding}"')],
            extra_compile_args=FLAGS,
            libraries=["m", "pthread"],
            optional=True,
        )
    ]
)
