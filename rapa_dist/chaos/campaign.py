"""A campaign: an undisturbed run, the same run disturbed, and whether the two end alike."""

import os
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rapa_dist.chaos.mischief import (
    ALL_TILES,
    CHIP_KILL,
    COORDINATOR_KILL,
    COORDINATOR_TERM,
    CUT_S,
    NODE_CUT,
    NODE_KILL,
    ON_NODES,
    SAVING,
    STARTING,
    TILE_KILL,
    TILE_STOP,
    Mischief,
    draw,
)
from rapa_dist.chaos.nodes import LocalNodes
from rapa_dist.chaos.remains import remains
from rapa_dist.chaos.subject import Subject
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator.run_directory import RunDirectory, environment
from rapa_dist.errors import ClusterError
from rapa_dist.fabric.scratch import shared_memory_root

Say = Callable[[str], None]
_START_S = 8.0  # within which a start is killed, if no start has been seen yet
_TERM_EXIT = 130
_STEPS_UNDER_WAY = 2  # that the tiles of one node may do before the loss of another is noticed


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Deed:
    """What was done, and what it cost."""

    run: int
    kind: str
    moment: str
    step: int
    """Training steps that were done then; -1 before the tiles were up."""
    seconds: float | None
    """Wall time until all that were hit were back and the run was a step further than before; None: it ended first."""


def campaign(plan: Plan, say: Say) -> dict[str, Any]:
    """Do it all and return what came of it: counts, seconds lost, what is wrong, and the verdict."""
    if plan.nodes:
        plan.nodes.check_unused()
    deeds: list[Deed] = []
    wrong: list[str] = []
    facts: dict[str, Any] = {}
    with _folders() as (work, shared, temporary):
        surroundings = os.environ | {"RAPA_DIST_SHM": str(shared), "TMPDIR": str(temporary)}
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
            "channels": list(undisturbed.config.channels),
        }
        for number in range(plan.runs):
            share = plan.kills // plan.runs + (number < plan.kills % plan.runs)
            epochs = undisturbed.config.epochs
            machine = undisturbed.config.machine
            todo = draw(
                f"{plan.seed}/{number}",
                plan.kinds,
                share,
                tiles=len(machine.tiles),
                epochs=epochs,
                steps=steps // epochs,
            )
            seen = nodes.shared_memory() if nodes else shared
            before, faults = len(deeds), len(wrong)
            subject = Subject(work / f"run-{number}", seen, plan.options, surroundings, on_head)
            try:
                _disturb(subject, todo, number, deeds, say, nodes)
                wrong += [f"run {number}: {line}" for line in differences(subject.directory, reference)]
            except Exception as error:  # noqa: BLE001  whatever it was, it is what was looked for
                wrong.append(f"run {number}: {type(error).__name__}: {error}")
            finally:
                subject.close()
            left = nodes.remains() if nodes else remains([shared, temporary])
            wrong += [f"run {number}: left behind: {line}" for line in left]
            for fault in wrong[faults:]:
                say(fault)
            done = f"{len(deeds) - before} of {share} deeds done"
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
    weights = [{f"layer {i}": k for i, k in enumerate(c.kernels)} | dict(c.digital) for c in (mine, yours)]
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


