"""`rapa-dist stats` and the metrics: finding runs, showing their tiles, losing them; no run trains here."""

import dataclasses
import errno
import fcntl
import io
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from rapa_dist import cli, console
from rapa_dist.coordinator.tiles_table import count, seconds, tiles_table
from rapa_dist.errors import ClusterError, OutputError, UsageError
from rapa_dist.fabric import watcher
from rapa_dist.fabric.registry import Registration, is_held, registrations
from rapa_dist.fabric.scratch import Scratch
from rapa_dist.fabric.watcher import RunEndedError, Watcher, find_run
from rapa_dist.inspection import RunStats, TileStats

TILE_KEYS = {field.name for field in dataclasses.fields(TileStats)}


def a_tile(layer: int, number: int, **changes) -> TileStats:
    values = dict.fromkeys(TILE_KEYS, 0) | {
        "tile": f"L{layer}/T{number:03d}",
        "layer": layer,
        "name": f"conv{layer}",
        "node": "0123456789abcdef",
        "pid": 1000 * layer + number,
        "state": "idle",
        "rows_forward": 1000 + number,
        "resident_bytes": 97_000_000,
    }
    return TileStats(**values | changes)


def a_run(*tiles_of_layer: int, **changes) -> RunStats:
    sizes = tiles_of_layer or (16, 4, 1)
    tiles = [a_tile(layer, number, **changes) for layer, n in enumerate(sizes) for number in range(n)]
    return RunStats.of("some-run", tiles)


# --- the table


def lines_of(stats: RunStats, **options) -> list[str]:
    return tiles_table(stats, **options).plain.splitlines()


def test_the_table_has_totals_first_and_then_every_tile():
    lines = lines_of(a_run())
    assert lines[0] == "some-run: 21 tiles on 1 node"
    for name in ("tile", "node", "pid", "state", "restarts", "busy s", "waiting s", "device s", "util %", "‖K‖"):
        assert name in lines[1]
    assert [line.split()[0] for line in lines[2:6]] == ["L0", "L1", "L2", "all"]
    assert [line.split()[0] for line in lines[6:]] == [tile.tile for tile in a_run().tiles]


@pytest.mark.parametrize("height", [6, 10, 24, 60])
@pytest.mark.parametrize("width", [20, 80, 120, 300])
@pytest.mark.parametrize("tiles", [(16, 4, 1), (128, 32, 8)])
def test_the_table_fits_the_terminal(tiles, width, height):
    lines = lines_of(a_run(*tiles), width=width, height=height)
    assert len(lines) <= max(height - 1, 7)  # totals are always there
    assert max(map(len, lines)) <= width
    shown = sum(line.startswith(("L0/T", "L1/T", "L2/T")) for line in lines)
    left_out = sum(tiles) - shown
    if left_out:
        assert lines[-1].startswith(f"{left_out} more tiles, "[:width])
    else:
        assert "more tiles" not in lines[-1]


def test_tiles_that_do_not_fit_are_those_that_sort_last():
    lines = lines_of(a_run(), width=300, height=12, sort="forward")
    assert [line.split()[0] for line in lines[6:-1]] == ["L0/T015", "L0/T014", "L0/T013", "L0/T012"]
    assert lines[-1] == "17 more tiles, sorted by forward, do not fit here"


def test_columns_that_do_not_fit_are_said_to_be_missing():
    wide, narrow = lines_of(a_run(), width=300), lines_of(a_run(), width=90)
    assert "too narrow" not in wide[0]
    missing = len(re.split(r"  +", wide[1])) - len(re.split(r"  +", narrow[1]))
    assert missing > 0
    assert f"too narrow for {missing} more column" in narrow[0]
    assert narrow[1].startswith("tile")


def test_a_tile_that_is_being_restarted_stands_out():
    stats = RunStats.of("r", [a_tile(0, 0), a_tile(0, 1, state="restarting", resident_bytes=0)])
    table = tiles_table(stats)
    lines = table.plain.splitlines()
    assert "1 restarting" in lines[2]
    red = [table.plain[span.start : span.end] for span in table.spans if span.style == "red"]
    assert len(red) == 1
    assert red[0].startswith("L0/T001")


