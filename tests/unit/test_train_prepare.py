"""Cases become a cache: equal to nnU-Net's, mended after every kind of damage, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from factories import UNET_3D, make_spec, write_case
from train_factory import configure, write_dataset

from segrt.errors import InputError
from segrt.export.importers.plans import model_spec
from segrt.io import read_volume
from segrt.preprocess import preprocess
from segrt.spec import Channel, CTNorm, NoNorm, PreviousStage, Resampling, SpacingTarget
from segrt.train.cache import block_shapes, open_array, open_case, write_array
from segrt.train.cases import Dataset, TrainingCase
from segrt.train.locations import find_locations
from segrt.train.prepare import prepare
from segrt.train.sizes import cache_bytes, case_memory

TESTS = Path(__file__).resolve().parents[1]
FINER = SpacingTarget(spacing=(0.7, 1.3, 1.0))


def _written(folder: Path) -> dict[str, int]:
    """When each case's marker was written."""
    return {marker.parent.name: marker.stat().st_mtime_ns for marker in folder.glob("*/case.json")}


# ------------------------------------------------------------------ the cache holds what the runtime makes
@pytest.mark.parametrize("storage", ["blosc2", "npy"])
def test_data_is_the_runtimes_and_labels_lie_on_the_same_grid(tmp_path: Path, storage: str) -> None:
    dataset = write_dataset(tmp_path / "raw", spacing=(1.0, 1.0, 2.0))
    configuration = configure(target=FINER, transpose=(2, 0, 1))
    prepared = prepare(dataset, configuration, tmp_path / "cache", workers=1, storage=storage)
    for case, raw in zip(prepared.cases, dataset.cases, strict=True):
        data, placement = preprocess(read_volume(raw.images[0]), configuration.spec)
        opened = open_case(prepared.folder, case)
        np.testing.assert_array_equal(opened.data[:], data)
        assert case.placement == placement
        assert opened.labels[:].shape == placement.shape == case.shape
        assert opened.labels[:].dtype == np.int16
        assert set(np.unique(opened.labels[:])) <= {-1, 0, 1, 2}
        # a slice of the stored array is the same as of the whole
        np.testing.assert_array_equal(opened.data[:, 2:5, 1:, 3:4], data[:, 2:5, 1:, 3:4])


def test_background_outside_the_nonzero_region_is_minus_one_and_labels_there_stay(tmp_path: Path) -> None:
    image, labels = np.zeros((6, 8, 8), np.int16), np.zeros((6, 8, 8), np.uint8)
    image[1:5, 1:7, 1:3] = image[1:5, 1:7, 5:7] = 7
    labels[2, 2, 3] = 2  # between the two blocks, where the image is 0
    raw = tmp_path / "raw"
    case = TrainingCase("a", (write_case(raw / "a.nii.gz", image),), write_case(raw / "labels" / "a.nii.gz", labels))
    dataset = Dataset("one", raw, ("MR",), {"background": (0,), "x": (2,)}, (case,))
    spec = make_spec(values=(0, 2), network=UNET_3D.model_copy(update={"out_channels": 2}))
    [prepared] = (whole := prepare(dataset, configure(spec), tmp_path / "cache", workers=1)).cases
    stored = open_case(whole.folder, prepared).labels[:]
    assert prepared.placement.bbox == ((1, 5), (1, 7), (1, 7))
    assert stored[1, 1, 2] == 2
    assert stored[0, 0, 2] == -1
    assert stored[0, 0, 0] == 0
    # a model that does not crop marks nothing
    uncropped = prepare(dataset, configure(spec.model_copy(update={"crop_nonzero": False})), tmp_path / "whole", workers=1)
    assert set(np.unique(open_case(uncropped.folder, uncropped.cases[0]).labels[:])) == {0, 2}


