"""Examine this machine. Every check is a function without arguments that returns a `Check`; none prints."""

from collections.abc import Callable
from functools import partial

from rapa_dist import preconditions
from rapa_dist.check import Check, Status
from rapa_dist.doctor import cluster, data, host, software

__all__ = ["Check", "Status", "examine"]

CHECKS: dict[str, Callable[[], Check]] = {
    "Python": software.check_python,
    "packages": software.check_packages,
    "cores": host.check_cores,
    "memory": host.check_memory,
    "shared memory": host.check_shared_memory,
    "doorbells": host.check_datagrams,
    "loopback": preconditions.check_loopback,
    "open files": partial(preconditions.check_open_files, sum(host.TILES)),
    "processes": partial(preconditions.check_processes, sum(host.TILES)),
    "products": software.check_products,
    "BLAS": software.check_blas,
    "PyTorch": software.check_torch,
    "torchvision": data.check_torchvision,
    "data sets": data.check_datasets,
    "Ray cluster": cluster.check_cluster,
    "Ray token": cluster.check_token,
}
DEEP_CHECKS: dict[str, Callable[[], Check]] = {"Ray actor": cluster.check_actor}


def examine(*, deep: bool = False) -> list[Check]:
    """Carry out every check, those that start something only if `deep`."""
    checks = CHECKS | DEEP_CHECKS if deep else CHECKS
    return [_carry_out(name, check) for name, check in checks.items()]


def _carry_out(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # noqa: BLE001 — on a broken machine anything fails, and the others still tell
        value = f"the check itself failed: {type(error).__name__}: {error}"
        return Check(name, "failed", value, "Mend what the message names; otherwise report this line.")
