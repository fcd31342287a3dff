"""Class sets: which classes a mean is over. IoU is of all classes always; a set only decides whose IoU is averaged."""

from collections.abc import Sequence

import numpy as np

from ..data.label_maps import IGNORE_INDEX

_STREET_13 = (
    "road", "sidewalk", "building", "traffic light", "traffic sign", "vegetation", "sky", "person", "rider", "car",
    "bus", "motorcycle", "bicycle",
)  # fmt: skip
# The classes that SYNTHIA labels, and those of them that are scored where wall, fence and pole are left out.
CLASS_SETS = {"synthia-16": (*_STREET_13, "wall", "fence", "pole"), "synthia-13": _STREET_13}
# The classes that the model and all sets name, or those with pixels in both tables that are compared.
COMMON = "common"


def class_set(text: str | None, classes: Sequence[str]) -> tuple[str, ...]:
    """The classes of a set, in the order of `classes`; none for no set.

    text: a name of `CLASS_SETS`, or classes with commas between them; "common" is of all `classes`, which are then
    those in common. Raises ValueError for what is neither.
    """
    if text is None:
        return ()
    if text == COMMON:
        return tuple(classes)
    wanted = CLASS_SETS.get(text, [name.strip() for name in text.split(",")])
    missing = [name for name in wanted if name not in classes]
    if missing:
        known = ", ".join((*CLASS_SETS, COMMON))
        raise ValueError(
            f"--class-set {text[:60]}: there is no class {missing[0][:60]!r}; give one of {known}, or names among "
            f"{', '.join(classes[:6])}{', ...' if len(classes) > 6 else ''}"
        )
    return tuple(name for name in classes if name in wanted)


def members(chosen: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Numbers of the classes of a set; of all classes where the set is none."""
    return [number for number, name in enumerate(classes) if not chosen or name in chosen]


def common_classes(*lists: Sequence[str]) -> list[str]:
    """The classes that all lists name, whatever their case, as the first list spells and orders them."""
    others = [{_plain(name) for name in names} for names in lists[1:]]
    return [name for name in lists[0] if all(_plain(name) in names for names in others)]


def renumbering(names: Sequence[str], chosen: Sequence[str]) -> np.ndarray:
    """(256,) uint8: number among `chosen` of every id of `names`; 255 for the ids of other classes and for no class."""
    numbers = {_plain(name): number for number, name in enumerate(chosen)}
    table = np.full(256, IGNORE_INDEX, np.uint8)
    table[: len(names)] = [numbers.get(_plain(name), IGNORE_INDEX) for name in names]
    return table


def _plain(name: str) -> str:
    return " ".join(name.lower().split())


def over_text(count: int, total: int, name: str | None = None) -> str:
    """'19 classes', '1 of 2 classes', '16 of 19 classes, synthia-16', '3 common classes': what a mean is over."""
    of, kind = f" of {total}" if count != total else "", "common " if name == COMMON else ""
    named = f", {name}" if name and not kind else ""
    return f"{count}{of} {kind}class{'es' if total > 1 or count > 1 else ''}{named}"
