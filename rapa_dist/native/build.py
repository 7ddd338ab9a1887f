"""How the library is built from the sources beside this file: by setup.py, by tests, and by a person who has to.

    python -m rapa_dist.native

builds it anew where rapa-dist is installed. Imports nothing of the package, as setup.py runs before there is one.
"""

import contextlib
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

FOLDER = Path(__file__).parent
LIBRARY = f"_library{EXTENSION_SUFFIXES[0]}"
FAILURE = "_library.failed"
"""A file where the library would be: why there is none."""

_ROUNDING = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
"""One everywhere; the last two change no result, and loops with roots and comparisons become vectors."""
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", *_ROUNDING)
LINKED = ("-shared", "-lm", "-pthread")
_ZIG_FLAGS = ("-mcpu=baseline", "-fno-sanitize=undefined", "-s")
"""Unlike others, Zig's compiler takes this machine's processor for every processor, and puts in traps."""

ZIG = "ziglang>=0.14,<0.18"
"""What to install where there is no compiler: one from PyPI."""
NO_COMPILER = "there was no C compiler"
_ZIG_MACHINES = ("x86_64", "aarch64")
_MOST_LINES = 12
_TRIAL = "#include <math.h>\n#include <sys/socket.h>\nfloat trial(float x) { return sqrtf(x); }\n"


class BuildError(Exception):
    """A compiler failed, or there is none; the message is what is told of it."""


def sources(folder: Path) -> list[Path]:
    """Return the files that the library is built from; an editor's own (`.#tile.c`) are none of them."""
    found = (path for path in folder.iterdir() if path.suffix in (".c", ".h", ".inc"))
    return sorted(path for path in found if not path.name.startswith("."))


def digest(folder: Path) -> str:
    """Return what tells whether a library was built from the files of a folder, as they would be compiled now.

    Of the compiler it knows nothing, as the library's bits don't depend on it; nor of the kind of machine, as those of
    another one are not loaded at all.
    """
    found = hashlib.sha256("\0".join((*FLAGS, *LINKED)).encode())
    for path in sources(folder):
        content = path.read_bytes()
        found.update(f"\0{path.name}\0{len(content)}\0".encode())
        found.update(content)
    return found.hexdigest()[:16]


def compilers() -> list[list[str]]:
    """Return the commands of all C compilers that are here, the one to be preferred first, each once."""
    names = [[*shlex.split(os.environ.get("CC", ""))], ["cc"], ["gcc"], ["clang"]]
    found: dict[tuple[str, ...], list[str]] = {}
    for name, *arguments in filter(None, names):
        if path := shutil.which(name):
            found.setdefault((os.path.realpath(path), *arguments), [name, *arguments])
    return [*found.values(), *zig()]


def zig() -> list[list[str]]:
    """Return the command of Zig's C compiler, if it is installed."""
    found = importlib.util.find_spec("ziglang")
    if found is None or found.origin is None:
        return []
    return [[str(Path(found.origin).with_name("zig")), "cc", *_ZIG_FLAGS]]


def needed_to_build() -> list[str]:
    """Return what has to be installed before the library can be built."""
    if zig() or platform.machine() not in _ZIG_MACHINES or any(map(_works, compilers())):
        return []
    return [ZIG]


def build(into: Path, commands: Sequence[Sequence[str]] | None = None) -> None:
    """Build the library from this folder's sources with the first compiler that can; where none can, leave there why.

    A library that was there before is replaced in one step; if no compiler can, it is removed.

    Args:
        into: a folder.
        commands: compilers; all that are here by default.

    Raises:
        BuildError: no compiler can.
    """
    failures = []
    (into / FAILURE).unlink(missing_ok=True)
    for command in compilers() if commands is None else commands:
        try:
            return compile_with(command, into / LIBRARY)
        except BuildError as error:
            failures.append(str(error))
    (into / LIBRARY).unlink(missing_ok=True)
    failure = "\n".join(failures) or NO_COMPILER
    (into / FAILURE).write_text(f"{failure}\n")
    raise BuildError(failure)


def compile_with(command: Sequence[str], library: Path, *flags: str) -> None:
    """Compile this folder's sources.

    Args:
        command: the compiler.
        library: the file to be made.
        flags: further ones.

    Raises:
        BuildError: the compiler fails.
    """
    files = [str(path) for path in sources(FOLDER) if path.suffix == ".c"]
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="_library") as folder:
        made = Path(folder) / library.name
        _run([*command, *FLAGS, *flags, f'-DRAPA_SOURCES="{digest(FOLDER)}"', "-o", str(made), *files, *LINKED])
        made.replace(library)  # not written to where it may be in use


def _works(command: Sequence[str]) -> bool:
    """Return whether a compiler makes a library: it may be there without the headers of C."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "trial.c"
        trial.write_text(_TRIAL)
        with contextlib.suppress(BuildError):
            _run([*command, "-fPIC", "-o", str(trial.with_suffix(".so")), str(trial), *LINKED])
            return True
    return False


def _run(command: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        caches = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}  # else it leaves some in the home folder
        try:
            done = subprocess.run(command, env=os.environ | caches, capture_output=True, errors="replace", check=False)
        except OSError as error:
            raise BuildError(f"{command[0]} can't be run: {error.strerror}") from error
    if done.returncode:
        said = (done.stderr + done.stdout).strip().splitlines()[:_MOST_LINES]
        raise BuildError("\n".join([f"{command[0]} failed with exit code {done.returncode}:", *said]))


def main() -> None:
    """Build it anew in this folder; where that fails, say what to install."""
    try:
        build(FOLDER)
    except BuildError as error:
        sys.exit(
            f"The library can't be built: {error}\nInstall a C compiler (Debian, Ubuntu: apt-get install gcc "
            f"libc6-dev), or one from PyPI: {shlex.join([sys.executable, '-m', 'pip', 'install', ZIG])}"
        )


if __name__ == "__main__":
    main()