def _disturb(
    subject: Subject, todo: Sequence[Mischief], run: int, deeds: list[Deed], say: Say, nodes: LocalNodes | None = None
) -> None:
    """Train a run to its end, and do to it what is to be done."""
    in_starts = [mischief for mischief in todo if mischief.moment == STARTING]
    start_s = _START_S

    def launch() -> None:
        """Start the run, as often as its start is to be killed and once more."""
        nonlocal start_s
        while in_starts:
            mischief = in_starts.pop()
            subject.launch()
            time.sleep(start_s * mischief.delay_s / 0.03)
            note(mischief, subject.step(), None)
            subject.kill()
        started = time.monotonic()
        subject.launch()
        subject.wait_until(lambda: subject.step() >= 0, "no tiles")
        start_s = time.monotonic() - started

    def note(mischief: Mischief, step: int, seconds: float | None) -> None:
        seconds = None if seconds is None else round(seconds, 3)
        deeds.append(Deed(run=run, kind=mischief.kind, moment=mischief.moment, step=step, seconds=seconds))
        lost = "" if seconds is None else f", {seconds:.2f} s"
        say(f"run {run}, step {step}: {mischief.kind} while {mischief.moment}{lost}")

    launch()
    for mischief in (mischief for mischief in todo if mischief.moment != STARTING):
        if not subject.wait_until(lambda: subject.step() >= mischief.step, "no step"):  # noqa: B023  called at once
            break
        if mischief.moment == SAVING:
            subject.wait_until(subject.saves, "no checkpoint")
        time.sleep(mischief.delay_s)
        if subject.exit_code is not None:
            break
        victims = {}
        if nodes and mischief.kind in ON_NODES:
            if mischief.kind != CHIP_KILL:
                nodes.settle()
            victims = nodes.chips()
            if not victims:
                say(f"run {run}: no other node has tiles; {mischief.kind} left out")
                continue
        step, pids, began = subject.step(), subject.pids(), time.monotonic()
        hit: Sequence[int] = ()
        further = 0
        if mischief.kind in (COORDINATOR_KILL, COORDINATOR_TERM):
            if mischief.kind == COORDINATOR_KILL:
                subject.kill()
            else:
                subject.signal(signal.SIGTERM)
                if subject.exit_code not in (_TERM_EXIT, 0):  # it may just have been done
                    raise ClusterError(f"exit code {subject.exit_code} after SIGTERM\n{subject.last_lines}")
            launch()
        elif nodes and victims:
            further = _STEPS_UNDER_WAY
            _hit_node(nodes, mischief, victims)
        else:
            hit = range(len(pids)) if mischief.kind == ALL_TILES else [mischief.victim % len(pids)]
            number = {TILE_KILL: signal.SIGKILL, ALL_TILES: signal.SIGKILL, TILE_STOP: signal.SIGSTOP}[mischief.kind]
            for victim in hit:
                with suppress(ProcessLookupError):
                    os.kill(pids[victim], number)

        def is_over() -> bool:
            now = subject.pids()
            return subject.step() > step + further and all(now[victim] != pids[victim] for victim in hit)  # noqa: B023

        over = subject.wait_until(is_over, f"no recovery from {mischief.kind}")
        note(mischief, step, time.monotonic() - began if over and subject.exit_code is None else None)
    subject.wait_until(lambda: subject.exit_code is not None, "no end")
    if subject.exit_code:
        raise ClusterError(f"The run ended with exit code {subject.exit_code}:\n{subject.last_lines}")


def _hit_node(nodes: LocalNodes, mischief: Mischief, chips: Mapping[int, int]) -> None:
    """Do mischief to one of the nodes that have tiles, or to its chip."""
    node = sorted(chips)[mischief.victim % len(chips)]
    if mischief.kind == NODE_KILL:
        nodes.kill(node)
    elif mischief.kind == NODE_CUT:
        nodes.cut(node, CUT_S)
    else:
        assert mischief.kind == CHIP_KILL
        os.kill(chips[node], signal.SIGKILL)


@contextmanager
def _folders() -> Iterator[tuple[Path, Path, Path]]:
    """Yield folders of its own for a campaign: for run directories, for shared memory, and for what is temporary."""
    token = secrets.token_hex(4)
    temporary = Path("/tmp") / f"rc{token}"  # short: the names of Ray's sockets below it have 107 bytes in all
    work = Path(tempfile.mkdtemp(prefix="rapa-chaos-"))
    shared = shared_memory_root() / f"rapa-chaos-{token}"
    try:
        for folder in (temporary, shared):
            folder.mkdir(mode=0o700)
        yield work, shared, temporary
    finally:
        for folder in (work, shared, temporary):
            shutil.rmtree(folder, ignore_errors=True)
