"""Checkpoints: all that a training is at one iteration, as safetensors and JSON; written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError, SpecError
from ..files import sha256, staged_folder
from .config import TrainConfig

SCHEMA = 1
_WEIGHTS, _STATE, _JSON = "weights.safetensors", "state.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one fold: `iter_<n>` folders, of which the newest `keep` stay, and `best`.

    Attributes
    ----------
    folder : where they lie
    config, plan : what is trained, and the SHA-256 of its plan; checkpoints of another training are refused
    """

    folder: Path
    config: TrainConfig
    plan: str = ""

    def save(self, iteration: int, parts: Mapping[str, Any], progress: Mapping[str, Any]) -> Path:
        """Write a checkpoint and drop the oldest ones.

        Parameters
        ----------
        parts : "network", "optimizer", "schedule", "scaler": whatever has a state_dict; the network's becomes the weights
        progress : further numbers, given back by `resume`

        Raises
        ------
        InputError
            When it cannot be written.
        """
        tensors, plain = _split({name: part.state_dict() for name, part in parts.items() if name != "network"})
        values = self._header(iteration, progress) | {"parts": plain}
        target = self.folder / f"iter_{iteration:07d}"
        _write(target, values, {_WEIGHTS: parts["network"].state_dict(), _STATE: tensors})
        for old in self.saved()[: -self.config.keep]:
            shutil.rmtree(old)
        return target

    def save_best(self, iteration: int, network: torch.nn.Module, progress: Mapping[str, Any]) -> Path:
        """Write the weights that scored best so far."""
        target = self.folder / "best"
        _write(target, self._header(iteration, progress), {_WEIGHTS: network.state_dict()})
        return target

    def saved(self) -> list[Path]:
        """Checkpoints to go on from, oldest first."""
        return sorted(path for path in self.folder.glob("iter_*") if (path / _JSON).is_file())

    def resume(self, parts: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Load the newest checkpoint into `parts`; (iterations done, progress) come out, (0, {}) without any.

        Raises
        ------
        SpecError
            When it belongs to another plan or configuration.
        InputError
            When it is damaged.
        """
        saved = self.saved()
        if not saved:
            return 0, {}
        path = saved[-1]
        values = self._checked(path)
        tensors = _load(path / _STATE)
        parts["network"].load_state_dict(_load(path / _WEIGHTS))
        for name, part in parts.items():
            if name != "network":
                part.load_state_dict(_joined(tensors, values["parts"][name], name))
                if isinstance(part, torch.optim.Optimizer):
                    _lay_out(part)
        return int(values["iteration"]), dict(values["progress"])

    def chosen(self) -> Weights:
        """The weights that become the member: the last checkpoint's, or the best's, as the configuration says.

        Raises
        ------
        InputError
            When there is none.
        """
        best = self.folder / "best"
        saved = [best] if self.config.weights == "best" and (best / _JSON).is_file() else self.saved()
        if not saved:
            raise InputError(f"{self.folder}: no checkpoint in it; train this fold first")
        values = self._checked(saved[-1])
        path = saved[-1] / _WEIGHTS
        return Weights(_load(path), sha256(path), int(values["iteration"]), str(path))

    def _header(self, iteration: int, progress: Mapping[str, Any]) -> dict[str, Any]:
        config = json.loads(self.config.to_json())
        return {"schema": SCHEMA, "iteration": iteration, "plan": self.plan, "config": config, "progress": dict(progress)}

    def _checked(self, path: Path) -> dict[str, Any]:
        try:
            values: dict[str, Any] = json.loads((path / _JSON).read_text(encoding="utf-8"))
            config = TrainConfig.model_validate(values["config"])
            plan = values["plan"]
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise InputError(f"{path}: damaged ({' '.join(str(err).split())[:200]}); delete it to go on from an older one") from err
        if plan != self.plan:
            raise SpecError(f"{path} was trained for another plan (its data, network or preprocessing differ); choose another work folder")
        if different := self.config.differences(config):
            told = ", ".join(f"{name} {there!r} (now {here!r})" for name, (here, there) in different.items())
            raise SpecError(f"{path} was trained with {told}; go on with the same settings or choose another work folder")
        return values


@dataclass(frozen=True)
class Weights:
    """Weights of a trained fold: tensors by name, the SHA-256 of their file, the iteration, and the file."""

    tensors: dict[str, Tensor] = field(repr=False)
    sha256: str
    iteration: int
    path: str


def _write(target: Path, values: Mapping[str, Any], files: Mapping[str, Mapping[str, Tensor]]) -> None:
    try:
        with staged_folder(target) as folder:
            for name, tensors in files.items():
                save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(folder / name))
                (folder / name).chmod(0o644)
            (folder / _JSON).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as err:
        raise InputError(f"{target} cannot be written ({err}); free some space, the checkpoint before it is whole") from err


def _load(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(str(path))
    except (OSError, SafetensorError) as err:
        raise InputError(f"{path.parent}: damaged ({err}); delete it to go on from an older one") from err
    return tensors


def _split(values: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a nested state by dotted name, and the rest of it as it stands."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return None
        if isinstance(value, dict):
            rest = {str(k): walk(v, f"{name}.{k}") for k, v in value.items()}
            return {k: v for k, v in rest.items() if f"{name}.{k}" not in tensors}
        return [walk(v, f"{name}.{i}") for i, v in enumerate(value)] if isinstance(value, list | tuple) else value

    return tensors, {name: walk(value, name) for name, value in values.items()}


def _joined(tensors: Mapping[str, Tensor], plain: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The state_dict that `_split` took apart: an optimizer's state counts its parameters by number."""
    state = dict(plain)
    if "param_groups" in state:
        slots = {int(k): dict(v) for k, v in state["state"].items()}
        for key, tensor in tensors.items():
            if key.startswith(f"{name}.state."):
                number, slot = key.removeprefix(f"{name}.state.").split(".")
                slots[int(number)][slot] = tensor
        state["state"] = slots
    return state


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Have momentum and the like lie in memory as their parameters do: files hold them contiguous, and steps over both would be slow."""
    for parameter, state in optimizer.state.items():
        for slot, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[slot] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
