"""Whether the head of a cluster is there, gone, or behind a network that is cut; on sockets that are none."""

import errno
import socket
from types import SimpleNamespace

import pytest

from rapa_dist.errors import ClusterError
from rapa_dist.fabric import address
from rapa_dist.fabric import cluster as module
from rapa_dist.fabric.address import heard
from rapa_dist.fabric.cluster import Cluster

ADDRESS = "10.0.0.1:6379"
SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
UNREACHABLE = OSError(errno.ENETUNREACH, "Network is unreachable")
REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")


class Network:
    """Stands in for the modules `socket` and `time`: what a connection comes to, and a clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.outcome: bytes | Exception = SETTINGS
        self.heals_at = float("inf")
        self.takes_s = 0.0
        self.tries = 0

    def create_connection(self, endpoint: tuple[str, int], timeout: float) -> "Network":
        self.tries += 1
        if self.now >= self.heals_at:
            self.outcome = SETTINGS
        if isinstance(self.outcome, Exception):
            self.now += min(timeout, self.takes_s)
            raise self.outcome
        return self

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def sendall(self, data: bytes) -> None:
        pass

    def recv(self, size: int) -> bytes:
        assert isinstance(self.outcome, bytes)
        return self.outcome[:size]

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def network(monkeypatch):
    made = Network()
    monkeypatch.setattr(address, "socket", SimpleNamespace(create_connection=made.create_connection))
    monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def cluster():
    return Cluster("--address", ADDRESS, None)


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (SETTINGS, True),
        (b"", False),
        (b"SSH-2.0-OpenSSH_9.2", False),
        (REFUSED, False),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), False),
        (UNREACHABLE, None),
        (OSError(errno.EHOSTUNREACH, "No route to host"), None),
        (TimeoutError("timed out"), None),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), None),
    ],
)
def test_who_refuses_is_gone_and_who_is_not_heard_may_be_cut_off(network, outcome, expected):
    network.outcome = outcome
    assert heard(ADDRESS, 1.0) is expected


@pytest.mark.parametrize("wait", [True, False])
def test_a_head_that_refuses_is_gone_after_a_few_tries(network, cluster, wait):
    network.outcome = REFUSED
    with pytest.raises(ClusterError, match=rf"The head of the Ray cluster at {ADDRESS} is gone"):
        cluster.check_head(wait=wait)
    assert network.tries == 3
    assert network.now - 1000 < 5
    assert cluster.head_lost


def test_a_head_that_refuses_for_a_moment_is_not_gone(network, cluster):
    network.outcome, network.heals_at = REFUSED, network.now + 1.5
    cluster.check_head()
    assert not cluster.head_lost


@pytest.mark.parametrize("takes_s", [0.0, 100.0], ids=["at once", "after the time-out"])
def test_a_head_that_is_cut_off_for_ten_seconds_holds_nobody_up(network, cluster, takes_s):
    network.outcome, network.heals_at, network.takes_s = UNREACHABLE, network.now + 10, takes_s
    for _ in range(20):
        began = network.now
        cluster.check_head()
        assert network.now - began <= 1
        network.now += 1
    assert not cluster.head_lost


def test_a_head_that_stays_cut_off_is_given_up_after_half_a_minute(network, cluster):
    network.outcome = UNREACHABLE
    with pytest.raises(ClusterError, match=rf"at {ADDRESS} can't be reached for 3\d s"):  # noqa: PT012
        while True:
            cluster.check_head()
            network.now += 5
    assert 30 < network.now - 1000 <= 36
    assert cluster.head_lost


def test_who_needs_the_head_waits_for_it(network, cluster):
    network.outcome, network.heals_at = UNREACHABLE, network.now + 10
    cluster.check_head(wait=True)
    assert 10 <= network.now - 1000 < 12
    network.outcome, network.heals_at = UNREACHABLE, float("inf")
    with pytest.raises(ClusterError, match="can't be reached"):
        cluster.check_head(wait=True)
    assert 40 < network.now - 1000 < 45


def test_cuts_are_not_added_up_and_a_stopped_process_has_not_been_waiting(network, cluster):
    for _ in range(5):
        network.outcome = UNREACHABLE
        cluster.check_head()
        network.now += 1000
        cluster.check_head()
        network.outcome = SETTINGS
        cluster.check_head()
    assert not cluster.head_lost
