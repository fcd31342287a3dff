"""Every bad input is refused clearly: see bad_inputs.py for the cases and the rule."""

import shutil
import signal
from pathlib import Path

import bad_inputs
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Good inputs of every kind, which the bad ones are made of; and an alarm stops what hangs."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    root = tmp_path_factory.mktemp("inputs") / "good"
    (root / "empty").mkdir(parents=True)
    bad_inputs.fixtures(root)
    yield root
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("area", bad_inputs.AREAS, ids=lambda area: area.__name__.removesuffix("_cases"))
def test_every_bad_input_is_refused_in_one_clear_line(root, tmp_path, area):
    wrong = []
    for number, case in enumerate(area(root)):
        folder = tmp_path / str(number)
        folder.mkdir()
        found, told = bad_inputs.verdict(case, folder)
        if found in bad_inputs.BAD:
            wrong.append(f"{found}: {case.area}: {case.name} -> {told[:400]}")
        shutil.rmtree(folder, ignore_errors=True)
    assert not wrong, "\n".join(wrong)
