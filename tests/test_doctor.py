import json
import resource
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from rapa_dist import cli, doctor, preconditions
from rapa_dist.cgroup import cpu_limit, memory_limit
from rapa_dist.check import Check, size
from rapa_dist.data import FoundDataSet
from rapa_dist.data.vision import VisionStatus
from rapa_dist.doctor import cluster, data, host, software
from rapa_dist.native import Lack, Native

GB = 10**9


def run(*arguments):
    return CliRunner().invoke(cli.main, ["doctor", *arguments])


def test_this_machine_can_run(monkeypatch):
    result = run("--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0, [check for check in report["checks"] if check["status"] == "failed"]
    assert report["ok"] is True
    assert [check["name"] for check in report["checks"]] == list(doctor.CHECKS)


def test_a_failed_check_comes_with_its_fix(monkeypatch):
    checks = {
        "good": lambda: Check("good", "ok", "[all] well"),
        "poor": lambda: Check("poor", "warning", "3 of 4", "Add one."),
        "bad": lambda: Check("bad", "failed", "nothing", "Install something."),
        "broken": lambda: 1 // 0,
    }
    monkeypatch.setattr(doctor, "CHECKS", checks)
    result = run()
    assert result.exit_code == 1
    for text in (
        "[all] well",
        "Add one.",
        "Install something.",
        "ZeroDivisionError",
        "1 ok, 1 warning, 2 failed",
    ):
        assert text in result.stdout
    result = run("--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["ok"] is False
    assert [check["status"] for check in report["checks"]] == ["ok", "warning", "failed", "failed"]
    assert all(check["fix"] for check in report["checks"][1:])


def test_warnings_do_not_count_as_failure(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", {"poor": lambda: Check("poor", "warning", "3 of 4", "Add one.")})
    assert run().exit_code == 0


@pytest.mark.parametrize("status", ["warning", "failed"])
def test_a_check_without_a_fix_is_refused(status):
    with pytest.raises(ValueError, match="no fix"):
        Check("bad", status, "nothing")


@pytest.mark.parametrize(
    ("total", "available", "status"),
    [(16 * GB, 12 * GB, "ok"), (16 * GB, int(2.5 * GB), "warning"), (2 * GB, GB, "failed")],
)
def test_memory(total, available, status):
    check = host.judge_memory(total, available)
    assert check.status == status
    assert check.quantities["needed_bytes"] < 3 * GB


@pytest.mark.parametrize(
    ("free", "in_memory", "status"),
    [(GB, True, "ok"), (GB, False, "warning"), (64 * 10**6, True, "warning"), (10**6, True, "failed")],
)
def test_shared_memory(free, in_memory, status):
    found = {"free_bytes": free, "needed_bytes": 17 * 10**6}
    assert host.judge_shared_memory("there", found, in_memory=in_memory).status == status


def test_shared_memory_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("RAPA_DIST_SHM", str(tmp_path))
    assert host.check_shared_memory().quantities["root"] == tmp_path
    assert host.check_datagrams().status == "ok"
    assert not list(tmp_path.iterdir())


def test_a_folder_too_deep_for_sockets(monkeypatch, tmp_path):
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    monkeypatch.setenv("RAPA_DIST_SHM", str(deep))
    check = host.check_datagrams()
    assert check.status == "failed"
    assert "RAPA_DIST_SHM" in check.fix
    assert not list(deep.iterdir())


@pytest.mark.parametrize(
    ("soft", "hard", "tiles", "status"),
    [
        (256, 65536, 21, "ok"),
        (1024, resource.RLIM_INFINITY, 21, "ok"),
        (200, 200, 21, "warning"),
        (100, 100, 21, "failed"),
        (100, 1024, 1000, "failed"),
    ],
)
def test_open_files(soft, hard, tiles, status):
    check = preconditions.judge_open_files(soft, hard, tiles)
    assert check.status == status
    assert (status == "ok") != ("`ulimit -Hn" in check.fix)


@pytest.mark.parametrize(
    ("of_user", "of_group", "status", "fix"),
    [
        (None, None, "ok", ""),
        (5000, None, "ok", ""),
        (1000, 100_000, "warning", "`ulimit -u`"),
        (-3, None, "failed", "`ulimit -u`"),
        (5000, 200, "failed", "--pids-limit"),
    ],
)
def test_processes(of_user, of_group, status, fix):
    check = preconditions.judge_processes(of_user, of_group, 21)
    assert check.status == status
    assert fix in check.fix


@pytest.mark.parametrize(("version", "status"), [("3.11.7", "ok"), ("3.10.2", "failed"), ("3.14.0", "failed")])
def test_python(version, status):
    assert software.judge_python(version, ">=3.11,<3.14").status == status


def test_python_is_taken_as_it_is_where_nothing_says_what_is_needed():
    assert software.judge_python("3.11.7", None).status == "ok"


def test_packages_of_a_program_that_was_not_installed_are_not_known(monkeypatch):
    monkeypatch.setattr(software, "version_of", lambda package: None)
    check = software.check_packages()
    assert check.status == "warning"
    assert "without having been installed" in check.value
    assert "scripts/rapa-dist" in check.fix


def test_packages():
    needed = [Requirement("torch>=2.13,<2.14"), Requirement("ray>=2.60,<2.61"), Requirement("click>=8.2,<9")]
    good = {"torch": "2.13.0+cpu", "ray": "2.60.0", "click": "8.5.1"}
    assert software.judge_packages(needed, good).status == "ok"
    check = software.judge_packages(needed, good | {"torch": "2.14.0", "ray": None})
    assert check.status == "failed"
    assert check.quantities["unfit"] == ["torch", "ray"]
    assert "ray missing" in check.value
    assert "'torch<2.14,>=2.13' 'ray<2.61,>=2.60'" in check.fix


@pytest.mark.parametrize(
    ("version", "operators", "problem", "status"),
    [("0.28.0", True, None, "ok"), ("0.28.0", False, "unfit", "warning"), (None, False, "no module", "failed")],
)
def test_torchvision(version, operators, problem, status):
    check = data.judge_torchvision(VisionStatus(version=version, operators=operators, problem=problem))
    assert check.status == status
    assert (problem or "") in check.value + check.fix


def test_data_sets(tmp_path):
    builtin = FoundDataSet(name="builtin", found=True, where=None, how="drawn")
    lacking = FoundDataSet(name="cifar10", found=False, where=None, how="put the archive there")
    there = FoundDataSet(name="cifar10", found=True, where=tmp_path, how="CIFAR-10")
    check = data.judge_datasets([builtin, lacking])
    assert check.status == "warning"
    assert "cifar10: put the archive there" in check.fix
    check = data.judge_datasets([builtin, there])
    assert check.status == "ok"
    assert str(tmp_path) in check.value


def test_an_address_where_nobody_answers(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    check = cluster.check_cluster()
    assert check.status == "failed"
    assert "127.0.0.1:1" in check.fix


def test_no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster.check_cluster().quantities == {"address": None}


@pytest.mark.ray
def test_deep(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", {})
    result = run("--deep", "--json")
    assert result.exit_code == 0, result.stdout
    (check,) = json.loads(result.stdout)["checks"]
    assert check["status"] == "ok"
    assert check["quantities"]["cluster"] == "started for this run"


def write(folder: Path, **files: object):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_dot_", ".")).write_text(f"{text}\n")


def test_control_groups_of_version_2(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("0::/batch/job\n")
    assert cpu_limit(root, membership) is None
    assert memory_limit(root, membership) is None
    write(root / "batch/job", cpu_dot_max="max 100000", memory_dot_max="max")
    assert cpu_limit(root, membership) is None
    assert memory_limit(root, membership) is None
    write(root / "batch", cpu_dot_max="150000 100000", memory_dot_max=8 * GB, memory_dot_current=3 * GB)
    write(root / "batch", memory_dot_stat=f"anon 5\ninactive_file {GB}")
    assert cpu_limit(root, membership) == 1.5
    assert memory_limit(root, membership) == (8 * GB, 6 * GB)


def test_control_groups_of_version_1(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("3:cpu,cpuacct:/on/the/host\n2:memory:/on/the/host\n0::/\n")
    write(root / "cpu", cpu_dot_cfs_quota_us=-1, cpu_dot_cfs_period_us=100000)
    write(root / "memory", memory_dot_limit_in_bytes=2**63 - 4096, memory_dot_usage_in_bytes=GB)
    assert cpu_limit(root, membership) is None
    assert memory_limit(root, membership) is None
    write(root / "cpu", cpu_dot_cfs_quota_us=200000)
    write(root / "memory", memory_dot_limit_in_bytes=4 * GB)
    assert cpu_limit(root, membership) == 2.0
    assert memory_limit(root, membership) == (4 * GB, 3 * GB)


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(5, "5 B"), (16_777_216, "16.8 MB"), (999_900, "1 MB"), (25_300_000_000, "25.3 GB")]
)
def test_size(n_bytes, text):
    assert size(n_bytes) == text


def test_a_processor_type_that_is_forced_on_openblas_is_a_warning(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    check = software.check_blas()
    assert check.status == "warning"
    assert "OPENBLAS_CORETYPE=Haswell" in check.fix
    monkeypatch.delenv("OPENBLAS_CORETYPE")
    assert software.check_blas().status == "ok"


def test_tiles_that_multiply_with_numpy_are_a_warning_unless_they_were_told_to(monkeypatch):
    monkeypatch.setattr(software, "native", lambda: Native(None, "the library was not built", Lack.NOT_BUILT))
    check = software.check_products()
    assert (check.status, check.value) == ("warning", "NumPy (the library was not built)")
    assert "slower" in check.fix
    monkeypatch.setattr(software, "native", lambda: Native(None, "RAPA_DIST_NATIVE=off", Lack.SWITCHED_OFF))
    assert software.check_products().status == "ok"
