"""predict_many: what is skipped, what a failing case does to the others, and the record that is left."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import CountingEngine, banded, make_spec, nearest, write_case

from segrt import Predictor, __version__, predict_many
from segrt.bundle import Bundle
from segrt.engines.function import FunctionEngine
from segrt.errors import InputError
from segrt.io import Case, find_cases, read_labels
from segrt.pipeline import CaseResult
from segrt.spec import PreviousStage

IMAGES = {name: banded((9, 10, 11), seed=seed) for seed, name in enumerate(("a", "b", "c"))}


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    for name, image in IMAGES.items():
        write_case(tmp_path / "images" / f"{name}_0000.nii.gz", image)
    return find_cases(tmp_path / "images", 1)


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine(nearest((0, 1, 2)))


@pytest.fixture
def predictor(tmp_path: Path, engine: CountingEngine) -> Predictor:
    return Predictor(Bundle(tmp_path / "model", make_spec()), engines=[engine])


@pytest.fixture(autouse=True)
def _model(tmp_path: Path) -> None:
    """The record holds the bundle's fingerprint, so its files must exist."""
    bundle = Bundle.create(tmp_path / "model", make_spec())
    bundle.weights_path("0").parent.mkdir()
    bundle.weights_path("0").write_bytes(b"weights")


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "predictions.json").read_text())


def status(results: list[CaseResult]) -> dict[str, str]:
    return {r.name: r.status for r in results}