# what nnU-Net 2.8.1's DefaultPreprocessor.run_case and _sample_foreground_locations made of these files
NNUNET = {
    ("S1_hippocampus_3d", "hippocampus_095"): {
        "labels": {-1: 3, 0: 61186, 1: 2191, 2: 1594},
        "locations": [2191, 1594],
        "sums": [2647392, 99947485],
        "data": [2.6532566],
    },
    ("S4_aniso_ct", "aniso_a"): {
        "labels": {-1: 130, 0: 110905, 2: 31209, 3: 54836, 4: 7434, 6: 22406, 7: 15585, 8: 12855},
        "locations": [0, 10000, 10000, 7434, 0, 10000, 10000, 10000],
        "sums": [300157733, 3459910724],
        "data": [142.0752600],
    },
    ("S7_regions_mr", "hippocampus_188"): {
        "labels": {-1: 15290, 0: 44566, 1: 1470, 2: 1914},
        "locations": [3384, 1914],
        "sums": [-4508023, 145452502],
        "data": [14.3056989, 214.1657710],
    },
}


def _golden_dataset(golden: Path, name: str, case: str) -> tuple[Dataset, dict, dict]:
    folder = golden / name
    [model] = (folder / "model").iterdir()
    plans, declared = (json.loads((model / file).read_text()) for file in ("plans.json", "dataset.json"))
    labels = {k: tuple(v) if isinstance(v, list) else (v,) for k, v in declared["labels"].items()}
    images = tuple(sorted((folder / "imagesTs").glob(f"{case}_*")))
    cases = (TrainingCase(case, images, folder / "labelsTs" / f"{case}.nii.gz"),)
    order = tuple(declared.get("regions_class_order", ()))
    return Dataset(name, folder, tuple(declared["channel_names"].values()), labels, cases, class_order=order), plans, declared


@pytest.mark.parametrize(("name", "case"), NNUNET)
def test_prepared_cases_are_nnunets(golden: Path, tmp_path: Path, name: str, case: str) -> None:
    dataset, plans, declared = _golden_dataset(golden, name, case)
    spec = model_spec(plans, declared, "3d_fullres", members=("0",))
    [prepared] = (whole := prepare(dataset, configure(spec), tmp_path, workers=1)).cases
    opened = open_case(whole.folder, prepared)
    labels, data = opened.labels[:], opened.data[:].astype(np.float64)
    values, counts = np.unique(labels, return_counts=True)
    expected = NNUNET[name, case]
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == expected["labels"]
    assert [row.stop - row.start for row in prepared.locations] == expected["locations"]
    # order and place of every voxel and every drawn location count in these
    weights = np.arange(labels.size).reshape(labels.shape) % 997
    order = np.arange(len(opened.locations)) % 991
    assert [int((labels * weights).sum()), int((opened.locations * order[:, None]).sum())] == expected["sums"]
    # the largest difference of a voxel is 1.4e-6, weighed by 498 on average
    np.testing.assert_allclose([(channel * weights).mean() for channel in data], expected["data"], atol=5e-4)


# ------------------------------------------------------------------ what is redone, and what is not
def test_nothing_is_done_twice(tmp_path: Path) -> None:
    dataset, cache = write_dataset(tmp_path / "raw"), tmp_path / "cache"
    calls: list[tuple[int, int]] = []
    first = prepare(dataset, configure(), cache, workers=1, progress=lambda *n: calls.append(n))
    assert calls == [(1, 2), (2, 2)]
    before = _written(cache)
    # the network, the patch and the batch change no voxel
    other = configure(patch=(4, 4, 4), batch_size=7, name="another", deep_supervision=True)
    again = prepare(dataset, other, cache, workers=1, progress=lambda *n: calls.append(n))
    assert _written(cache) == before
    assert again == first
    assert len(calls) == 2


def _truncate(case: Path) -> None:
    content = (case / "data.b2nd").read_bytes()
    (case / "data.b2nd").write_bytes(content[:-1])


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        lambda case: (case / "labels.b2nd").unlink(),
        lambda case: (case / "case.json").unlink(),
        lambda case: (case / "case.json").write_text('{"name": "a", "key'),
        lambda case: (case / "locations.npy").write_bytes(b""),
        shutil.rmtree,
    ],
    ids=["truncated", "missing", "no marker", "marker cut off", "emptied", "gone"],
)
def test_a_damaged_case_is_mended_and_no_other(tmp_path: Path, damage) -> None:
    """SEEDS 2.12 t: caches trusted by existence."""
    dataset, cache = write_dataset(tmp_path / "raw"), tmp_path / "cache"
    first = prepare(dataset, configure(), cache, workers=1)
    before = _written(cache)
    damage(cache / "a")
    assert prepare(dataset, configure(), cache, workers=1) == first
    after = _written(cache)
    assert after["b"] == before["b"]
    assert after["a"] != before["a"]
    assert open_case(cache, first.cases[0]).data[:].shape[1:] == first.cases[0].shape


