"""`measure` counts what nnU-Net's fingerprint holds; `choose_target`, `plan_topology` and the memory count decide from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import write_case
from hypothesis import given
from hypothesis import strategies as st

from segrt.errors import InputError, SpecError
from segrt.train import fingerprint as module
from segrt.train.cases import Dataset
from segrt.train.dataset import open_dataset
from segrt.train.fingerprint import Fingerprint, load_fingerprint, measure
from segrt.train.plan import plan_nnunet
from segrt.train.presets import PRESETS
from segrt.train.target import choose_target
from segrt.train.topology import feature_map_elements, plan_topology

# nnU-Net 2.8.1's own dataset_fingerprint.json of the first cases of each folder
FIRST_6_HIPPOCAMPUS = {
    "max": 1090.437744140625,
    "mean": 341.91455078125,
    "median": 351.5792236328125,
    "min": 21.0,
    "percentile_00_5": 37.0,
    "percentile_99_5": 877.2694702148438,
    "std": 175.57325744628906,
}
FIRST_3_KBP = {
    "max": 3071.0,
    "mean": 202.08206176757812,
    "median": 29.0,
    "min": -996.0,
    "percentile_00_5": -962.0,
    "percentile_99_5": 1574.0,
    "std": 431.53057861328125,
}
FIRST_6_LGG = (
    (63.0, 42.66753891870156, 42.0, 18.0, 27.0, 59.0, 8.182441479408029),
    (132.0, 103.65022573800903, 105.0, 44.0, 71.0, 128.0, 14.087701798557351),
    (59.0, 43.114344644573784, 43.0, 22.0, 28.0, 57.0, 7.898747243860169),
)
# percentiles and extremes are equal; nnU-Net sums 10^8 numbers in float32
SUMMED = {"mean": 2e-7, "std": 2e-7}


def first(dataset: Dataset, cases: int) -> Dataset:
    return Dataset(dataset.name, dataset.folder, dataset.channels, dataset.labels, dataset.cases[:cases])


def assert_intensities(found: Any, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=SUMMED.get(name, 1e-12)), name


def write_pairs(folder: Path, images: dict[str, np.ndarray], labels: dict[str, np.ndarray], spacing: Any = (1.0, 1.0, 1.0)) -> Dataset:
    for name in images:
        write_case(folder / "images" / f"{name}.nii.gz", images[name], spacing)
        write_case(folder / "labels" / f"{name}.nii.gz", labels[name], spacing)
    return open_dataset(folder, labels={"organ": 1, "other": 2})


@pytest.mark.slow
def test_hippocampus_is_measured_as_by_nnunet(shared_data: Path) -> None:
    found = measure(first(open_dataset(shared_data / "b_hippocampus", labels={"anterior": 1, "posterior": 2}), 6), workers=2)
    assert found.spacings == ((1.0, 1.0, 1.0),) * 6
    assert found.shapes == ((35, 51, 35), (35, 52, 34), (38, 52, 36), (34, 52, 35), (40, 47, 34), (40, 48, 36))
    assert found.relative_size == 1.0
    assert_intensities(found.intensities[0], FIRST_6_HIPPOCAMPUS)


@pytest.mark.slow
def test_ct_is_measured_as_by_nnunet(shared_data: Path) -> None:
    found = measure(first(open_dataset(shared_data / "a_openkbp_hn7", channels=["CT"]), 3))
    assert found.spacings[1] == (2.5, 4.367000102996826, 4.367000102996826)
    assert_intensities(found.intensities[0], FIRST_3_KBP)


@pytest.mark.slow
def test_colour_pictures_are_measured_as_by_nnunet(shared_data: Path) -> None:
    found = measure(first(open_dataset(shared_data / "c_lgg2d", labels={"tumour": 255}), 6))
    assert found.spacings == ((999.0, 1.0, 1.0),) * 6
    assert found.shapes == ((1, 256, 197),) * 6
    assert found.relative_size == 0.76953125
    names = ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")
    for intensities, values in zip(found.intensities, FIRST_6_LGG, strict=True):
        assert_intensities(intensities, dict(zip(names, values, strict=True)))


def test_counted_draws_give_the_statistics_of_the_draws_themselves() -> None:
    """On several cases, against NumPy on every drawn number."""
    rng = np.random.default_rng(0)
    cases = [rng.normal(100, 30, size).round(decimals).astype(np.float32) for size, decimals in ((500, 0), (40, 3), (1, 2))]
    drawn = [module._draw(voxels, 1000, np.random.RandomState(module.SEED)) for voxels in cases]
    found = module._statistics([v for v, _ in drawn], [n for _, n in drawn])
    every = np.concatenate([np.random.RandomState(module.SEED).choice(voxels, 1000, replace=True) for voxels in cases]).astype(np.float64)
    low, median, high = np.percentile(every, (0.5, 50, 99.5))
    expected = (every.mean(), median, every.std(), every.min(), every.max(), low, high)
    names = ("mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5")
    np.testing.assert_allclose([getattr(found, n) for n in names], expected, rtol=1e-12)


def test_the_crop_and_the_positive_labels_are_what_counts(tmp_path: Path) -> None:
    image, labels = np.zeros((6, 8, 10), np.int16), np.zeros((6, 8, 10), np.uint8)
    image[1:5, 2:7, 3:9] = 50
    image[2, 3, 4], labels[2, 3, 4] = 7, 1
    image[3, 3, 4], labels[3, 3, 4] = 9, 2
    dataset = write_pairs(tmp_path, {"a": image}, {"a": labels}, (3.0, 1.0, 2.0))
    found = measure(dataset, samples=1000)
    assert found.shapes == ((4, 5, 6),)
    assert found.spacings == ((3.0, 1.0, 2.0),)
    assert found.relative_size == 120 / 480
    assert (found.intensities[0].min, found.intensities[0].max) == (7, 9)
    assert found.intensities[0].mean == pytest.approx(8, abs=0.2)


def test_cases_without_foreground_count_only_for_the_grid(tmp_path: Path) -> None:
    image, labels = np.full((4, 4, 4), 5, np.int16), np.zeros((4, 4, 4), np.uint8)
    full = labels.copy()
    full[1] = 1
    dataset = write_pairs(tmp_path, {"a": image, "b": image * 2}, {"a": labels, "b": full})
    assert measure(dataset, samples=100).intensities[0].mean == 10
    assert len(measure(dataset, samples=100).shapes) == 2


def test_no_foreground_at_all_is_an_error(tmp_path: Path) -> None:
    image = np.full((4, 4, 4), 5, np.int16)
    dataset = write_pairs(tmp_path, {"a": image}, {"a": np.zeros((4, 4, 4), np.uint8)})
    with pytest.raises(InputError, match="no case has a voxel with a positive label"):
        measure(dataset, samples=10)


def test_progress_and_workers(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images = {f"c{k}": rng.integers(-50, 50, (4, 5, 6)).astype(np.int16) for k in range(3)}
    labels = {name: (image > 0).astype(np.uint8) for name, image in images.items()}
    dataset = write_pairs(tmp_path, images, labels)
    calls: list[tuple[int, int]] = []
    alone = measure(dataset, samples=300, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert measure(dataset, samples=300, workers=2) == alone


def test_the_fingerprint_survives_its_file(tmp_path: Path) -> None:
    found = _fingerprint([(1, 1, 1)], [(4, 5, 6)])
    (tmp_path / "f.json").write_text(found.to_json())
    assert load_fingerprint(tmp_path / "f.json") == found
    (tmp_path / "f.json").write_text("{")
    with pytest.raises(SpecError, match=r"f\.json: not a readable JSON file"):
        load_fingerprint(tmp_path / "f.json")
    (tmp_path / "f.json").write_text(found.to_json().replace("relative_size", "size"))
    with pytest.raises(SpecError, match=r"f\.json: relative_size: Field required"):
        load_fingerprint(tmp_path / "f.json")


def _fingerprint(spacings: Any, shapes: Any, channels: int = 1) -> Fingerprint:
    values = {"mean": 1.0, "median": 1.0, "std": 1.0, "min": 0.0, "max": 2.0, "percentile_00_5": 0.0, "percentile_99_5": 2.0}
    return Fingerprint(spacings=spacings, shapes=shapes, intensities=(values,) * channels, relative_size=1.0)


# ------------------------------------------------------------------ target spacing
def test_isotropic_cases_get_the_median_spacing() -> None:
    target = choose_target(_fingerprint([(1, 1, 1), (1.2, 0.8, 1), (1.4, 1, 1)], [(100, 100, 100)] * 3))
    np.testing.assert_allclose(target.spacing, (1.2, 1, 1))
    assert target.transpose == (0, 1, 2)
    assert "median" in target.reason


def test_a_coarse_short_axis_gets_the_tenth_percentile_and_comes_first() -> None:
    spacings = [(1.0, 1.0, z) for z in np.linspace(4, 8, 11)]
    target = choose_target(_fingerprint(spacings, [(300, 300, 20)] * 11))
    np.testing.assert_allclose(target.spacing, (4.4, 1, 1))
    assert target.transpose == (2, 0, 1)
    assert "Axis x" in target.reason


def test_a_coarse_long_axis_keeps_its_median() -> None:
    target = choose_target(_fingerprint([(4, 1, 1), (6, 1, 1), (8, 1, 1)], [(200, 300, 300)] * 3))
    np.testing.assert_allclose(target.spacing, (6, 1, 1))


def test_the_tenth_percentile_never_gets_finer_than_the_other_axes() -> None:
    spacings = [(0.5, 1, 1)] * 3 + [(9, 1, 1)] * 4
    target = choose_target(_fingerprint(spacings, [(20, 300, 300)] * 7))
    np.testing.assert_allclose(target.spacing, (1 + 1e-5, 1, 1), rtol=0, atol=1e-12)


# ------------------------------------------------------------------ topology
def test_no_axis_is_pooled_below_four_voxels() -> None:
    assert plan_topology((1, 1, 1), (36, 49, 35)).patch == (40, 56, 40)
    assert plan_topology((9.4, 1.56, 1.58), (10, 237, 207)).patch == (10, 256, 224)
    topology = plan_topology((9.4, 1.56, 1.58), (10, 237, 207))
    assert topology.strides[1] == (1, 2, 2)
    assert topology.kernels[0] == (1, 3, 3)
    assert topology.kernels[-1] == (3, 3, 3)


@given(
    spacing=st.lists(st.floats(0.2, 10), min_size=2, max_size=3),
    data=st.data(),
)
def test_strides_divide_the_padded_patch(spacing: list[float], data: st.DataObject) -> None:
    patch = data.draw(st.lists(st.integers(1, 400), min_size=len(spacing), max_size=len(spacing)))
    topology = plan_topology(spacing, patch)
    for padded, wanted, divisor in zip(topology.patch, patch, topology.divisor, strict=True):
        assert wanted <= padded < wanted + divisor
        assert padded % divisor == 0
        assert divisor == 1 or padded // divisor >= 4
    assert len(topology.kernels) == topology.stages


def test_feature_map_elements_equal_a_count_by_hand() -> None:
    topology = plan_topology((1.0, 1.0), (16, 16))
    assert topology.strides == ((1, 1), (2, 2), (2, 2))
    full, half, quarter = 256, 64, 16
    plain = 2 * 8 * full + 2 * 16 * half + 2 * 32 * quarter + (3 * 16 * half + 3 * 8 * full) + 5 * full
    assert feature_map_elements(topology, (8, 16, 32), (2, 2, 2), (2, 2), classes=5, residual=False) == plain
    encoder = 8 * full + 2 * 8 * full + (6 + 1) * 16 * half + (8 + 1) * 32 * quarter
    decoder = 2 * 16 * half + 2 * 8 * full + 5 * full
    assert feature_map_elements(topology, (8, 16, 32), (1, 3, 4), (1, 1), classes=5, residual=True) == encoder + decoder


# ------------------------------------------------------------------ bad input
@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    image = np.full((4, 4, 4), 5, np.int16)
    return write_pairs(tmp_path, {"a": image}, {"a": (image > 0).astype(np.uint8)})


def test_a_fingerprint_of_other_data_is_refused(dataset: Dataset) -> None:
    with pytest.raises(InputError, match=r"the fingerprint is of 2 cases, dataset .* has 1; measure it again"):
        plan_nnunet(dataset, _fingerprint([(1, 1, 1)] * 2, [(40, 40, 40)] * 2))
    with pytest.raises(InputError, match=r"the fingerprint is of 2 channels, dataset .* has 1"):
        plan_nnunet(dataset, _fingerprint([(1, 1, 1)], [(40, 40, 40)], channels=2))


def test_an_unknown_planner_and_impossible_memory_are_refused(dataset: Dataset) -> None:
    found = _fingerprint([(1, 1, 1)], [(40, 40, 40)])
    with pytest.raises(InputError, match=f"planner: expected one of {', '.join(PRESETS)}, got 'xxl'"):
        plan_nnunet(dataset, found, planner="xxl")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="memory_gb: expected more than 0, got -1"):
        plan_nnunet(dataset, found, memory_gb=-1)
    with pytest.raises(InputError, match="memory_gb: no patch fits into 1e-06 GB, the last one tried was"):
        plan_nnunet(dataset, found, memory_gb=1e-6)


def test_single_slices_are_planned_in_two_dimensions_only(dataset: Dataset) -> None:
    plan = plan_nnunet(dataset, _fingerprint([(999, 1, 1)], [(1, 200, 260)]))
    assert list(plan.configurations) == ["2d"]
    assert plan.configurations["2d"].spec.target.spacing == (None, 1, 1)
    assert plan.configurations["2d"].spec.inference.mirror_axes == (1, 2)
