"""Files that are run without having been installed: as on a cluster, from a shared folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import rapa_dist

PROGRAM = """
import json
from rapa_dist.command_lines import no_matplotlib
from rapa_dist.coordinator.environment import environment
from rapa_dist.installed import python_bounds, requirements
print(json.dumps([environment()["packages"], requirements(), python_bounds(), no_matplotlib("No plot")]))
"""


def test_what_has_no_installation_says_so_instead_of_failing(tmp_path):
    shutil.copytree(Path(rapa_dist.__file__).parent, tmp_path / "rapa_dist")
    packages = tmp_path / "packages"
    packages.mkdir()
    for found in Path(sysconfig.get_paths()["purelib"]).iterdir():  # everything that is installed, but the program
        if "rapa_dist" not in found.name:
            (packages / found.name).symlink_to(found)
    surroundings = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{packages}"}
    command = [sys.executable, "-S", "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    versions, needed, bounds, advice = json.loads(done.stdout)
    assert versions["rapa-dist"] is None
    assert versions["numpy"]
    assert (needed, bounds) == ([], None)
    assert advice.endswith("pip install matplotlib")
