"""What a second user tries on somebody else's run; a program of its own, as it gives up its rights for good.

Reads what to try it on as JSON from stdin, and prints what came of each attempt, one JSON object a line.
"""

import ctypes
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError

from rapa_dist.fabric.access import current, use
from rapa_dist.fabric.registry import registrations

Attempt = tuple[str, Callable[[], object]]

OTHER = 61234  # a user that has no account, and owns nothing
_PTRACE_ATTACH = 16
_FORGED = "f" * 64  # a token of the right form
_LONG_S = 3.0
METHODS = {  # by what has it; each answers whoever has the token
    "cluster's head": "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "node manager": "/ray.rpc.NodeManagerService/GetNodeStats",
    "object manager": "/ray.rpc.ObjectManagerService/Pull",
    "worker": "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "agent": "",  # speaks HTTP
}
_STATUS = re.compile(rb"grpc-status(?:\x01(?=\d)|\x02(?=\d\d))(\d\d?)", re.DOTALL)  # with the length before it
_REFUSALS = ("16", "401", "403")  # UNAUTHENTICATED of gRPC; of HTTP


def become(user: int) -> None:
    """Give up all rights but those of a user."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def call(port: int, method: str, token: str | None) -> str:
    """Call a gRPC method of a server on this machine, with an empty message; return its status, "" if there is none."""
    fields = [(":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "localhost")]
    fields += [("te", "trailers"), ("content-type", "application/grpc")]
    fields += [("authorization", f"Bearer {token}")] if token else []
    block = b"".join(b"\0" + b"".join(bytes((len(part),)) + part.encode() for part in field) for field in fields)
    frames = [(4, 0, 0, b""), (1, 4, 1, block), (0, 1, 1, bytes(5))]  # settings; headers; data, which ends the stream
    sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for kind, flags, stream, payload in frames:
        sent += len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=_LONG_S) as connection:
        connection.sendall(sent)
        while (status := _STATUS.search(found)) is None:
            if not (more := connection.recv(65536)):
                return ""
            found += more
    return status[1].decode()


def http(port: int, token: str | None) -> str:
    """Return the status of a request of HTTP to a server on this machine, "" if it speaks something else."""
    header = f"Authorization: Bearer {token}\r\n" if token else ""
    request = f"POST /get_or_create_runtime_env HTTP/1.1\r\nHost: localhost\r\n{header}Content-Length: 0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=_LONG_S) as connection:
        connection.sendall(request.encode())
        version, _, status = connection.recv(100)[:12].partition(b" ")
        return status.decode() if version == b"HTTP/1.1" else ""


def ask(port: int, method: str, token: str | None) -> str:
    """Call what listens on a port, and return how that ended."""
    return call(port, method, token) if method else http(port, token)


class Attempts:
    """Everything that is tried, one by one."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given

    def run(self) -> None:
        for name in ("files", "sockets", "processes", "ports", "cluster"):
            for deed, act in getattr(self, name)():
                try:
                    result = act()
                    refused, outcome = result is None, "found nothing" if result is None else str(result)
                except OSError as error:
                    refused, outcome = True, error.strerror or str(error)
                row = {"subject": name, "deed": deed, "refused": refused, "outcome": outcome}
                sys.stdout.write(json.dumps(row) + "\n")

    def files(self) -> Iterator[Attempt]:
        for name, folder in self.given["folders"].items():
            yield f"list {name}", partial(os.listdir, folder)
            yield f"put a file into {name}", partial(Path(folder, "planted").write_text, "planted")
            yield f"move {name} away", partial(done, os.rename, folder, f"{folder}.away")
        for name, file in self.given["files"].items():
            yield f"read {name}", partial(Path(file).read_bytes)
            yield f"write {name}", partial(Path(file).write_text, "planted")

    def sockets(self) -> Iterator[Attempt]:
        for name, (kind, path) in self.given["sockets"].items():
            yield f"connect to {name}", partial(connect, socket.SocketKind[kind], path)

    def processes(self) -> Iterator[Attempt]:
        for name, pid in self.given["processes"].items():
            for what in ("environ", "maps", "mem"):
                yield f"read {what} of {name}", partial(Path(f"/proc/{pid}/{what}").read_bytes)
            yield f"list open files of {name}", partial(os.listdir, f"/proc/{pid}/fd")
            yield f"trace {name}", partial(trace, pid)
            yield f"signal {name}", partial(done, os.kill, pid, 0)

    def ports(self) -> Iterator[Attempt]:
        for name, port, method in self.given["ports"]:
            for token, which in ((None, "no token"), (_FORGED, "a token of its own")):
                yield f"call {name} with {which}", partial(unless_refused, port, method, token)
            for address in self.given["addresses"]:
                yield f"reach {name} at an outer address", partial(reach, address, port)

    def cluster(self) -> Iterator[Attempt]:
        yield "find the run as stats does", lambda: registrations(Path(self.given["shared"])) or None
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _FORGED}
        use(current())
        yield "ask Ray for the nodes with a token of its own", partial(nodes, self.given["address"])


def done(act: Callable[..., object], *arguments: object) -> str:
    act(*arguments)
    return "done"


def connect(kind: socket.SocketKind, path: str) -> str:
    with socket.socket(socket.AF_UNIX, kind) as unix:
        return done(unix.connect, path)


def reach(address: str, port: int) -> str:
    with socket.create_connection((address, port), timeout=_LONG_S):
        return "connected"


def unless_refused(port: int, method: str, token: str | None) -> str | None:
    status = ask(port, method, token)
    if status in _REFUSALS:
        raise PermissionError(1, f"status {status}")
    return f"status {status}"


def trace(pid: int) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(_PTRACE_ATTACH, pid, None, None) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return "done"


def nodes(address: str) -> str:
    from ray._raylet import GcsClient

    try:
        return str(GcsClient(address=address).get_all_node_info(timeout=_LONG_S))
    except AuthenticationError as error:
        raise PermissionError(1, type(error).__name__) from None


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    become(OTHER)
    Attempts(asked).run()
