"""What a run has to say: shown on stderr to whoever watches, and kept in its log, as it may be that nobody can."""

from rapa_dist.console import stderr
from rapa_dist.coordinator.run_directory import RunDirectory


def tell(directory: RunDirectory, message: str) -> None:
    """Show a message, and append it to the log of a run."""
    for line in message.strip().splitlines():
        directory.log(line)
    stderr.print(message, markup=False)
