"""Every bad input is refused clearly: see bad_inputs.py for the cases and the rule."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_every_bad_input_is_refused_in_one_clear_line(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE.parent, HERE))), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, HERE / "bad_inputs.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-2000:]
    assert int(result.stdout.splitlines()[-1].split()[0]) >= 500
