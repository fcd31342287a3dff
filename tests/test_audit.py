"""Leaked test scenes are found, by name, by time and by picture, and the published lists give the published overlap."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tqdm_seg.scenes_tqdm import canonical_name, recording_time

ROOT = Path(__file__).parent.parent
LISTS = ROOT / "dataset_scripts" / "scene_lists"


def audit(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "dataset_scripts" / "audit_splits.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_road3d_test_against_orfd_training_gives_exactly_the_three_known_scenes(tmp_path):
    known = sorted((LISTS / "road3d_orfd_overlap_scenes.txt").read_text().split())
    assert known == ["x0613_1627", "x2021_0223_1310", "y0613_1248"]
    test, training = LISTS / "road3d_test_scenes.txt", tmp_path / "training.txt"
    names = (LISTS / "orfd_train_scenes.txt").read_text().split()
    # In another order, and with the names in their other form.
    training.write_text("\n".join(canonical_name(name) for name in reversed(names)))
    for other in (LISTS / "orfd_train_scenes.txt", training):
        result = audit(test, other, "--json", tmp_path / "leaks.json")
        assert result.returncode == 1, result.stderr
        assert "LEAKS: same scene 3" in result.stdout
        text = json.dumps(json.loads((tmp_path / "leaks.json").read_text()))
        found = {name for name in test.read_text().split() if f'"{name}"' in text}
        assert sorted(found) == known


def test_lists_without_a_common_scene_pass(tmp_path):
    (tmp_path / "a.txt").write_text("x0613_1627\n")
    (tmp_path / "b.txt").write_text("y0615_1627\n")
    assert audit(tmp_path / "a.txt", tmp_path / "b.txt", "--minutes", "10").returncode == 0
    (tmp_path / "b.txt").write_text("y0613_1631\n")
    result = audit(tmp_path / "a.txt", tmp_path / "b.txt", "--minutes", "10")
    assert result.returncode == 1 and "scenes near in time 1" in result.stdout


def test_two_parts_of_one_drive_are_found(tmp_path):
    parts = [ROOT / "examples" / "orfd_mini" / part for part in ("validation", "training")]
    result = audit(*parts)
    assert result.returncode == 1 and "same scene 1" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("x0613_1627", "0613-1627"),
        ("c2021_0228_1819", "2021-0228-1819"),
        ("y2021_0222_1744_2", "2021-0222-1744-2"),
        ("0613-1627", "0613-1627"),
    ],
)
def test_canonical_names(name, canonical):
    assert canonical_name(name) == canonical


@pytest.mark.parametrize("name", ["x1313_1200", "x0632_1200", "y2021_0223_2510"])
def test_impossible_times_are_errors_that_name_the_scene(name, tmp_path):
    with pytest.raises(ValueError, match=name):
        recording_time(name)
    (tmp_path / "a.txt").write_text(f"{name}\n")
    result = audit(tmp_path / "a.txt", LISTS / "orfd_train_scenes.txt")
    assert result.returncode == 2 and name in result.stderr


def test_a_missing_list_is_named(tmp_path):
    result = audit(tmp_path / "nowhere.txt", LISTS / "orfd_train_scenes.txt")
    assert result.returncode == 2 and "nowhere.txt" in result.stderr
