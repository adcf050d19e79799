"""What one request asks for: its tensors and options, checked, as an image that a Predictor takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..arrays import Array
from ..bundle import Bundle
from ..errors import InputError
from ..io.geometry import FLAT_FACTOR, check_axes
from ..io.read import read_volume
from ..io.write import WRITABLE
from ..protocol import DIRECTION, FILE, FILE_SIZES, IMAGE, IMAGE_INT16, ORIGIN, PREVIOUS, SPACING, RequestOptions, grid_of
from ..volume import Grid, Volume
from .files import plain_name, read_files
from .limits import Limits, check_answer

_IMAGES, _PLACE = (IMAGE, IMAGE_INT16, FILE), (SPACING, ORIGIN, DIRECTION)
# a label file of one request is one file
FORMATS = tuple(suffix for suffix in WRITABLE if suffix != ".mhd")


@dataclass(frozen=True)
class Asked:
    """One image to segment, and labels of a cascade's first stage where they came with it."""

    volume: Volume
    previous: Array | None


def read_request(tensors: Mapping[str, Array], options: RequestOptions, bundle: Bundle, limits: Limits) -> Asked:
    """Read what a request brings.

    Parameters
    ----------
    tensors : name -> data, see `segrt.protocol.INPUTS`; copied, not kept
    options : of the request
    bundle : of the model that is asked
    limits : what one request may take

    Raises
    ------
    InputError
        When there is not exactly one image, it is damaged, too large or does not fit the model, or an option cannot be.
    BackendError
        When the server has no room for it at this moment.
    """
    _check_format(options)
    volume = _image(tensors, options, bundle, limits)
    limits.check_work(volume.name, bundle, volume.grid, volume.data.itemsize, probabilities=options.probabilities, step=options.step)
    check_answer(volume.name, bundle, volume.grid, probabilities=options.probabilities)
    previous = tensors.get(PREVIOUS)
    return Asked(volume, None if previous is None else np.array(previous))


def _check_format(options: RequestOptions) -> None:
    if options.format is not None and options.format not in FORMATS:
        raise InputError(f"option 'format': expected one of {', '.join(FORMATS)}, got {options.format!r}")


def _image(tensors: Mapping[str, Array], options: RequestOptions, bundle: Bundle, limits: Limits) -> Volume:
    given = [name for name in _IMAGES if name in tensors]
    if len(given) != 1:
        raise InputError(f"expected one image as {', '.join(_IMAGES[:-1])} or {_IMAGES[-1]}, got {' and '.join(given) or 'none'}")
    if given == [FILE]:
        surplus = [name for name in _PLACE if name in tensors]
        if surplus:
            raise InputError(f"{surplus[0]} comes with an array; a file says itself how it lies, so leave it out")
        channels = [channel.name for channel in bundle.spec.channels]
        return read_files(tensors[FILE], tensors.get(FILE_SIZES), options.name, channels, limits)
    if FILE_SIZES in tensors:
        raise InputError(f"{FILE_SIZES} comes with {FILE}, got {given[0]}")
    return _from_array(given[0], tensors, plain_name(options.name), bundle, limits)


def _from_array(given: str, tensors: Mapping[str, Array], name: str, bundle: Bundle, limits: Limits) -> Volume:
    data = tensors[given]
    if data.ndim != 4:
        raise InputError(f"{given} has {data.ndim} axes, expected 4: (C, Z, Y, X); a 2-D image has Z = 1")
    limits.check_voxels(name, data.shape)
    channels = [channel.name for channel in bundle.spec.channels]
    # a copy: what the server shares with us is read-only, for which the kernels would be compiled once more
    return read_volume(Volume(np.array(data, order="C"), _grid(data, tensors, name), name), channels)


def _grid(data: Array, tensors: Mapping[str, Array], name: str) -> Grid:
    z, y, x = data.shape[1:]
    spacing = tensors.get(SPACING)
    if spacing is None and z > 1:
        raise InputError(f"{name} comes without {SPACING}, expected its (z, y, x) in mm")
    # a picture's own spacing, as for one that comes as a file
    step: Array = np.array([FLAT_FACTOR, 1.0, 1.0]) if spacing is None else spacing
    origin, direction = tensors.get(ORIGIN, np.zeros(3)), tensors.get(DIRECTION, np.eye(3))
    for what, numbers in ((SPACING, step), (ORIGIN, origin), (DIRECTION, direction)):
        if not np.isfinite(numbers).all():
            raise InputError(f"{name} has a {what} of {numbers.tolist()}, expected finite numbers")
    grid = grid_of((z, y, x), step.tolist(), origin.tolist(), direction.tolist())
    check_axes(grid, name)
    return grid
