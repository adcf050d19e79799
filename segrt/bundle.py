"""`Bundle`: a model is a folder; steps only ever add files to it, and a file appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import require
from .errors import InputError, SpecError
from .files import sha256, staged_folder, write_atomic
from .level import level_of, prune_spec
from .pair import check_identity, check_pair
from .spec import ModelSpec, Partner, load_spec


@dataclass(frozen=True)
class Bundle:
    """A model folder and its spec.

    Attributes
    ----------
    path : the folder
    spec : what model.json says
    whole : of a pruned UNet++ (see `at_level`) the bundle it is a level of, else None
    """

    path: Path
    spec: ModelSpec
    whole: Bundle | None = None

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read the bundle at `path`.

        Raises
        ------
        SpecError
            When there is no model.json, when it is wrong, when a member has neither ONNX nor weights, or when the partner of a pair is not
            the one it was made with.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise SpecError(f"{folder}: no such bundle; expected a folder made by segrt-build or segrt-train")
        if not (folder / "model.json").is_file():
            raise SpecError(f"{folder}: no model.json in it; expected a bundle (an nnU-Net folder becomes one with segrt-build)")
        bundle = cls(folder, load_spec(folder / "model.json"))
        for member in bundle.spec.members:
            if not bundle.onnx_path(member).is_file() and not bundle.weights_path(member).is_file():
                raise SpecError(
                    f"{folder}: member {member!r} has neither onnx/{member}.onnx nor weights/{member}.safetensors; copy the bundle again"
                )
        bundle._check_partner()
        return bundle

    @classmethod
    def create(
        cls,
        path: str | Path,
        spec: ModelSpec,
        *,
        weights: Mapping[str, Mapping[str, Any]] | None = None,
        previous: Bundle | None = None,
        partner: Bundle | None = None,
        reports: Mapping[str, str | bytes] | None = None,
        force: bool = False,
    ) -> Bundle:
        """Write a new bundle under a temporary name, then rename it to `path`.

        Parameters
        ----------
        weights : member -> tensor name -> array (NumPy or torch), written as safetensors
        previous : bundle of the stage before, copied into previous/
        partner : the other model of a pair, copied into partner/ and named in the spec
        reports : file name -> text or bytes, written into reports/
        force : replace an existing bundle

        Raises
        ------
        InputError
            When `path` exists and `force` is not set, or exists and is no bundle.
        SpecError
            When the partner is no model of the same channels and labels.
        """
        target = Path(path)
        check_replaceable(target, force=force)
        if partner is not None:
            spec = spec.model_copy(update={"partner": partner.identity})
            check_pair(target, spec, partner.spec)
        with staged_folder(target) as folder:
            (folder / "model.json").write_text(spec.to_json(), encoding="utf-8")
            for member, tensors in (weights or {}).items():
                _save_safetensors(folder / "weights" / f"{member}.safetensors", tensors)
            if previous is not None:
                shutil.copytree(previous.path, folder / "previous")
            if partner is not None:
                shutil.copytree(partner.path, folder / "partner")
            for name, content in (reports or {}).items():
                file = folder / "reports" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content.encode() if isinstance(content, str) else content)
        return cls(target, spec)

    def at_level(self, level: str) -> Bundle:
        """Give the model pruned to "L1", "L2", ...: the same folder and weights, with ONNX files and engines of its own.

        Raises
        ------
        InputError
            When this is no UNet++, or one without a head at that level.
        """
        spec = prune_spec(self.path, self.spec, level)
        return self if spec is self.spec else Bundle(self.path, spec, whole=self)

    @property
    def level(self) -> str | None:
        """ "L1", "L2", ... of a pruned network; None of a whole one."""
        return None if self.whole is None else level_of(self.spec)

    @property
    def build_command(self) -> str:
        """What makes the ONNX files and engines of this model."""
        return f"segrt-build {self.path}" + (f" --prune {self.level}" if self.level else "")

    def keyed(self, name: str) -> str:
        """A name that no other level's file or engine has."""
        return f"{name}-{self.level}" if self.level else name

    def weights_path(self, member: str) -> Path:
        """Where this member's safetensors file belongs."""
        return self.path / "weights" / f"{member}.safetensors"

    def onnx_path(self, member: str) -> Path:
        """Where this member's ONNX file belongs."""
        return self.path / "onnx" / f"{self.keyed(member)}.onnx"

    @property
    def reference_path(self) -> Path:
        """Where windows and their logits are kept, to verify engines without torch."""
        return self.path / "onnx" / f"{self.keyed('reference')}.npz"

    def engine_path(self, key: str) -> Path:
        """Where the compiled files of one engine belong."""
        return self.path / "engines" / self.keyed(key)

    @property
    def is_exported(self) -> bool:
        """Whether every member has its ONNX file."""
        return all(self.onnx_path(member).is_file() for member in self.spec.members)

    @cached_property
    def previous(self) -> Bundle | None:
        """The bundle of the stage before, or None."""
        return Bundle.open(self.path / "previous") if (self.path / "previous" / "model.json").is_file() else None

    @cached_property
    def partner(self) -> Bundle | None:
        """The other model of a pair, or None."""
        return None if self.spec.partner is None else Bundle.open(self.path / "partner")

    @property
    def identity(self) -> Partner:
        """What a pair knows this bundle by; building engines for it changes nothing of that."""
        files = [self.weights_path(member) for member in self.spec.members]
        weights = tuple(sha256(file) if file.is_file() else "" for file in files)
        return Partner(spec_sha256=sha256(self.path / "model.json"), weights_sha256=weights)

    def _check_partner(self) -> None:
        """Raise a SpecError unless the partner is the one this pair was made with."""
        if self.spec.partner is not None and self.partner is not None:
            check_pair(self.path, self.spec, self.partner.spec)
            check_identity(self.partner.path, self.partner.spec.members, named=self.spec.partner, found=self.partner.identity)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over model.json and every member's ONNX (else weights): what predictions.json records."""
        digest = hashlib.sha256((self.path / "model.json").read_bytes() + (self.level or "").encode())
        for member in self.spec.members:
            file = self.onnx_path(member)
            digest.update(sha256(file if file.is_file() else self.weights_path(member)).encode())
        for other in (self.previous, self.partner):
            if other is not None:
                digest.update(other.fingerprint.encode())
        return digest.hexdigest()

    def update_spec(self, spec: ModelSpec) -> Bundle:
        """Replace model.json with `spec`; the bundle of the new spec comes out."""
        write_atomic(self.path / "model.json", spec.to_json())
        return Bundle(self.path, spec)

    def write_report(self, name: str, values: Mapping[str, Any]) -> Path:
        """Write reports/`name` as JSON."""
        return write_atomic(self.path / "reports" / name, json.dumps(values, indent=1) + "\n")


def check_replaceable(target: Path, *, force: bool) -> None:
    """Raise an InputError unless a bundle may be written to `target`; `force` allows to replace one."""
    if not target.exists():
        return
    is_bundle = (target / "model.json").is_file()
    if target.is_dir() and not any(target.iterdir()):
        return
    if not is_bundle:
        raise InputError(f"{target}: exists and is not a bundle; choose another output folder")
    if not force:
        raise InputError(
            f"{target}: a bundle is already there; pass --force to replace it, choose another output folder, "
            f"or finish building it with: segrt-build {target}"
        )


def _save_safetensors(path: Path, tensors: Mapping[str, Any]) -> None:
    safetensors = require("safetensors.numpy", extra="export")
    # safetensors writes memory as it lies and would silently permute an array of another order
    arrays = {k: np.asarray(v.detach().cpu().numpy() if hasattr(v, "detach") else v, order="C") for k, v in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.save_file(arrays, str(path))
    except require("safetensors", extra="export").SafetensorError as err:
        raise InputError(f"{path} cannot be written ({err}); free some space or choose another folder") from err
    path.chmod(mode)  # safetensors makes it readable for its owner only
