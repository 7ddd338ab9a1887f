import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from rapa_dist import __version__, cli, errors
from rapa_dist.cli.output import emit, json_option

HEAVY = {"torch", "ray", "numpy", "rich", "torchvision"}


@pytest.fixture
def run(monkeypatch):
    """Run a command line; the first argument becomes the command `act`, which calls it."""

    def run_with(action, *arguments):
        @click.command()
        @json_option
        @click.argument("number", type=int, default=0)
        def act(as_json, number):
            return action()

        module = types.ModuleType("rapa_dist_acting")
        module.act = act
        monkeypatch.setitem(sys.modules, "rapa_dist_acting", module)
        monkeypatch.setitem(cli.COMMANDS, "act", "rapa_dist_acting:act")
        return CliRunner().invoke(cli.main, ["act", *arguments])

    return run_with


def raising(error):
    def action():
        raise error

    return action


def test_help_lists_the_commands_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from rapa_dist.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    for command in ("train", "evaluate", "doctor"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["train", "evaluate", "doctor"])
def test_a_command_explains_itself(command):
    result = CliRunner().invoke(cli.main, [command, "--help"])
    assert result.exit_code == 0
    assert f"rapa-dist {command}" in result.stdout


def test_version_and_module():
    done = subprocess.run([sys.executable, "-m", "rapa_dist", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"rapa-dist {__version__}\n"


def test_misspelt_command_gets_a_suggestion():
    result = CliRunner().invoke(cli.main, ["tarin"])
    assert result.exit_code == 2
    assert "Did you mean 'train'?" in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RapaError("too few tiles"), 1),
        (errors.ClusterError("too few tiles"), 1),
        (errors.UsageError("too few tiles"), 2),
        (click.UsageError("too few tiles"), 2),
        (click.ClickException("too few tiles"), 1),
    ],
)
def test_an_error_is_one_message_and_an_exit_code(run, error, code):
    result = run(raising(error))
    assert result.exit_code == code
    assert "Error: too few tiles" in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout

    result = run(raising(error), "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout) == {"error": {"type": type(error).__name__, "message": "too few tiles"}}


def test_wrong_arguments_are_an_object_too(run):
    result = run(lambda: None, "--json", "many")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "BadParameter"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupted_command_exits_130(run, error):
    result = run(raising(error), "--json")
    assert result.exit_code == 130
    assert "Interrupted." in result.stderr
    assert json.loads(result.stdout)["error"]["type"] == "Interrupted"


def test_an_unexpected_error_keeps_its_traceback(run):
    result = run(raising(ZeroDivisionError("no tiles")), "--json")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "in action" in result.stderr
    assert "ZeroDivisionError: no tiles" in result.stderr
    assert "report it" in result.stderr
    assert json.loads(result.stdout)["error"] == {"type": "ZeroDivisionError", "message": "no tiles"}


def test_a_broken_pipe_that_is_not_stdout_is_no_quiet_matter(run):
    result = run(raising(BrokenPipeError("a socket")))
    assert result.exit_code == 1
    assert "BrokenPipeError: a socket" in result.stderr


def test_a_full_disk_is_no_fault(run):
    result = run(raising(OSError(errno.ENOSPC, "No space left on device", "out/scaling.json")), "--json")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: out/scaling.json can't be written: No space left on device. Make room for it there.\n"
    )
    assert json.loads(result.stdout)["error"]["message"] in result.stderr


def test_what_a_command_returns_is_no_exit_code(run):
    assert run(lambda: 7).exit_code == 0
    assert run(lambda: click.get_current_context().exit(7)).exit_code == 7


@pytest.mark.parametrize("arguments", [["--help"], ["nonsense", "--json"]])
def test_a_reader_that_leaves_is_no_error_message(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "rapa_dist", *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode in (1, 2)
    assert "BrokenPipe" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_command_emits_one_object(run):
    result = run(lambda: emit({"test_error_percent": 12.5}), "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"test_error_percent": 12.5})

    def emit_twice():
        emit({"first": 1})
        emit({"second": 2})

    result = run(emit_twice, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"first": 1}

    def emit_and_fail():
        emit({"first": 1})
        raise errors.ClusterError("gone")

    result = run(emit_and_fail, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"first": 1}
    assert "Error: gone" in result.stderr


def test_any_value_becomes_json(run):
    @dataclasses.dataclass(frozen=True, slots=True)
    class Layer:
        tiles: int
        loss: float

    value = {
        "scalar": np.float32(0.5),
        "count": np.int64(3),
        "array": np.arange(4).reshape(2, 2),
        "nan": math.nan,
        "infinite": np.array([np.inf, 1.0]),
        "path": Path("runs/x"),
        "layer": Layer(16, -math.inf),
        "tuple": (1, True, None, "ü"),
        3: "key",
    }
    assert json.loads(run(lambda: emit(value), "--json").stdout) == {
        "scalar": 0.5,
        "count": 3,
        "array": [[0, 1], [2, 3]],
        "nan": None,
        "infinite": [None, 1.0],
        "path": "runs/x",
        "layer": {"tiles": 16, "loss": None},
        "tuple": [1, True, None, "ü"],
        "3": "key",
    }
