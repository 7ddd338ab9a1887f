"""Whole runs on tiles with every noise there is: killed and resumed, they end with the bits of undisturbed ones."""

import json
import subprocess
import sys

import pytest

SMALL = ["--channels", "8,8,4", "--limit-train", "200", "--limit-test", "20", "--epochs", "2", "--tiles", "2,1,1"]
ALL_NOISES = """
preset = "reram-es"
[forward]
inp_noise = 0.01
inp_sto_round = true
out_sto_round = true
w_noise = 0.02
w_noise_type = "PCM_READ"
ir_drop = 1.0
[backward]
w_noise = 0.02
w_noise_type = "ADDITIVE_CONSTANT"
out_sto_round = true
[device]
lifetime = 1000.0
diffusion = 0.0005
corrupt_devices_prob = 0.01
[layers.1]
preset = "capacitor"
[layers.2]
preset = "io"
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_noisy_tiles_that_are_killed_and_runs_that_are_resumed_have_the_bits_of_serial(tmp_path):
    (tmp_path / "noisy.toml").write_text(ALL_NOISES)
    options = ["--physics", str(tmp_path / "noisy.toml"), "--kills", "5", "--seed", "73"]
    options += ["--kinds", "tile-kill,all-tiles,coordinator-kill", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "rapa_dist", "chaos", *SMALL, *options],
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"] == "identical"
    assert len(report["deeds"]) > 0
