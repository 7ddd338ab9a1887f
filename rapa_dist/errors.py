"""The errors a user can meet. Each message says what was expected, what came, and what to do.

RapaError                   exit code 1
├── UsageError              a value that can't work, whatever the machine (exit code 2)
│   └── VoidError           what an earlier version made, whose network was another one
├── DataError               a data set that is missing, damaged or inconsistent
├── ClusterError            Ray, its resources, or a node's shared memory
│   ├── CapacityError       the cluster's nodes have too few tiles left
│   └── NodeLostError       a node is gone, with the tiles on it
├── RunDirectoryError       a run directory that is in use or not one
├── CheckpointError         a checkpoint that is missing, damaged or of another configuration
├── DivergedError           the loss is no longer a finite number
└── OutputError             stdout does not take what a command has to say
"""

import errno


class RapaError(Exception):
    """Base of every error that a user can mend; its message says what was expected, what came, and what to do.

    Example:
        >>> import rapa_dist as rapa
        >>> try:
        ...     rapa.configure(tiles=(16, 4))
        ... except rapa.RapaError as error:
        ...     print(error)
        --tiles needs one number for each of the 3 layers, like 16,4,1; it has 2: 16,4.
    """

    exit_code = 1


class UsageError(RapaError):
    """A value that can't work, whatever the machine; exit code 2."""

    exit_code = 2


class VoidError(UsageError):
    """What an earlier version made, whose network was another one."""


class DataError(RapaError):
    """A data set that is missing, damaged or inconsistent."""


class ClusterError(RapaError):
    """Ray can't be reached, or it offers too little for the run."""


class CapacityError(ClusterError):
    """The nodes of the cluster have too few tiles left for the run."""


class NodeLostError(ClusterError):
    """A node is gone, or its chip, and with it the kernels of the tiles on it."""

    def __init__(self, message: str, node: str, address: str) -> None:
        """Say which one.

        Args:
            message: what was seen.
            node: Ray's id of the node.
            address: its address, for people.
        """
        super().__init__(message)
        self.node, self.address = node, address


class RunDirectoryError(RapaError):
    """A run directory that is in use, or is none."""


class CheckpointError(RapaError):
    """A checkpoint that is missing, damaged or of another configuration."""


class DivergedError(RapaError):
    """The loss is no longer a finite number."""


class OutputError(RapaError):
    """stdout is closed, or its disk is full."""

    def __init__(self, cause: OSError, kept: str = "", exit_code: int = 1) -> None:
        """Say why.

        Args:
            cause: what came of writing.
            kept: a sentence on where the result is all the same.
            exit_code: of the command.
        """
        closed = {errno.EBADF: "it is closed", errno.EPIPE: "nobody reads it any more"}
        why = closed.get(cause.errno or 0, cause.strerror)
        super().__init__(f"stdout can't be written to: {why}. {kept or 'What it was to show is lost.'}")
        self.cause, self.exit_code = cause, exit_code
        self.expected = isinstance(cause, BrokenPipeError) and not kept
        """Whether its reader has seen enough, like `head`, and nobody waits to be told."""
