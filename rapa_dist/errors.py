"""The errors a user can meet. Each message says what was expected, what came, and what to do.

RapaError                   exit code 1
├── UsageError              a value that can't work, whatever the machine (exit code 2)
├── DataError               a data set that is missing, damaged or inconsistent
├── ClusterError            Ray, its resources, or a node's shared memory
│   ├── CapacityError       the cluster's nodes have too few tiles left
│   └── NodeLostError       a node is gone, with the tiles on it
├── RunDirectoryError       a run directory that is in use or not one
├── CheckpointError         a checkpoint that is missing, damaged or of another configuration
└── DivergedError           the loss is no longer a finite number
"""


class RapaError(Exception):
    """Base of every error that is reported to the user without a traceback."""

    exit_code = 1


class UsageError(RapaError):
    """A value that can't work, whatever the machine; exit code 2."""

    exit_code = 2


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
