"""Patches are drawn as nnU-Net draws them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from train_factory import configure, write_dataset

from segrt.train.cache import Locations, Prepared, open_case
from segrt.train.prepare import prepare
from segrt.train.sampler import Sampling, cut, draw, enlarge, wants_foreground


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("sampler")
    return prepare(write_dataset(folder / "raw", ((20, 24, 22), (5, 9, 7))), configure(), folder / "cache", workers=1)


@pytest.mark.parametrize(
    ("patch", "degrees", "expected"),
    [  # what nnU-Net 2.8.1's get_patch_size gives
        ((40, 56, 40), 30, (73, 80, 64)),
        ((128, 128, 128), 30, (205, 205, 205)),
        ((28, 256, 256), 180, (301, 301, 301)),
        ((256, 256), 180, (301, 301)),
        ((96, 160), 15, (157, 188)),
    ],
)
def test_patches_are_enlarged_for_rotation(patch, degrees: float, expected) -> None:
    assert enlarge(patch, degrees) == expected


@pytest.mark.parametrize(
    ("batch", "share", "forced"),
    [(2, 0.33, [1]), (1, 0.33, []), (9, 0.33, [6, 7, 8]), (3, 0.0, []), (3, 1.0, [0, 1, 2]), (5, 0.5, [2, 3, 4])],
)
def test_the_last_elements_of_a_batch_hold_foreground(batch: int, share: float, forced: list[int]) -> None:
    sampling = Sampling((8, 8, 8), (8, 8, 8), share)
    rng = np.random.default_rng(0)
    assert [position for position in range(batch) if wants_foreground(position, batch, sampling, rng)] == forced


def test_or_each_by_chance() -> None:
    sampling, rng = Sampling((8, 8, 8), (8, 8, 8), 0.33, probabilistic=True), np.random.default_rng(0)
    drawn = [wants_foreground(0, 2, sampling, rng) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(0.33, abs=0.03)


def test_a_patch_is_cut_where_image_and_labels_agree(prepared: Prepared) -> None:
    """Labels follow intensities in these cases: what is moved against the other is seen."""
    sampling, rng = Sampling((6, 7, 8), (9, 10, 11)), np.random.default_rng(1)
    for number in range(20):
        sample = draw(prepared.folder, prepared.cases[0], sampling, foreground=bool(number % 2), ignore=False, rng=rng)
        assert sample.data.shape == (1, 9, 10, 11)
        assert sample.data.dtype == np.float32
        assert sample.labels.shape == (9, 10, 11)
        assert sample.previous is None
        inside = sample.data[0] > 0
        np.testing.assert_array_equal(sample.labels[inside], sample.data[0][inside] // 100)
        assert set(np.unique(sample.labels[~inside])) <= {-1, 0, 1, 2}


def test_outside_the_image_are_zeros_and_minus_one(prepared: Prepared) -> None:
    sampling, small = Sampling((16, 16, 16), (16, 16, 16)), prepared.cases[1]
    sample = draw(prepared.folder, small, sampling, foreground=False, ignore=False, rng=np.random.default_rng(0))
    opened = open_case(prepared.folder, small)
    # the whole image is in the patch, and nothing else
    np.testing.assert_array_equal(sample.data[sample.data != 0], opened.data[:][opened.data[:] != 0])
    np.testing.assert_array_equal(sample.labels[sample.labels != -1], opened.labels[:][opened.labels[:] != -1])


def test_foreground_is_in_the_middle_and_every_label_as_likely(prepared: Prepared) -> None:
    sampling, rng = Sampling((5, 5, 5), (5, 5, 5)), np.random.default_rng(2)
    middle = []
    for _ in range(400):
        sample = draw(prepared.folder, prepared.cases[0], sampling, foreground=True, ignore=False, rng=rng)
        middle.append(int(sample.labels[2, 2, 2]))
        assert (sample.labels > 0).any()
    # a patch at the border is moved inside, where its middle may be another voxel
    assert np.mean(np.array(middle) > 0) > 0.9
    assert middle.count(1) / max(1, middle.count(2)) == pytest.approx(1, abs=0.35)


def test_slices_are_cut_from_volumes(prepared: Prepared) -> None:
    sampling, rng = Sampling((1, 8, 8), (1, 12, 12)), np.random.default_rng(3)
    counts = set()
    for number in range(60):
        sample = draw(prepared.folder, prepared.cases[0], sampling, foreground=number % 2 == 0, ignore=False, rng=rng)
        assert sample.data.shape == (1, 1, 12, 12)
        if number % 2 == 0:
            assert (sample.labels > 0).any()
        counts.add(sample.data.sum())
    assert len(counts) > 30


def _annotated(prepared: Prepared, rows: list[tuple[tuple[int, ...], int, int]]):
    return prepared.cases[0].model_copy(update={"locations": tuple(Locations(values=v, start=a, stop=b) for v, a, b in rows)})


def test_with_an_ignored_label_every_patch_holds_something_annotated(prepared: Prepared) -> None:
    """Rows 0 .. n are label 1's; declared to be all that is annotated, they are where patches without foreground go too."""
    first = prepared.cases[0].locations[0]
    case = _annotated(prepared, [((2,), 0, 0), ((-1, 0, 1, 2), first.start, first.stop)])
    sampling, rng = Sampling((3, 3, 3), (3, 3, 3)), np.random.default_rng(4)
    for foreground in (False, True):  # with no foreground at all, what is annotated is the last resort
        samples = [draw(prepared.folder, case, sampling, foreground=foreground, ignore=True, rng=rng) for _ in range(50)]
        assert all((sample.labels == 1).any() for sample in samples)
    # where there is foreground, background is not what a foreground patch is centred on
    end = prepared.cases[0].locations[1].stop
    case = _annotated(prepared, [((1,), first.start, first.stop), ((-1, 0, 1, 2), first.stop, end)])
    samples = [draw(prepared.folder, case, sampling, foreground=True, ignore=True, rng=rng) for _ in range(50)]
    assert all((sample.labels == 1).any() for sample in samples)


def test_a_case_with_nothing_to_find_is_cut_anywhere(prepared: Prepared) -> None:
    case = _annotated(prepared, [((1,), 0, 0), ((-1, 0, 1), 0, 0)])
    rng = np.random.default_rng(5)
    samples = [draw(prepared.folder, case, Sampling((4, 4, 4), (4, 4, 4)), foreground=True, ignore=True, rng=rng) for _ in range(9)]
    assert len({sample.data.tobytes() for sample in samples}) > 5


def test_a_window_wholly_outside_is_all_fill() -> None:
    array = np.ones((1, 3, 3, 3), np.int16)
    np.testing.assert_array_equal(cut(array, (5, -9, 0), (2, 2, 2), -1), np.full((1, 2, 2, 2), -1))


def test_samples_can_be_written_to(tmp_path: Path) -> None:
    """Augmentation works in place; a memory-mapped file must not be what it works on."""
    prepared = prepare(write_dataset(tmp_path / "raw"), configure(), tmp_path / "cache", workers=1, storage="npy")
    case = prepared.cases[0]
    sampling = Sampling(case.shape, case.shape)
    sample = draw(prepared.folder, case, sampling, foreground=False, ignore=False, rng=np.random.default_rng(0))
    sample.data[:] = 5
    sample.labels[:] = 5
    assert (open_case(prepared.folder, case).data[:] != 5).any()
