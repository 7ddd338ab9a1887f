"""The public names: what they load, that their examples hold, and the README's lines from Python."""

import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rapa_dist as rapa

ROOT = Path(__file__).parent.parent


def test_the_package_loads_neither_torch_nor_ray():
    code = "import sys, rapa_dist; dir(rapa_dist); print(sorted({'torch', 'ray', 'numpy'} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(AttributeError, match=r"has no attribute 'convolve'; its public names are .*RapaConv2d, "):
        _ = rapa.convolve
    assert set(rapa.__all__) <= set(dir(rapa))
    assert (ROOT / "rapa_dist" / "py.typed").exists()


@pytest.mark.parametrize("name", rapa.__all__)
def test_the_example_of_a_public_name_holds(name, tmp_path):
    public = getattr(rapa, name)
    (found,) = doctest.DocTestFinder(recurse=False).find(public, name, globs={"folder": tmp_path})
    assert found.examples, "it has an example"
    results = doctest.DocTestRunner().run(found)
    assert results.failed == 0
    assert inspect.getdoc(public)


def test_the_readmes_lines_run():
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"```python\n(import rapa_dist as rapa\n.*?)```", readme, re.DOTALL)
    assert len(block.splitlines()) <= 15
    done = subprocess.run(
        [sys.executable, "-c", block.replace("open_fabric(model,", 'open_fabric(model, "serial",')],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.ray
def test_the_example_trains_on_ray_and_reverts():
    example = ROOT / "examples" / "convert_and_train.py"
    assert len(example.read_text().splitlines()) <= 40
    done = subprocess.run([sys.executable, example, "--steps", "3"], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "test error" in done.stdout
