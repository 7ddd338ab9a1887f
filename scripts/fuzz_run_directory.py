#!/usr/bin/env python3
"""Change the files of a run directory at random, and have every command that reads one meet what comes of it.

    .venv/bin/python scripts/fuzz_run_directory.py --cases 1000 --seed 1

Every case is a copy of a small finished run with one to three mutations of `mutations.py`, drawn from the seed and the
number of the case. It is evaluated, analysed, reported and resumed, each in a process of its own that has everything
loaded. What is wrong: a traceback, a signal, another exit code than 0, 1 and 2, more than `--limit` seconds, anything
touched outside the run directory, and a command that refuses and has still changed the run.
"""

import argparse
import codecs
import hashlib
import os
import random
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from mutations import mutate

SMALL = ("--tiles", "2,1,1", "--channels", "2,2,2", "--limit-train", "10", "--batch-size", "5", "--fabric", "serial")
MEMORY_BYTES = 8 << 30  # of address space: a file of a terabyte that is read whole is found
NOBODY = 65534
FAULTS = ("Traceback", "This is a fault", "Exception ignored", "panicked")
UNSEEN = {"log", ".lock"}  # of a refused command: it says in the log why, and the lock is empty


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended."""

    code: int
    """Its exit code; that of the signal that killed it, negative."""
    text: str
    """What it wrote."""
    seconds: float


Command = Callable[[list[str], bool], Result]
"""Runs a command line, as nobody if so wished."""


@dataclass(slots=True)
class World:
    """A finished run to copy, and files of others beside it that nobody may touch."""

    path: Path
    report: bool = True
    """Whether reports are made: they take the longest by far."""
    found: Counter[str] = field(default_factory=Counter)
    """Of commands by exit code."""

    @classmethod
    def make(cls, path: Path, command: Command) -> "World":
        """Draw images and train the runs."""
        from PIL import Image

        for part, count in (("train", 6), ("test", 3)):
            for number, name in enumerate(("cat", "dog")):
                folder = path / "images" / part / name
                folder.mkdir(parents=True)
                for i in range(count):
                    Image.new("RGB", (32, 32), (40 * i, 80 * number, 90)).save(folder / f"{i}.png")
        (path / "others" / "folder").mkdir(parents=True)
        (path / "others" / "folder" / "file").write_text("theirs")
        (path / "others" / "secret.txt").write_text("theirs")
        options = [*SMALL, "--dataset", f"images:{path / 'images'}", "--epochs", "4"]
        for place in ("run", "others/run"):
            done = command(["train", *options, "--run-dir", str(path / place)], False)
            assert done.code == 0, done.text
        command(["report", str(path / "run")], False)
        return cls(path)

    def try_case(self, seed: int, number: int, command: Command) -> tuple[str, list[str]]:
        """Mutate a copy of the run and run commands on it; return what was done, and what was wrong."""
        rng = random.Random(f"{seed}/{number}")
        folder = self.path / "case"
        run = Path(shutil.copytree(self.path / "run", folder / "run"))
        done = [mutate(rng, run, self.path / "others") for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        as_nobody = os.geteuid() == 0 and rng.random() < 0.15
        if as_nobody:
            hand_over(folder)
        before, wrong = fingerprint(self.path, leave_out={"case"}), []
        try:
            for arguments in self.commands(rng, run):
                was = fingerprint(run, leave_out=UNSEEN | {"report.html"})
                result = command(arguments, as_nobody)
                self.found[f"{arguments[0]} {result.code}"] += 1
                faults = [line for line in result.text.splitlines() if any(fault in line for fault in FAULTS)]
                named = " ".join(arguments).replace(str(folder), "")
                if faults or result.code not in (0, 1, 2):
                    wrong.append(f"{named}: exit code {result.code}, {result.seconds:.0f} s\n{result.text[-3000:]}")
                elif (result.code == 0 and not result.text.strip()) or (
                    result.code != 0 and "Error: " not in result.text
                ):
                    wrong.append(f"{named}: exit code {result.code}, but said {result.text!r}")
                refused = result.code == 2 or (result.code == 1 and "diverged" not in result.text)
                if refused and (now := fingerprint(run, leave_out=UNSEEN | {"report.html"})) != was:
                    wrong.append(f"{named}: was refused, and changed {changes(was, now)}\n{result.text[-1000:]}")
            if (after := fingerprint(self.path, leave_out={"case"})) != before:
                wrong.append(f"touched {changes(before, after)}")
        finally:
            shutil.rmtree(folder)
        return "; ".join(done) + (" (as nobody)" if as_nobody else ""), wrong

    def commands(self, rng: random.Random, run: Path) -> Iterable[list[str]]:
        """Yield what is done to a case."""
        at = str(run)
        yield ["evaluate", at, "--checkpoint", rng.choice(("newest", "newest", "best"))]
        more = (
            ["voting", at, "--votes", "2"],
            ["reduce", at],
            ["attack", at, "--snr", "30"],
            ["similarity", at, "--json"],
        )
        yield ["analyze", "similarity", at]
        yield ["analyze", *rng.choice(more)]
        theirs = str(self.path / "others" / "run")
        yield rng.choice(
            (["runs", str(run.parent)], ["runs", at, "--json"], ["compare", at, at], ["compare", at, theirs])
        )
        if self.report:
            yield ["report", at]
        yield ["train", "--resume", at, "--dry-run"]
        resume = [
            "train",
            "--resume",
            at,
            "--fabric",
            rng.choice(("serial", "serial", "batched")),
            "--save-patience",
            "1",
        ]
        yield [
            *resume,
            *rng.choice((["--epochs", "4"], ["--epochs", "6"], ["--epochs", "6"], ["--epochs", "5", "--json"])),
        ]
        yield ["evaluate", at, "--json"]


def fingerprint(folder: Path, leave_out: Iterable[str] = ()) -> dict[str, str]:
    """Return what there is below a folder, links and pipes too: kind, mode, time, contents."""
    found = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not (place == str(folder) and name in leave_out)]
        for name in (*folders, *files):
            path = os.path.join(place, name)
            key = os.path.relpath(path, folder)
            if key in leave_out:
                continue
            about = os.lstat(path)
            facts = f"{about.st_mode:o} {about.st_uid} {about.st_size if not stat.S_ISDIR(about.st_mode) else ''}"
            if stat.S_ISLNK(about.st_mode):
                facts += os.readlink(path)
            elif stat.S_ISREG(about.st_mode) and about.st_size < 1 << 24:
                facts += f" {about.st_mtime_ns} " + hashlib.sha256(Path(path).read_bytes()).hexdigest()
            found[key] = facts
    return found


def changes(before: dict[str, str], after: dict[str, str]) -> str:
    """Return the names of what differs."""
    return ", ".join(sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key)))


def hand_over(folder: Path) -> None:
    """Give a folder to nobody, but what was somebody else's already, and what is linked elsewhere."""
    os.lchown(folder, NOBODY, NOBODY)
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            about = os.lstat(path)
            if about.st_uid == os.geteuid() and (stat.S_ISDIR(about.st_mode) or about.st_nlink == 1):
                os.lchown(path, NOBODY, NOBODY)


