"""What is in cluster/: scripts by running them, the rest against Ray's own schema and options, or by structure."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "cluster"
LOCAL = FOLDER / "local.sh"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^=]+", line) for line in lines)
    return {re.sub("[-_.]+", "-", line.split("==")[0]).lower(): line.split("==")[1] for line in lines}


RAY = pins(ROOT / "requirements.lock")["ray"]


# --- a cluster on one machine


def local(state, *arguments, **options):
    return subprocess.run(
        [LOCAL, "--state", state, *arguments], capture_output=True, text=True, timeout=120, check=False, **options
    )


class Local:
    """A cluster that was started by the script, and its traces on this machine."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.state = folder / "c"  # a short path, as Ray's sockets are below it
        self.started = local(self.state, "start", "--tiles-per-node", "7", *options)
        assert self.started.returncode == 0, self.started.stderr
        self.id, self.kind = ((self.state / name).read_text().strip() for name in ("id", "kind"))
        self.shm = (self.state / "shm").read_text().strip() if (self.state / "shm").exists() else None

    def __call__(self, *arguments, **options):
        return local(self.state, *arguments, **options)

    def rows(self) -> list[list[str]]:
        """What `status` says of each node: address, alive or dead, processes."""
        lines = self("status").stdout.splitlines()[1:]
        return [re.split("  +", line)[1:] for line in lines]

    def processes(self) -> list[int]:
        """Processes that were given this cluster's folder, below any node."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                files = [os.readlink(link) for link in (entry / "fd").iterdir()]
                if (
                    f"RAPA_DIST_LOCAL_NODE={self.id}-".encode() in (entry / "environ").read_bytes()
                    or any(file.startswith(f"{self.state}/") for file in files)
                ) and entry.joinpath("stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                    found.append(int(entry.name))
        return found

    def traces(self) -> list[str]:
        """What is there of it, and must not be after it was stopped."""
        links = [path.name for path in Path("/sys/class/net").iterdir() if path.name.startswith(f"rapa{self.id}")]
        spaces = [str(path) for path in Path("/run/netns").glob(f"rapa-{self.id}-*")]
        files = [str(self.state)] if self.state.exists() else []
        files += [self.shm] if self.shm and Path(self.shm).exists() else []
        return [*links, *spaces, *files, *map(str, self.processes())]


NODES = """
import json, os, sys, ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
json.dump([[node["NodeManagerAddress"], node["Alive"], node["Resources"]] for node in ray.nodes()], sys.stdout)
"""


@pytest.fixture
def short_folder():
    folder = Path("/tmp") / f"rl{os.getpid()}"
    folder.mkdir(mode=0o700)
    yield folder
    local(folder / "c", "stop")
    shutil.rmtree(folder)


@pytest.mark.ray
@pytest.mark.xdist_group("namespaces")
def test_three_nodes_come_up_are_cut_and_killed_and_leave_nothing(short_folder):
    cluster = Local(short_folder)
    address = (cluster.state / "address").read_text().strip()
    assert f"rapa-dist train --address {address}" in cluster.started.stderr
    assert stat.S_IMODE(cluster.state.stat().st_mode) == 0o700
    assert stat.S_IMODE((cluster.state / "token").stat().st_mode) == 0o600

    shown = cluster("run", "--", sys.executable, "-c", NODES)
    assert shown.returncode == 0, shown.stderr
    nodes = json.loads(shown.stdout)
    assert [(alive, resources["analog_tile"]) for _, alive, resources in nodes] == [(True, 7.0)] * 3
    assert [row[1] for row in cluster.rows()] == ["alive"] * 3
    if cluster.kind == "namespaces":
        assert len({place for place, _, _ in nodes}) == 3
        assert sorted(place for place, _, _ in nodes) == [row[0] for row in cluster.rows()]
        cut_and_heal(cluster)
    else:
        assert "no link to cut" in cluster("cut", "1", "1").stderr

    assert cluster("kill", "2").returncode == 0
    assert [row[1:] for row in cluster.rows()][2] == ["dead", "0 processes"]
    assert [row[1] for row in cluster.rows()][:2] == ["alive"] * 2
    assert cluster("status").returncode == 1
    assert cluster.traces()
    assert cluster("stop").returncode == 0
    assert cluster.traces() == []
    assert "no cluster of this script" in cluster("status").stderr


def cut_and_heal(cluster):
    operational = Path(f"/sys/class/net/rapa{cluster.id}-1/operstate")
    assert operational.read_text().strip() == "up"
    for ended in (False, True):
        cut = subprocess.Popen([LOCAL, "--state", cluster.state, "cut", "1", "60" if ended else "1"])
        deadline = time.monotonic() + 20
        while operational.read_text().strip() != "down":
            assert time.monotonic() < deadline, "the link was not cut"
            time.sleep(0.02)
        if ended:  # by hand, before its time
            cut.send_signal(signal.SIGTERM)
        assert cut.wait(timeout=20) == (130 if ended else 0)
        while operational.read_text().strip() != "up":
            assert time.monotonic() < deadline, "the link was not healed"
            time.sleep(0.02)


@pytest.mark.ray
@pytest.mark.xdist_group("namespaces")
def test_plain_raylets_are_nodes_too(short_folder):
    cluster = Local(short_folder, "--plain", "--nodes", "2")
    assert cluster.kind == "plain"
    assert [row[1] for row in cluster.rows()] == ["alive"] * 2
    again = cluster("start")
    assert again.returncode == 1
    assert "a cluster is in" in again.stderr
    assert cluster("kill", "1").returncode == 0
    assert [row[1:] for row in cluster.rows()][1] == ["dead", "0 processes"]
    assert cluster("run", "--node", "1", "--", "true").returncode == 1
    inside = cluster("run", "--", "sh", "-c", "echo $RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH $RAPA_DIST_SHM; exit 9")
    assert inside.returncode == 9
    assert inside.stdout.split()[:2] == ["token", f"{cluster.state}/token"]
    assert cluster("stop").returncode == 0
    assert cluster.traces() == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "takes start, run"),
        (("launch",), 2, "it was 'launch'"),
        (("start", "--nodes", "0"), 2, "--nodes is a number from 1"),
        (("start", "--nodes", "08x"), 2, "it was '08x'"),
        (("start", "--tiles-per-node"), 2, "needs a number"),
        (("start", "--fast"), 2, "doesn't know '--fast'"),
        (("stop",), 1, "no cluster of this script"),
        (("run", "--", "true"), 1, "no cluster of this script"),
        (("--help",), 0, ""),
    ],
)
def test_wrong_use_is_told_apart(tmp_path, arguments, code, words):
    told = local(tmp_path / "state", *arguments)
    assert told.returncode == code
    assert words in told.stderr
    assert not (tmp_path / "state").exists()


@pytest.mark.ray
@pytest.mark.xdist_group("namespaces")
def test_a_start_that_fails_takes_everything_back(short_folder):
    clone = short_folder / "clone"
    for name in ("scripts/setup.sh", "cluster/local.sh"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    fake = clone / ".venv/bin/ray"
    fake.parent.mkdir(parents=True)
    fake.write_text(
        f"#!/bin/sh\necho $RAPA_DIST_LOCAL_NODE >{short_folder}/node\necho no room for a raylet >&2\nexit 3\n"
    )
    fake.chmod(0o755)
    (fake.parent / "python").symlink_to(sys.executable)
    failed = subprocess.run(
        [clone / "cluster/local.sh", "--state", short_folder / "c", "start"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert failed.returncode == 1
    assert "no room for a raylet" in failed.stderr
    cluster = Local.__new__(Local)
    cluster.state, cluster.shm = short_folder / "c", None
    cluster.id = (short_folder / "node").read_text().partition("-")[0]
    assert cluster.traces() == []


# --- options that Ray knows, tiles on every node


def check_start(arguments: list[str]) -> dict[str, object]:
    """Return the options of a `ray start`, as Ray itself reads them; fail where it knows one of them not."""
    from ray.scripts.scripts import start

    options = start.make_context("ray start", list(arguments)).params
    assert json.loads(options["resources"]) == {"analog_tile": 21}
    assert options["num_cpus"] == 21 // 4 + 1
    assert options["object_store_memory"] == 100_000_000
    return options


def test_ray_up():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((FOLDER / "ssh.yaml").read_text())
    full = prepare_config(config)  # as `ray up` does first: it puts defaults in
    validate_config(full)  # against ray-schema.json
    workers = config["provider"]["worker_ips"]
    assert full["available_node_types"]["local.cluster.node"]["min_workers"] == len(workers)
    for kind, here in (("head", ["--head"]), ("worker", ["--address=$RAY_HEAD_IP:6379"])):
        stop, command = config[f"{kind}_start_ray_commands"]
        assert stop == "~/rapa-dist/.venv/bin/ray stop"
        words = shlex.split(command)
        program = words.index("~/rapa-dist/.venv/bin/ray")
        assert {"RAY_AUTH_MODE=token", "RAY_worker_maximum_startup_concurrency=6"} <= set(words[:program])
        assert words[program + 1] == "start"
        options = check_start(words[program + 2 :])
        assert options["head"] == (kind == "head")
        assert set(here) <= set(words)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"][-1]


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


# The fields of KubeRay's CRD that the manifests use; anything else would be dropped or refused by it.
CLUSTER_FIELDS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
GROUP_FIELDS = {"rayStartParams", "template"}
WORKER_FIELDS = GROUP_FIELDS | {"groupName", "replicas", "minReplicas", "maxReplicas"}
JOB_FIELDS = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"}
POD_FIELDS = {"securityContext", "containers", "volumes", "topologySpreadConstraints"}
CONTAINER_FIELDS = {"name", "image", "env", "ports", "resources", "volumeMounts"}


@pytest.mark.parametrize("name", ["kuberay-cluster.yaml", "kuberay-job.yaml"])
def test_kuberay(name):
    volume, main = documents(name)
    assert (volume["apiVersion"], volume["kind"]) == ("v1", "PersistentVolumeClaim")
    assert main["apiVersion"] == "ray.io/v1"
    assert re.fullmatch("[a-z0-9-]+", main["metadata"]["name"])
    cluster = main["spec"]
    if main["kind"] == "RayJob":
        assert set(cluster) <= JOB_FIELDS
        assert main["spec"]["entrypoint"].startswith("rapa-dist train ")
        cluster = main["spec"]["rayClusterSpec"]
    else:
        assert main["kind"] == "RayCluster"
    assert set(cluster) <= CLUSTER_FIELDS
    assert cluster["rayVersion"] == RAY
    assert cluster["authOptions"] == {"mode": "token"}
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert set(head) <= GROUP_FIELDS
    for group in workers:
        assert set(group) <= WORKER_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in [head, *workers]:
        check_group(group, volume["metadata"]["name"], is_head=group is head)


def check_group(group: dict, claim: str, *, is_head: bool) -> None:
    parameters = group["rayStartParams"]
    assert all(isinstance(value, str) for value in parameters.values())  # map[string]string in the CRD
    line = " ".join(f"--{key}={value}" for key, value in parameters.items())  # as KubeRay writes it, for a shell
    options = check_start((["--head"] if is_head else []) + shlex.split(line))
    pod = group["template"]["spec"]
    assert set(pod) <= POD_FIELDS
    (container,) = pod["containers"]
    assert set(container) <= CONTAINER_FIELDS
    assert container["image"] == f"rapa-dist:{PROJECT['version']}"
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment == {"RAY_worker_maximum_startup_concurrency": "6"}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["metrics"] == options["metrics_export_port"]
    assert group["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])
    for kind in ("requests", "limits"):
        resources = container["resources"][kind]
        assert re.fullmatch(r"\d+", resources["cpu"])
        assert re.fullmatch(r"\d+Gi", resources["memory"])
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    assert {mount["name"] for mount in container.get("volumeMounts", [])} == set(volumes)
    assert [volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values()] == [claim] * is_head


def test_both_manifests_start_the_same_cluster():
    cluster, job = (documents(name)[1]["spec"] for name in ("kuberay-cluster.yaml", "kuberay-job.yaml"))
    job = job["rayClusterSpec"]
    for spec in (cluster, job):
        del spec["headGroupSpec"]["template"]["spec"]["volumes"]
    assert cluster == job


# --- Slurm, with stand-ins for its commands

STAND_INS = {
    # `ray symmetric-run OPTIONS -- COMMAND`, on the head
    "ray": """
