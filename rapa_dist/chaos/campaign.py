"""A campaign: an undisturbed run, the same run disturbed, and whether the two end alike."""

import os
import secrets
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rapa_dist import folders
from rapa_dist.chaos.disturbance import Deed, Disturbance
from rapa_dist.chaos.mischief import draw
from rapa_dist.chaos.nodes import LocalNodes
from rapa_dist.chaos.remains import remains
from rapa_dist.chaos.subject import Subject
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator.environment import environment
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.errors import ClusterError
from rapa_dist.fabric.address import find_address
from rapa_dist.fabric.scratch import shared_memory_root
from rapa_dist.interpreter import same_modules
from rapa_dist.layout import machine_of

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a campaign is to do."""

    options: tuple[str, ...]
    """Of `rapa-dist train`, those that make the run."""
    kinds: tuple[str, ...]
    """Kinds of mischief."""
    kills: int
    """Deeds in all."""
    runs: int
    """Disturbed runs that they are spread over."""
    seed: int
    """Of what is done when, and to whom; each run draws anew."""
    address: str | None = None
    """A Ray cluster to use, this machine being one of its nodes; None: every run starts one of its own."""
    nodes: LocalNodes | None = None
    """The nodes to use, and to do mischief to, instead."""


def campaign(plan: Plan, say: Say) -> dict[str, Any]:
    """Do it all and return what came of it: counts, seconds lost, what is wrong, and the verdict."""
    if plan.nodes:
        plan.nodes.check_unused()
    elif plan.address or os.environ.get("RAY_ADDRESS"):
        find_address(plan.address)  # before the undisturbed run, which takes its time
    deeds: list[Deed] = []
    wrong: list[str] = []
    facts: dict[str, Any] = {}
    with _folders() as (work, shared, temporary):
        surroundings = os.environ | same_modules() | {"RAPA_DIST_SHM": str(shared), "TMPDIR": str(temporary)}
        nodes = plan.nodes
        address = nodes.address if nodes else plan.address
        surroundings |= {"RAY_ADDRESS": address} if address else {}
        on_head = nodes.on_head() if nodes else []
        reference = work / "reference"
        say("training the undisturbed run (fabric serial)")
        _train_reference(plan, reference, surroundings)
        undisturbed = RunDirectory(reference)
        steps = int(undisturbed.metrics()[-1]["step"])
        facts = {
            "steps_per_run": steps,
            "tiles": list(undisturbed.config.tiles),
            "channels": list(undisturbed.config.channels or ()),
        }
        for number in range(plan.runs):
            share = plan.kills // plan.runs + (number < plan.kills % plan.runs)
            epochs = undisturbed.config.epochs
            machine = machine_of(undisturbed.config)
            todo = draw(
                f"{plan.seed}/{number}",
                plan.kinds,
                share,
                tiles=len(machine.tiles),
                epochs=epochs,
                steps=steps // epochs,
            )
            seen = nodes.shared_memory() if nodes else shared
            faults = len(wrong)
            subject = Subject(work / f"run-{number}", seen, plan.options, surroundings, on_head)
            disturbance = Disturbance(subject, number, say, nodes)
            try:
                disturbance.carry_out(todo)
                wrong += [f"run {number}: {line}" for line in differences(subject.directory, reference)]
            except Exception as error:  # noqa: BLE001  whatever it was, it is what was looked for
                wrong.append(f"run {number}: {type(error).__name__}: {error}")
            finally:
                subject.close()
            left = nodes.remains() if nodes else remains([shared, temporary])
            wrong += [f"run {number}: left behind: {line}" for line in left]
            for fault in wrong[faults:]:
                say(fault)
            deeds += disturbance.deeds
            done = f"{len(disturbance.deeds)} of {share} deeds done"
            say(f"run {number}: {done}, started {subject.launches} times; {len(wrong)} faults so far")
            shutil.rmtree(subject.directory, ignore_errors=True)
    return {
        "verdict": "identical" if not wrong else "not identical",
        "wrong": wrong,
        "seed": plan.seed,
        "runs": plan.runs,
        "wanted": plan.kills,
        **facts,
        "kinds": summary(deeds),
        "deeds": [asdict(deed) for deed in deeds],
        "environment": {key: value for key, value in environment().items() if key != "argv"},
    }


def summary(deeds: Sequence[Deed]) -> dict[str, dict[str, Any]]:
    """Return, for every kind of mischief, how often it was done and the seconds lost: median and longest."""
    kinds = Counter(deed.kind for deed in deeds)
    found: dict[str, dict[str, Any]] = {}
    for kind, number in kinds.items():
        seconds = [deed.seconds for deed in deeds if deed.kind == kind and deed.seconds is not None]
        moments = Counter(deed.moment for deed in deeds if deed.kind == kind)
        found[kind] = {
            "number": number,
            "moments": dict(moments),
            "median_s": round(statistics.median(seconds), 3) if seconds else None,
            "longest_s": max(seconds, default=None),
        }
    return found


def differences(ours: Path, theirs: Path) -> list[str]:
    """Return in what two finished runs differ: weights bit by bit, and metrics but for the wall time."""
    mine, yours = (checkpoints.read(checkpoints.latest(path / "checkpoints")) for path in (ours, theirs))
    found = []
    weights = [mine.weights, yours.weights]
    for name, value in weights[1].items():
        if weights[0].get(name) is None or weights[0][name].tobytes() != value.tobytes():
            found.append(f"weights differ: {name}")
    if replace(mine.progress, metrics_bytes=0) != replace(yours.progress, metrics_bytes=0):
        found.append(f"progress differs: {mine.progress}, {yours.progress}")
    lines = [
        [{key: value for key, value in line.items() if key != "wall"} for line in RunDirectory(path).metrics()]
        for path in (ours, theirs)
    ]
    return found + (["metrics differ"] if lines[0] != lines[1] else [])


def _train_reference(plan: Plan, directory: Path, surroundings: dict[str, str]) -> None:
    command = [
        sys.executable,
        "-m",
        "rapa_dist",
        "train",
        *plan.options,
        "--fabric",
        "serial",
        "--run-dir",
        str(directory),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings)
    if done.returncode:
        raise ClusterError(f"The undisturbed run failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")


@contextmanager
def _folders() -> Iterator[tuple[Path, Path, Path]]:
    """Yield folders of its own for a campaign: for run directories, for shared memory, and for what is temporary."""
    token = secrets.token_hex(4)
    shared_root = shared_memory_root()
    usual = Path("/tmp")
    root = usual if os.access(usual, os.W_OK | os.X_OK) else folders.temporary()
    if root is None:
        raise ClusterError("chaos needs a folder for temporary files, and there is none. Name one in TMPDIR.")
    work, temporary = (root / f"rc{kind}{token}" for kind in "wt")  # short, for the names of Ray's sockets
    shared = shared_root / f"rapa-chaos-{token}"
    try:
        for folder in (work, temporary, shared):
            folder.mkdir(mode=0o700)
        yield work, shared, temporary
    finally:
        for folder in (work, shared, temporary):
            shutil.rmtree(folder, ignore_errors=True)
