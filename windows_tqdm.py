"""Inference on images of any size: sliding windows, test-time augmentation, class ids.

Letters: B batch, K classes, H, W image, h, w window or result.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .configuration_tqdm import TqdmConfig, quote
from .layers_tqdm import check_images, check_names, resize, warn_untrained


def window_corners(height: int, width: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Top left corners of the windows over an image: one every `stride` pixels, the last ones moved back inside."""
    rows, columns = (
        [max(min(i * stride, n - size), 0) for i in range(max(-(-(n - size) // stride), 0) + 1)]
        for n in (height, width)
    )
    return [(row, column) for row in rows for column in columns]


def count_windows(
    corners: list[tuple[int, int]], image: tuple[int, int], window: tuple[int, int], device: torch.device
) -> Tensor:
    """How many windows lie over every pixel (H, W) of an image; sizes are (height, width)."""
    hits = []
    for positions, length, side in zip(map(set, zip(*corners, strict=True)), image, window, strict=True):
        counts = torch.zeros(length, device=device)
        for start in positions:
            counts[start : start + side] += 1
        hits.append(counts)
    return hits[0][:, None] * hits[1]


def slide_strips(
    score: Callable[[Tensor], Tensor],
    pixel_values: Tensor,
    scores: Tensor,
    window_size: int,
    window_stride: int,
    window_batch_size: int,
) -> Iterator[Tensor]:
    """`slide`, strip by strip along the longer side (dimension `longer_side`) of the image, from its beginning.

    scores: zeros to sum in, (B, K, H, W), or only a window long along the longer side. Yields parts of it, finished; in
    the second case they are overwritten later.
    """
    batch, _, height, width = pixel_values.shape
    rows, columns = min(window_size, height), min(window_size, width)
    corners = window_corners(height, width, window_size, window_stride)
    hits = count_windows(corners, (height, width), (rows, columns), pixel_values.device)  # (H, W)
    along = longer_side(pixel_values)
    corners.sort(key=lambda corner: corner[along])
    base = begin = 0  # positions on the longer side: where `scores` begins, and what is not finished

    def average(end: int) -> Tensor:
        strip = scores.narrow(along, begin - base, end - begin)
        return strip.div_(hits.narrow(along, begin, end - begin))

    for index in range(0, len(corners), window_batch_size):
        chunk = corners[index : index + window_batch_size]
        windows = torch.cat([pixel_values[..., y : y + rows, x : x + columns] for y, x in chunk])
        for corner, part in zip(chunk, score(windows).split(batch), strict=True):
            start, length = corner[along], part.shape[along]
            if start > begin:
                yield average(start)
                if start + length > base + scores.shape[along]:  # no room: drop what is finished
                    rest = scores.narrow(along, start - base, base + scores.shape[along] - start).clone()
                    scores.zero_().narrow(along, 0, rest.shape[along]).copy_(rest)
                    base = start
                begin = start
            y, x = corner
            y, x = (y - base, x) if along == -2 else (y, x - base)
            scores[..., y : y + rows, x : x + columns] += part
    yield average(pixel_values.shape[along])


def longer_side(pixel_values: Tensor) -> int:
    """The dimension, -2 or -1, along which images (B, 3, H, W) are longer."""
    return -2 if pixel_values.shape[-2] > pixel_values.shape[-1] else -1


def slide(
    score: Callable[[Tensor], Tensor],
    pixel_values: Tensor,
    num_labels: int,
    window_size: int,
    window_stride: int,
    window_batch_size: int,
) -> Tensor:
    """Scores (B, K, H, W) of pixel_values (B, 3, H, W), averaged over windows.

    score: windows (n, 3, h, w) -> (n, K, h, w), window_batch_size windows per call. Where a side of the image is
    smaller than the window, so is the window.
    """
    batch, _, height, width = pixel_values.shape
    scores = torch.zeros(batch, num_labels, height, width, device=pixel_values.device)
    for _ in slide_strips(score, pixel_values, scores, window_size, window_stride, window_batch_size):
        pass
    return scores


def average_views(
    score_view: Callable[[Tensor], Tensor],
    views: list[Tensor],
    size: tuple[int, int],
    flip: bool = False,
    softmax_views: bool = False,
) -> Tensor:
    """Scores (B, K, h, w) at `size`, averaged over views (B, 3, H, W) and with `flip` over their mirror images.

    score_view: a view -> its scores (B, K, H, W). softmax_views: see `Segmenter.segment`.
    """
    total = None
    for view in views:
        for mirrored in (False, True)[: 1 + flip]:
            scores = score_view(view.flip(-1) if mirrored else view).float()
            if tuple(scores.shape[-2:]) != tuple(size):
                scores = resize(scores, size)
            scores = scores.softmax(1) if softmax_views else scores
            scores = scores.flip(-1) if mirrored else scores
            total = scores if total is None else total.add_(scores)
    count = len(views) * (1 + flip)
    return total if count == 1 else total.div_(count)


class Segmenter:
    """Scores and class ids of images of any size; subclasses have `config` and `window_scorer`."""

    config: TqdmConfig
    training = False

    def window_scorer(self) -> Callable[[Tensor], Tensor]:
        """A function that scores windows: (n, 3, h, w) -> (n, K, h, w)."""
        raise NotImplementedError

    def window_batch_size(self, device: torch.device) -> int:
        """Windows per forward pass, see `TqdmConfig`."""
        return self.config.window_batch_size or (1 if device.type == "cpu" else 8)

    def window_scores(self, pixel_values: Tensor, score: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Scores (B, K, H, W) averaged over windows of `config.window_size` every `config.window_stride` pixels.

        score: a `window_scorer()`; made here if not given.
        """
        config, score = self.config, score or self.window_scorer()
        config.check_windows()
        return slide(
            score, pixel_values, config.num_labels, config.window_size, config.window_stride,
            self.window_batch_size(pixel_values.device),
        )  # fmt: skip

    @torch.inference_mode()
    def segment(
        self,
        views: Tensor | list[Tensor],
        size: tuple[int, int] | None = None,
        flip: bool = False,
        softmax_views: bool = False,
    ) -> Tensor:
        """Scores (B, K, h, w) of images of any size; larger ones than `config.window_size` by sliding windows.

        views: pixel_values (B, 3, H, W), or a list of the same images at several scales, whose scores are averaged.
        size: height and width of the result (bilinear), by default those of the first view.
        flip: average every view with its mirror image.
        softmax_views: put each view's scores through a softmax over the classes before averaging, as the published code
        does; the scores are sums of probabilities already, so this only flattens their differences.
        Raises ValueError in training mode, and, naming the argument, for views that are no images of one batch.
        """
        views = self._check_views(views, size, flip=flip, softmax_views=softmax_views)
        size = views[0].shape[-2:] if size is None else size
        score = self.window_scorer()

        def score_view(view: Tensor) -> Tensor:
            return self.window_scores(view, score) if self.config.exceeds_window(*view.shape[-2:]) else score(view)

        return average_views(score_view, views, size, flip, softmax_views)

    @torch.inference_mode()
    def segment_labels(
        self,
        views: Tensor | list[Tensor],
        size: tuple[int, int] | None = None,
        flip: bool = False,
        softmax_views: bool = False,
    ) -> Tensor:
        """Class ids (B, h, w) int64; arguments as in `segment`."""
        views = self._check_views(views, size, flip=flip, softmax_views=softmax_views)
        view = views[0]
        plain = len(views) == 1 and not flip and not softmax_views and size in (None, tuple(view.shape[-2:]))
        # On CPUs argmax over the classes would take four times as long as max.
        if not (plain and self.config.exceeds_window(*view.shape[-2:])):
            return self.segment(views, size, flip, softmax_views).max(1).indices
        # The scores of all classes are the largest tensor: keep only the part that is not finished.
        config, along = self.config, longer_side(view)
        size = [view.shape[0], config.num_labels, *view.shape[-2:]]
        size[along] = min(config.window_size, size[along])
        strips = slide_strips(
            self.window_scorer(), view, torch.zeros(size, device=view.device), config.window_size, config.window_stride,
            self.window_batch_size(view.device),
        )  # fmt: skip
        return torch.cat([strip.max(1).indices for strip in strips], along)

    def _check_views(self, views: Any, size: Any, **switches: Any) -> list[Tensor]:
        """The views as a list, with the arguments checked; windows of other settings than these would be gaps."""
        if self.training:
            raise ValueError("segment() predicts, which training mode would disturb; call model.eval() first")
        views = list(views) if isinstance(views, list | tuple) else [views]
        if not views:
            raise ValueError(
                "segment() got an empty list as views; pass pixel_values, or the same images at several scales"
            )
        for view in views:
            check_images(view, self.config.vision_config.num_channels)
        batches = [len(view) for view in views]
        if len(set(batches)) > 1:
            raise ValueError(
                f"the views are of the same images, but there are {quote(batches)} images in them; pass as many"
            )
        if size is not None and not (
            isinstance(size, list | tuple)
            and len(size) == 2
            and all(type(side) is int and 0 < side <= 100_000 for side in size)
        ):
            raise ValueError(f"size is {quote(size)} and must be (height, width) in pixels, 1 to 100000")
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {quote(value)} and must be True or False")
        self.config.check_windows()
        check_names(self.config)
        warn_untrained(self.config)
        return views
