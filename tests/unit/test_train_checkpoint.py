"""Checkpoints: whole or not at all, the newest few and the best, and none of another training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from factories import UNET_3D
from train_jobs import tiny_config

from segrt.errors import InputError, SpecError
from segrt.networks import build
from segrt.train.checkpoint import Checkpoints
from segrt.train.layout import lay_out
from segrt.train.optim import build_optimizer, build_schedule


def _parts(optimizer: str = "adam") -> dict[str, object]:
    network = build(UNET_3D)
    config = tiny_config(optimizer=optimizer)
    made = build_optimizer(network.parameters(), config)
    return {
        "network": network,
        "optimizer": made,
        "schedule": build_schedule(made, config, config.iterations),
        "scaler": torch.amp.GradScaler("cpu", enabled=True),
    }


def _step(parts: dict[str, object], seed: int = 0) -> None:
    data = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(seed))
    parts["network"](data).square().mean().backward()
    parts["optimizer"].step()
    parts["optimizer"].zero_grad()
    parts["schedule"].step()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_everything_comes_back(tmp_path: Path, optimizer: str) -> None:
    config = tiny_config(optimizer=optimizer)
    store = Checkpoints(tmp_path, config, "plan")
    before, after = _parts(optimizer), _parts(optimizer)
    for _ in range(3):
        _step(before)
    store.save(3, before, {"best": 0.25, "average": None})
    assert store.resume(after) == (3, {"best": 0.25, "average": None})
    for part in (before, after):
        _step(part, seed=7)
    for name, tensor in before["network"].state_dict().items():
        assert torch.equal(tensor, after["network"].state_dict()[name]), name
    assert before["scaler"].state_dict() == after["scaler"].state_dict() != {}
    assert before["optimizer"].param_groups[0]["lr"] == after["optimizer"].param_groups[0]["lr"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_what_an_optimizer_keeps_lies_like_its_weights(tmp_path: Path, optimizer: str) -> None:
    store, before, after = Checkpoints(tmp_path, tiny_config(optimizer=optimizer), "plan"), _parts(optimizer), _parts(optimizer)
    for parts in (before, after):
        lay_out(parts["network"], torch.device("cpu"))
    _step(before)
    store.save(1, before, {})
    store.resume(after)
    slots = 0
    for weight, state in after["optimizer"].state.items():
        for value in state.values():
            if weight.ndim == 5 and torch.is_tensor(value) and value.ndim == 5:
                assert value.is_contiguous(memory_format=torch.channels_last_3d)
                slots += 1
    assert slots == {"sgd": 1, "adam": 2}[optimizer] * sum(weight.ndim == 5 for weight in after["network"].parameters())


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "none", tiny_config())
    assert store.resume(_parts()) == (0, {})
    with pytest.raises(InputError, match="no checkpoint in it; train this fold first"):
        store.chosen()


def test_only_the_newest_stay(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, tiny_config(keep=2), "plan")
    for iteration in (1, 2, 10, 200):
        store.save(iteration, _parts(), {})
    assert [path.name for path in store.saved()] == ["iter_0000010", "iter_0000200"]


def test_no_file_is_a_pickle_and_others_may_read_them(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path, tiny_config()).save(1, _parts(), {})
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    assert all(file.stat().st_mode & 0o044 for file in path.iterdir())


def test_best_or_last_becomes_the_member(tmp_path: Path) -> None:
    parts = _parts()
    last = Checkpoints(tmp_path, tiny_config(), "plan")
    last.save_best(1, parts["network"], {})
    _step(parts)
    last.save(2, parts, {})
    best = Checkpoints(tmp_path, tiny_config(weights="best"), "plan")
    assert (last.chosen().iteration, best.chosen().iteration) == (2, 1)
    assert last.chosen().sha256 != best.chosen().sha256


def test_without_a_best_the_last_one_is_taken(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, tiny_config(weights="best"), "plan")
    store.save(2, _parts(), {})
    assert store.chosen().iteration == 2


def test_of_another_plan_or_configuration(tmp_path: Path) -> None:
    Checkpoints(tmp_path, tiny_config(), "plan").save(1, _parts(), {})
    with pytest.raises(SpecError, match="was trained for another plan"):
        Checkpoints(tmp_path, tiny_config(), "other").resume(_parts())
    with pytest.raises(SpecError, match=r"with optimizer 'sgd' \(now 'adam'\), seed 1 \(now 2\); go on with the same settings"):
        Checkpoints(tmp_path, tiny_config(optimizer="adam", seed=2), "plan").resume(_parts())
    with pytest.raises(SpecError, match="another plan"):
        Checkpoints(tmp_path, tiny_config(), "other").chosen()


@pytest.mark.parametrize("name", ["weights.safetensors", "state.safetensors"])
def test_damaged_tensors(tmp_path: Path, name: str) -> None:
    store = Checkpoints(tmp_path, tiny_config())
    parts = _parts()
    _step(parts)
    path = store.save(1, parts, {})
    (path / name).write_bytes((path / name).read_bytes()[:100])
    with pytest.raises(InputError, match=r"iter_0000001: damaged .* delete it to go on from an older one"):
        store.resume(_parts())


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"config": {}, "plan": ""}', '{"config": {"lr": -1}, "plan": ""}'])
def test_damaged_description(tmp_path: Path, text: str) -> None:
    store = Checkpoints(tmp_path, tiny_config())
    path = store.save(1, _parts(), {})
    (path / "state.json").write_text(text)
    with pytest.raises((InputError, SpecError), match="iter_0000001"):
        store.resume(_parts())


def test_half_a_checkpoint_is_none(tmp_path: Path) -> None:
    """A crash while writing leaves a hidden folder, or none; what lacks its description does not count."""
    store = Checkpoints(tmp_path, tiny_config())
    store.save(1, _parts(), {})
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000002" / "weights.safetensors").write_bytes(b"")
    assert store.resume(_parts())[0] == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .* the checkpoint before it is whole"):
        Checkpoints(tmp_path / "file" / "checkpoints", tiny_config()).save(1, _parts(), {})


def test_the_description_is_plain_json(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path, tiny_config(), "plan").save(5, _parts(), {"best": None})

    def refuse(text: str) -> None:
        raise AssertionError(text)

    values = json.loads((path / "state.json").read_text(), parse_constant=refuse)
    assert (values["iteration"], values["plan"], values["config"]["lr"]) == (5, "plan", 0.01)
