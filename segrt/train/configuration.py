"""`Plan` and `Configuration`: what is going to be trained and why, as frozen values; stored as plan.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..arrays import Shape3, Spacing3
from ..spec import Head, Label, ModelSpec, Part
from .cases import Dataset
from .stored import parse_stored, read_stored

UNTRAINED = ("0",)  # a spec names its members; training replaces this by the folds it trained


class Configuration(Part):
    """One network to train and all around it.

    Attributes
    ----------
    spec : the runtime's own description, complete but for `members`, which training fills in
    batch_size : cases (3-D) or slices (2-D) per step
    batch_dice : the Dice term of the loss sums over the whole batch instead of one image at a time
    median_shape : (z, y, x) in voxels of the median case on the working grid
    deep_supervision : the network has a loss at every resolution
    flips : axes (z, y, x) that patches are mirrored along in training, where these are not those that predictions are averaged over
    previous : configuration whose labels are inputs of this one, or None
    reasons : choice -> why, one sentence each
    """

    spec: ModelSpec
    batch_size: int = Field(ge=1)
    batch_dice: bool
    median_shape: tuple[float, float, float]
    deep_supervision: bool
    flips: tuple[Literal[0, 1, 2], ...] | None = None
    previous: str | None = None
    reasons: Mapping[str, str] = Field(default_factory=dict)


class Plan(Part):
    """Every configuration a dataset can be trained with.

    Attributes
    ----------
    planner : preset that made it ("default", "resenc_m", ..., "vnet")
    memory_gb : GPU memory it was made for; None where no memory was counted
    transpose : axis i of the working array is axis transpose[i] of the image
    median_spacing, median_shape : of the cropped images, in transposed axes, mm and voxels
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    dataset: str
    planner: str
    memory_gb: float | None
    transpose: Shape3
    median_spacing: Spacing3
    median_shape: Shape3
    configurations: dict[str, Configuration]

    def to_json(self) -> str:
        """The text of plan.json."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"


def load_plan(path: Path) -> Plan:
    """Read a plan.json.

    Raises
    ------
    SpecError
        When the file is not JSON, is of another schema, or a value is wrong.
    """
    return parse_stored(Plan, read_stored(path), where=str(path))


def labels_of(dataset: Dataset) -> tuple[Label, ...]:
    """The structures of a dataset, the background left out."""
    return tuple(Label(name=name, values=values) for name, values in dataset.foreground.items())


def head_of(dataset: Dataset) -> Head:
    """Softmax over all values in rising order, or one sigmoid per region."""
    if dataset.regions:
        return Head(activation="sigmoid", values=dataset.class_order)
    return Head(activation="softmax", values=dataset.values)
