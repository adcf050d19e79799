"""PREDICT, restore of a whole image: planes of logits, as the network makes them final, become labels; of one model or of a pair's mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .arrays import Array, FloatArray
from .device import get_xp, to_host
from .kernels.argmax import decide
from .restore import add_share, known_planes, mean_planes, restore, restore_probabilities, restore_slab, spread
from .spec import ModelSpec
from .volume import Placement
from .windows import Planes


@dataclass(frozen=True)
class Flow:
    """One model's logits of one image on their way.

    Attributes
    ----------
    planes : in their order; each one's logits are valid until the next is asked for
    placement : of the working grid they lie on
    """

    planes: Iterable[Planes]
    placement: Placement
    spec: ModelSpec


def assemble(flows: Sequence[Flow], *, probabilities: bool) -> tuple[Array, FloatArray | None]:
    """Run the flows to their ends; labels of the image come out, beside the logits, and probabilities on the host when asked for.

    Parameters
    ----------
    flows : of one model; or of several, whose probabilities are averaged on the image's own grid
    probabilities : they are wanted too; one model's logits are whole then

    Returns
    -------
    labels : (Z, Y, X) unsigned integers
    probabilities : (K, Z, Y, X) float32, or None
    """
    return _single(flows[0], probabilities=probabilities) if len(flows) == 1 else _mean(flows, probabilities=probabilities)


def _single(flow: Flow, *, probabilities: bool) -> tuple[Array, FloatArray | None]:
    placement, spec = flow.placement, flow.spec
    labels, scores, done = None, None, 0
    for part in flow.planes:
        if part.logits.shape[1] == placement.shape[0]:
            scores = to_host(restore_probabilities(part.logits, placement, spec)) if probabilities else None
            labels = restore(part.logits, placement, spec)
            continue
        if labels is None:
            labels = get_xp(part.logits).zeros(placement.grid.shape, spec.label_dtype)
        done = restore_slab(part.logits, placement, spec, labels, first=part.first, ready=part.ready, done=done)
    assert labels is not None, "there is at least one window"
    return labels, scores


def _mean(flows: Sequence[Flow], *, probabilities: bool) -> tuple[Array, FloatArray | None]:
    """Slab by slab along the axis of the image that the first model's windows move along: no model's probabilities are ever whole."""
    spec, grid = flows[0].spec, flows[0].placement.grid
    axis, threshold = spec.transpose[0], spec.head.threshold if spec.head.activation == "sigmoid" else None
    thickness = mean_planes(spec, grid.shape)
    scores = np.empty((spec.classes, *grid.shape), np.float32) if probabilities else None
    sources = [_Source(flow, axis) for flow in flows]
    labels, done = None, 0
    while done < grid.shape[axis]:
        for source in sources:
            source.advance_beyond(done)
        stop = min(done + thickness, *(source.ready for source in sources))
        slab = tuple(slice(done, stop) if a == axis else slice(0, n) for a, n in enumerate(grid.shape))
        like = sources[0].logits
        labels = get_xp(like).zeros(grid.shape, spec.label_dtype) if labels is None else labels
        mean = get_xp(like).zeros((spec.classes, *(part.stop - part.start for part in slab)), np.float32)
        _certain_outside(mean, slab, flows)
        for source in sources:
            source.add(mean, (done, stop), 1 / len(sources))
        decide(mean, spec.head.values, threshold, labels[slab])
        if scores is not None:
            scores[(slice(None), *slab)] = to_host(mean)
        del mean  # before the next one is made
        done = stop
    for source in sources:
        source.end()
    assert labels is not None, "an image has planes"
    return labels, scores


class _Source:
    """The logits one model has at hand, and how far along the image they are final."""

    def __init__(self, flow: Flow, axis: int) -> None:
        self._flow, self._axis = flow, axis
        self._planes = iter(flow.planes)
        self.ready, self._first = 0, 0

    def advance_beyond(self, plane: int) -> None:
        """Have the network run on until this plane of the image is final."""
        placement, spec = self._flow.placement, self._flow.spec
        while self.ready <= plane:
            part = next(self._planes)
            whole = part.logits.shape[1] == placement.shape[0]
            self.logits = spread(part.logits, placement, spec) if whole else part.logits
            self._first = part.first
            self.ready = known_planes(placement, spec, part.ready, axis=self._axis)

    def end(self) -> None:
        """Let the network's loop end, and its logits go: what follows needs the memory."""
        for _ in self._planes:
            pass

    def add(self, mean: FloatArray, planes: tuple[int, int], share: float) -> None:
        """Add this model's share to the mean of these planes of the image."""
        add_share(mean, self.logits, self._flow.placement, self._flow.spec, axis=self._axis, planes=planes, first=self._first, share=share)


def _certain_outside(mean: FloatArray, slab: Sequence[slice], flows: Sequence[Flow]) -> None:
    """Background has all of a model's share outside its crop; `mean` is 0 at first."""
    if flows[0].spec.head.activation != "softmax":
        return
    crops = [_inside(flow.placement, slab) for flow in flows]
    share = 1 / len(flows)
    mean[0] = 1
    for crop in crops:
        mean[0][crop] = 1 - share
    mean[0][tuple(slice(max(c.start for c in part), max(min(c.stop for c in part), 0)) for part in zip(*crops, strict=True))] = 0


def _inside(placement: Placement, slab: Sequence[slice]) -> tuple[slice, ...]:
    """The crop as slices of a slab of the image."""
    crop = [placement.slices[placement.transpose.index(axis)] for axis in range(3)]
    return tuple(slice(max(c.start - s.start, 0), max(min(c.stop, s.stop) - s.start, 0)) for c, s in zip(crop, slab, strict=True))
