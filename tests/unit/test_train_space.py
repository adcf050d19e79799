"""Room for prepared cases: that of all stages together is asked for before the first one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from train_factory import configure, write_dataset
from train_jobs import CPU
from train_jobs import write_dataset as write_balls

from segrt.errors import InputError
from segrt.train.config import make_config
from segrt.train.folds import Show
from segrt.train.prepare import prepare
from segrt.train.run import train_model
from segrt.train.sizes import cache_bytes
from segrt.train.space import check_space
from segrt.train.work import Work


class Usage(NamedTuple):
    free: float


def test_the_needs_of_all_stages_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, told = write_dataset(tmp_path / "raw"), list[str]()
    place = Work(tmp_path, dataset, make_config(), CPU, tmp_path, Show(stage=told.append))
    configuration = configure()
    one = cache_bytes(dataset.cases, configuration.spec)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1.5 * one))
    check_space(place, {"a": configuration})
    assert told == [f"prepared cases of a need about {one / 1e9:.3g} GB and {1.5 * one / 1e9:.3g} GB are free in {tmp_path}"]
    with pytest.raises(InputError, match=r"prepared cases of a, b need about .*; store float16 .*, train fewer configurations, free some"):
        check_space(place, {"a": configuration, "b": configuration.model_copy(update={"previous": "a"})})
    prepare(dataset, configuration, tmp_path / "prepared" / "a", workers=1)
    check_space(place, {"a": configuration, "b": configuration.model_copy(update={"previous": "a"})})
    assert f"need about {one / 1e9:.3g} GB" in told[-1]  # what is there needs no more


def test_cases_of_other_settings_make_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other: beside the difference only the largest of them needs room, for each worker."""
    dataset, told = write_dataset(tmp_path / "raw", [(12, 14, 10)] * 4), list[str]()
    config = make_config(storage="npy", workers=1)
    place = Work(tmp_path, dataset, config, CPU, tmp_path, Show(stage=told.append))
    configuration, folder = configure(), tmp_path / "prepared" / "a"
    half = prepare(dataset, configuration, folder, workers=1, dtype="float16", storage="npy")
    old = [sum(case.sizes.values()) for case in half.cases]
    new = cache_bytes(dataset.cases, configuration.spec, storage="npy")
    assert 0 < sum(old) < new
    for workers, room in {1: 1.1 * (new - sum(old) + max(old)), 4: new}.items():
        monkeypatch.setattr(shutil, "disk_usage", lambda _, room=room: Usage(room))
        check_space(replace(place, config=config.model_copy(update={"workers": workers})), {"a": configuration})
        monkeypatch.setattr(shutil, "disk_usage", lambda _, room=room: Usage(0.8 * room))
        with pytest.raises(InputError, match="prepared cases of a need about"):
            check_space(replace(place, config=config.model_copy(update={"workers": workers})), {"a": configuration})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1.1 * (new - sum(old) + max(old))))
    assert len(prepare(dataset, configuration, folder, workers=1, storage="npy").cases) == 4


def test_cases_are_stored_as_the_configuration_says(tmp_path: Path) -> None:
    data = write_balls(tmp_path / "data", cases=2)
    config = make_config(storage="npy", cache="float16", workers=0, folds=("all",))
    told = list[str]()
    assert train_model(data, tmp_path / "m", config, prepare_only=True, show=Show(stage=told.append)) is None
    folder = tmp_path / "m.train" / "prepared" / "3d_fullres" / "ball_000"
    assert sorted(path.name for path in folder.iterdir()) == ["case.json", "data.npy", "labels.npy", "locations.npy"]
    assert any(line.startswith("prepared cases of 3d_fullres need about ") for line in told)