def test_tiles_that_nobody_answers_for_are_named():
    stats = RunStats.of("r", [a_tile(0, 0)], silent=["L0/T001", "L0/T002"])
    assert lines_of(stats)[-1] == "no answer for L0/T001, L0/T002"


def test_the_table_is_not_broken_where_stdout_is_no_terminal():
    out = io.StringIO()
    Console(file=out, soft_wrap=True, width=80).print(tiles_table(a_run()))
    printed = out.getvalue().splitlines()
    assert printed == lines_of(a_run())
    assert max(map(len, printed)) > 100


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (9999, "9999"), (10_000, "10 k"), (1_234_567, "1.23 M"), (999_600, "1 M"), (5 * 10**18, "5,000 P")],
)
def test_numbers_are_short(number, text):
    assert count(number) == text


@pytest.mark.parametrize(
    ("time_s", "text"), [(0.0, "0.00"), (5e-6, "5.0e-06"), (0.02134, "0.0213"), (1.2, "1.20"), (12345.6, "12346")]
)
def test_times_are_short(time_s, text):
    assert seconds(time_s) == text


# --- registrations


@pytest.fixture
def register(tmp_path, monkeypatch):
    """Register a run below tmp_path, held by this process until the end of the test."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):  # of a cluster that another module's tests have here
        monkeypatch.delenv(name, raising=False)
    scratches = []

    def register_run(run: str, address: str = "10.0.0.1:1000", mode: str | None = "token") -> Registration:
        scratches.append(Scratch(tmp_path))
        registration = Registration(
            run=run,
            address=address,
            auth_mode=mode,
            token_path=None,
            pid=os.getpid(),
            run_dir=f"/runs/{run}",
            started="2026-01-01T00:00:00+00:00",
            folder=scratches[-1].path,
        )
        registration.write()
        return registration

    register_run.scratches = scratches
    yield register_run
    for scratch in scratches:
        scratch.remove()


def test_a_registered_run_is_found(register, tmp_path):
    written = register("some-run")
    assert registrations(tmp_path) == [written]
    assert written.alive
    assert not written.left_behind
    assert (written.folder / "run.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("token", "path"), [({"RAY_AUTH_TOKEN_PATH": "/t"}, "/t"), ({"RAY_AUTH_TOKEN": "t"}, None)])
def test_a_run_registers_with_the_mode_that_its_cluster_has(tmp_path, monkeypatch, token, path):
    scratch = Scratch(tmp_path)
    for name, value in ({"RAY_AUTH_MODE": "token"} | token).items():
        monkeypatch.setenv(name, value)
    facts = {"run": "r", "address": "h:1", "run_dir": Path("there"), "folder": scratch.path}
    Registration.of_this_process(**facts).write()
    (found,) = registrations(tmp_path)
    assert (found.auth_mode, found.token_path) == ("token", path)
    assert (found.pid, found.run_dir) == (os.getpid(), str(Path("there").absolute()))
    scratch.remove()


def test_a_run_that_ended_is_found_no_more(register, tmp_path):
    written = register("some-run")
    register.scratches[0].remove()
    assert registrations(tmp_path) == []
    assert not written.alive
    assert not written.left_behind


def test_a_run_that_was_killed_is_told_from_one_that_ended(register, tmp_path):
    written = register("some-run")
    os.close(register.scratches[0]._lock)  # what the kernel does for a process that is killed
    assert registrations(tmp_path) == []
    assert not written.alive
    assert written.left_behind
    written.folder.joinpath("run.json").unlink()


@pytest.mark.parametrize("flaw", ["open", "a link", "its file a link", "its lock a link", "its file a pipe"])
def test_a_run_that_others_may_have_planted_is_not_found(register, tmp_path, flaw):
    folder = register("some-run").folder
    if flaw == "open":
        folder.chmod(0o755)
    elif flaw == "a link":
        folder.symlink_to(folder.rename(tmp_path / "elsewhere"))
    else:
        file = folder / ("lock" if "lock" in flaw else "run.json")
        moved = file.rename(tmp_path / "file")
        os.mkfifo(file) if "pipe" in flaw else file.symlink_to(moved)
    assert registrations(tmp_path) == []
    if flaw == "a link":  # as the fixture removes it
        folder.unlink()
        (tmp_path / "elsewhere").rename(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_run_of_another_user_is_not_found(register, tmp_path):
    folder = register("some-run").folder
    os.chown(folder, 65534, 65534)
    assert registrations(tmp_path) == []


def test_looking_at_a_run_does_not_keep_others_from_sweeping_it(register):
    written = register("some-run")
    os.close(register.scratches[0]._lock)
    for _ in range(3):
        assert not is_held(written.folder)
    with open(written.folder / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"run": "r"}', '{"what": 1}'])
def test_a_registration_that_can_not_be_understood_is_passed_over(register, tmp_path, text):
    good, bad = register("good"), register("bad")
    (bad.folder / "run.json").write_text(text)
    assert registrations(tmp_path) == [good]


# --- which run is meant


def never(error):
    raise AssertionError(f"told of a cluster that is there: {error}")


@pytest.fixture
def joined(monkeypatch, tmp_path):
    """Stand in for Ray: note which cluster is joined, and let it have some runs."""
    calls: list[tuple] = []

    class FakeCluster:
        def __init__(self, address: str) -> None:
            self.address = address

        def close(self) -> None:
            calls.append(("closed", self.address))

    def attach(found, mode=None):
        calls.append((found[0], mode))
        return FakeCluster(found[0])

    monkeypatch.setattr(watcher, "attach", attach)
    monkeypatch.setattr(watcher, "shared_memory_root", lambda: tmp_path)
    monkeypatch.setattr(watcher, "find_address", lambda address: (address, "--address") if address else None)
    monkeypatch.setattr(watcher, "runs_here", lambda: ["far-a", "far-b"])
    return calls


def test_the_only_run_needs_no_name(register, joined):
    register("some-run")
    found = find_run(None, None, never)
    assert (found.run, joined) == ("some-run", [("10.0.0.1:1000", {"RAY_AUTH_MODE": "token"})])


def test_a_cluster_without_a_token_is_joined_without_one(register, joined):
    register("some-run", mode=None)
    find_run(None, None, never)
    assert joined == [("10.0.0.1:1000", {"RAY_AUTH_MODE": "disabled"})]


def test_one_of_several_runs_has_to_be_named(register, joined):
    register("a")
    register("b", "10.0.0.1:2000")
    with pytest.raises(UsageError, match=r"2 runs train on this node.*--run:\n  a\n  b"):
        find_run(None, None, never)
    assert not joined
    assert find_run("b", None, never).run == "b"
    assert joined == [("10.0.0.1:2000", {"RAY_AUTH_MODE": "token"})]


def test_a_run_that_is_not_there_is_refused_with_those_that_are(register, joined):
    register("a")
    register("b")
    with pytest.raises(UsageError, match=r"No run named c trains on this node, but:\n  a\n  b"):
        find_run("c", None, never)


def test_no_run_and_no_cluster(joined):
    with pytest.raises(ClusterError, match="No run trains on this node, and no Ray cluster runs here"):
        find_run(None, None, never)


def test_two_runs_of_one_name_are_told_apart_by_their_clusters(register, joined):
    register("a")
    register("a", "10.0.0.1:2000")
    with pytest.raises(UsageError, match=r"Several runs are named a: .*10.0.0.1:1000; .*10.0.0.1:2000.*--address"):
        find_run("a", None, never)


def test_a_cluster_that_is_named_is_asked_for_its_runs(register, joined):
    register("near")
    assert find_run("far-b", "10.0.0.9:1", never).run == "far-b"
    assert joined == [("10.0.0.9:1", None)]


@pytest.mark.parametrize(("run", "message"), [(None, "2 runs train on"), ("near", "No run named near trains on")])
def test_a_cluster_that_is_named_and_lacks_the_run(register, joined, run, message):
    register("near")
    with pytest.raises(UsageError, match=rf"{message} the cluster at 10.0.0.9:1.*\n  far-a\n  far-b"):
        find_run(run, "10.0.0.9:1", never)
    assert joined[-1] == ("closed", "10.0.0.9:1")


def test_a_cluster_without_runs(joined, monkeypatch):
    monkeypatch.setattr(watcher, "runs_here", list)
    with pytest.raises(ClusterError, match=r"No run trains on the cluster at 10.0.0.9:1"):
        find_run(None, "10.0.0.9:1", never)
    with pytest.raises(ClusterError, match=r"There is no run x, nor any other, on the cluster at 10.0.0.9:1"):
        find_run("x", "10.0.0.9:1", never)


@pytest.mark.parametrize("address", ["10.0.0.1:2000", "127.0.0.1:2000", "localhost:2000"])
def test_a_cluster_that_is_named_may_be_that_of_a_run_here(register, joined, monkeypatch, address):
    monkeypatch.setattr(watcher, "runs_here", lambda: ["a"])
    here = register("a", "10.0.0.1:2000", "token")
    register("b")
    found = find_run(None, address, never)
    assert (found.run, found._registration) == ("a", here)
    assert joined == [(address, {"RAY_AUTH_MODE": "token"})]


# --- losing it


class FakeCluster:
    address = "10.0.0.1:1000"


@pytest.fixture
def reading(monkeypatch, register):
    """Watch a run whose tiles answer what the test says; the cluster answers until it says otherwise."""
    state = {"up": True, "tiles": ["L0/T000", "L0/T001"], "found": {}}
    monkeypatch.setattr(watcher, "answers", lambda address: state["up"])
    monkeypatch.setattr(watcher, "tiles_of", lambda run: state["tiles"])
    monkeypatch.setattr(watcher, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(Watcher, "_ask", lambda self: state["found"])
    state["registration"] = register("some-run")
    state["scratch"] = register.scratches[0]
    state["watcher"] = Watcher("some-run", FakeCluster(), state["registration"], never)
    state["far"] = Watcher("some-run", FakeCluster(), None, never)
    return state


def test_tiles_without_an_answer_are_listed(reading):
    reading["found"] = {"L0/T000": a_tile(0, 0)}
    stats = reading["watcher"].read()
    assert (stats.run, len(stats.tiles), stats.silent) == ("some-run", 1, ("L0/T001",))


def test_a_run_that_ended_is_not_an_error(reading):
    reading["scratch"].remove()
    reading["up"] = False  # its cluster was its own
    with pytest.raises(RunEndedError, match="The run some-run has ended"):
        reading["watcher"].read()


def test_a_run_elsewhere_has_ended_when_its_tiles_are_gone(reading):
    reading["tiles"] = []
    with pytest.raises(RunEndedError, match="has ended"):
        reading["far"].read()


@pytest.mark.parametrize("which", ["watcher", "far"])
def test_a_cluster_that_went_away_is_an_error(reading, which):
    reading["up"] = False
    with pytest.raises(ClusterError, match=r"cluster at 10.0.0.1:1000 went away.*--resume"):
        reading[which].read()


def test_a_coordinator_that_was_killed_is_an_error(reading):
    os.close(reading["scratch"]._lock)
    with pytest.raises(ClusterError, match=r"was killed.*train --resume /runs/some-run"):
        reading["watcher"].read()
    (reading["registration"].folder / "run.json").unlink()


def test_tiles_that_are_silent_all_of_them_are_an_error_after_a_while(reading):
    with pytest.raises(ClusterError, match="No tile of the run some-run answers for 0 s"):
        reading["watcher"].read()


def test_tiles_that_come_back_are_read(reading):
    answers = iter([{}, {}, {"L0/T000": a_tile(0, 0), "L0/T001": a_tile(0, 1)}])
    reading["watcher"]._ask = lambda: next(answers)
    assert len(reading["watcher"].read().tiles) == 2


def test_ray_is_not_waited_for_where_its_cluster_is_gone(reading, monkeypatch):
    told, released = queue.SimpleQueue(), threading.Event()

    def leave(error):
        told.put(error)
        released.set()  # where the command would end the process

    def stuck(self):
        reading["up"] = False
        assert released.wait(30)
        return {"L0/T000": a_tile(0, 0)}

    monkeypatch.setattr(watcher, "_STUCK_S", 0.02)
    monkeypatch.setattr(Watcher, "_ask", stuck)
    reading["far"].leave = leave
    assert reading["far"].read().silent == ("L0/T001",)
    with pytest.raises(ClusterError, match=r"cluster at 10.0.0.1:1000 went away"):
        raise told.get_nowait()


def test_ray_is_waited_for_while_its_cluster_answers(reading, monkeypatch):
    monkeypatch.setattr(watcher, "_STUCK_S", 0.01)
    monkeypatch.setattr(Watcher, "_ask", lambda self: time.sleep(0.1) or {"L0/T000": a_tile(0, 0)})
    reading["watcher"].read()  # `never` was not called


# --- the command


@pytest.mark.parametrize(
    ("error", "options", "code", "said"),
    [
        ("ClusterError('x went away.')", "", 1, "Error: x went away."),
        ("RunEndedError('r has ended.')", "", 1, "Error: r has ended. Its last numbers are in tiles.json"),
        ("RunEndedError('r has ended.')", ", code=0", 0, "r has ended. Its last numbers are in tiles.json"),
        ("ClusterError('x went away.')", ", code=0", 1, "Error: x went away."),
        ("ClusterError('x went away.')", ", as_json=True", 1, "Error: x went away."),
    ],
)
def test_leaving_while_ray_hangs(error, options, code, said):
    program = (
        "import threading, time\nfrom rapa_dist.cli.stats import _leave\nfrom rapa_dist.errors import ClusterError\n"
        f"from rapa_dist.fabric.watcher import RunEndedError\nprint('last', end='')\n"
        f"threading.Thread(target=lambda: _leave({error}{options})).start()\ntime.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(said)
    shown = json.dumps({"error": {"type": "ClusterError", "message": "x went away."}}) + "\n"
    assert done.stdout == "last" + (shown if "json" in options else "")


def invoke(*arguments: str):
    return CliRunner().invoke(cli.main, ["stats", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sort", "colour"], "--sort is one of tile, node, pid,"),
        (["--watch", "--json"], "--watch and --json exclude each other"),
        (["--watch", "--interval", "0"], "--interval needs seconds above 0, like 2, and up to 86,400, a day; it is 0."),
        (["--watch", "--interval", "-1"], "--interval needs seconds above 0"),
        (["--watch", "--interval", "nan"], "--interval needs seconds above 0"),
        (["--watch", "--interval", "inf"], "--interval needs seconds above 0"),
        (["--watch", "--interval", "1e10"], "--interval needs seconds above 0"),
        (["--watch", "--interval", "soon"], "not a valid float"),
        (["--interval", "1"], "--interval is for --watch"),
        (["some-run"], "unexpected extra argument"),
        (["--address", "nonsense"], "--address needs host:port"),
        (["--address", "ray://somewhere:10001"], "not behind Ray Client"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_looked_for(monkeypatch, tmp_path, arguments, message):
    monkeypatch.setenv("RAPA_DIST_SHM", str(tmp_path))
    done = invoke(*arguments)
    assert done.exit_code == 2, done.stderr
    assert message in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--watch"]])
def test_no_run_at_all(monkeypatch, tmp_path, arguments):
    monkeypatch.setenv("RAPA_DIST_SHM", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    done = invoke(*arguments)
    assert done.exit_code == 1
    assert "No run trains on this node" in done.stderr
    if "--json" in arguments:
        assert json.loads(done.stdout)["error"]["type"] == "ClusterError"


def test_a_cluster_that_does_not_answer(monkeypatch, tmp_path):
    monkeypatch.setenv("RAPA_DIST_SHM", str(tmp_path))
    done = invoke("--address", "127.0.0.1:1")
    assert done.exit_code == 1
    assert "No Ray cluster answers at 127.0.0.1:1 (--address)" in done.stderr
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    assert "No Ray cluster answers at 127.0.0.1:2 (RAY_ADDRESS)" in invoke().stderr


@pytest.fixture
def three_looks(monkeypatch):
    """Let the command find a run that answers three times, and then does what the test says."""

    class FakeWatcher:
        looks, closed = 0, False
        end: Exception = RunEndedError("The run some-run has ended.")

        def read(self):
            self.looks += 1
            if self.looks > 3:
                raise self.end
            return a_run(updates=self.looks)

        def close(self):
            self.closed = True

    fake = FakeWatcher()
    monkeypatch.setattr(watcher, "find_run", lambda run, address, leave: fake)
    return fake


def test_watching_a_run_to_its_end_is_a_success(three_looks):
    done = invoke("--watch", "--interval", "0.01")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("some-run: 21 tiles on 1 node") == 3
    assert "The run some-run has ended. These were its last numbers." in done.stderr
    assert three_looks.closed


def test_a_cluster_lost_while_watching_is_a_failure(three_looks):
    three_looks.end = ClusterError("The Ray cluster at h:1 went away")
    done = invoke("--watch", "--interval", "0.01")
    assert done.exit_code == 1
    assert "went away" in done.stderr
    assert three_looks.closed


def test_ctrl_c_ends_watching(three_looks):
    three_looks.end = KeyboardInterrupt()
    assert invoke("--watch", "--interval", "0.01").exit_code == 130
    assert three_looks.closed


def test_watching_ends_with_its_terminal(three_looks, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return three_looks.looks < 2

        def write(self, text):
            if not self.isatty():
                raise OutputError(OSError(errno.EIO, "Input/output error"))
            return len(text)

    monkeypatch.setattr(console, "stdout", Console(file=Terminal()))
    done = invoke("--watch", "--interval", "0.01")
    assert done.exit_code == 1
    assert "stdout can't be written to: Input/output error" in done.stderr
    assert three_looks.looks == 2


def test_json_is_one_object_with_tiles_layers_and_totals(three_looks):
    done = invoke("--json", "--layer", "L1")
    stats = json.loads(done.stdout)
    assert stats.keys() == {"run", "tiles", "layers", "total", "silent", "tiles_of_run"}
    assert [tile["tile"] for tile in stats["tiles"]] == [f"L1/T{number:03d}" for number in range(4)]
    assert stats["tiles"][0].keys() == TILE_KEYS
    assert stats["total"]["rows_forward"] == sum(tile["rows_forward"] for tile in stats["tiles"])


def test_a_layer_beyond_the_last_is_refused(three_looks):
    done = invoke("--layer", "conv3")
    assert done.exit_code == 2
    assert "--layer is a layer's number or name, one of 0 (conv0), 1 (conv1), 2 (conv2); not “conv3”." in done.stderr
    assert three_looks.closed


# --- metrics


class Recorded:
    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.values: dict[tuple[str, ...], float] = {}
        self.keys = tag_keys
        Recorded.all[name] = self

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0  # Ray raises otherwise
        key = tuple(tags[name] for name in self.keys)
        self.values[key] = self.values.get(key, 0) + value

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tuple(tags[name] for name in self.keys)] = value


def test_metrics_follow_what_the_tiles_have_done(monkeypatch):
    import ray.util.metrics

    from rapa_dist.coordinator.telemetry import RayMetrics

    Recorded.all = {}
    monkeypatch.setattr(ray.util.metrics, "Counter", Recorded)
    monkeypatch.setattr(ray.util.metrics, "Gauge", Recorded)
    metrics = RayMetrics()
    for rows, norm in ((0, 1.0), (10, 3.0), (10, 2.0), (25, 2.5)):
        metrics.record(RunStats.of("r", [a_tile(0, 3, rows_forward=rows, kernel_norm=norm, waiting_s=100 - rows)]))
    tile = ("r", "L0", "T003")
    assert Recorded.all["rapa_dist_tile_rows_forward"].values == {tile: 25}
    assert Recorded.all["rapa_dist_tile_kernel_norm"].values == {tile: 2.5}
    assert Recorded.all["rapa_dist_tile_waiting_s"].values == {tile: 100}
    assert Recorded.all["rapa_dist_tile_updates"].values == {}
