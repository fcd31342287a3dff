"""Figures of several seeds with intervals: a bootstrap over scenes and seeds, on summed counts.

A resample draws as many scenes as there are, and as many seeds, both with replacement. The counts of its scenes are
summed, mIoU is taken for every drawn seed, and the seeds are averaged. A difference gives both sides the same draws, so
it is paired by frame and by seed: what is hard for both cancels. Where a set has no scenes, only seeds are drawn, where
there is one seed, only scenes. With three seeds an interval says little about seeds; it is the scenes that widen it.

Letters: S seeds, C scenes, N resamples, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .class_sets import members
from .counts import FrameTable
from .metrics import group_sums

RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A share or a difference of shares, and its 95 % interval; without one where nothing can be drawn again."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, sign: bool = False) -> str:
        """'63.9 [56.4, 74.7]' in percent, '+12.3 [7.0, 17.6]' with `sign`, 'N/A' for a figure that is not defined."""
        if np.isnan(self.value):
            return "N/A"
        value, *ends = (f"{100 * x:+.1f}" if sign else f"{100 * x:.1f}" for x in self if x is not None)
        return f"{value} [{ends[0]}, {ends[1]}]" if ends else value


class Draws(NamedTuple):
    """How often every resample has every scene (N, C) and every seed (N, S)."""

    scenes: np.ndarray
    seeds: np.ndarray


@dataclass(frozen=True, eq=False)
class Runs:
    """The same frames scored by the models of S seeds, or by one baseline, summed by scene.

    totals (S, C, 3, K): hits, true and predicted pixels. over: numbers of the classes that means are over.
    """

    totals: np.ndarray
    scenes: list[str]
    over: list[int]

    @classmethod
    def of(cls, tables: Sequence[FrameTable], over: Sequence[int] | None = None) -> "Runs":
        """From a table per seed; raises ValueError for tables of other frames or classes.

        over: None for the tables' class set.
        """
        first = tables[0]
        for table in tables[1:]:
            if (table.frames, table.scenes, table.classes) != (first.frames, first.scenes, first.classes):
                raise ValueError("tables of several seeds hold other frames or classes; evaluate all on the same sets")
        sums = [group_sums(table_totals(table.counts), table.scenes) for table in tables]
        over = members(first.class_set, first.classes) if over is None else list(over)
        return cls(np.stack([np.stack([*of_scene.values()]) for of_scene in sums]), list(sums[0]), over)

    def iou(self, draws: Draws | None = None) -> np.ndarray:
        """IoU (S, K) of all scenes together, or (N, S, K) of resamples; NaN where a class is in neither."""
        if draws is None:
            return totals_iou(self.totals.sum(1))
        seeds, scenes = self.totals.shape[:2]
        cells = self.totals.swapaxes(0, 1).reshape(scenes, -1).astype(float)  # exact: whole numbers below 2**53
        return totals_iou((draws.scenes.astype(float) @ cells).reshape(-1, seeds, *self.totals.shape[2:]))

    def miou(self, draws: Draws | None = None) -> np.ndarray:
        """Mean IoU (S,) or (N, S) over the classes of `over` that have one; NaN where none has."""
        return _nanmean(self.iou(draws)[..., self.over])


def table_totals(counts: np.ndarray) -> np.ndarray:
    """Hits, true and predicted pixels (..., 3, K) of counts (..., K, K + 1)."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    return np.stack([hits, counts.sum(-1), counts.sum(-2)[..., :-1]], -2)


def totals_iou(totals: np.ndarray) -> np.ndarray:
    """IoU (..., K) of hits, true and predicted pixels (..., 3, K); NaN where a class is in neither."""
    hits, true, predicted = np.moveaxis(totals, -2, 0)
    union = true + predicted - hits
    return np.divide(hits, union, out=np.full(hits.shape, np.nan), where=union > 0)


def draw(scenes: int, seeds: int, resamples: int, seed: int) -> Draws:
    """The draws of a bootstrap, the same for the same numbers."""
    rng = np.random.default_rng(seed)
    return Draws(*(rng.multinomial(n, np.full(n, 1 / n), resamples) for n in (scenes, seeds)))


def miou_estimate(runs: Runs, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """mIoU, mean over the seeds."""
    draws = _draws(runs, resamples, seed)
    return _estimate(runs.miou(), None if draws is None else runs.miou(draws), draws)


def class_estimates(runs: Runs, resamples: int = RESAMPLES, seed: int = 0) -> list[Estimate]:
    """IoU of every class, mean over the seeds."""
    draws = _draws(runs, resamples, seed)
    iou, drawn = runs.iou(), None if draws is None else runs.iou(draws)
    return [_estimate(iou[:, k], None if drawn is None else drawn[..., k], draws) for k in range(iou.shape[1])]


def difference(first: Runs, second: Runs, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """mIoU of the second minus that of the first, paired by frame and, where both have several, by seed.

    A single run, such as a baseline, is compared with every seed of the other. Raises ValueError for other numbers of
    seeds and for other scenes.
    """
    seeds = {len(runs.totals) for runs in (first, second)}
    if len(seeds - {1}) > 1 or first.scenes != second.scenes or first.over != second.over:
        raise ValueError("the two have other seeds, scenes or classes; train and evaluate both alike")
    draws = _draws(max(first, second, key=lambda runs: len(runs.totals)), resamples, seed)
    return _estimate(
        second.miou() - first.miou(), None if draws is None else second.miou(draws) - first.miou(draws), draws
    )


def rare_classes(table: FrameTable, least: int) -> list[str]:
    """Classes whose ground truth lies in fewer scenes than `least`; none where the set itself has fewer."""
    of_scene = group_sums(table.counts.sum(2), table.scenes)
    if len(of_scene) < least:
        return []
    seen = (np.stack([*of_scene.values()]) > 0).sum(0)
    return [name for name, scenes in zip(table.classes, seen, strict=True) if scenes < least]


def _draws(runs: Runs, resamples: int, seed: int) -> Draws | None:
    seeds, scenes = runs.totals.shape[:2]
    return draw(scenes, seeds, resamples, seed) if resamples and max(seeds, scenes) > 1 else None


def _estimate(values: np.ndarray, drawn: np.ndarray | None, draws: Draws | None) -> Estimate:
    """From the value of every seed (S,), and of resamples (N, S) or of one run in them (N, 1)."""
    value = float(_nanmean(values))
    if drawn is None or draws is None or np.isnan(value):
        return Estimate(value)
    weights = np.broadcast_to(draws.seeds, (len(drawn), max(draws.seeds.shape[1], drawn.shape[1])))
    weights = np.where(np.isnan(drawn), 0, weights)
    total = weights.sum(1)
    means = (np.nan_to_num(drawn) * weights).sum(1)[total > 0] / total[total > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where all is."""
    known = ~np.isnan(values)
    count = known.sum(-1)
    return np.divide(np.where(known, values, 0).sum(-1), count, out=np.full(count.shape, np.nan), where=count > 0)
