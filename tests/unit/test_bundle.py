"""The bundle: a folder that is whole or not there."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from factories import make_bundle, make_spec
from safetensors.numpy import load_file

from segrt.bundle import Bundle
from segrt.errors import InputError, SpecError
from segrt.files import held, sha256, staged_folder, write_atomic
from segrt.spec import PreviousStage


class Stop(BaseException):
    """Stands for Ctrl-C in the middle of a write."""


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_create_writes_spec_weights_and_reports(tmp_path: Path) -> None:
    weights = {"0": {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    bundle = Bundle.create(tmp_path / "b", make_spec(), weights=weights, reports={"plan.json": "{}", "curve.png": b"\x89PNG"})
    opened = Bundle.open(tmp_path / "b")
    assert opened.spec == bundle.spec
    assert opened.previous is None
    assert (load_file(opened.weights_path("0"))["a.weight"] == weights["0"]["a.weight"]).all()
    assert (opened.path / "reports" / "curve.png").read_bytes() == b"\x89PNG"
    assert names(tmp_path) == ["b"]


def test_torch_tensors_are_written_too(tmp_path: Path) -> None:
    import torch

    turned = torch.arange(6.0).reshape(2, 3).T
    tensors = {"w": torch.ones(2, requires_grad=True), "turned": turned, "count": torch.tensor(7)}
    stored = load_file(Bundle.create(tmp_path / "b", make_spec(), weights={"0": tensors}).weights_path("0"))
    assert stored["w"].tolist() == [1, 1]
    assert stored["turned"].tolist() == turned.tolist()
    assert stored["count"].shape == ()


def test_weights_keep_their_order_whatever_their_strides(tmp_path: Path) -> None:
    # safetensors stores memory as it lies: a channels-last weight came back permuted
    turned = np.moveaxis(np.arange(24, dtype=np.float32).reshape(2, 3, 4), -1, 1)
    bundle = Bundle.create(tmp_path / "b", make_spec(), weights={"0": {"w": turned}})
    np.testing.assert_array_equal(load_file(str(bundle.weights_path("0")))["w"], turned)


def test_a_failure_inside_create_leaves_nothing(tmp_path: Path) -> None:
    class Broken:
        def detach(self) -> Broken:
            raise Stop

    with pytest.raises(Stop):
        Bundle.create(tmp_path / "b", make_spec(), weights={"0": {"w": Broken()}})
    assert names(tmp_path) == []


def test_a_failed_replacement_keeps_the_old_bundle(tmp_path: Path) -> None:
    old = make_bundle(tmp_path / "b")
    with pytest.raises(OSError, match="no-such"):
        Bundle.create(tmp_path / "b", make_spec(name="new"), previous=Bundle(tmp_path / "no-such", make_spec()), force=True)
    assert Bundle.open(tmp_path / "b").spec == old.spec
    assert names(tmp_path) == ["b"]


def test_an_existing_bundle_is_replaced_only_by_force(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    with pytest.raises(InputError, match=r"a bundle is already there.*--force"):
        Bundle.create(tmp_path / "b", make_spec(name="new"))
    assert Bundle.create(tmp_path / "b", make_spec(name="new"), force=True).spec.name == "new"
    assert names(tmp_path / "b") == ["model.json"]
    assert names(tmp_path) == ["b"]


def test_other_folders_and_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("holiday", "file"):
        with pytest.raises(InputError, match="is not a bundle"):
            Bundle.create(tmp_path / name, make_spec(), force=True)
    (tmp_path / "empty").mkdir()
    Bundle.create(tmp_path / "empty", make_spec())
    assert (tmp_path / "empty" / "model.json").is_file()


def test_the_previous_stage_is_copied_along(tmp_path: Path) -> None:
    first = make_bundle(tmp_path / "low")
    spec = make_spec(previous=PreviousStage(values=(1, 2)))
    second = make_bundle(tmp_path / "full", spec, previous=first)
    previous = Bundle.open(second.path).previous
    assert previous is not None
    assert previous.spec == first.spec
    assert previous.onnx_path("0").is_file()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda b: (b / "model.json").unlink(), "no model.json in it"),
        (lambda b: (b / "onnx" / "0.onnx").unlink(), "member '0' has neither"),
        (lambda b: (b / "model.json").write_text('{"schema": 2}'), "schema 2"),
    ],
)
def test_open_names_what_is_missing(tmp_path: Path, damage: object, sentence: str) -> None:
    bundle = make_bundle(tmp_path / "b")
    damage(bundle.path)  # type: ignore[operator]
    with pytest.raises(SpecError, match=sentence):
        Bundle.open(bundle.path)


def test_open_wants_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("file", "nothing"):
        with pytest.raises(SpecError, match="no such bundle"):
            Bundle.open(tmp_path / name)


def test_the_fingerprint_follows_every_part_that_decides_labels(tmp_path: Path) -> None:
    first = make_bundle(tmp_path / "low")
    spec = make_spec(previous=PreviousStage(values=(1, 2)))

    def fingerprint(name: str, **options: object) -> str:
        return make_bundle(tmp_path / name, **({"spec": spec, "previous": first} | options)).fingerprint  # type: ignore[arg-type]

    base = fingerprint("a")
    assert base == fingerprint("b") == Bundle.open(tmp_path / "a").fingerprint
    others = [
        fingerprint("c", spec=spec.model_copy(update={"name": "other"})),
        fingerprint("d", centres=(0, 1, 3)),
        fingerprint("e", previous=make_bundle(tmp_path / "low2", centres=(0, 5, 6))),
        fingerprint("f", previous=None),
    ]
    assert len({base, *others}) == 5


def test_the_fingerprint_of_a_bundle_of_weights(tmp_path: Path) -> None:
    a, b = (Bundle.create(tmp_path / str(i), make_spec(), weights={"0": {"w": np.full(2, i, np.float32)}}) for i in range(2))
    assert a.fingerprint != b.fingerprint


def test_update_spec_and_reports(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    assert bundle.update_spec(make_spec(name="new")).spec.name == "new"
    assert Bundle.open(bundle.path).spec.name == "new"
    assert json.loads(bundle.write_report("x.json", {"a": 1}).read_text()) == {"a": 1}


def test_sha256_is_the_files(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f").startswith("ba7816bf8f01cfea")


def test_write_atomic_makes_folders_and_respects_the_umask(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "a" / "b.txt", "text")
    assert path.read_text() == "text"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_write_atomic_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "b.txt", "old")
    with pytest.raises(TypeError):
        write_atomic(path, 5)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert names(tmp_path) == ["b.txt"]


COUNT = """
import sys
from pathlib import Path
from segrt.files import held, write_atomic
path = Path(sys.argv[1]) / "made" / "count"
for _ in range(50):
    with held(path.parent):
        write_atomic(path, str(int(path.read_text() if path.exists() else 0) + 1))
"""


def test_what_several_processes_change_in_a_held_folder_loses_nothing(tmp_path: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)]) for _ in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert (tmp_path / "made" / "count").read_text() == "200"
    with pytest.raises(Stop), held(tmp_path / "made"):
        raise Stop
    with held(tmp_path / "made"):  # let go
        assert names(tmp_path / "made") == ["count"]


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"

    def stop_halfway() -> None:
        with staged_folder(target) as folder:
            (folder / "half").write_text("x")
            raise Stop

    with pytest.raises(Stop):
        stop_halfway()
    assert names(tmp_path / "deep") == []
    with staged_folder(target) as folder:
        assert not target.exists()
        (folder / "whole").write_text("x")
    assert names(target) == ["whole"]
    with staged_folder(target) as folder:
        (folder / "second").write_text("x")
    assert names(target) == ["second"]
    with pytest.raises(FileNotFoundError), staged_folder(target) as folder:
        folder.rmdir()  # it cannot take its place, so what was there stays
    assert names(target) == ["second"]
    assert names(tmp_path / "deep") == ["folder"]
