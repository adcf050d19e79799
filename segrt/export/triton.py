"""SERVE: a bundle becomes the models of a Triton repository; what changed becomes a new version of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..bundle import Bundle
from ..engines import Backend, Precision, resolve_device
from ..errors import InputError, SpecError
from ..files import staged_folder, write_atomic
from ..protocol import BLS_SUFFIX, STREAM_SUFFIX
from ..repository import CLASSES, Role, check_target
from .pbtxt import to_text
from .triton_bundle import bundle_files, holds, link_or_copy
from .triton_config import Export, patch_config, pipeline_config, warmup_files
from .triton_native import native_files, native_models

logger = logging.getLogger(__name__)

_MODEL = '''"""{what}.

All it does is in segrt.serving.backend, which the server's Python has to find.
"""

from segrt.serving.backend import {name} as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_WHAT: dict[Role, str] = {
    "pipeline": "Whole images in, labels out, on engines of its own",
    "patch": "The bare network: patches in, logits out",
    "bls": "Whole images in, labels out; the windows of all requests meet in the patch models",
    "stream": "Whole images in, progress and then labels out; the windows of all requests meet in the patch models",
}


@dataclass(frozen=True)
class Written:
    """What a repository holds after an export.

    Attributes
    ----------
    repository : its folder
    version : number that all models of this bundle now have
    models : their names, that of the whole pipeline first
    new : whether this version was added; False when the bundle is the one that was there
    unused : models of earlier versions that this one has no use for
    """

    repository: Path
    version: int
    models: tuple[str, ...]
    new: bool
    unused: tuple[str, ...] = ()


def write_triton(
    bundle: Bundle,
    repository: str | Path,
    *,
    name: str | None = None,
    device: str = "auto",
    backend: Backend = "auto",
    precision: Precision | None = None,
    instances: int = 1,
) -> Written:
    """Write the models that serve a bundle: <name>, <name>_bls, <name>_stream, and a <name>_patch for each network.

    A repository that serves another bundle under this name gets a new version of each model; one that serves this very bundle gets
    only what is missing or was changed in it.

    Parameters
    ----------
    bundle : a finished bundle; of a pruned UNet++ the whole one, whose levels requests can ask for
    repository : folder of the model repository; made when it is missing
    name : of the models; the bundle folder's by default
    device : where instances live: "cpu", "cuda" (each GPU), "cuda:1", or "auto": what the backend is for, else GPUs when there is one
    backend, precision : what the engines are to be, see `Predictor`
    instances : requests that run at once, each with engines of its own

    Returns
    -------
    Written

    Raises
    ------
    InputError
        When the name is no folder's, the repository lies in the bundle, or one of its folders belongs to something else.
    BackendError
        When a GPU is asked for that is not there.
    """
    root = Path(repository)
    name = check_target(root, bundle.path, name)
    if instances < 1:
        raise InputError(f"instances: expected 1 or more, got {instances}")
    export = Export(name, bundle, {}, None, _served_device(device, backend), backend, precision, instances)
    models = [*_pipelines(name), *(network.model for network in export.networks)]
    for model in models:
        _check_owned(root, model, name)
    present = _versions(root, models)
    files = list(bundle_files(bundle, with_weights=export.on_gpu or backend == "pytorch"))
    newest = present[-1] if present else 0
    new = not newest or not holds(root / name / str(newest) / "bundle", bundle, files)
    version = newest + 1 if new else newest
    export = _with_history(export, root, version, [number for number in present if number < version])
    _write_configs(export, root)
    _write_versions(export, root, version, files)
    _link_networks(export, root, version)
    return Written(root, version, tuple(models), new, _unused(root, name, models))


def _served_device(device: str, backend: Backend) -> str:
    """Where instances live; "cuda" stands for every GPU the server will see."""
    if device == "auto":
        device = {"openvino": "cpu", "tensorrt": "cuda", "tensorrt-rtx": "cuda"}.get(backend, device)
    concrete = resolve_device(device)
    return "cuda" if concrete.startswith("cuda") and device in ("auto", "cuda") else concrete


def _header(name: str) -> str:
    return f"# written by segrt-build --triton for {name}, which writes it again\n"


def _is_ours(config: Path, name: str) -> bool:
    return config.read_text(encoding="utf-8", errors="replace").startswith(_header(name))


def _check_owned(root: Path, model: str, name: str) -> None:
    """Refuse to write into what is not ours: a link that leads elsewhere, or a model that other hands made."""
    folder, config = root / model, root / model / "config.pbtxt"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder} is no folder of the repository's own; choose another name with --triton-name")
    if config.is_file() and not _is_ours(config, name):
        raise InputError(f"{config} is not of the models that serve {name!r}; choose another name with --triton-name, or remove {folder}")
    if folder.is_dir() and not config.is_file() and any(not _is_version(path) and path.name not in _OURS for path in folder.iterdir()):
        raise InputError(f"{folder} holds files that segrt-build did not write; choose another name with --triton-name, or remove it")


_OURS = ("configs", "warmup")


def _is_version(path: Path) -> bool:
    """A version's folder, or one that an interrupted export left under a hidden name."""
    return path.is_dir() and (path.name.isdecimal() or path.name.startswith("."))


