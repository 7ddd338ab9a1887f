"""What Ray would take over from this process's surroundings, and what is set in its place.

Left to itself, Ray puts the current folder first on its workers' path, has workers run whatever a hook in the
environment says, and reads several hundred settings from variables named RAY_*. A run has to depend on its
configuration and seed alone; so workers look for modules where the coordinator does, and nothing else is taken over
unless it is named here.
"""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rapa_dist.console import stderr
from rapa_dist.interpreter import same_modules
from rapa_dist.interrupts import NOTICES

_KEPT = frozenset(
    {
        "RAY_ADDRESS",  # which cluster, and how to get into it
        "RAY_TMPDIR",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_USE_TLS",
        "RAY_TLS_CA_CERT",
        "RAY_TLS_SERVER_CERT",
        "RAY_TLS_SERVER_KEY",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",  # set by this program
        "RAY_USAGE_STATS_ENABLED",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV",
        "RAY_worker_maximum_startup_concurrency",
        "RAY_memory_monitor_refresh_ms",  # when Ray ends processes for want of memory
        "RAY_memory_usage_threshold",
        "RAY_BACKEND_LOG_LEVEL",  # what is logged, and how much of it is kept
        "RAY_ROTATION_MAX_BYTES",
        "RAY_ROTATION_BACKUP_COUNT",
    }
)
_BRINGS_CODE = ("HOOK", "RUNTIME_ENV")
_OF_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit`


def settle(*, joins: bool) -> None:
    """Decide what Ray reads from the environment, and say what was left out; call it before Ray is imported.

    A cluster that is started has the settings that are named above, and no others. One that is joined has those that
    it was started with; from here it would only get code, which is left out.

    Args:
        joins: whether a cluster is joined.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.pop("RAY_CLIENT_MODE", None)  # set by Ray itself, where it was imported before
    left_out = [name for name in os.environ if name.startswith(("RAY_", "__RAY_")) and _is_left_out(name, joins)]
    for name in left_out:
        del os.environ[name]
    # under `uv run`, every worker would be another `uv run` in a copy of the current folder
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    if left_out:
        names = ", ".join(sorted(left_out))
        stderr.print(f"Settings of Ray's in the environment are left out: {names}", markup=False)
    if parts := _of_the_job():
        stderr.print(f"Tiles run in the runtime environment of this Ray job ({', '.join(parts)})", markup=False)


def _is_left_out(name: str, joins: bool) -> bool:
    if name in _KEPT:
        return False
    if joins:
        return name.startswith("__RAY_") or any(part in name for part in _BRINGS_CODE)
    return True


def _of_the_job() -> list[str]:
    """Return what a job that was submitted to Ray gives its workers, by name."""
    try:
        return sorted(json.loads(os.environ[_OF_A_JOB]).get("runtime_env") or {})
    except (KeyError, ValueError, AttributeError):
        return []


def job_config() -> Any:
    """Return a job configuration with which Ray does not put the current folder first on its workers' path."""
    from ray.job_config import JobConfig

    return JobConfig(_client_job=True)  # a job from elsewhere, whose current folder means nothing here


@contextmanager
def apart(folder: Path) -> Iterator[None]:
    """Have what Ray starts live apart from this process, and find the same modules.

    It gets process groups of its own, and does not hear of notices: `timeout` and a terminal that is closed send their
    signals to a whole group, and Slurm sends its notice to all processes of a job. The coordinator has to finish a step
    and save, for which it needs its tiles.

    Args:
        folder: its current folder; that of this process may be deleted, or on a disk that goes away.
    """
    from ray._private import services

    before = services.ConsolePopen

    def start(command: Any, *, env: dict[str, str], cwd: str | None, **options: Any) -> Any:
        return before(command, env=env | same_modules(), cwd=folder, process_group=0, **options)

    services.ConsolePopen = start  # type: ignore[misc, assignment]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)  # which what is started inherits
    try:
        yield
    finally:
        services.ConsolePopen = before  # type: ignore[misc]
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
