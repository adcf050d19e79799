"""BUILD, last step: no engine is trusted before it agreed with the fp32 torch network on real or realistic windows."""

from __future__ import annotations

import importlib.util
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from zipfile import BadZipFile

import numpy as np

from ..arrays import Array, FloatArray, Spacing3
from ..bundle import Bundle
from ..device import to_device, to_host, use_device
from ..engines import Engine, Precision, open_engine
from ..engines.batches import too_large
from ..errors import BuildError
from ..io import read_volume
from ..kernels.argmax import argmax, paint
from ..metrics import dice, mean_dice
from ..phantom import make_phantom
from ..predictor import Predictor
from ..preprocess import preprocess
from ..spec import ModelSpec, OnnxNetwork, RGBNorm, ShapeTarget, SpacingTarget
from ..volume import Grid, Volume
from ..windows import plan_windows

logger = logging.getLogger(__name__)

FirstStage: TypeAlias = Callable[[Volume], Array]

# the least share of voxels that keep their label
LEAST_AGREEMENT: dict[Precision, float] = {"fp32": 0.9995, "fp16": 0.999, "bf16": 0.999, "int8": 0.995}
_WINDOWS = 2


def checked_windows(bundle: Bundle, image: str | Path | None, *, count: int = _WINDOWS) -> FloatArray:
    """Cut the windows a bundle's engines are checked on, see `sample_windows`; a cascade's first stage labels the image."""
    if image is None:
        return sample_windows(bundle.spec, count=count)
    with first_stage(bundle) as first:
        return sample_windows(bundle.spec, image, count=count, first=first)


@contextmanager
def first_stage(bundle: Bundle) -> Iterator[FirstStage | None]:
    """Open what labels an image as the stage before a cascade's second does; None for other models, and where the bundle has none."""
    if bundle.spec.previous is not None and bundle.previous is not None:
        with Predictor(bundle.previous, postprocess=False, tta=False) as predictor:
            yield lambda volume: predictor(volume).labels
        return
    if bundle.spec.previous is not None:
        logger.warning("%s holds no first stage: windows of images are made as if it had found nothing", bundle.path)
    yield None


def sample_windows(
    spec: ModelSpec,
    image: str | Path | Sequence[Path] | None = None,
    *,
    count: int = _WINDOWS,
    contrast: int | None = None,
    phase: float = 0.5,
    first: FirstStage | None = None,
) -> FloatArray:
    """Cut the windows an engine is checked or calibrated on.

    Parameters
    ----------
    image : an image of the kind the model is for; without it a phantom is mapped into the model's intensity range
    count : at most this many windows
    contrast : how many of these are the ones with the most contrast, all by default; the others are spread evenly over the image
    phase : where in its share of the image each of these others lies, 0 <= phase < 1
    first : labels an image for a cascade's second stage, see `first_stage`; without it there are no labels on an image

    Returns
    -------
    (N, C, z, y, x) float32, the windows with the most contrast first
    """
    data = _phantom_data(spec) if image is None else _image_data(spec, image, first)
    plan = plan_windows(data.shape[1:], spec.inference)
    pads = [(low, full - low - n) for low, full, n in zip(plan.low, plan.shape, data.shape[1:], strict=True)]
    padded = np.pad(data, [(0, 0), *pads])
    patches = [padded[(slice(None), *(slice(s, s + p) for s, p in zip(start, plan.patch, strict=True)))] for start in plan.starts]
    chosen = _choose([float(patch.std()) for patch in patches], count, count if contrast is None else contrast, phase)
    return np.ascontiguousarray(np.stack([patches[n] for n in chosen]), np.float32)


def _choose(contrasts: Sequence[float], count: int, first: int, phase: float) -> list[int]:
    """Places of the `first` largest contrasts, then up to `count` of the others at even distances."""
    order = sorted(range(len(contrasts)), key=lambda n: -contrasts[n])
    others = sorted(order[first:])
    more = min(count - first, len(others))
    return order[:first] + [others[int((k + phase) * len(others) / more)] for k in range(more)]


def reference_logits(bundle: Bundle, member: str, windows: FloatArray) -> FloatArray:
    """Logits (N, K, z, y, x) of the fp32 torch network."""
    engine = open_engine(bundle, member, backend="pytorch")
    try:
        return np.concatenate([engine(window[None]) for window in windows])
    finally:
        engine.close()


def can_run_reference(bundle: Bundle) -> bool:
    """Whether torch and the weights are at hand."""
    has_torch = importlib.util.find_spec("torch") is not None and importlib.util.find_spec("safetensors") is not None
    weights = all(bundle.weights_path(member).is_file() for member in bundle.spec.members)
    return has_torch and weights and not isinstance(bundle.spec.network, OnnxNetwork)


def compare(reference: FloatArray, logits: FloatArray, spec: ModelSpec) -> dict[str, Any]:
    """Hold logits (N, K, z, y, x) against the reference's: errors, label agreement, and the two ways FP16 goes wrong."""
    finite = bool(np.isfinite(logits).all())
    difference = np.abs(np.where(np.isfinite(logits), logits, 0) - reference)
    expected, found = (_labels(x, spec) for x in (reference, logits))
    return {
        "max_abs_difference": float(difference.max()),
        "relative_error": float(
            np.sqrt((difference.astype(np.float64) ** 2).mean() / max((reference.astype(np.float64) ** 2).mean(), 1e-30))
        ),
        "label_agreement": float((expected == found).mean()),
        "mean_dice": _mean_dice(expected, found),
        "finite": finite,
        "all_background": bool((found == 0).all() and not (expected == 0).all()),
        "voxels": int(expected.size),
    }


