"""The sessions of a run: by what command and with what it was started and resumed; and how to resume it.

They are in environment.json in its directory, as {"data_dir": …, "sessions": [{"argv": …, "started": …, …}, …]}.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rapa_dist.command_lines import resume
from rapa_dist.coordinator.environment import environment
from rapa_dist.fields import TEXT
from rapa_dist.files import parse_json, read_file, write_whole
from rapa_dist.folders import expanded

FILE = "environment.json"
_MOST = 1 << 24  # bytes


def read(run_dir: Path) -> dict[str, Any]:
    """Return environment.json of a run; empty where it is missing or damaged, as training does not depend on it."""
    try:
        found = parse_json(read_file(run_dir / FILE, _MOST))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def sessions_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the sessions of a run, the first one first."""
    found = read(run_dir).get("sessions")
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def add(run_dir: Path, options: Sequence[str], data_dir: Path | None = None) -> None:
    """Record that a run is started or resumed now, by the command line of this process.

    Args:
        run_dir: its directory, held.
        options: of `rapa-dist train`, to resume it in the same way.
        data_dir: where it looks for its data; None: where it did before, or in the usual places.

    Raises:
        OSError: it can't be written.
    """
    looked_in = str(expanded(data_dir).absolute()) if data_dir else read(run_dir).get("data_dir")
    found = [*sessions_of(run_dir), environment() | {"options": list(options)}]
    about = {"data_dir": looked_in, "sessions": found}
    write_whole(run_dir / FILE, (json.dumps(about, indent=2) + "\n").encode())


def options_of(values: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """Return options of a command line that give some parameters the values that are not their defaults."""
    options: list[str] = []
    for name, value in values.items():
        if value != defaults.get(name):
            options += [f"--{name.replace('_', '-')}", *([] if value is True else [f"{value}"])]
    return options


def resume_command(run_dir: Path) -> str:
    """Return the command line that resumes a run as it was started or resumed last, quoted for a shell."""
    return resume(run_dir, last_options(run_dir))


def last_options(run_dir: Path) -> list[str]:
    """Return the options of `rapa-dist train` that resume a run as it was started or resumed last."""
    found = (sessions_of(run_dir) or [{}])[-1].get("options")
    return [option for option in found if TEXT.fits(option)] if isinstance(found, list) else []
