"""Who may talk to a Ray cluster: its token, and whether it listens to other machines at all.

Whoever may talk to one may run code as its owner. Ray by itself lets a cluster of one machine listen on every network
that this machine is in, and, for want of a token, writes one to ~/.ray/auth_token as the umask has it, for all to read.
"""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from rapa_dist.fabric.address import answers, endpoint_of

LOOPBACK = "127.0.0.1"
LOOPBACK_NAMES = (LOOPBACK, "localhost", "::1")
_MODE, _TOKEN, _PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_USERS = "~/.ray/auth_token"
_TOKEN_FILE = "token"
_TOKEN_BYTES = 32


def with_own_token(folder: Path) -> dict[str, str]:
    """Make a token in a private folder; return the environment of a cluster that wants it of everybody.

    By its file and not by its value: what Ray starts has the environment too, and might show it.
    """
    path = folder / _TOKEN_FILE
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(_TOKEN_BYTES))
    return {_MODE: "token", _PATH: str(path)}


def with_users_token() -> dict[str, str]:
    """Return the environment to join a cluster of the user's own: with their token, if they have one."""
    found = current()
    if _MODE not in found and (_TOKEN in found or users_token_file().exists()):
        found[_MODE] = "token"  # as Ray itself joins a cluster that it finds
    return found


def users_token_file() -> Path:
    """Return where Ray looks for this user's token, whether it is there or not."""
    return Path(os.environ.get(_PATH) or os.path.expanduser(_USERS))


def recorded(mode: str | None, token_path: str | None) -> dict[str, str]:
    """Return the environment to join the cluster of a run that had this mode and this file with a token."""
    token = {_PATH: token_path} if token_path else current()
    return token | {_MODE: mode or "disabled"}


def to_record() -> tuple[str | None, str | None]:
    """Return mode and file for `recorded`; a token that is in the environment itself is written nowhere."""
    found = current()
    return found.get(_MODE), None if _TOKEN in found else found.get(_PATH)


def current() -> dict[str, str]:
    """Return what this process's environment says of the token."""
    return {name: os.environ[name] for name in (_MODE, _TOKEN, _PATH) if os.environ.get(name)}


def use(environment: Mapping[str, str]) -> None:
    """Have Ray use this and nothing else, in this process and in what is started from here on; imports Ray."""
    for name in (_MODE, _TOKEN, _PATH):
        os.environ.pop(name, None)
    os.environ.update(environment)
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")  # both were read when Ray was imported, or used before
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def on_loopback() -> Iterator[None]:
    """Have Ray take 127.0.0.1 for this machine's address; else it puts one that others reach in its place."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # what Ray has on systems where it supports one machine only
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def as_it_listens(address: str) -> AbstractContextManager[None]:
    """Have Ray join 127.0.0.1 as such where the cluster listens there only."""
    from ray._private.services import get_node_ip_address

    endpoint = endpoint_of(address)
    if endpoint is None or endpoint[0] not in LOOPBACK_NAMES:
        return nullcontext()
    outside = get_node_ip_address()  # type: ignore[no-untyped-call]
    return nullcontext() if answers(f"{outside}:{endpoint[1]}") else on_loopback()