def test_every_case_becomes_a_label_file(cases: list[Case], predictor: Predictor, tmp_path: Path) -> None:
    results = predict_many(cases, tmp_path / "deep" / "out", predictor)
    assert status(results) == dict.fromkeys("abc", "done")
    for name, image in IMAGES.items():
        labels, _ = read_labels(tmp_path / "deep" / "out" / f"{name}.nii.gz")
        assert (labels == image).all()
    assert sorted(p.name for p in (tmp_path / "deep" / "out").iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz", "predictions.json"]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_a_picture_becomes_labels_of_its_own_format(tmp_path: Path, suffix: str, engine: CountingEngine) -> None:
    """Pixel for pixel: a BMP pads its rows and shows grey through a palette, and loses nothing by either."""
    image = banded((1, 9, 11))
    write_case(tmp_path / "images" / f"a{suffix}", image.astype(np.uint8), dimensions=2)
    flat = Predictor(Bundle(tmp_path / "model", make_spec(patch=(1, 8, 8))), engines=[engine])
    predict_many(find_cases(tmp_path / "images", 1), tmp_path / "out", flat)
    labels, _ = read_labels(tmp_path / "out" / f"a{suffix}")
    np.testing.assert_array_equal(labels, image)


def test_the_record_says_what_ran_and_on_what(cases: list[Case], predictor: Predictor, tmp_path: Path) -> None:
    predict_many(cases, tmp_path / "out", predictor)
    written = record(tmp_path / "out")
    assert written["segrt"] == __version__
    assert written["libraries"]["numpy"] == np.__version__
    assert {"numba", "SimpleITK", "openvino"} <= set(written["libraries"])
    assert written["model"] == "tiny"
    assert written["bundle_sha256"] == predictor.bundle.fingerprint
    assert written["settings"]["engines"] == ["function"]
    assert written["settings"]["step"] == 0.5
    assert written["peak_bytes"] > 10**7
    assert [c["name"] for c in written["cases"]] == ["a", "b", "c"]
    first = written["cases"][0]
    assert first["output"] == "a.nii.gz"
    assert first["windows"] == 8
    assert first["voxels"] == {f"label {v}": int((IMAGES["a"] == v).sum()) for v in (1, 2)}
    assert {"read", "network", "write"} <= set(first["seconds"])


def test_finished_cases_are_skipped(cases: list[Case], predictor: Predictor, engine: CountingEngine, tmp_path: Path) -> None:
    predict_many(cases[:2], tmp_path / "out", predictor)
    engine.calls.clear()
    results = predict_many(cases, tmp_path / "out", predictor)
    assert status(results) == {"a": "skipped", "b": "skipped", "c": "done"}
    assert len(engine.calls) == 8
    written = {c["name"]: c["status"] for c in record(tmp_path / "out")["cases"]}
    assert written == dict.fromkeys("abc", "done")


def test_overwrite_does_them_again(cases: list[Case], predictor: Predictor, tmp_path: Path) -> None:
    write_case(tmp_path / "out" / "a.nii.gz", np.zeros((2, 2, 2), np.uint8))
    assert status(predict_many(cases[:1], tmp_path / "out", predictor)) == {"a": "skipped"}
    assert status(predict_many(cases[:1], tmp_path / "out", predictor, overwrite=True)) == {"a": "done"}
    assert read_labels(tmp_path / "out" / "a.nii.gz")[0].shape == (9, 10, 11)


def test_labels_of_another_model_or_setting_are_kept_and_said(
    cases: list[Case], predictor: Predictor, engine: CountingEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Predictor(predictor.bundle, engines=[engine], step=1.0, threads=1)
    predict_many(cases[:2], tmp_path / "out", predictor)
    predict_many(cases[:2], tmp_path / "out", Predictor(predictor.bundle, engines=[engine], threads=1))
    assert caplog.text == ""  # threads change no label
    for _ in range(2):
        caplog.clear()
        predict_many(cases, tmp_path / "out", other)
        assert "a.nii.gz was made by another model or with other settings and is kept; --overwrite makes it again" in caplog.text
        assert "c.nii.gz" not in caplog.text
    written = record(tmp_path / "out")
    made_with = {c["name"]: c.get("settings", written["settings"])["step"] for c in written["cases"]}
    assert made_with == {"a": 0.5, "b": 0.5, "c": 1.0}
    predict_many(cases, tmp_path / "out", other, overwrite=True)
    assert not any("settings" in c for c in record(tmp_path / "out")["cases"])


def test_a_skipped_case_nobody_recorded_is_in_the_record(cases: list[Case], predictor: Predictor, tmp_path: Path) -> None:
    write_case(tmp_path / "out" / "a.nii.gz", np.zeros((2, 2, 2), np.uint8))
    predict_many(cases, tmp_path / "out", predictor)
    assert {c["name"]: c["status"] for c in record(tmp_path / "out")["cases"]} == {"a": "skipped", "b": "done", "c": "done"}


@pytest.mark.parametrize("text", ["{", "[]", '{"cases": 5}', '{"cases": [1, {"no": "name"}]}'])
def test_a_damaged_record_is_replaced(cases: list[Case], predictor: Predictor, tmp_path: Path, text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.json").write_text(text)
    predict_many(cases[:1], tmp_path / "out", predictor)
    assert [c["name"] for c in record(tmp_path / "out")["cases"]] == ["a"]


def test_a_failing_case_does_not_stop_the_others_and_is_tried_again(cases: list[Case], predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "images" / "b_0000.nii.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    results = predict_many(cases, tmp_path / "out", predictor)
    assert status(results) == {"a": "done", "b": "failed", "c": "done"}
    assert "b_0000.nii.gz" in results[1].error
    assert not (tmp_path / "out" / "b.nii.gz").exists()
    assert record(tmp_path / "out")["cases"][1]["error"] == results[1].error
    path.write_bytes(whole)
    assert status(predict_many(cases, tmp_path / "out", predictor)) == {"a": "skipped", "b": "done", "c": "skipped"}
    assert {c["name"]: c["status"] for c in record(tmp_path / "out")["cases"]} == dict.fromkeys("abc", "done")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), "not enough memory (allocation failed); free some"),
        (MemoryError("Unable to allocate 847. TiB"), "not enough memory (Unable to allocate 847. TiB); free some"),
        (RuntimeError("the backend\n\n  died\n"), "the backend died"),
        (RuntimeError(), "RuntimeError"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_what_goes_wrong_inside_a_case_is_its_error(
    cases: list[Case], predictor: Predictor, tmp_path: Path, error: Exception, sentence: str
) -> None:
    def dies(patches: np.ndarray) -> np.ndarray:
        raise error

    predictor.engines = [CountingEngine(dies)]
    results = predict_many(cases[:1], tmp_path / "out", predictor)
    assert results[0].status == "failed"
    assert results[0].error.startswith(sentence)


def test_an_interruption_keeps_the_record_of_finished_cases(cases: list[Case], predictor: Predictor, tmp_path: Path) -> None:
    class Interrupt(BaseException):
        pass

    def stop(case: str, done: int, total: int) -> None:
        if case == "b":
            raise Interrupt

    with pytest.raises(Interrupt):
        predict_many(cases, tmp_path / "out", predictor, progress=stop)
    assert [c["name"] for c in record(tmp_path / "out")["cases"]] == ["a"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.nii.gz", "predictions.json"]


def test_probabilities_that_cannot_be_written_are_named(cases: list[Case], predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "out" / "a.npz").mkdir(parents=True)
    results = predict_many(cases[:1], tmp_path / "out", predictor, probabilities=True)
    assert "a.npz cannot be written (Is a directory); free some space or choose another folder" in results[0].error


def test_progress_and_done_are_told(cases: list[Case], predictor: Predictor, tmp_path: Path) -> None:
    seen: list[Any] = []
    predict_many(cases[:1], tmp_path / "out", predictor, progress=lambda *a: seen.append(a), done=lambda r: seen.append(r.status))
    assert seen == [*(("a", k, 8) for k in range(1, 9)), "done"]


def test_probabilities_are_written_and_belong_to_what_is_finished(cases: list[Case], predictor: Predictor, tmp_path: Path) -> None:
    predict_many(cases[:1], tmp_path / "out", predictor)
    results = predict_many(cases[:1], tmp_path / "out", predictor, probabilities=True)
    assert status(results) == {"a": "done"}
    with np.load(tmp_path / "out" / "a.npz") as stored:
        assert (stored["probabilities"].argmax(0) == IMAGES["a"]).all()
    assert status(predict_many(cases[:1], tmp_path / "out", predictor, probabilities=True)) == {"a": "skipped"}


@pytest.mark.parametrize("format", [".nrrd", "nii", ".mha"])
def test_the_format_can_be_chosen(cases: list[Case], predictor: Predictor, tmp_path: Path, format: str) -> None:  # noqa: A002
    results = predict_many(cases[:1], tmp_path / "out", predictor, format=format)
    assert results[0].output == f"a.{format.lstrip('.')}"
    assert (read_labels(tmp_path / "out" / results[0].output)[0] == IMAGES["a"]).all()


@pytest.mark.parametrize("format", [".hdr", ".jpg", ".xyz", ""])
def test_a_format_that_cannot_be_written_is_refused_first(
    cases: list[Case],
    predictor: Predictor,
    engine: CountingEngine,
    tmp_path: Path,
    format: str,  # noqa: A002
) -> None:
    with pytest.raises(InputError, match=r"format: expected one of \.nii\.gz"):
        predict_many(cases, tmp_path / "out", predictor, format=format)
    assert engine.calls == []


def test_an_output_folder_that_is_a_file(cases: list[Case], predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    for path in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(InputError, match=r"out.* cannot be made"):
            predict_many(cases, path, predictor)


def test_a_record_that_cannot_be_written_is_said(cases: list[Case], predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "out" / "predictions.json").mkdir(parents=True)
    with pytest.raises(InputError, match=r"predictions\.json cannot be written"):
        predict_many(cases[:1], tmp_path / "out", predictor)


@pytest.mark.parametrize("overwrite", [True, False])
def test_labels_never_replace_images(predictor: Predictor, tmp_path: Path, overwrite: bool) -> None:
    path = write_case(tmp_path / "images" / "a.nii.gz", IMAGES["a"])
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"a\.nii\.gz is an image and would be replaced"):
        predict_many(find_cases(path.parent, 1), path.parent, predictor, overwrite=overwrite)
    assert path.read_bytes() == before


def cascade(tmp_path: Path) -> Predictor:
    function = lambda p: np.concatenate([np.full_like(p[:, :1], 0.5), p[:, 1:]], 1)  # noqa: E731
    return Predictor(Bundle(tmp_path / "model", make_spec(previous=PreviousStage(values=(1, 2)))), engines=[CountingEngine(function)])


def test_first_stage_labels_are_found_by_the_cases_name(cases: list[Case], tmp_path: Path) -> None:
    for name in "ab":
        write_case(tmp_path / "low" / f"{name}.nrrd", np.flip(IMAGES[name]).astype(np.uint8))
    results = predict_many(cases, tmp_path / "out", cascade(tmp_path), previous=tmp_path / "low")
    assert status(results) == {"a": "done", "b": "done", "c": "failed"}
    assert "no label file for case 'c'" in results[2].error
    labels = read_labels(tmp_path / "out" / "a.nii.gz")[0]
    assert labels.any()
    assert (labels[labels > 0] == np.flip(IMAGES["a"])[labels > 0]).all()


def test_first_stage_labels_for_a_model_that_takes_none(cases: list[Case], predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not the second stage of a cascade; leave out"):
        predict_many(cases, tmp_path / "out", predictor, previous=tmp_path)
    assert not (tmp_path / "out").exists()


def test_several_predictors_share_the_cases(cases: list[Case], tmp_path: Path) -> None:
    """Each on its own thread; both have to be at work at once, or the barrier breaks."""
    together = threading.Barrier(2, timeout=60)
    calls: dict[int, int] = {0: 0, 1: 0}

    def network(number: int) -> FunctionEngine:
        def run(patches: np.ndarray) -> np.ndarray:
            if not calls[number]:
                together.wait()
            calls[number] += 1
            return nearest((0, 1, 2))(patches)

        return FunctionEngine(run)

    predictors = [Predictor(Bundle(tmp_path / "model", make_spec()), engines=[network(k)]) for k in range(2)]
    seen: list[str] = []
    results = predict_many(cases, tmp_path / "out", predictors, done=lambda result: seen.append(result.name))
    assert [r.name for r in results] == [c.name for c in cases]
    assert {r.status for r in results} == {"done"}
    assert sorted(seen) == [c.name for c in cases]
    assert [c["name"] for c in record(tmp_path / "out")["cases"]] == [c.name for c in cases]
    alone = predict_many(cases, tmp_path / "alone", predictors[0])
    for one, other in zip(results, alone, strict=True):
        assert np.array_equal(read_labels(tmp_path / "out" / one.output)[0], read_labels(tmp_path / "alone" / other.output)[0])


def test_a_case_that_fails_on_one_of_several_predictors_stops_no_other(cases: list[Case], tmp_path: Path) -> None:
    cases[0].files[0].write_bytes(b"no image")
    predictors = [Predictor(Bundle(tmp_path / "model", make_spec()), engines=[CountingEngine(nearest((0, 1, 2)))]) for _ in range(2)]
    results = predict_many(cases, tmp_path / "out", predictors)
    assert [r.status for r in results] == ["failed", *["done"] * (len(cases) - 1)]


def test_cases_in_work_when_the_run_is_stopped_are_in_the_record(cases: list[Case], tmp_path: Path) -> None:
    """The first case's callback stops the run while the other predictor waits in the second case."""
    stopped = threading.Event()

    def network(patches: np.ndarray) -> np.ndarray:
        stopped.wait(60)
        return nearest((0, 1, 2))(patches)

    def stop(result: CaseResult) -> None:
        stopped.set()
        raise KeyboardInterrupt

    engines = [FunctionEngine(nearest((0, 1, 2))), FunctionEngine(network)]
    predictors = [Predictor(Bundle(tmp_path / "model", make_spec()), engines=[engine]) for engine in engines]
    with pytest.raises(KeyboardInterrupt):
        predict_many(cases, tmp_path / "out", predictors, done=stop)
    labelled = sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz"))
    assert len(labelled) >= 2
    assert sorted(c["output"] for c in record(tmp_path / "out")["cases"] if c["status"] == "done") == labelled
