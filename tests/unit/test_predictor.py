"""What a Predictor takes and gives: sources, options, cascades, probabilities, timings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from factories import CountingEngine, banded, make_bundle, make_spec, nearest, nearest_engine, volume_of, write_case

from segrt import Predictor
from segrt.bundle import Bundle
from segrt.errors import BackendError, InputError, SpecError
from segrt.spec import (
    Channel,
    Inference,
    KeepLargest,
    NoNorm,
    PreviousStage,
    RGBNorm,
    ShapeTarget,
    WindowNorm,
)

IMAGE = banded((12, 14, 10))
SPACING = (3.0, 1.5, 2.0)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor(make_bundle(tmp_path_factory.mktemp("model") / "b"))


def with_function(tmp_path: Path, spec: Any, *functions: Any, **options: Any) -> Predictor:
    engines = [CountingEngine(f) for f in functions or (nearest(range(spec.classes)),)]
    return Predictor(Bundle(tmp_path, spec), engines=engines, **options)


def itk(image: np.ndarray) -> SimpleITK.Image:
    result = SimpleITK.GetImageFromArray(image)
    result.SetSpacing(SPACING[::-1])
    return result


def test_every_kind_of_source_gives_the_same_labels(predictor: Predictor, tmp_path: Path) -> None:
    path = write_case(tmp_path / "case_0000.nii.gz", IMAGE, SPACING)
    sources = (path, str(path), [path], itk(IMAGE), volume_of(IMAGE, SPACING), (IMAGE, SPACING), (IMAGE[None], SPACING))
    for source in sources:
        result = predictor(source)
        assert (result.labels == IMAGE).all()
        assert result.labels.dtype == np.uint8
        assert result.grid.spacing == pytest.approx(SPACING)


def test_the_image_is_not_modified(predictor: Predictor) -> None:
    image = IMAGE.astype(np.float32)
    before = image.copy()
    predictor((image, SPACING), probabilities=True)
    assert (image == before).all()


def test_several_channels_from_a_list_of_files(tmp_path: Path) -> None:
    spec = make_spec(channels=tuple(Channel(name=n, normalization=NoNorm()) for n in ("T1", "T2")))
    predictor = with_function(tmp_path, spec, lambda p: nearest((0, 1, 2))(p[:, 1:] - p[:, :1]))
    paths = [write_case(tmp_path / f"c_000{i}.nii.gz", image) for i, image in enumerate((IMAGE, 2 * IMAGE))]
    assert (predictor(paths).labels == IMAGE).all()
    with pytest.raises(InputError, match=r"2 \(T1, T2\)"):
        predictor(paths[0])


def test_the_name_grid_windows_and_seconds_come_along(predictor: Predictor, tmp_path: Path) -> None:
    result = predictor(write_case(tmp_path / "liver.nrrd", IMAGE, SPACING))
    assert "liver" in result.name
    assert set(result.seconds) == {"read", "previous", "preprocess", "network", "restore", "postprocess"}
    assert result.windows[0] == 2 * 3 * 2
    assert result.voxels() == {"label 1": (IMAGE == 1).sum(), "label 2": (IMAGE == 2).sum()}


def test_probabilities_only_when_asked_for(predictor: Predictor) -> None:
    assert predictor((IMAGE, SPACING)).probabilities is None
    result = predictor((IMAGE, SPACING), probabilities=True)
    assert result.probabilities is not None
    assert result.probabilities.shape == (3, *IMAGE.shape)
    assert result.probabilities.dtype == np.float32
    assert np.allclose(result.probabilities.sum(0), 1, atol=1e-5)
    assert (result.probabilities.argmax(0) == result.labels).all()


def test_progress_reaches_the_total(predictor: Predictor) -> None:
    seen: list[tuple[int, int]] = []
    predictor((IMAGE, SPACING), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)


@pytest.mark.parametrize("accumulate", ["float32", "float16"])
def test_both_accumulations_segment(predictor: Predictor, tmp_path: Path, accumulate: Any) -> None:
    found = Predictor(predictor.bundle, accumulate=accumulate)((IMAGE, SPACING))
    # float16 sums at the outer corners are near-integers, so a tie there may fall the other way
    assert (found.labels == IMAGE).mean() > 0.99


def test_one_thread_gives_the_same(predictor: Predictor) -> None:
    with Predictor(predictor.bundle, threads=1) as single:
        assert (single((IMAGE, SPACING)).labels == IMAGE).all()


def test_mirroring_runs_every_flip_and_can_be_left_out(tmp_path: Path) -> None:
    spec = make_spec(mirror_axes=(0, 1, 2))
    for tta, passes in ((True, 8), (False, 1)):
        engine = CountingEngine(nearest((0, 1, 2)))
        predictor = Predictor(Bundle(tmp_path, spec), engines=[engine], tta=tta)
        assert (predictor((np.resize(IMAGE, (8, 8, 8)), SPACING)).labels == np.resize(IMAGE, (8, 8, 8))).all()
        assert len(engine.calls) == passes


def test_a_closed_predictor_says_so(tmp_path: Path) -> None:
    predictor = with_function(tmp_path, make_spec())
    predictor.close()
    with pytest.raises(BackendError, match="was closed"):
        predictor((IMAGE, SPACING))


@pytest.mark.parametrize("kind", ["volume", "array"])
def test_voxels_that_are_no_numbers_are_refused(predictor: Predictor, kind: str) -> None:
    image = IMAGE.astype(np.float32)
    image[3, 4, 5] = np.nan
    with pytest.raises(InputError, match="has 1 NaN or infinite voxels"):
        predictor(volume_of(image, SPACING) if kind == "volume" else (image, SPACING))


@pytest.mark.parametrize("step", [0, -0.5, 1.1])
def test_the_step_is_a_fraction(predictor: Predictor, step: float) -> None:
    with pytest.raises(InputError, match="0 < step <= 1"):
        Predictor(predictor.bundle, step=step)


def test_the_step_overrides_the_models(predictor: Predictor) -> None:
    assert Predictor(predictor.bundle, step=1.0)((IMAGE, SPACING)).windows[0] == 2 * 2 * 2


def test_folds_are_chosen_by_name(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", make_spec(members=("0", "1", "4")))
    assert Predictor(bundle).members == ("0", "1", "4")
    assert Predictor(bundle, folds=("all",)).members == ("0", "1", "4")
    with Predictor(bundle, folds=["4", "0"]) as predictor:
        assert predictor.members == ("4", "0")
        assert len(predictor.engines) == 2
    with pytest.raises(InputError, match="no fold 2; the bundle has 0, 1, 4"):
        Predictor(bundle, folds=("2",))
    with pytest.raises(InputError, match="no fold was chosen; choose of 0, 1, 4, or all"):
        Predictor(bundle, folds=())


def test_a_fold_counts_once_and_may_be_a_number(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", make_spec(members=("0", "1")))
    assert Predictor(bundle, folds=["1", "1"]).members == ("1",)
    assert Predictor(bundle, folds=[0, 1]).members == ("0", "1")  # type: ignore[list-item]


@pytest.mark.parametrize("option", [{"accumulate": "double"}, {"threads": -1}])
def test_options_that_cannot_be_are_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(option))}: expected .*, got"):
        with_function(tmp_path, make_spec(), **option)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (IMAGE, "an array comes with its spacing: pass \\(array, \\(z, y, x\\) in mm\\)"),
        ([IMAGE, IMAGE], "expected a path, .* got a list of ndarray, ndarray"),
        (None, "expected a path, .* got a NoneType"),
        (7, "expected a path, .* got a int"),
        ((IMAGE, 3.0), "spacing: expected \\(z, y, x\\) in mm, got 3.0"),
        ((IMAGE, "abc"), "spacing: expected \\(z, y, x\\) in mm, got 'abc'"),
        (SimpleITK.Cast(SimpleITK.Image(4, 4, 4, SimpleITK.sitkUInt8), SimpleITK.sitkLabelUInt8), "image is a label map object"),
    ],
)
def test_what_is_no_image_is_refused(predictor: Predictor, source: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        predictor(source)


def test_a_member_may_be_called_all(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", make_spec(members=("all", "0")))
    assert Predictor(bundle, folds=("all",)).members == ("all",)


def test_close_releases_every_engine(tmp_path: Path) -> None:
    engine = CountingEngine(nearest((0, 1, 2)))
    with Predictor(Bundle(tmp_path, make_spec(mirror_axes=(1,))), engines=[engine]):
        pass
    assert engine.closed == 1


def test_postprocessing_is_on_unless_refused(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 8), np.int16)
    image[:3] = 1
    image[7, 7, 7] = 1
    spec = make_spec(postprocess=(KeepLargest(values=(1,)),))
    assert with_function(tmp_path, spec)((image, SPACING)).labels[7, 7, 7] == 0
    assert with_function(tmp_path, spec, postprocess=False)((image, SPACING)).labels[7, 7, 7] == 1


def test_regions(tmp_path: Path) -> None:
    spec = make_spec(values=(1, 2), activation="sigmoid")
    predictor = with_function(tmp_path, spec, lambda p: np.concatenate([p - 0.5, p - 1.5], 1) * 9)
    result = predictor((IMAGE, SPACING), probabilities=True)
    assert (result.labels == IMAGE).all()
    assert result.probabilities is not None
    assert ((result.probabilities[0] > 0.5) == (IMAGE > 0)).all()
    assert ((result.probabilities[1] > 0.5) == (IMAGE > 1)).all()


def test_an_ignore_label_is_never_given(tmp_path: Path) -> None:
    result = with_function(tmp_path, make_spec(ignore=3))((IMAGE, SPACING))
    assert set(np.unique(result.labels)) == {0, 1, 2}


def test_more_than_255_classes(tmp_path: Path) -> None:
    image = np.arange(8 * 8 * 8, dtype=np.int16).reshape(8, 8, 8) % 300
    result = with_function(tmp_path, make_spec(values=range(300)))((image, SPACING))
    assert result.labels.dtype == np.uint16
    assert (result.labels == image).all()


def test_a_fixed_shape_with_uniform_blending(tmp_path: Path) -> None:
    """A V-Net: HU window, one shape for every image, windows of equal weight."""
    hu = np.where(np.arange(20)[:, None, None] < 10, 100, -100) * np.ones((20, 16, 12), np.int16)
    spec = make_spec(
        values=(0, 1),
        channels=(Channel(name="CT", normalization=WindowNorm(lower=-200, upper=200, scale=1)),),
        target=ShapeTarget(shape=(10, 32, 12)),
        crop_nonzero=False,
        inference=Inference(patch=(10, 32, 12), blending="uniform"),
    )
    result = with_function(tmp_path, spec)((hu, (1.0, 1.0, 1.0)))
    assert result.windows[0] == 1
    assert (result.labels == (hu > 0)).all()


def test_a_2d_model_segments_a_volume_and_a_picture(tmp_path: Path) -> None:
    spec = make_spec(patch=(1, 8, 8))
    predictor = with_function(tmp_path, spec)
    assert (predictor((IMAGE, SPACING)).labels == IMAGE).all()
    colour = make_spec(values=(0, 1), patch=(1, 8, 8), channels=tuple(Channel(name=n, normalization=RGBNorm()) for n in "RGB"))
    picture = np.zeros((12, 14, 3), np.uint8)
    picture[3:7, 2:9] = 255
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(picture, isVector=True), str(tmp_path / "p.png"))
    result = with_function(tmp_path, colour)(tmp_path / "p.png")
    assert result.labels.shape == (1, 12, 14)
    assert (result.labels[0] == (picture[..., 0] > 0)).all()


CASCADE = make_spec(name="full", previous=PreviousStage(values=(1, 2)))


def copies_previous(patches: np.ndarray) -> np.ndarray:
    """Class k wins where the first stage said k."""
    return np.concatenate([np.full_like(patches[:, :1], 0.5), patches[:, 1:]], 1)


@pytest.mark.parametrize("kind", ["path", "str", "array"])
def test_a_cascade_takes_first_stage_labels(tmp_path: Path, kind: str) -> None:
    predictor = with_function(tmp_path, CASCADE, copies_previous)
    first = np.flip(IMAGE).astype(np.uint8)
    path = write_case(tmp_path / "first.nii.gz", first, SPACING)
    result = predictor((IMAGE, SPACING), previous={"path": path, "str": str(path), "array": first}[kind])
    # outside the crop of the image nothing is predicted
    assert (result.labels == first).all()


def test_a_cascade_runs_its_own_first_stage(tmp_path: Path) -> None:
    spec = make_spec(name="low", labels=(), values=(0, 1, 2), mirror_axes=(1,), postprocess=(KeepLargest(values=(2,)),))
    low = make_bundle(tmp_path / "low", spec, centres=(0, 2, 1))
    bundle = make_bundle(tmp_path / "full", CASCADE, previous=low)
    with Predictor(bundle) as predictor:
        assert predictor.previous is not None
        assert predictor.previous.steps == ()
        assert predictor.previous((IMAGE, SPACING)).labels.max() == 2
        assert (predictor((IMAGE, SPACING)).labels == IMAGE).all()
    stage = Predictor(bundle, engines=[CountingEngine(copies_previous)])
    assert (stage((IMAGE, SPACING)).labels == np.array([0, 2, 1])[IMAGE]).all()


def test_a_cascade_without_first_stage_says_what_to_pass(tmp_path: Path) -> None:
    predictor = with_function(tmp_path, CASCADE, copies_previous)
    with pytest.raises(InputError, match="no first stage; pass its labels"):
        predictor((IMAGE, SPACING))


def test_first_stage_labels_must_lie_on_the_images_grid(tmp_path: Path) -> None:
    predictor = with_function(tmp_path, CASCADE, copies_previous)
    other = write_case(tmp_path / "other.nii.gz", IMAGE.astype(np.uint8), (3.0, 1.5, 2.2))
    with pytest.raises(InputError, match=r"not on the grid of array: spacing \(3, 1\.5, 2\.2\) mm"):
        predictor((IMAGE, SPACING), previous=other)
    with pytest.raises(InputError, match=r"shape \(2, 2, 2\)"):
        predictor((IMAGE, SPACING), previous=np.zeros((2, 2, 2), np.uint8))


def test_a_model_that_is_no_cascade_takes_no_first_stage_labels(predictor: Predictor) -> None:
    with pytest.raises(InputError, match="'tiny' is not the second stage of a cascade"):
        predictor((IMAGE, SPACING), previous=IMAGE)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such bundle"):
        Predictor(tmp_path / "nothing")


def test_measured_memory_is_known_only_when_every_engine_was_measured(tmp_path: Path) -> None:
    measured, other = nearest_engine(), nearest_engine()
    measured.held_bytes = 5
    assert Predictor(Bundle(tmp_path, make_spec()), engines=[measured, measured]).engine_bytes == 10
    assert Predictor(Bundle(tmp_path, make_spec()), engines=[measured, other]).engine_bytes == 0
