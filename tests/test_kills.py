"""Programs killed at random moments lose nothing: see kills.py, which tries more kills, and small disks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="children are forked and killed by group")
def test_a_kill_loses_nothing_and_the_same_command_goes_on():
    quick = ("prepare", "train", "evaluate", "predict", "convert", "compare", "report", "audit", "table")
    only = [word for name in quick for word in ("--only", name)]  # export and ablate take a minute each
    command = [sys.executable, HERE / "kills.py", "--kills", "2", "--seed", "1", *only]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE.parent, HERE))), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert ended.returncode == 0 and ended.stdout.endswith("lost: 0\n"), ended.stdout + ended.stderr[-2000:]
    assert len(ended.stdout.splitlines()) == len(quick) + 2
