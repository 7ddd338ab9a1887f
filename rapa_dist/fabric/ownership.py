"""Whose a Ray cluster is: the user of the file that names it, and of the process behind it.

Whoever runs a cluster can run code as those who join it, since Ray unpickles what it is sent, and gets their token.
Ray leaves the address of the cluster that was started last in a folder that everybody may write to.
"""

import ipaddress
import os
import pwd
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rapa_dist.fabric.scratch import open_file

_LISTENING = "0A"  # TCP_LISTEN of the kernel, as /proc/net/tcp writes it
_ADDRESS_BYTES = 300  # of a file with an address: a host's name has 253 characters at most
_ADDRESS = re.compile(r"[A-Za-z0-9._:\[\]-]+")  # what a terminal shows as it is, too


def user_name(uid: int) -> str:
    """Return a user's name, or the number of one that has none here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def read_address(file: Path) -> tuple[str, int] | None:
    """Return what an address file says, and the user that it belongs to; None if there is none that can be read.

    Anybody may have put anything there: a pipe would be waited for without end, a link read as somebody else's.
    """
    try:
        descriptor = open_file(file, os.O_RDONLY)
    except OSError:
        return None
    with open(descriptor, "rb") as opened:
        text = opened.read(_ADDRESS_BYTES).decode("ascii", errors="replace").strip()
        return (text, os.fstat(descriptor).st_uid) if _ADDRESS.fullmatch(text) else None


def owners(host: str, port: int) -> set[int]:
    """Return the users that a cluster belongs to, by the processes that can be seen here; empty if there are none.

    Who listens at its address, or, where the head is on another machine, who has joined it from this one. Nothing is
    sent to it, as it may be anybody's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as unsent:
            unsent.connect((host, port))
            ours, theirs = unsent.getsockname()[0], unsent.getpeername()[0]
    except (OSError, UnicodeError):
        return set()
    if ours == theirs:
        return set(_listeners(theirs, port))
    found, me = set(_nodes(f"{host}:{port}")), os.getuid()
    return {me} if me in found else found


def _listeners(host: str, port: int) -> Iterator[int]:
    """Yield the users that listen on a port of this machine, at an address or at all of them."""
    wanted = _plain(host)
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):  # a kernel without IPv6
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, uid, *_ = line.split()
                address, _, number = local.partition(":")
                if state == _LISTENING and int(number, 16) == port:
                    at = _plain(_from_kernel(address))
                    if at == wanted or at.is_unspecified:
                        yield int(uid)


def _from_kernel(address: str) -> str:
    """Return an address as /proc/net writes it, in words of four bytes in the machine's order, as people write it."""
    words = [int(address[i : i + 8], 16) for i in range(0, len(address), 8)]
    packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    return str(ipaddress.ip_address(packed))


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an address; one of IPv4 that is written as one of IPv6 as what it is."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return (isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped) or found


def _nodes(address: str) -> Iterator[int]:
    """Yield the users whose raylets on this machine are nodes of the cluster at an address."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):  # it has ended
                words = (process / "cmdline").read_bytes().split(b"\0")
                if os.path.basename(words[0]) == b"raylet" and f"--gcs-address={address}".encode() in words:
                    yield process.stat().st_uid