@pytest.mark.parametrize(
    "changes",
    [
        {"target": FINER},
        {"crop_nonzero": False},
        {"transpose": (1, 0, 2)},
        {"resample_labels": Resampling(order=0)},
        {"channels": (Channel(name="CT", normalization=CTNorm(lower=0, upper=9, mean=1, std=2)),)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_preprocessing_does_every_case_again(tmp_path: Path, changes: dict) -> None:
    dataset, cache = write_dataset(tmp_path / "raw"), tmp_path / "cache"
    first = prepare(dataset, configure(), cache, workers=1)
    second = prepare(dataset, configure(**changes), cache, workers=1)
    assert all(a.key != b.key for a, b in zip(first.cases, second.cases, strict=True))
    assert second == prepare(dataset, configure(**changes), cache, workers=1)


def test_a_changed_image_is_prepared_again(tmp_path: Path) -> None:
    dataset, cache = write_dataset(tmp_path / "raw"), tmp_path / "cache"
    first = prepare(dataset, configure(), cache, workers=1)
    before = _written(cache)
    os.utime(dataset.cases[1].labels, ns=(1, 1))
    second = prepare(dataset, configure(), cache, workers=1)
    assert _written(cache)["a"] == before["a"]
    assert _written(cache)["b"] != before["b"]
    assert second.digest == first.digest  # touched, but the same content


def test_dtype_and_storage_are_part_of_the_key(tmp_path: Path) -> None:
    dataset, cache = write_dataset(tmp_path / "raw"), tmp_path / "cache"
    keys = {
        prepare(dataset, configure(), cache, workers=1, dtype=dtype, storage=storage).cases[0].key
        for dtype in ("float32", "float16")
        for storage in ("blosc2", "npy")
    }
    assert len(keys) == 4
    assert sorted(path.name for path in (cache / "a").iterdir()) == ["case.json", "data.npy", "labels.npy", "locations.npy"]


def test_what_a_killed_run_left_is_cleared_when_it_is_old(tmp_path: Path) -> None:
    dataset, cache = write_dataset(tmp_path / "raw"), tmp_path / "cache"
    for name in (".a.1234.part", ".b.1234.part"):
        (cache / name).mkdir(parents=True)
    os.utime(cache / ".a.1234.part", (1, 1))
    prepare(dataset, configure(), cache, workers=1)
    assert not (cache / ".a.1234.part").exists()
    assert (cache / ".b.1234.part").exists()  # another run may be writing it


def test_processes_give_what_one_gives(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "raw", ((6, 7, 8),) * 3)
    alone = prepare(dataset, configure(), tmp_path / "one", workers=1)
    together = prepare(dataset, configure(), tmp_path / "two", workers=2)
    assert together.cases == alone.cases


# ------------------------------------------------------------------ bad input
def test_a_bad_case_is_named_and_the_finished_ones_stay(tmp_path: Path) -> None:
    dataset, cache = write_dataset(tmp_path / "raw", ((12, 14, 10), (5, 5, 5))), tmp_path / "cache"
    dataset.cases[1].images[0].write_bytes(b"not an image")
    with pytest.raises(InputError, match="b_0000"):
        prepare(dataset, configure(), cache, workers=1)
    assert sorted(_written(cache)) == ["a"]
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "raw")
    dataset.cases[0].labels.unlink()
    with pytest.raises(InputError, match=r"case a cannot be read: .*a\.nii\.gz"):
        prepare(dataset, configure(), tmp_path / "cache", workers=1)


def test_intensities_beyond_float16_are_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "raw")
    huge = Channel(name="CT", normalization=CTNorm(lower=0, upper=1e3, mean=0, std=1e-6))
    with pytest.raises(InputError, match=r"a: normalised intensities up to .* do not fit into float16; store float32"):
        prepare(dataset, configure(channels=(huge,)), tmp_path / "cache", workers=1, dtype="float16")
    assert _written(tmp_path / "cache") == {}


def test_a_disk_that_is_too_small_is_said_before_anything_is_made(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "raw")
    endless = configure(target=SpacingTarget(spacing=(0.003, 0.003, 0.003)))
    with pytest.raises(InputError, match=r"2 cases to prepare need about [\d.]+ GB and [\d.]+ GB are free; store float16"):
        prepare(dataset, endless, tmp_path / "cache", workers=1)
    assert _written(tmp_path / "cache") == {}


FULL = """
import contextlib, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from train_factory import configure, write_dataset
from segrt.errors import InputError
from segrt.train.prepare import prepare
dataset = write_dataset(Path({raw!r}), ((20, 20, 20), (16, 16, 16)))
def fill(done, cases):
    with contextlib.suppress(OSError), open(Path({cache!r}) / "other", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
try:
    prepare(dataset, configure(), Path({cache!r}), workers=1, progress=fill)
except InputError as err:
    print(err)
print(sorted(p.name for p in Path({cache!r}).iterdir()))
"""


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    cache, raw = tmp_path / "cache", tmp_path / "raw"
    cache.mkdir()
    mount = f"mount -t tmpfs -o size=400k tmpfs {cache}"
    own = ["unshare", "-rm", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*own, mount], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace for a disk that is full")
    # somebody else fills the disk when the first case is done
    code = FULL.format(tests=str(TESTS), raw=str(raw), cache=str(cache))
    command = f"{mount} && {sys.executable} -c '{code.replace(chr(39), chr(34))}'"
    answer = subprocess.run([*own, command], capture_output=True, text=True, check=True, cwd=TESTS.parent)
    sentence, left = answer.stdout.splitlines()
    assert sentence.endswith("cannot be written: the disk is full; free some space or choose another folder, finished cases are kept")
    assert sentence.startswith(str(cache / "b"))
    assert left == "['a', 'other']"


# ------------------------------------------------------------------ cascade
def _cascade() -> dict:
    return {"previous": PreviousStage(values=(1, 2)), "network": UNET_3D.model_copy(update={"in_channels": 3})}


def test_labels_of_the_stage_before_lie_beside_the_case(tmp_path: Path) -> None:
    dataset, earlier = write_dataset(tmp_path / "raw"), tmp_path / "earlier"
    for case in dataset.cases:
        earlier.mkdir(exist_ok=True)
        shutil.copy(case.labels, earlier / case.labels.name)
    configuration = configure(target=FINER, **_cascade())
    prepared = prepare(dataset, configuration, tmp_path / "cache", workers=1, previous=earlier)
    for case, raw in zip(prepared.cases, dataset.cases, strict=True):
        opened = open_case(prepared.folder, case)
        labels = read_volume(raw.labels).data[0]
        data, _ = preprocess(read_volume(raw.images[0]), configuration.spec, previous=labels)
        np.testing.assert_array_equal(opened.data[:], data[:1])
        for value, channel in zip((1, 2), data[1:], strict=True):
            np.testing.assert_array_equal(opened.previous[:] == value, channel == 1)
    # other labels: only that case again
    before = _written(prepared.folder)
    os.utime(earlier / "a.nii.gz", ns=(1, 1))
    prepare(dataset, configuration, tmp_path / "cache", workers=1, previous=earlier)
    assert _written(prepared.folder)["a"] != before["a"]
    assert _written(prepared.folder)["b"] == before["b"]


def test_a_cascade_without_its_first_stage_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "raw")
    with pytest.raises(InputError, match="second stage of a cascade"):
        prepare(dataset, configure(**_cascade()), tmp_path / "cache", workers=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no label file for case 'a'"):
        prepare(dataset, configure(**_cascade()), tmp_path / "cache", workers=1, previous=tmp_path / "empty")


# ------------------------------------------------------------------ pieces
def test_folds_select_their_cases(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "raw", ((6, 6, 6),) * 3)
    prepared = prepare(dataset, configure(), tmp_path / "cache", workers=1)
    assert [case.name for case in prepared.select(["c", "a"]).cases] == ["a", "c"]
    assert prepared.select(["a"]).digest != prepared.digest
    with pytest.raises(InputError, match="case 'x' is not among the 3 prepared cases"):
        prepared.select(["a", "x"])


def test_locations_are_capped_and_an_ignored_label_adds_what_is_annotated() -> None:
    labels = np.zeros((40, 40, 40), np.int16)
    labels[:20] = 1
    labels[20, 0, :3] = 2
    labels[39] = 9
    labels[38] = -1
    spec = make_spec(ignore=9)
    rows, points = find_locations(labels, spec)
    assert [row.values for row in rows] == [(1,), (2,), (-1, 0, 1, 2)]
    assert [row.stop - row.start for row in rows] == [10_000, 3, 10_000]
    drawn = [labels[tuple(points[row.start : row.stop].T)] for row in rows]
    assert set(drawn[0]) == {1}
    assert set(drawn[1]) == {2}
    assert set(drawn[2]) == {-1, 0, 1} or set(drawn[2]) == {-1, 0, 1, 2}
    assert len(np.unique(points[: rows[0].stop], axis=0)) == 10_000


def test_a_case_without_foreground_has_no_location() -> None:
    rows, points = find_locations(np.zeros((3, 3, 3), np.int16), make_spec())
    assert [(row.start, row.stop) for row in rows] == [(0, 0), (0, 0)]
    assert points.shape == (0, 3)


@pytest.mark.parametrize(
    ("shape", "patch", "itemsize", "expected"),
    [  # what nnU-Net 2.8.1's comp_blosc2_params gives
        ((250, 512, 512), (128, 128, 128), 4, ((32, 32, 32), (96, 128, 128))),
        ((40, 60, 50), (40, 56, 40), 4, ((32, 32, 32), (40, 60, 50))),
        ((30, 300, 300), (1, 256, 256), 2, ((1, 256, 256), (1, 300, 300))),
    ],
)
def test_blocks_and_chunks_are_nnunets(shape, patch, itemsize: int, expected) -> None:
    assert block_shapes(shape, patch, itemsize) == expected


def test_a_truncated_array_is_a_sentence_not_a_crash(tmp_path: Path) -> None:
    prepared = prepare(write_dataset(tmp_path / "raw"), configure(), tmp_path / "cache", workers=1)
    _truncate(prepared.folder / "a")
    with pytest.raises(InputError, match=r"the prepared case cannot be opened .*; delete the folder and prepare again"):
        open_case(prepared.folder, prepared.cases[0])


def test_arrays_of_any_shape_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, shape in enumerate([(1, 1, 1, 1), (2, 5, 1, 9), (33, 20, 17)]):
        array = rng.normal(size=shape).astype(np.float16)
        write_array(tmp_path / f"{number}.b2nd", array.swapaxes(-1, -2), (8, 8, 8))
        np.testing.assert_array_equal(open_array(tmp_path / f"{number}.b2nd")[:], array.swapaxes(-1, -2))


def test_sizes_come_from_headers(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "raw", ((10, 10, 10), (20, 10, 10)), channels=2)
    channels = tuple(Channel(name=str(c), normalization=NoNorm()) for c in range(2))
    spec = make_spec(channels=channels)
    points = 3000 * 6
    assert cache_bytes(dataset.cases, spec, storage="npy") == 3000 * (2 * 4 + 2) + points
    assert cache_bytes(dataset.cases, spec, storage="npy", dtype="float16") == 3000 * (2 * 2 + 2) + points
    assert points < cache_bytes(dataset.cases, spec) < 3000 * 10 + points
    assert case_memory(dataset.cases[1], spec) > case_memory(dataset.cases[0], spec) > 1000 * 50
    unreadable = replace(dataset.cases[0], images=(tmp_path / "no.nii.gz",))
    assert cache_bytes([unreadable], spec) == 0