def verify(engine: Engine, bundle: Bundle, member: str, precision: Precision, *, windows: FloatArray | None = None) -> dict[str, Any]:
    """Compare an engine with the fp32 torch network; the report says whether it `passed` and, if not, the `reason`.

    With torch and the weights at hand every voxel of `windows` is compared; without them the windows and logits stored at export
    (onnx/reference.npz).

    Raises
    ------
    BuildError
        When there is neither torch with weights nor a stored reference.
    BackendError
        When not even one window fits into the memory of the engine's device.
    """
    if windows is not None and can_run_reference(bundle):
        source = "torch fp32"
        reference, logits = reference_logits(bundle, member, windows), _run(engine, windows)
    else:
        source = "logits stored at export"
        inputs, reference, stride = stored_reference(bundle, member)
        logits = np.ascontiguousarray(_run(engine, inputs)[(slice(None), slice(None), *(slice(None, None, s) for s in stride))])
    report = {"engine": engine.name, "reference": source, **compare(reference, logits, bundle.spec)}
    report["least_agreement"] = LEAST_AGREEMENT[precision]
    report["reason"] = _shortfall(report)
    report["passed"] = not report["reason"]
    return report


def stored_reference(bundle: Bundle, member: str) -> tuple[FloatArray, FloatArray, tuple[int, int, int]]:
    """Windows, their torch logits, and the stride (z, y, x) at which these were kept.

    Raises
    ------
    BuildError
        When onnx/reference.npz is missing or damaged.
    """
    path = bundle.reference_path
    try:
        # from memory: NumPy leaves the file open when it is no archive
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            z, y, x = (int(s) for s in stored["stride"])
            return stored["inputs"].astype(np.float32), stored[f"logits_{member}"].astype(np.float32), (z, y, x)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as err:
        raise BuildError(
            f"{path}: no usable reference for member {member!r} ({err}); build where torch and the weights are at hand"
        ) from err


def _run(engine: Engine, windows: FloatArray) -> FloatArray:
    with use_device(engine.device):
        answers = [to_host(_answer(engine, to_device(np.ascontiguousarray(window[None]), engine.device))) for window in windows]
    return np.concatenate(answers).astype(np.float32, copy=False)


def _answer(engine: Engine, patches: Array) -> Array:
    """An engine's logits, with fewer windows at once where its device's memory does not hold the batch it would like."""
    while True:
        batch = engine.batch
        try:
            return engine(patches)
        except MemoryError as err:
            if engine.batch < batch:
                logger.warning("%s: %d windows at once do not fit into the memory of %s", engine.name, batch, engine.device)
                continue
            raise too_large(engine, err) from err


def _labels(logits: FloatArray, spec: ModelSpec) -> Array:
    maps: Sequence[Array]
    contiguous = np.ascontiguousarray(logits)
    if spec.head.activation == "softmax":
        maps = [argmax(window, spec.head.values) for window in contiguous]
    else:
        maps = [paint(window, spec.head.values, spec.head.threshold) for window in contiguous]
    return np.stack(maps)


def _mean_dice(expected: Array, found: Array) -> float:
    """Mean Dice of the labels the reference has; 1 when it has none."""
    present = [int(v) for v in np.unique(expected) if v]
    return mean_dice(dice(expected, found, present)) if present else 1.0


def _shortfall(report: dict[str, Any]) -> str:
    if not report["finite"]:
        return "its logits hold NaN or infinity"
    if report["all_background"]:
        return "it sees only background where the reference sees labels"
    if report["label_agreement"] < report["least_agreement"]:
        return (
            f"it gives the reference's label to {report['label_agreement']:.5f} of voxels, at least {report['least_agreement']} are needed"
        )
    return ""


def _image_data(spec: ModelSpec, image: str | Path | Sequence[Path], first: FirstStage | None) -> FloatArray:
    volume = read_volume(image, [channel.name for channel in spec.channels])
    previous = None
    if spec.previous is not None:
        previous = np.zeros(volume.grid.shape, np.uint8) if first is None else first(volume)
    return preprocess(volume, spec, previous=previous)[0]


def _phantom_data(spec: ModelSpec) -> FloatArray:
    """A phantom abdomen at the model's own spacing, one patch and a half deep (a 2-D model: some slices), normalised by its rules."""
    patch = spec.inference.patch
    shape = (max(4, patch[0] + patch[0] // 2), patch[1], patch[2])
    hu, labels, _ = make_phantom(np.random.default_rng(7), shape=shape, spacing=_phantom_spacing(spec))
    channels = []
    for number, channel in enumerate(spec.channels):
        shifted = np.roll(hu, number, axis=-1)  # channels of one case resemble each other and are not equal
        if isinstance(channel.normalization, RGBNorm):
            shifted = np.minimum((shifted - float(shifted.min())) * (255 / max(float(np.ptp(shifted)), 1.0)), 255)
        channels.append(shifted)
    still = spec.model_copy(update={"target": ShapeTarget(shape=shape), "transpose": (0, 1, 2), "crop_nonzero": False})
    previous = None
    if spec.previous is not None:
        previous = np.where(labels > 0, (labels.astype(np.int64) - 1) % max(spec.previous.values) + 1, 0).astype(np.uint8)
    return preprocess(Volume(np.stack(channels), Grid(shape), "phantom"), still, previous=previous)[0]


def _phantom_spacing(spec: ModelSpec) -> Spacing3:
    """The model's target spacing in mm where it has one and that is a scanner's; pixels without a size count as 2 mm."""
    if not isinstance(spec.target, SpacingTarget):
        shape = spec.target.shape
        return 8.0 if shape[0] == 1 else 400 / shape[0], 300 / shape[1], 400 / shape[2]
    z, y, x = (2.0 if t is None else min(max(t, 0.4), 8.0) for t in spec.target.spacing)
    return z, y, x