def _versions(root: Path, models: Sequence[str]) -> list[int]:
    """Versions that any of the models has, oldest first."""
    folders = (path for model in models if (root / model).is_dir() for path in (root / model).iterdir())
    return sorted({int(path.name) for path in folders if path.is_dir() and path.name.isdecimal()})


def _with_history(export: Export, root: Path, version: int, earlier: Sequence[int]) -> Export:
    """The export with the fingerprints of all versions, and the bundle of the one before, which patch models keep."""
    shas, before = {}, None
    for number in earlier:
        try:
            before = Bundle.open(root / export.name / str(number) / "bundle")
            shas[str(number)] = before.fingerprint
        except (SpecError, OSError):  # it was taken away: nothing can run it
            before = None
    return replace(export, shas={**shas, str(version): export.bundle.fingerprint}, earlier=before)


def _write_configs(export: Export, root: Path) -> None:
    """Write every config.pbtxt and what lies beside it.

    Before the version's folder: a server that watches the repository finds each version with a configuration that knows it.
    """
    configs = {network.model: patch_config(export, network) for network in export.networks}
    configs |= {model: pipeline_config(export, role, model) for model, role in _pipelines(export.name).items()}
    for model, config in configs.items():
        _write_changed(root / model / "config.pbtxt", (_header(export.name) + to_text(config)).encode())
    for file, content in warmup_files(export.bundle.spec).items():
        _write_changed(root / export.name / "warmup" / file, content)
    for network in export.networks:
        for file, text in native_files(export, network).items():
            _write_changed(root / network.model / "configs" / file, text.encode())


def _write_versions(export: Export, root: Path, version: int, files: Sequence[Path]) -> None:
    """Write the version's folders that are not there: the bundle's first, then the patch models' before those that call them."""
    pipelines = _pipelines(export.name)
    for model in [export.name, *(network.model for network in export.networks), *pipelines]:
        if (root / model / str(version)).is_dir():
            continue
        with staged_folder(root / model / str(version)) as folder:
            for file in files if model == export.name else ():
                link_or_copy((export.bundle.path / file).resolve(), folder / "bundle" / file)
            (folder / "model.py").write_text(_model_py(pipelines.get(model, "patch")), encoding="utf-8")


def _link_networks(export: Export, root: Path, version: int) -> None:
    """Give Triton's own backends the network's files under the names they look for, as links into the served bundle."""
    for network in export.networks:
        for name, file in native_models(export, network, version).items():
            link, target = root / network.model / str(version) / name, Path("..", "..", file)
            if link.is_symlink() and link.readlink() == target:
                continue
            link.unlink(missing_ok=True)
            try:
                link.symlink_to(target)
            except OSError as err:  # a file system without links; our own models do without
                logger.warning("%s cannot be a link to %s (%s); Triton's own backends need it", link, target, err.strerror or err)


def _pipelines(name: str) -> dict[str, Role]:
    """Models that answer whole images: name -> role."""
    return {name: "pipeline", f"{name}{BLS_SUFFIX}": "bls", f"{name}{STREAM_SUFFIX}": "stream"}


def _model_py(role: Role) -> str:
    return _MODEL.format(what=_WHAT[role], name=CLASSES[role])


def _write_changed(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        write_atomic(path, content)


def _unused(root: Path, name: str, models: Sequence[str]) -> tuple[str, ...]:
    """Models of this bundle's earlier versions, such as of a member that is gone; a server may still be finishing with them."""
    return tuple(c.parent.name for c in sorted(root.glob("*/config.pbtxt")) if c.parent.name not in models and _is_ours(c, name))
