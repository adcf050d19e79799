"""Post-processing: nnU-Net's rule on predictions made to need it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from factories import write_case

from segrt.io import read_labels
from segrt.metrics import overlaps
from segrt.spec import KeepLargest
from segrt.train.cases import Dataset, TrainingCase
from segrt.train.select import choose_postprocess
from segrt.train.validate import CaseScores, Summary

SHAPE = (6, 8, 20)
A, B = slice(1, 4), slice(12, 15)  # two places along x


def _map(**boxes: int) -> np.ndarray:
    """Labels in boxes: name a1..a9 or b1.. chooses the place along x and the depth."""
    labels = np.zeros(SHAPE, np.uint8)
    for name, value in boxes.items():
        place = {"a": A, "b": B, "c": slice(17, 18)}[name[0]]
        labels[: int(name[1]), 2:5, place] = value
    return labels


def _make(folder: Path, pairs: list[tuple[np.ndarray, np.ndarray]], structures: dict[str, tuple[int, ...]], ignore: int | None = None):
    """A dataset of (truth, prediction) pairs and the summary of its validation."""
    cases, scores = [], []
    for number, (truth, prediction) in enumerate(pairs):
        name = f"case_{number}"
        truth_path, found_path = folder / "truth" / f"{name}.nii.gz", folder / "found" / f"{name}.nii.gz"
        write_case(truth_path, truth)
        write_case(found_path, prediction)
        cases.append(TrainingCase(name, (truth_path,), truth_path))
        scores.append(CaseScores(name, found_path, truth_path, overlaps(truth, prediction, structures, ignore=ignore)))
    regions = any(len(values) > 1 for values in structures.values())
    order = tuple(values[-1] for values in structures.values()) if regions else ()
    dataset = Dataset("d", folder, ("CT",), {"background": (0,), **structures}, tuple(cases), class_order=order, ignore=ignore)
    return Summary(tuple(scores), structures, "model"), dataset


def test_all_together_when_it_helps_and_harms_none(tmp_path: Path) -> None:
    truth, found = _map(a5=1, c1=0), _map(a5=1, c1=1)
    choice = choose_postprocess(*_make(tmp_path, [(truth, found)], {"one": (1,)}))
    assert choice.steps == (KeepLargest(values=(1,)),)
    assert choice.after.mean_dice == 1 > choice.before.mean_dice
    assert "taken" in choice.tried[0]


def test_a_single_structure_is_not_tried_twice(tmp_path: Path) -> None:
    choice = choose_postprocess(*_make(tmp_path, [(_map(a5=1), _map(a5=1))], {"one": (1,)}))
    assert (choice.steps, len(choice.tried)) == ((), 1)


def test_per_structure_where_together_would_harm(tmp_path: Path) -> None:
    """Structure 2 lies apart from 1 and would vanish; a false piece of 1 is cleared on its own."""
    truth, found = _map(a5=1, b3=2), _map(a5=1, b3=2, c1=1)
    choice = choose_postprocess(*_make(tmp_path, [(truth, found)], {"one": (1,), "two": (2,)}))
    assert choice.steps == (KeepLargest(values=(1,)),)
    assert choice.after.dice == {"one": 1.0, "two": 1.0}
    assert [("taken" in sentence) for sentence in choice.tried] == [False, True, False]


def test_the_mean_over_the_cases_decides(tmp_path: Path) -> None:
    """One case gains a little, another loses a true second piece."""
    gains = (_map(a5=1), _map(a5=1, c1=1))
    loses = (_map(a5=1, b3=1), _map(a5=1, b3=1))
    choice = choose_postprocess(*_make(tmp_path, [gains, loses], {"one": (1,)}))
    assert choice.steps == ()
    assert choice.after == choice.before


def test_both_steps_in_their_order(tmp_path: Path) -> None:
    truth = _map(a5=1)
    truth[:5, 5:7, A] = 2
    found = truth.copy()
    found[0, 0, 17] = 1  # apart from everything
    found[0, 2, 1] = 2  # in the middle of 1: part of the whole, apart from 2
    choice = choose_postprocess(*_make(tmp_path, [(truth, found)], {"one": (1,), "two": (2,)}))
    assert choice.steps == (KeepLargest(values=(1, 2)), KeepLargest(values=(2,)))


def test_regions_overlap_and_go_in_their_order(tmp_path: Path) -> None:
    truth = _map(a5=1)
    truth[1:3, 3, 2] = 2
    found = truth.copy()
    found[0, 0, 17] = 2
    choice = choose_postprocess(*_make(tmp_path, [(truth, found)], {"whole": (1, 2), "core": (2,)}))
    assert choice.steps == (KeepLargest(values=(1, 2)),)
    assert choice.after.dice == {"whole": 1.0, "core": 1.0}


def test_ignored_voxels_do_not_count(tmp_path: Path) -> None:
    truth, found = _map(a5=1, c1=9), _map(a5=1, c1=1)
    choice = choose_postprocess(*_make(tmp_path, [(truth, found)], {"one": (1,)}, ignore=9))
    assert choice.steps == ()


def test_the_report_names_the_weights_and_both_scores(tmp_path: Path) -> None:
    choice = choose_postprocess(*_make(tmp_path, [(_map(a5=1), _map(a5=1, c1=1))], {"one": (1,)}))
    values = json.loads(choice.to_json())
    assert values["model"] == "model"
    assert values["steps"] == [{"kind": "keep_largest", "values": [1]}]
    assert values["mean_dice"]["without"] < values["mean_dice"]["with"] == 1
    assert choice.table["with post-processing"] == {"one": 1.0}
    # the predictions on disk stay as they were
    assert read_labels(choice.before.cases[0].prediction)[0][0, 2, 17] == 1


@pytest.mark.parametrize("seed", range(3))
def test_it_decides_as_nnunet_writes_its_rule(tmp_path: Path, seed: int) -> None:
    """The rule once more, slow and obvious, on random maps."""
    rng = np.random.default_rng(seed)
    structures = {"one": (1,), "two": (2,), "three": (3,)}
    pairs = []
    for _ in range(3):
        truth = np.zeros(SHAPE, np.uint8)
        for value in (1, 2, 3):
            truth[1:4, 2:5, 6 * value - 4 : 6 * value] = value
        found = truth.copy()
        noise = rng.random(SHAPE) < 0.02
        found[noise] = rng.integers(0, 4, int(noise.sum()))
        pairs.append((truth, found))
    choice = choose_postprocess(*_make(tmp_path, pairs, structures))
    assert choice.steps == _nnunet(pairs)


def _nnunet(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[KeepLargest, ...]:
    from scipy import ndimage

    def clear(labels: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
        mask = np.isin(labels, values)
        parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
        sizes = ndimage.sum_labels(mask, parts, range(1, count + 1))
        kept = np.isin(parts, [i + 1 for i, size in enumerate(sizes) if size == max(sizes)])
        return np.where(mask & ~kept, 0, labels).astype(np.uint8)

    def means(maps: list[np.ndarray]) -> dict[int, float]:
        def one(truth: np.ndarray, found: np.ndarray, value: int) -> float:
            return 2 * ((truth == value) & (found == value)).sum() / ((truth == value).sum() + (found == value).sum())

        return {v: float(np.mean([one(t, f, v) for (t, _), f in zip(pairs, maps, strict=True)])) for v in (1, 2, 3)}

    maps, steps = [found for _, found in pairs], []
    for values in ((1, 2, 3), (1,), (2,), (3,)):
        new = [clear(found, values) for found in maps]
        before, after = means(maps), means(new)
        if len(values) == 3:
            better = np.mean(list(after.values())) > np.mean(list(before.values())) and all(after[v] >= before[v] for v in before)
        else:
            better = after[values[0]] > before[values[0]]
        if better:
            maps, steps = new, [*steps, KeepLargest(values=values)]
    return tuple(steps)
