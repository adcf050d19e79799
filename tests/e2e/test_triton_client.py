"""RemotePredictor and `segrt-predict --triton` against a real tritonserver: the labels, grids and records of a Predictor."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_side import Served
from factories import banded, make_bundle, make_spec, volume_of, write_case
from triton_server import serving, write_repository

from segrt import Predictor
from segrt.cli import predict as predict_command
from segrt.errors import InputError
from segrt.io import write_image, write_labels
from segrt.serving import Connection, RemotePredictor
from segrt.spec import KeepLargest
from segrt.volume import Grid

SPACING = (2.0, 1.0, 1.5)
IMAGE = banded((19, 14, 12), seed=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    """A server with the models of one bundle, but for the one nobody asks here."""
    bundle = make_bundle(folder / "organ", make_spec(mirror_axes=(2,), postprocess=(KeepLargest(values=(1, 2)),)))
    write_repository(folder / "repository", bundle, "organ")
    shutil.rmtree(folder / "repository" / "organ_bls")
    write_repository(folder / "repository", make_bundle(folder / "picture", make_spec(patch=(1, 16, 16))), "picture", alone=True)
    with serving(folder / "repository") as server:
        yield Served(server, folder)


@pytest.fixture(scope="module")
def local(folder: Path, served: Served) -> Iterator[Predictor]:
    with Predictor(folder / "organ") as predictor:
        yield predictor


@pytest.fixture(params=["grpc", "http"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def same(found: Any, expected: Any) -> None:
    """Two segmentations with equal bytes and equal everything else."""
    assert found.labels.dtype == expected.labels.dtype
    assert found.labels.tobytes() == expected.labels.tobytes()
    assert found.labels.flags.writeable
    assert (found.grid, found.names, found.name, found.windows) == (expected.grid, expected.names, expected.name, expected.windows)
    assert found.voxels() == expected.voxels()


@pytest.mark.parametrize("way", ["off", "system", "auto"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.int32])
def test_triton_gives_the_predictors_labels_for_arrays(served: Served, local: Predictor, protocol: str, way: Any, dtype: Any) -> None:
    image = (IMAGE.astype(dtype), SPACING)
    expected = local(image, probabilities=True)
    with RemotePredictor(served.url(protocol), "organ", connection=Connection(shared_memory=way)) as remote:
        found = remote(image, probabilities=True)
    same(found, expected)
    assert found.probabilities is not None
    assert expected.probabilities is not None
    assert found.probabilities.tobytes() == expected.probabilities.tobytes()
    assert {"read", "transfer", "network"} <= set(found.seconds)
    assert served.left() == []


@pytest.mark.parametrize("send_files", [False, True])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".png"])
def test_triton_gives_the_predictors_labels_for_files(
    served: Served, local: Predictor, protocol: str, tmp_path: Path, suffix: str, send_files: bool
) -> None:
    path = tmp_path / f"case_0000{suffix}"
    if suffix == ".png":
        write_image(path, IMAGE[:1].astype(np.uint8), Grid((1, *IMAGE.shape[1:]), dimensions=2))
    else:
        write_case(path, IMAGE, SPACING, origin=(5.0, -3.0, 8.0))
    expected = local(path)
    with RemotePredictor(served.url(protocol), "organ", connection=Connection(send_files=send_files)) as remote:
        found = remote(path)
    same(found, expected)
    assert served.left() == []


def test_triton_is_asked_with_options(served: Served, local: Predictor, protocol: str) -> None:
    image = volume_of(IMAGE, SPACING)
    for options in ({"step": 1.0, "tta": False}, {"postprocess": False}):
        with RemotePredictor(served.url(protocol), "organ", **options) as remote:
            same(remote(image), Predictor(local.bundle, **options)(image))
    with RemotePredictor(served.url(protocol), "organ", level="L1") as remote, pytest.raises(InputError, match="L1"):
        remote(image)


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_triton_answers_through_compression(served: Served, local: Predictor, protocol: str, compression: Any) -> None:
    image = volume_of(IMAGE, SPACING)
    how = Connection(compression=compression, shared_memory="off")
    with RemotePredictor(served.url(protocol), "organ", connection=how) as remote:
        same(remote(image), local(image))


def test_triton_tells_of_every_window_over_a_stream(served: Served, local: Predictor) -> None:
    image, seen, here = volume_of(IMAGE, SPACING), list[tuple[int, int]](), list[tuple[int, int]]()
    expected = local(image, progress=lambda *now: here.append(now))
    with RemotePredictor(served.server.grpc, "organ") as remote:
        same(remote(image, progress=lambda *now: seen.append(now)), expected)
    assert seen == sorted(seen)
    assert seen[-1] == here[-1]
    with RemotePredictor(served.url("http"), "organ") as remote:
        told = list[tuple[int, int]]()
        same(remote(image, progress=lambda *now: told.append(now)), expected)
    assert len(told) == 1
    assert told[0][0] == told[0][1]


# ------------------------------------------------------------------ segrt-predict
@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Three cases in images/, the working folder."""
    monkeypatch.chdir(tmp_path)
    made = {name: banded((12, 13, 14), seed=seed) for seed, name in enumerate("abc")}
    for name, image in made.items():
        write_case(Path("images") / f"{name}_0000.nii.gz", image, SPACING)
    return made