printf '%s\\n' "$@" >"$CALLS/ray"; env >"$CALLS/environment"; stat -c %a "$RAY_AUTH_TOKEN_PATH" >"$CALLS/mode"
until [ "$1" = -- ]; do shift; done; shift
[ -z "$FAKE_SLOW" ] || sleep 2
[ -z "$FAKE_NO_START" ] || exit 0  # as Ray does where a node did not start
"$@"
""",
    # runs its command here; a step on all nodes once, as on the head
    "srun": """
printf '%s\\n' "$*" >>"$CALLS/srun"
while :; do case $1 in --*) shift ;; *) break ;; esac; done
exec "$@"
""",
    "scontrol": "printf 'node%s\\n' 1 2 3",
    "hostname": "echo 192.0.2.1 192.0.2.9",
    "rapa-dist": """
printf '%s\\n' "$@" >"$CALLS/rapa-dist"
trap 'echo saved; exit 130' TERM
[ -z "$FAKE_LONG" ] || { touch "$CALLS/training"; while :; do sleep 0.05; done; }
exit 5
""",
}


@pytest.fixture
def slurm(tmp_path):
    """Start the batch script as Slurm would."""
    for part in ("clone/.venv/bin", "clone/scripts", "home", "calls"):
        (tmp_path / part).mkdir(parents=True)
    for name, text in STAND_INS.items():
        path = tmp_path / "clone/.venv/bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    setup = tmp_path / "clone/scripts/rapa-dist"
    setup.write_text("#!/bin/sh\n")
    setup.chmod(0o755)

    started = []

    def start(*arguments, **environment):
        job = subprocess.Popen(
            ["bash", FOLDER / "slurm.sbatch", *arguments],
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(tmp_path / "home"),
                "CALLS": str(tmp_path / "calls"),
                "SLURM_SUBMIT_DIR": str(tmp_path / "clone"),
                "SLURM_JOB_ID": "77",
                "SLURM_JOB_NODELIST": "node[1-3]",
                "RAY_ADDRESS": "198.51.100.1:1",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(job.pid)
        return job

    start.calls, start.home = tmp_path / "calls", tmp_path / "home"
    yield start
    for group in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def test_slurm_runs_the_command_on_the_head_of_as_many_nodes_as_there_are(slurm):
    job = slurm("train", "--tiles", "16,4,1", "--run-dir", "runs/a b")
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 5, out
    command = (slurm.calls / "rapa-dist").read_text().splitlines()
    assert command == ["train", "--address", "192.0.2.1:6379", "--tiles", "16,4,1", "--run-dir", "runs/a b"]
    words = (slurm.calls / "ray").read_text().splitlines()
    assert words[:5] == ["symmetric-run", "--address", "192.0.2.1:6379", "--min-nodes", "3"]
    options = check_start(words[5 : words.index("--")])
    assert not {"head", "block", "port", "node_ip_address"} & {key for key, value in options.items() if value}
    environment = dict(line.partition("=")[::2] for line in (slurm.calls / "environment").read_text().splitlines())
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_worker_maximum_startup_concurrency"] == "6"
    assert "RAY_ADDRESS" not in environment
    assert (slurm.calls / "mode").read_text() == "600\n"
    assert "--nodes=3 --ntasks=3 --ntasks-per-node=1 ray" in (slurm.calls / "srun").read_text()
    assert list(slurm.home.iterdir()) == []


def test_slurm_fails_where_the_nodes_did_not_start(slurm):
    job = slurm("train", FAKE_NO_START="1")
    job.communicate(timeout=30)
    assert job.returncode == 1
    assert list(slurm.home.iterdir()) == []


def test_slurm_tells_the_training_that_time_is_up(slurm):
    job = slurm("train", FAKE_LONG="1")
    deadline = time.monotonic() + 20
    while not (slurm.calls / "training").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=30)
    assert "saved" in out
    assert job.returncode == 130
    assert "--overlap --nodes=1 --ntasks=1 --nodelist=node1 kill" in (slurm.calls / "srun").read_text()
    assert list(slurm.home.iterdir()) == []


@pytest.mark.parametrize(("starts", "codes"), [("", (130, 143)), ("no", (1,))])
def test_slurm_tells_a_training_that_has_yet_to_start(slurm, starts, codes):
    job = slurm("train", FAKE_LONG="1", FAKE_SLOW="1", FAKE_NO_START=starts)
    deadline = time.monotonic() + 20
    while not (slurm.calls / "mode").exists():  # Ray has been started
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=20)
    assert job.returncode in codes, out
    assert list(slurm.home.iterdir()) == []


def test_slurm_starts_a_job_again_whose_node_was_lost(slurm):
    for name in (".rapa-dist-job-77.0", ".rapa-dist-job-770.0"):
        (slurm.home / name).mkdir()
        (slurm.home / name / "exit").write_text("0\n")
    job = slurm("train", SLURM_RESTART_COUNT="1")
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 5, out
    assert [path.name for path in slurm.home.iterdir()] == [".rapa-dist-job-770.0"]
    environment = (slurm.calls / "environment").read_text()
    assert f"RAY_AUTH_TOKEN_PATH={slurm.home}/.rapa-dist-job-77.1/token\n" in environment


def test_slurm_leaves_the_job_the_nodes_that_are_left(slurm):
    job = slurm("train")
    job.communicate(timeout=30)
    (step,) = [line for line in (slurm.calls / "srun").read_text().splitlines() if " ray " in line]
    assert "--no-kill" in step.split(" ray ")[0].split()
    assert "#SBATCH --no-kill" in (FOLDER / "slurm.sbatch").read_text().splitlines()


def test_slurm_reads_its_options():
    lines = (FOLDER / "slurm.sbatch").read_text().splitlines()
    options = [line for line in lines if line.startswith("#SBATCH")]
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert options
    assert all(lines.index(option) < first_command for option in options)  # Slurm reads none behind it
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", option) for option in options)
    assert "#SBATCH --ntasks-per-node=1" in options


# --- the image, and versions

INSTRUCTIONS = {"FROM", "ARG", "RUN", "COPY", "WORKDIR", "USER", "ENV", "VOLUME", "CMD"}


def instructions() -> list[tuple[str, str]]:
    text = "\n".join(
        line for line in (FOLDER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    )
    joined = re.sub(r"\\\n", "", text)
    return [tuple(re.split(r"\s+", line, maxsplit=1)) for line in joined.splitlines() if line.strip()]


def test_dockerfile():
    steps = instructions()
    assert steps[0][0] == "FROM"
    assert {name for name, _ in steps} <= INSTRUCTIONS
    python = re.match(r"python:(\d+\.\d+)-slim-", steps[0][1])[1]
    assert python in SpecifierSet(PROJECT["requires-python"])
    allowed = [line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    for name, rest in steps:
        if name == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources)
            assert all(source in allowed for source in sources)
        if name == "RUN":
            subprocess.run(["bash", "-n"], input=rest, text=True, check=True)
    runs = [rest for name, rest in steps if name == "RUN"]
    torch = next(run for run in runs if "torch==" in run)
    for name in ("torch", "torchvision"):
        assert f"grep '^{name}==' requirements.lock" in torch
        assert name in pins(ROOT / "requirements.lock")
    package = next(run for run in runs if "'.[" in run)
    assert "--constraint requirements.lock --constraint cluster/requirements.lock" in package
    extras = re.search(r"'\.\[(.*)\]'", package)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert "metrics" in extras  # for KubeRay's jobs and its questions after a pod's health
    assert "/" not in [rest for name, rest in steps if name == "USER"]
    assert ("USER", "rapa") in steps


def test_versions_agree():
    ours, more = pins(ROOT / "requirements.lock"), pins(FOLDER / "requirements.lock")
    assert not set(ours) & set(more)
    assert {"aiohttp", "grpcio", "opencensus"} <= set(more)
    assert RAY in SpecifierSet(next(r for r in PROJECT["dependencies"] if r.startswith("ray"))[3:])
    for path in FOLDER.iterdir():
        text = path.read_text()
        assert set(re.findall(r"rapa-dist:([\w.-]+)", text)) <= {PROJECT["version"]}, path
        assert set(re.findall(r"(?i)\bray(?:Version:)?[ :=]+v?(\d+\.\d+\.\d+)", text)) <= {RAY}, path


def test_ci_looks_at_the_scripts():
    line = next(
        line for line in (ROOT / ".ci/run").read_text().splitlines() if "shellcheck " in line and "step" in line
    )
    for path in FOLDER.iterdir():
        if path.read_text().startswith("#!") and "bash" in path.read_text().splitlines()[0]:
            assert f"cluster/{path.name}" in line
            subprocess.run(["bash", "-n", path], check=True)
