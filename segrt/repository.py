"""What the models of a Triton repository are called, and what each is told by its config.pbtxt; the exporter and the server agree here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .bundle import Bundle
from .engines import Backend, Precision
from .errors import InputError
from .level import levels_of
from .protocol import PATCH_SUFFIX, SPEC, TAKES_PREVIOUS, check_name

Role = Literal["pipeline", "patch", "bls", "stream"]
# role -> the class of segrt.serving.backend that the model's model.py binds
CLASSES: Mapping[Role, str] = {"pipeline": "PipelineModel", "patch": "PatchModel", "bls": "BlsModel", "stream": "StreamModel"}


class Network(BaseModel):
    """One network of a served bundle, and the model of the repository that runs nothing else.

    Attributes
    ----------
    model : the model's name in the repository
    member : the trained fold
    stage : "" of the bundle's own, else the folder in it that holds the bundle it belongs to: "previous" (a cascade's first stage),
        "partner" (of a pair), or one below the other, such as "partner/previous"
    level : a UNet++'s pruned network, such as "L2"; None for the whole one
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    member: str
    stage: Annotated[str, Field(pattern=r"^((previous|partner)(/(previous|partner))*)?$")] = ""
    level: str | None = None

    def bundle_in(self, served: Bundle) -> Bundle:
        """Give the bundle, at the level, whose member this network is.

        Raises
        ------
        InputError
            When the served bundle has no such stage.
        """
        bundle = served
        for folder in self.stage.split("/") if self.stage else ():
            other = bundle.previous if folder == "previous" else bundle.partner
            if other is None:
                raise InputError(f"{bundle.path} has no {folder} bundle, which model {self.model!r} is to run; write the repository again")
            bundle = other
        return bundle if self.level is None else bundle.at_level(self.level)


def check_target(repository: Path, bundle: Path, name: str | None) -> str:
    """Give the name under which the bundle in a folder is served in a repository: the folder's, unless one is chosen.

    Raises
    ------
    InputError
        When the name is no model's, or the repository lies in the bundle.
    """
    if repository.resolve().is_relative_to(bundle.resolve()):
        raise InputError(f"{repository} lies in the bundle {bundle}; choose a folder outside it")
    chosen = bundle.resolve().name if name is None else name
    try:
        return check_name(chosen)
    except InputError as err:
        raise InputError(f"{err}; choose one with --triton-name") from err


def networks_of(name: str, bundle: Bundle) -> tuple[Network, ...]:
    """Give every network that predicting with a bundle may run, and what its model is called: name_patch for most bundles.

    With several members it is name_patch_<member>, of a cascade's first stage name_previous_patch, of a pair's other model
    name_partner_patch; a pruned level adds -L2. Levels count when their ONNX files are there.
    """
    return tuple(_networks(name, bundle, ""))


def levels_in(bundle: Bundle) -> tuple[Bundle, ...]:
    """Give the bundle itself, and the levels of a UNet++ that were exported."""
    levels = (bundle.at_level(level) for level in levels_of(bundle.spec))
    return (bundle, *(level for level in levels if level.whole is not None and level.is_exported))


def _networks(name: str, bundle: Bundle, stage: str) -> Iterator[Network]:
    several = len(bundle.spec.members) > 1
    # only the served bundle itself can be asked for a level
    for at_level in (bundle,) if stage else levels_in(bundle):
        for member in bundle.spec.members:
            model = at_level.keyed(f"{name}{PATCH_SUFFIX}" + (f"_{member}" if several else ""))
            yield Network(model=model, member=member, stage=stage, level=at_level.level)
    for folder, other in (("previous", bundle.previous), ("partner", bundle.partner)):
        if other is not None:
            yield from _networks(f"{name}_{folder}", other, f"{stage}/{folder}".lstrip("/"))


class Deployment(BaseModel):
    """What the parameters in a model's config.pbtxt say to the model; one JSON text each where a value is no plain text.

    Attributes
    ----------
    role : what the model does: the whole pipeline, one network, or the pipeline with its windows run by the models of the networks
    name : the model of the whole pipeline; the others' names begin with it
    bundle : the bundle's folder in the repository; {version} stands for the model's version
    bundle_sha : fingerprint of the bundle of the newest version
    bundle_shas : version -> fingerprint of its bundle; several versions share one config.pbtxt
    patch_models : of a patch model the network it runs; of bls and stream every network and who runs it
    backend, precision, threads : as `Predictor` takes them; its device follows the instance's kind and number
    max_voxels : voxels an image may have over all channels; decided by the memory there is when it starts by default
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    name: str
    bundle: str
    bundle_sha: str
    bundle_shas: dict[str, str]
    patch_models: tuple[Network, ...] = ()
    backend: Backend = "auto"
    precision: Precision | None = None
    threads: Annotated[int, Field(ge=0)] = 0
    max_voxels: Annotated[int, Field(gt=0)] | None = None

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Deployment:
        """Read the `parameters` of a model's configuration, as the server's JSON has them ({"string_value": ...}) or as plain text.

        What is there for clients, and the server's own in capital letters, is passed over.

        Raises
        ------
        InputError
            When one is missing, unknown, or not what is expected.
        """
        texts = {key: value["string_value"] if isinstance(value, Mapping) else value for key, value in parameters.items()}
        try:
            return cls.model_validate({key: _value(key, text) for key, text in texts.items() if not (key.isupper() or key in _FOR_CLIENTS)})
        except ValidationError as err:
            first = err.errors()[0]
            raise InputError(f"config.pbtxt, parameter {'.'.join(map(str, first['loc']))}: {first['msg']}; write it again") from err

    def to_parameters(self) -> dict[str, str]:
        """What config.pbtxt holds; defaults are left out."""
        given = self.model_dump(exclude_defaults=True, mode="json")
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}

    def bundle_folder(self, repository: Path, version: str | int) -> Path:
        """Where the bundle of a version lies.

        Raises
        ------
        InputError
            When that would not be inside the repository.
        """
        relative = PurePosixPath(self.bundle.replace("{version}", str(version)))
        folder = (repository / relative).resolve()
        if relative.is_absolute() or not folder.is_relative_to(repository.resolve()):
            raise InputError(f"config.pbtxt, parameter bundle: expected a folder inside the model repository, got {self.bundle!r}")
        return folder


def _value(key: str, text: Any) -> Any:
    if key not in _JSON_PARAMETERS:
        return text
    try:
        return json.loads(text)
    except (TypeError, ValueError) as err:
        raise InputError(f"config.pbtxt, parameter {key}: expected JSON, got {str(text)[:80]!r}; write it again") from err


_JSON_PARAMETERS = ("bundle_shas", "patch_models")
_FOR_CLIENTS = (SPEC, TAKES_PREVIOUS)
