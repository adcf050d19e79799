"""TRAIN, `measure`: what the planner needs to know of a dataset's images, in numbers; nnU-Net 2.8.1's dataset fingerprint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from ..arrays import Array, ProgressFn, Shape3, Spacing3
from ..errors import InputError
from ..kernels.bbox import nonzero_bbox
from ..kernels.draws import count_draws
from ..spec import Part
from .cases import Dataset, TrainingCase
from .dataset import read_training_case
from .parallel import run_each
from .stored import parse_stored, read_stored

SAMPLES = 100_000_000  # foreground voxels drawn from the whole dataset
SEED = 1234


class Intensities(Part):
    """A channel's intensities where labels are positive, over all cases; percentiles 0.5 and 99.5."""

    mean: float
    median: float
    std: float
    min: float
    max: float
    percentile_00_5: float
    percentile_99_5: float


class Fingerprint(Part):
    """What `measure` found.

    Attributes
    ----------
    spacings : (z, y, x) in mm of each case, in the dataset's order
    shapes : (z, y, x) in voxels of each case after the crop to its non-zero box
    intensities : one per channel
    relative_size : median over the cases of the share of voxels the crop keeps
    """

    spacings: tuple[Spacing3, ...]
    shapes: tuple[Shape3, ...]
    intensities: tuple[Intensities, ...]
    relative_size: float

    def to_json(self) -> str:
        """The text of fingerprint.json."""
        return self.model_dump_json(indent=1) + "\n"


@dataclass(frozen=True)
class _Measured:
    """One case: foreground `values` (sorted) and how often each was drawn, per channel."""

    spacing: Spacing3
    shape: Shape3
    relative_size: float
    values: tuple[Array, ...]
    counts: tuple[Array, ...]


def load_fingerprint(path: Path) -> Fingerprint:
    """Read a fingerprint.json.

    Raises
    ------
    SpecError
        When it is not JSON or a value is wrong.
    """
    return parse_stored(Fingerprint, read_stored(path), where=str(path))


def measure(dataset: Dataset, *, workers: int = 0, samples: int = SAMPLES, progress: ProgressFn | None = None) -> Fingerprint:
    """Give spacings, shapes after the crop to the non-zero box, and intensities under positive labels.

    From every case the same number of foreground voxels is drawn with replacement, by nnU-Net's generator and seed. Each voxel is kept
    once with the number of its draws, so the statistics are those of nnU-Net's 10^8 draws at a fraction of its memory; mean and
    deviation are summed in float64, nnU-Net's in float32.

    Parameters
    ----------
    workers : processes; 0 or 1 measures in this one
    samples : foreground voxels to draw from the whole dataset

    Raises
    ------
    InputError
        When a case cannot be read, or no case has a positive label.

    References
    ----------
    Isensee et al. 2021, nnU-Net, doi:10.1038/s41592-020-01008-z; `DatasetFingerprintExtractor` of nnU-Net 2.8.1.
    """
    one = partial(_measure_case, dataset=dataset, samples=samples // len(dataset.cases))
    cases = run_each(one, dataset.cases, workers=workers, progress=progress)
    if not any(len(case.values[0]) for case in cases):
        if dataset.mask is not None:
            raise InputError(
                f"dataset {dataset.name}: none of the {len(cases)} masks has a pixel above {dataset.mask.threshold:g}, so there is nothing "
                "to learn; take a lower mask_threshold, or check the masks"
            )
        raise InputError(f"dataset {dataset.name}: no case has a voxel with a positive label, so there is nothing to learn")
    channels = range(len(dataset.channels))
    return Fingerprint(
        spacings=tuple(case.spacing for case in cases),
        shapes=tuple(case.shape for case in cases),
        intensities=tuple(_statistics([c.values[k] for c in cases], [c.counts[k] for c in cases]) for k in channels),
        relative_size=float(np.median([case.relative_size for case in cases])),
    )


def _measure_case(case: TrainingCase, *, dataset: Dataset, samples: int) -> _Measured:
    volume, labels = read_training_case(case, dataset)
    slices = tuple(slice(start, stop) for start, stop in nonzero_bbox(volume.data))
    foreground = labels[slices] > 0
    shape: Shape3 = (foreground.shape[0], foreground.shape[1], foreground.shape[2])
    rng = np.random.RandomState(SEED)  # nnU-Net's own generator
    drawn = [_draw(channel[slices][foreground], samples, rng) for channel in volume.data]
    relative = prod(shape) / prod(volume.grid.shape)
    return _Measured(volume.grid.spacing, shape, relative, tuple(v for v, _ in drawn), tuple(n for _, n in drawn))


def _draw(voxels: Array, samples: int, rng: np.random.RandomState) -> tuple[Array, Array]:
    """Distinct values among `samples` draws with replacement, sorted, and how often each came."""
    if not voxels.size:
        return np.empty(0, np.float32), np.empty(0, np.int64)
    times = count_draws(rng, voxels.size, samples)
    values, where = np.unique(voxels.astype(np.float32), return_inverse=True)
    counts = np.bincount(where.ravel(), weights=times, minlength=len(values)).astype(np.int64)
    return values[counts > 0], counts[counts > 0]


def _statistics(values: Sequence[Array], counts: Sequence[Array]) -> Intensities:
    """Statistics of values that came `counts` times each, over all cases."""
    every, times = np.concatenate(values), np.concatenate(counts)
    order = np.argsort(every, kind="stable")
    every, times = every[order].astype(np.float64), times[order]
    total = int(times.sum())
    mean = float(every @ times / total)
    low, median, high = (_percentile(every, np.cumsum(times), q) for q in (0.5, 50.0, 99.5))
    return Intensities(
        mean=mean,
        median=median,
        std=float(np.sqrt((every - mean) ** 2 @ times / total)),
        min=float(every[0]),
        max=float(every[-1]),
        percentile_00_5=low,
        percentile_99_5=high,
    )


def _percentile(values: Array, reached: Array, q: float) -> float:
    """Linear percentile, as NumPy defines it, of sorted values; value i fills the places up to reached[i]."""
    place = q / 100 * (int(reached[-1]) - 1)
    below, above = (float(values[np.searchsorted(reached, p, side="right")]) for p in (np.floor(place), np.ceil(place)))
    return below + (above - below) * (place - float(np.floor(place)))
