"""What this machine gives a run: cores, memory, shared memory, sockets; see `preconditions` for what Ray needs."""

import os
import socket
import stat
from pathlib import Path

from rapa_dist.cgroup import cpu_limit
from rapa_dist.check import Check, size
from rapa_dist.config import PAPER_CHANNELS, PAPER_TILES
from rapa_dist.demand import arena_floats
from rapa_dist.errors import ClusterError
from rapa_dist.footprint import COORDINATOR_BYTES, RAY_BYTES, TILE_BYTES
from rapa_dist.memory import memory

TILES, CHANNELS = PAPER_TILES, PAPER_CHANNELS
"""The machine that a run has unless it is told otherwise; what is looked for is room for it."""
BATCH_SIZE = 10

_OBJECT_STORE_BYTES = 100_000_000


def check_cores() -> Check:
    """Look how many cores this process may use."""
    usable, limit = len(os.sched_getaffinity(0)), cpu_limit()
    found = {"cores": os.cpu_count(), "cores_usable": usable, "cores_limit": limit}
    value = f"{usable} usable of {os.cpu_count()}"
    if limit is not None and limit < usable:
        value += f", limited to {limit:g} cores' time"
    if min(usable, limit or usable) < 2:
        fix = "Runs work, but coordinator and tiles take turns. Allow the container two cores or more."
        return Check("cores", "warning", value, fix, found)
    return Check("cores", "ok", value, quantities=found)


def check_memory() -> Check:
    """Look whether the processes of a run with the default tiles fit into memory."""
    found = memory()
    return judge_memory(found.total, found.available, "in this control group" if found.limited else "")


def judge_memory(total: int, available: int, where: str = "") -> Check:
    """Say whether a run with the default tiles fits into `available` bytes."""
    needed = RAY_BYTES + COORDINATOR_BYTES + sum(TILES) * TILE_BYTES
    found = {"total_bytes": total, "available_bytes": available, "needed_bytes": needed}
    value = f"{size(available)} available of {size(total)} {where}".rstrip()
    rule = (
        f"{sum(TILES)} tiles, the coordinator and Ray take about {size(needed)}; a tile more takes "
        f"{size(TILE_BYTES)}. End other programs, use fewer --tiles, or --fabric serial."
    )
    if available < needed:
        return Check("memory", "failed", value, rule, found)
    if available < 1.5 * needed:
        return Check("memory", "warning", value, rule, found)
    return Check("memory", "ok", value, quantities=found)


def check_shared_memory() -> Check:
    """Make, map and measure a file where a run would put its rows and kernels."""
    from rapa_dist.fabric.chip import shared_bytes
    from rapa_dist.fabric.scratch import Scratch, free_bytes, shared_memory_root
    from rapa_dist.machine import Machine

    root = shared_memory_root()
    status = os.statvfs(root)
    total, free = status.f_blocks * status.f_frsize, free_bytes(root)
    machine = Machine.build(channels=CHANNELS, tiles=TILES)
    needed = shared_bytes(machine, arena_floats(machine, BATCH_SIZE))
    found = {"root": root, "total_bytes": total, "free_bytes": free, "needed_bytes": needed}
    value = f"{root}: {size(free)} free of {size(total)}"
    name = "shared memory"
    try:
        scratch = Scratch(root)
        try:
            with scratch.map_file("probe", 4096) as probe:
                probe[:5] = b"probe"
            mode = stat.S_IMODE((scratch.path / "probe").stat().st_mode)
        finally:
            scratch.remove()
    except (ClusterError, OSError) as error:
        return Check(name, "failed", f"{value}; no file can be made and mapped there", str(error), found)
    if mode != 0o600:
        fix = "Others could read the rows. Set RAPA_DIST_SHM to a folder in memory that keeps a file's mode."
        return Check(name, "failed", f"{value}; a file of mode 600 gets {mode:o} there", fix, found)
    return judge_shared_memory(value, found, in_memory=_in_memory(root))


def judge_shared_memory(value: str, found: dict[str, object], *, in_memory: bool) -> Check:
    """Say whether a run with the default tiles fits, from the bytes free and needed."""
    name = "shared memory"
    free, needed = found["free_bytes"], found["needed_bytes"]
    assert isinstance(free, int)
    assert isinstance(needed, int)
    enlarge = "In a container, start it with --shm-size=2g; elsewhere, free some, or set RAPA_DIST_SHM."
    if free < needed:
        fix = f"A run with {sum(TILES)} tiles needs {size(needed)} there. {enlarge}"
        return Check(name, "failed", value, fix, found)
    if not in_memory:
        fix = "Not in memory, so the disk slows the tiles. Mount a tmpfs and name it in RAPA_DIST_SHM."
        return Check(name, "warning", value, fix, found)
    if free < needed + _OBJECT_STORE_BYTES:
        fix = f"Enough for the tiles, but Ray, too, wants {size(_OBJECT_STORE_BYTES)} of it. {enlarge}"
        return Check(name, "warning", value, fix, found)
    return Check(name, "ok", value, quantities=found)


def _in_memory(folder: Path) -> bool:
    """Whether the folder is on a tmpfs, as /proc/mounts tells."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    around = [(len(point), kind) for _, point, kind, *_ in mounts if folder.resolve().is_relative_to(point)]
    return max(around, default=(0, ""))[1] in ("tmpfs", "ramfs")


def check_datagrams() -> Check:
    """Send a datagram from one Unix socket to another, as doorbells do."""
    from rapa_dist.fabric.scratch import Scratch

    name = "doorbells"
    queue = Path("/proc/sys/net/unix/max_dgram_qlen")
    length = int(queue.read_text()) if queue.exists() else None
    found = {"max_dgram_qlen": length}
    try:
        scratch = Scratch()
        try:
            with (
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear,
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bell,
            ):
                ear.bind(str(scratch.path / "probe"))
                ear.settimeout(2.0)
                bell.sendto(b"probe", str(scratch.path / "probe"))
                works = ear.recv(64) == b"probe"
        finally:
            scratch.remove()
    except (ClusterError, OSError) as error:
        works, value = False, f"no Unix datagram arrives: {error}"
    else:
        value = f"Unix datagrams arrive; net.unix.max_dgram_qlen is {length}"
    if not works:
        fix = (
            "Let the sandbox allow AF_UNIX sockets, and set RAPA_DIST_SHM to a folder with a short name "
            "(107 bytes with the socket's) in which sockets can be made."
        )
        return Check(name, "failed", value, fix, found)
    return Check(name, "ok", value, quantities=found)