def in_a_process(arguments: list[str], as_nobody: bool, limit_s: float, output: Path) -> Result:
    """Run a command line in a child of this process, which has everything loaded; kill it after a time."""
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            _run(arguments, as_nobody, output)
        finally:
            os._exit(99)
    code = _ended(pid, limit_s)
    seconds = time.monotonic() - started
    text = output.read_text(errors="replace")
    return Result(code, text if code != -signal.SIGKILL else f"no end after {seconds:.0f} s\n{text}", seconds)


def _run(arguments: list[str], as_nobody: bool, output: Path) -> None:
    from rapa_dist.cli import main

    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    if as_nobody:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    try:
        main(arguments)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


def _ended(pid: int, limit_s: float) -> int:
    deadline = time.monotonic() + limit_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def load_everything() -> None:
    """Import what the commands import, so that a child needs no time for it."""
    import importlib

    for name in ("train", "evaluate", "analyze", "report", "runs", "compare"):
        importlib.import_module(f"rapa_dist.cli.{name}")
    for name in (
        *(
            "coordinator.run",
            "coordinator.retest",
            "coordinator.plan",
            "fabric.serial",
            "fabric.batched",
            "report.page",
        ),
        *("analysis.voting", "analysis.reduction", "analysis.attack", "analysis.plots", "report.figures"),
    ):
        importlib.import_module(f"rapa_dist.{name}")
    for name in ("utf-16-be", "idna", "latin-1"):  # nobody may not read where Python is
        codecs.lookup(name)
    for name in ("matplotlib.figure", "matplotlib.backends.backend_svg"):
        importlib.import_module(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds a command may take")
    parser.add_argument("--show", action="store_true", help="print all that the commands say")
    parser.add_argument("--report-every", type=int, default=4, help="make a report in one of so many cases")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    load_everything()
    with tempfile.TemporaryDirectory(prefix="rapa-fuzz-") as made:
        folder = Path(made)
        folder.chmod(0o755)
        shared = folder / "shared"
        shared.mkdir()
        shared.chmod(0o1777)
        os.environ |= {"HOME": str(folder), "RAPA_DIST_SHM": str(shared)}
        output = folder.with_name(f"{folder.name}.out")

        def command(line: list[str], as_nobody: bool) -> Result:
            result = in_a_process(line, as_nobody, arguments.limit, output)
            if arguments.show:
                print(f"$ {' '.join(line)}\n{result.text}[{result.code}, {result.seconds:.1f} s]", flush=True)
            return result

        world = World.make(folder, command)
        failed, slowest, started = 0, 0.0, time.monotonic()
        for number in range(arguments.first, arguments.first + arguments.cases):
            world.report = number % arguments.report_every == 0
            began = time.monotonic()
            done, wrong = world.try_case(arguments.seed, number, command)
            slowest = max(slowest, time.monotonic() - began)
            if wrong:
                failed += 1
                print(f"--- case {number}: {done}", *wrong, sep="\n", flush=True)
            if (number + 1) % 50 == 0:
                print(f"{number + 1} cases, {failed} wrong, {time.monotonic() - started:.0f} s", file=sys.stderr)
        output.unlink(missing_ok=True)
    print(f"{arguments.cases} cases of seed {arguments.seed}: {failed} wrong. The slowest took {slowest:.1f} s.")
    print("exit codes: " + ", ".join(f"{name} {count}×" for name, count in sorted(world.found.items())))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
