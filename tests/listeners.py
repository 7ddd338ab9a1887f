"""What can be seen of a run from outside: its processes, what they listen on, and what answers there."""

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from second_user import METHODS, ask


def processes(top: int) -> dict[int, str]:
    """Return a process and those below it, with their names."""
    names, parents = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:  # it has ended
            continue
        names[int(entry.name)], parents[int(entry.name)] = name, int(rest.split()[1])
    found = {top}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: names[pid] for pid in found}


def listening(pids: Iterable[int]) -> dict[int, str]:
    """Return the ports that processes listen on, and at which address, as the kernel writes it."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                inodes.add(os.readlink(link))
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
            if state == "0A" and f"socket:[{inode}]" in inodes:
                at, _, port = local.partition(":")
                found[int(port, 16)] = at
    return found


def services(ports: Iterable[int], token: str) -> list[tuple[str, int, str]]:
    """Return what is behind each port, found by asking it with the token, so that a refusal is one of the others."""
    found = []
    for port in ports:
        for name, method in METHODS.items():
            with suppress(OSError):
                status = ask(port, method, token)
                if status == "0" or (status and not method):
                    found.append((f"{name} ({port})", port, method))
    return found


def outer_addresses() -> list[str]:
    """Return the address that this machine has in a network, if it is in one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent, suppress(OSError):
        unsent.connect(("203.0.113.1", 9))
        return [unsent.getsockname()[0]]
    return []


def abstract_sockets() -> list[str]:
    """Return the names of the Unix sockets that are in no folder: whoever knows one may connect."""
    lines = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    return [words[-1] for words in lines if words[-1].startswith("@")]
