"""`python -m rapa_dist` is `rapa-dist`."""

import os
import sys
from contextlib import suppress

# `-m` puts the current folder first: a file there that has the name of a module would be run in its place
with suppress(FileNotFoundError):  # a current folder that was deleted is not on the path either
    if sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__)):
        del sys.path[0]

from rapa_dist.cli import main

if __name__ == "__main__":
    main()
