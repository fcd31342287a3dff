"""Names of recorded scenes: one spelling for all lists, and the time that a name holds.

ORFD and Road3D name a scene after the minute in which its recording began, often without the year, behind a letter
whose meaning nobody wrote down: `x0613_1627` is 13 June, 16:27; `y2021_0222_1744_2` has a year and a counter. Tables
write the same scenes as `0613-1627`. Frames are named by a millisecond clock that can disagree with these dates by
months, so neither is ever derived from the other.
"""

import re
from calendar import isleap
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

# What may follow the time (a counter, a camera) begins with a separator, too.
_RECORDING = re.compile(r"[a-z]?(?:((?:19|20)\d\d)[_-])?(\d\d)(\d\d)[_-](\d\d)(\d\d)(?:[_-].*)?")
# Almost a time (a digit too many, a capital letter, a count behind it) is a slip of the pen, not another naming: it
# must not pass for a name without a time, which nothing would be compared with.
_ALMOST_RECORDING = re.compile(r"[A-Za-z]?\d{3,5}[_-]\d{3,5}(?!\d).*")
# A part of a drive, cut by time: 4s-007 is its eighth block of four seconds.
_BLOCK = re.compile(r"(?:(.*)/)?(\d+)s-\d+")
# 13 digits without leading zeros: milliseconds since 1970, of a moment after September 2001.
_STAMP = re.compile(r"[1-9]\d{12}")


class RecordingTime(NamedTuple):
    """The minute in which a recording began; `year` is None where the name does not tell it."""

    year: int | None
    month: int
    day: int
    hour: int
    minute: int

    def moments(self, around_year: int) -> list[datetime]:
        """The moment that is meant; without a year, the possible ones of around_year and the years around it."""
        years = [self.year] if self.year is not None else [around_year - 1, around_year, around_year + 1]
        leap_day = (self.month, self.day) == (2, 29)
        return [datetime(year, *self[1:]) for year in years if isleap(year) or not leap_day]


def canonical_name(name: str) -> str:
    """`y2021_0222_1744_2` -> `2021-0222-1744-2`: without one small letter before a digit in front, `_` as `-`.

    Canonical names stay as they are.
    """
    return re.sub(r"^[a-z](?=\d)", "", name).replace("_", "-")


def recording_time(name: str) -> RecordingTime | None:
    """The time in a scene's name: [letter][YYYY_]MMDD_HHMM[_anything], also with `-`; None in names of another kind.

    Raises ValueError for names that hold almost a time: month 13, 30 February, hour 25, a digit too few.
    """
    form = "scenes are named [letter][YYYY_]MMDD_HHMM[_anything], as x0613_1627 or y2021_0222_1744_2"
    match = _RECORDING.fullmatch(name)
    if match is None:
        if _ALMOST_RECORDING.fullmatch(name):
            raise ValueError(f"impossible scene name {name!r}: almost a time, but not quite; {form}")
        return None
    year, *rest = (None if part is None else int(part) for part in match.groups())
    try:
        datetime(2000 if year is None else year, *rest)  # 2000 had a 29 February, as an unknown year may
    except ValueError as error:
        month, day, hour, minute = rest
        raise ValueError(
            f"impossible scene name {name!r}: month {month}, day {day}, hour {hour}, minute {minute}"
            f"{'' if year is None else f' of {year}'} is no time ({error}); {form}"
        ) from error
    return RecordingTime(year, *rest)


def scene_identity(name: str) -> str:
    """What two names of one scene have in common: the canonical name if it holds a time, else the name itself.

    Elsewhere (`a1`, `b1`) the letter may be all that tells two scenes apart. Raises ValueError for impossible names.
    """
    return name if recording_time(name) is None else canonical_name(name)


def minutes_apart(first: RecordingTime, second: RecordingTime) -> float:
    """Minutes between two recordings; a year that is not named is the one that brings them closest.

    So 1231_2359 and 0101_0001 are two minutes apart, and a name without a year can be compared with one that has it.
    Infinity for 29 February and a year that has none near it.
    """
    # Without any year: 2024, a leap year between two that are none.
    around = next((year for year in (first.year, second.year) if year is not None), 2024)
    gaps = [abs(a - b).total_seconds() / 60 for a in first.moments(around) for b in second.moments(around)]
    return min(gaps, default=float("inf"))


def frame_stamp(name: str) -> int | None:
    """Milliseconds since 1970 of a frame that is named by them (13 digits, no suffix), else None."""
    return int(name) if _STAMP.fullmatch(name) else None


def time_block(name: str, first: int, seconds: int, scene: str = "") -> str:
    """Scene "4s-007" of a frame named by its stamp: which block of so many seconds, counted from the stamp `first`.

    scene: of the frame, which goes in front. Raises ValueError for a name that is no stamp.
    """
    stamp = frame_stamp(name)
    if stamp is None:
        raise ValueError(f"{name!r} is no time stamp of 13 digits (milliseconds); leave out --scene-seconds")
    block = f"{seconds}s-{(stamp - first) // (1000 * seconds):03d}"
    return f"{scene}/{block}" if scene else block


def clusters_text(scenes: Sequence[str]) -> str:
    """What the scenes of a set are: '18 scenes', '14 blocks of 4 s within one drive', 'one place', 'no scenes'."""
    names = sorted({*scenes} - {""})
    blocks = [match for name in names if (match := _BLOCK.fullmatch(name))]
    if names and len(blocks) == len(names):
        drives = len({match[1] for match in blocks})
        where = "one drive" if drives == 1 else f"{drives} drives"
        return f"{len(names)} block{'s' * (len(names) > 1)} of {blocks[0][2]} s within {where}"
    return f"{len(names)} scenes" if len(names) > 1 else "one place" if names else "no scenes"
