"""Which Ray cluster a command uses: the one that was named, this user's own on this machine, or none."""

import os
import socket
from pathlib import Path

from rapa_dist.console import stderr
from rapa_dist.errors import ClusterError, UsageError
from rapa_dist.fabric.nodes import GONE
from rapa_dist.fabric.ownership import owners, read_address, user_name
from rapa_dist.fabric.placement import RESOURCE

RUNNING_HERE = "already running here"
_CONNECT_TIMEOUT_S = 5.0
_HTTP2_SETTINGS = 4  # the kind of frame with which either side of HTTP/2, and so of gRPC, begins
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, _HTTP2_SETTINGS, 0, 0, 0, 0, 0))
_told: set[str] = set()


def find_address(address: str | None) -> tuple[str, str] | None:
    """Return (address, how it was found) of the cluster to use, or None if there is none.

    In this order: `address`, RAY_ADDRESS, the cluster that `ray start` last left running on this machine, if it is this
    user's own. Whoever runs a cluster can run code as those who join it, so another's is joined only by its address.

    Raises:
        UsageError: the address is none that a coordinator can run behind.
        ClusterError: an address was asked for and nothing answers there.
    """
    for value, source in ((address, "--address"), (os.environ.get("RAY_ADDRESS"), "RAY_ADDRESS")):
        if value and value != "local":
            if value == "auto":
                here = cluster_here()
                if here and here[1]:
                    raise ClusterError(f"{source} is auto. {here[1]}")
                if here:
                    return here[0], RUNNING_HERE
                raise ClusterError(
                    f"{source} is auto, and no Ray cluster runs on this machine. Start one with `ray start --head "
                    f"--resources='{{\"{RESOURCE}\": 21}}'`, or leave it out to have one started for the run."
                )
            if "://" in value:
                raise UsageError(
                    f"{source} is {value}: the coordinator shares memory with its tiles, so it has to run on a "
                    "node of the cluster, not behind Ray Client. Give host:port, and run it there "
                    "(for instance with `ray job submit`)."
                )
            if endpoint_of(value) is None:
                raise UsageError(
                    f"{source} needs host:port of a Ray cluster's head, like 10.0.0.1:6379, or “local” to have one "
                    f"started for the run; it is “{value}”."
                )
            if not answers(value):
                raise ClusterError(
                    f"No Ray cluster answers at {value} ({source}). Start one with `ray start --head "
                    f"--resources='{{\"{RESOURCE}\": 21}}'`, correct the address, or leave it out to have one "
                    "started for the run."
                )
            return value, source
        if value == "local":
            return None
    return _running_here()


def _running_here() -> tuple[str, str] | None:
    """Return the cluster that this user left running on this machine; of another's say so, once."""
    if (here := cluster_here()) is None:
        return None
    address, whose = here
    if whose is None:
        return address, RUNNING_HERE
    if whose not in _told:
        _told.add(whose)
        stderr.print(whose, markup=False)
    return None


def cluster_here() -> tuple[str, str | None] | None:
    """Return the address that `ray start` last left on this machine, and a sentence on whose it is if not this user's.

    Nothing is sent to an address that somebody else wrote. None: there is no cluster.
    """
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    if (found := read_address(file)) is None or (endpoint := endpoint_of(found[0])) is None:
        return None
    (address, writer), me = found, os.getuid()
    users = owners(*endpoint)
    if writer == me and users == {me}:
        return (address, None) if answers(address) else None
    if writer != me and users:
        whose = f"It belongs to {user_name(writer)}, who wrote {file}"
    elif users:
        whose = f"It belongs to {', '.join(user_name(user) for user in sorted(users - {me}))}"
    elif writer == me and answers(address):
        whose = "No node of it on this machine is yours"
    else:  # what somebody left behind
        return None
    return address, (
        f"The Ray cluster at {address} is not used unasked. {whose}, and a cluster's owner can run code as those who "
        f"join it. To join it, give --address {address}."
    )


def endpoint_of(address: str) -> tuple[str, int] | None:
    """Return host and port of "host:port", or None where the address is something else."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        return None
    return host.strip("[]"), int(port)


def answers(address: str) -> bool:
    """Return whether a gRPC server, as the head of a Ray cluster is one, listens there.

    Ray itself would wait for minutes, also behind a port that something else listens on.
    """
    return heard(address, _CONNECT_TIMEOUT_S) is True


def heard(address: str, timeout_s: float) -> bool | None:
    """Return the same as `answers`; None if it can't be told, as where a network is cut."""
    endpoint = endpoint_of(address)
    if endpoint is None:
        return False
    try:
        with socket.create_connection(endpoint, timeout=timeout_s) as connection:
            connection.sendall(_HTTP2_GREETING)
            frame = connection.recv(9)
    except UnicodeError:  # from a name that can't be one of a host
        return False
    except OSError as error:
        return False if error.errno in GONE else None
    return len(frame) == 9 and frame[3] == _HTTP2_SETTINGS
