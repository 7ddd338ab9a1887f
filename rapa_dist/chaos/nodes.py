"""A cluster of several nodes on this machine, started with `cluster/local.sh`, and the mischief done to them."""

import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rapa_dist.errors import UsageError
from rapa_dist.fabric.scratch import PREFIX
from rapa_dist.files import read_file

_SCRIPT = Path(__file__).resolve().parents[2] / "cluster" / "local.sh"
_OF_A_RUN = ("ray::Tile", "ray::RemoteChip")
_CHIP = "ray::RemoteChip"
_PATIENCE_S = 60.0
_MOST_BYTES = 4096  # of a file that says something about the cluster
_SCRIPT_S = 150.0  # for the script to start a node again
_LEAVING_S = 15.0  # for the tiles of a run that has just ended
_PAUSE_S = 0.2


class LocalNodes:
    """The nodes of a local cluster. The coordinator is on node 0, the head; mischief is done to the others."""

    def __init__(self, state: Path) -> None:
        """Look for the cluster that is kept in a folder.

        Raises:
            UsageError: there is none, or it has no node besides the head.
        """
        self._state = state
        self._under_way: list[subprocess.Popen[bytes]] = []
        try:
            self.number = int(_read(state / "nodes"))
            self.address = _read(state / "address")
            self._has_links = _read(state / "kind") == "namespaces"
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--local-cluster is the folder that cluster/local.sh keeps a cluster in; {state} is none ({error}). "
                "Start one with: cluster/local.sh --state DIR start"
            ) from error
        if self.number < 2:
            raise UsageError(f"The cluster in {state} has no node besides its head; start one with --nodes 3.")
        if not _SCRIPT.exists():
            raise UsageError("cluster/local.sh is not there; --local-cluster needs a checkout of the repository.")

    def check_can_cut(self) -> None:
        """Raise UsageError if the nodes have no links that could be cut."""
        if not self._has_links:
            raise UsageError(
                f"node-cut needs nodes with networks of their own; those of {self._state} are raylets on one host. "
                "Start the cluster as root, where namespaces can be made, or leave node-cut out of --kinds."
            )

    def on_head(self) -> list[str]:
        """Return what to put before a command that is to run on node 0."""
        return [*self._script("run"), "--"]

    def shared_memory(self, node: int = 0) -> Path:
        """Return the folder of a node's shared memory, as it is seen from outside."""
        if self._has_links:
            return Path(f"/proc/{self._holder(node)}/root/dev/shm")
        with suppress(OSError):
            return Path(_read(self._state / "shm")) / f"n{node}"
        return Path("/dev/shm")

    def chips(self) -> dict[int, int]:
        """Return the processes of the chips besides the coordinator's, by their nodes."""
        found = {}
        for node in range(1, self.number):
            for pid, title in self._processes(node):
                if title.startswith(_CHIP):
                    found[node] = pid
        return found

    def kill(self, node: int) -> None:
        """End every process of a node at once, and begin to start it again, empty."""
        subprocess.run(self._script("kill", str(node)), check=True, capture_output=True, timeout=_SCRIPT_S)
        self._begin("revive", str(node))

    def cut(self, node: int, seconds: float) -> None:
        """Begin to cut a node from the network for some seconds."""
        self._begin("cut", str(node), str(seconds))

    def settle(self) -> None:
        """Wait until all nodes are back."""
        while self._under_way:
            self._under_way.pop().wait(timeout=_SCRIPT_S)

    def check_unused(self) -> None:
        """Raise UsageError if something of another run is on the nodes: mischief would be done to that, too."""
        if found := self._left_after(_LEAVING_S):
            raise UsageError(
                f"The nodes of {self._state} are in use: {', '.join(found[:5])}. Wait for the run there to end, or "
                "start a cluster for chaos alone."
            )

    def remains(self) -> list[str]:
        """Return what a run that has ended left on the nodes, once it had time to go away."""
        self.settle()
        return self._left_after(_PATIENCE_S)

    def _left_after(self, patience_s: float) -> list[str]:
        deadline = time.monotonic() + patience_s
        while (found := self._left()) and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
        return found

    def _left(self) -> list[str]:
        found = []
        for node in range(self.number):
            found += [f"node {node}: {path.name}" for path in self.shared_memory(node).glob(f"{PREFIX}*")]
            titles = [(pid, title) for pid, title in self._processes(node) if title.startswith(_OF_A_RUN)]
            found += [f"node {node}: process {pid} {title}" for pid, title in titles]
        return found

    def _script(self, *arguments: str) -> list[str]:
        return [str(_SCRIPT), "--state", str(self._state), *arguments]

    def _begin(self, *arguments: str) -> None:
        started = subprocess.Popen(self._script(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._under_way.append(started)

    def _holder(self, node: int) -> int:
        """Return the process that all processes of a node descend from."""
        return int(_read(self._state / f"n{node}" / "holder"))

    def _processes(self, node: int) -> Sequence[tuple[int, str]]:
        """Return the processes of a node as (pid, title)."""
        try:
            top = self._holder(node)
        except (OSError, ValueError):  # it is being started
            return []
        parents, titles = {}, {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError, IndexError):
                    pid = int(entry.name)
                    parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    titles[pid] = os.fsdecode((entry / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" "))
        return [(pid, titles[pid]) for pid in titles if top in _ancestors(pid, parents)]


def _read(file: Path) -> str:
    return read_file(file, _MOST_BYTES).decode().strip()


def _ancestors(pid: int, parents: dict[int, int]) -> set[int]:
    found: set[int] = set()
    while (pid := parents.get(pid, 0)) and pid not in found:
        found.add(pid)
    return found