def predict(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["segrt-predict", "images", "out", *arguments])
    with pytest.raises(SystemExit) as left:
        predict_command.main()
    return int(left.value.code or 0)


@pytest.mark.parametrize("flags", [(), ("--send-files", "--timeout", "60"), ("--shared-memory", "off", "--compression", "gzip")])
def test_triton_segments_a_folder(
    served: Served,
    local: Predictor,
    protocol: str,
    images: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    capsys: Any,
) -> None:
    url = served.url(protocol)
    assert predict(monkeypatch, "--triton", f"{url},{url}", "--model", "organ", *flags) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 done; details in out/predictions.json"
    for name in images:
        found = local(Path("images") / f"{name}_0000.nii.gz")
        write_labels(Path("here.nii.gz"), found.labels, found.grid)
        assert Path("here.nii.gz").read_bytes() == (Path("out") / f"{name}.nii.gz").read_bytes()
    record = json.loads(Path("out/predictions.json").read_text())
    assert record["bundle_sha256"] == local.bundle.fingerprint
    assert record["settings"]["engines"] == ["triton organ"]
    assert predict(monkeypatch, "--triton", url, "--model", "organ") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 skipped")


def test_triton_segments_the_rest_of_a_folder_with_a_damaged_image(
    served: Served, protocol: str, images: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    damaged = Path("images/b_0000.nii.gz")
    damaged.write_bytes(damaged.read_bytes()[:60])
    for flags in ((), ("--send-files", "--overwrite")):
        assert predict(monkeypatch, "--triton", served.url(protocol), "--model", "organ", *flags) == 3
        captured = capsys.readouterr()
        assert captured.out.splitlines()[-1].startswith("2 done, 1 failed")
        assert "b failed: b_0000.nii.gz" in captured.err
        assert sorted(path.name for path in Path("out").iterdir()) == ["a.nii.gz", "c.nii.gz", "predictions.json"]


def test_triton_gives_the_predictors_labels_for_frames(served: Served, folder: Path, protocol: str) -> None:
    frames = [banded((1, 20, 30), seed=seed)[0].astype(np.uint8) for seed in range(5)]
    with Predictor(folder / "picture", device="cpu") as predictor, RemotePredictor(served.url(protocol), "picture") as remote:
        expected = list(predictor.frames(frames, spacing=(0.5, 0.5)))
        for batch in (1, 3):
            for found, label in zip(remote.frames(iter(frames), batch=batch, spacing=(0.5, 0.5)), expected, strict=True):
                assert found.dtype == label.dtype
                np.testing.assert_array_equal(found, label)
        with pytest.raises(InputError, match="batch: expected 1 or more frames"):
            next(remote.frames(frames, batch=0))
    with RemotePredictor(served.url(protocol), "organ") as remote, pytest.raises(InputError, match="cannot take a stream of frames"):
        next(remote.frames(frames))
