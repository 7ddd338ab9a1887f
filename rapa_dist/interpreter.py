"""Having other Python processes find the modules that this one finds, and no others."""

import os
import sys


def same_modules() -> dict[str, str]:
    """Return what to put into the environment of a Python process, so that it looks for modules where this one does.

    By itself it would look at its script's folder or, behind `-m`, at the current folder first: a file there that has
    the name of a module would be run in its place.
    """
    variables: dict[str, str] = {}
    if sys.flags.ignore_environment:  # python -E or -I: for Python an empty variable is an unset one
        variables |= dict.fromkeys((name for name in os.environ if name.startswith("PYTHON")), "")
    if sys.flags.no_user_site:
        variables["PYTHONNOUSERSITE"] = "1"
    # some entries are no folders, but marks for import hooks
    folders = [os.path.abspath(entry) for entry in map(str, sys.path) if os.path.exists(entry or ".")]
    variables["PYTHONPATH"] = os.pathsep.join(folder for folder in folders if os.pathsep not in folder)
    variables["PYTHONSAFEPATH"] = "1"
    return variables
