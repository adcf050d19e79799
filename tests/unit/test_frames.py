"""Streams of frames: the labels a call gives, slices that share batches, and frames that do not fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import CountingEngine, make_bundle, make_spec, nearest, nearest_engine

from segrt.bundle import Bundle
from segrt.errors import BackendError, InputError
from segrt.export.verify import sample_windows
from segrt.predictor import Predictor
from segrt.spec import Channel, DropSmall, Inference, PreviousStage, RGBNorm, ShapeTarget, ZScoreNorm

FLAT = (999.0, 1.0, 1.0)


def frames(count: int, *shape: int, high: int = 3, dtype: Any = np.uint8) -> list[Any]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, high, shape).astype(dtype) for _ in range(count)]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", make_spec(patch=(1, 16, 16)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channels": (Channel(name="MR", normalization=ZScoreNorm()),)},
        {"target": ShapeTarget(shape=(1, 16, 16))},
        {"inference": Inference(patch=(1, 16, 16), mirror_axes=(1, 2))},
        {"postprocess": (DropSmall(values=(1, 2), minimum_mm3=3 * 999),)},
    ],
)
@pytest.mark.parametrize("batch", [None, 1, 3])
def test_frames_get_the_labels_of_a_call(tmp_path: Path, changes: dict[str, Any], batch: int | None) -> None:
    bundle = make_bundle(tmp_path / "bundle", make_spec(patch=(1, 16, 16), **changes))
    stream = [*frames(3, 20, 24), *frames(2, 16, 17), *frames(3, 20, 24, dtype=np.float32)]
    with Predictor(bundle, device="cpu") as predictor:
        wanted = [predictor((frame[None], FLAT)).labels[0] for frame in stream]
        found = list(predictor.frames(stream, batch=batch))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(one, other)


def test_slices_share_batches(bundle: Bundle) -> None:
    engine = CountingEngine(nearest((0, 1, 2)), batch=4)
    with Predictor(bundle, engines=[engine], device="cpu") as predictor:
        assert len(list(predictor.frames(frames(10, 16, 16)))) == 10
        assert engine.calls == [4, 4, 2]
        engine.calls.clear()
        list(predictor.frames(frames(3, 16, 16), batch=1))
        assert engine.calls == [1, 1, 1]


def test_labels_come_while_the_stream_still_runs(bundle: Bundle) -> None:
    taken = []

    def camera() -> Iterator[Any]:
        for number, frame in enumerate(frames(6, 16, 16)):
            taken.append(number)
            yield frame

    with Predictor(bundle, engines=[nearest_engine(batch=2)], device="cpu") as predictor:
        labels = predictor.frames(camera())
        next(labels)
        assert taken == [0, 1]


@pytest.mark.parametrize("last", [True, False])
def test_colours_may_come_first_or_last(tmp_path: Path, last: bool) -> None:
    channels = tuple(Channel(name=name, normalization=RGBNorm()) for name in "rgb")
    bundle = make_bundle(tmp_path / "bundle", make_spec(patch=(1, 16, 16), channels=channels), centres=(0, 0.5, 1))
    frame = frames(1, 3, 18, 20, high=255)[0]
    with Predictor(bundle, device="cpu") as predictor:
        (labels,) = predictor.frames([np.moveaxis(frame, 0, 2) if last else frame])
        assert np.array_equal(labels, predictor((frame[:, None], FLAT)).labels[0])


def test_the_simulated_device_gives_the_same(bundle: Bundle) -> None:
    stream = frames(5, 20, 24)
    found = []
    for device in ("cpu", "simulated"):
        with Predictor(bundle, device=device, backend="onnxruntime", precision="fp32") as predictor:
            found.append(list(predictor.frames(stream, batch=2)))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_a_grey_frame_does_not_fit_a_colour_model(tmp_path: Path) -> None:
    channels = tuple(Channel(name=name, normalization=RGBNorm()) for name in "rgb")
    bundle = make_bundle(tmp_path / "bundle", make_spec(patch=(1, 16, 16), channels=channels), centres=(0, 0.5, 1))
    with Predictor(bundle, device="cpu") as predictor:
        for frame in (np.zeros((16, 18), np.uint8), np.zeros((16, 18, 4), np.uint8)):
            with pytest.raises(
                InputError, match=rf"expected real numbers \(3, Y, X\) or \(Y, X, 3\) .*, got uint8 {re.escape(str(frame.shape))}"
            ):
                next(predictor.frames([frame]))


@pytest.mark.parametrize(
    ("frame", "sentence"),
    [
        (np.zeros((2, 16, 16), np.uint8), r"frame 1: expected real numbers \(Y, X\) for model 'tiny', got uint8 \(2, 16, 16\)"),
        (np.zeros(16, np.uint8), r"got uint8 \(16,\)"),
        (np.zeros((16, 16), complex), "got complex128"),
        (np.full((16, 16), np.nan, np.float32), "frame 1: holds NaN or infinity"),
        (np.zeros((0, 16), np.uint8), "every axis needs at least one voxel"),
    ],
)
def test_a_frame_that_does_not_fit_is_named(bundle: Bundle, frame: Any, sentence: str) -> None:
    with Predictor(bundle, device="cpu") as predictor:
        labels = predictor.frames([frames(1, 16, 16)[0], frame], batch=1)
        assert next(labels).shape == (16, 16)
        with pytest.raises(InputError, match=sentence):
            next(labels)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_what_a_stream_gave_before_it_broke_is_labelled_first(bundle: Bundle, batch: int) -> None:
    def camera() -> Iterator[Any]:
        yield from frames(4, 16, 16)
        raise OSError("the camera is gone")

    found = []
    with Predictor(bundle, device="cpu") as predictor:
        with pytest.raises(OSError, match="the camera is gone"):
            found.extend(predictor.frames(camera(), batch=batch))
        with pytest.raises(InputError, match="frame 4: expected real numbers"):
            found.extend(predictor.frames([*frames(4, 16, 16), np.zeros(3)], batch=batch))
        wanted = list(predictor.frames(frames(4, 16, 16)))
    assert len(found) == 8
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted * 2, strict=True))


def test_a_stream_that_is_left_half_way_ends_the_camera(bundle: Bundle) -> None:
    ended = []

    def camera() -> Iterator[Any]:
        try:
            yield from frames(9, 16, 16)
        finally:
            ended.append(True)

    with Predictor(bundle, device="cpu") as predictor:
        labels = predictor.frames(camera(), batch=2)
        next(labels)
        labels.close()
        assert ended == [True]
        assert len(list(predictor.frames(camera(), batch=2))) == 9


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int64, np.uint16, np.float16, np.float64, ">u2", ">f4"])
def test_frames_of_any_dtype_and_layout(bundle: Bundle, dtype: Any) -> None:
    (frame,) = frames(1, 40, 34, high=2 if dtype is bool else 3, dtype=dtype)
    with Predictor(bundle, device="cpu") as predictor:
        for view in (frame, frame[::2, ::-1], np.asfortranarray(frame), frame.T):
            before = view.copy()
            (labels,) = predictor.frames([view])
            assert np.array_equal(labels, predictor((view[None].astype(np.float32), FLAT)).labels[0])
            assert np.array_equal(view, before)


def test_models_that_see_more_than_a_slice_are_refused(tmp_path: Path) -> None:
    spec = make_spec()
    bundle = make_bundle(tmp_path / "volumes", spec)
    with (
        Predictor(bundle, device="cpu") as predictor,
        pytest.raises(InputError, match="cannot take a stream of frames, for its network has 3"),
    ):
        next(predictor.frames(frames(1, 16, 16)))
    stage = make_spec(patch=(1, 16, 16), previous=PreviousStage(values=(1, 2)))
    with Predictor(make_bundle(tmp_path / "second", stage), device="cpu") as predictor, pytest.raises(InputError, match="of a cascade"):
        next(predictor.frames(frames(1, 16, 16)))
    flat = make_spec(patch=(1, 16, 16))
    pair = make_bundle(tmp_path / "pair", flat, partner=make_bundle(tmp_path / "partner", flat))
    with Predictor(pair, device="cpu") as predictor, pytest.raises(InputError, match="for it is a pair"):
        next(predictor.frames(frames(1, 16, 16)))


def test_a_batch_below_one_and_a_closed_predictor_are_refused(bundle: Bundle) -> None:
    predictor = Predictor(bundle, device="cpu")
    with pytest.raises(InputError, match="batch: expected 1 or more frames, got 0"):
        next(predictor.frames(frames(1, 16, 16), batch=0))
    labels = predictor.frames(frames(3, 16, 16), batch=1)
    next(labels)
    predictor.close()
    with pytest.raises(BackendError, match="this Predictor was closed"):
        next(labels)


def test_colour_models_of_resized_pictures_can_be_verified_on_a_phantom() -> None:
    channels = tuple(Channel(name=name, normalization=RGBNorm()) for name in "rgb")
    windows = sample_windows(make_spec(patch=(1, 64, 64), channels=channels, target=ShapeTarget(shape=(1, 64, 64)), crop_nonzero=False))
    assert windows.shape[1:] == (3, 1, 64, 64)
    assert (windows.min() >= 0, windows.max() <= 1, windows.std() > 0.1) == (True, True, True)
