"""Where MedicalSeg's files and the article that uses them for AMOS CT say what is not so; each becomes a warning of the import."""

from __future__ import annotations

from collections.abc import Mapping

from ..networks import build_empty, count_parameters
from ..spec import VNetSpec
from .medicalseg_section import Notes

_NNUNET_PARAMETERS = 31e6
_HEADER_ITERATIONS, _RUN_ITERATIONS = 50_000, 30_000


def size_of_vnet(notes: Notes, classes: int, channels: int, *, elu: bool) -> None:
    """The article calls V-Net the smaller network."""
    count = count_parameters(build_empty(VNetSpec(in_channels=channels, out_channels=classes, elu=elu)))
    notes.warn(
        "model.type",
        "VNet",
        f"this network has {count:,} parameters, {count / _NNUNET_PARAMETERS:.1f} times nnU-Net's 31 million; the article says less than "
        "half (--width for a smaller one)",
    )


def iterations_of_article(notes: Notes, iterations: int) -> None:
    """The article's table says 50000, its commands and text 30000."""
    if iterations == _HEADER_ITERATIONS:
        notes.warn(
            "iters",
            iterations,
            f"trained as the file says; the article's commands and curves are of {_RUN_ITERATIONS}, only the header of its table says "
            f"{_HEADER_ITERATIONS} (--iters {_RUN_ITERATIONS} for its results)",
        )


def folds_of_article(notes: Notes, key: str, fold: object) -> None:
    """The article's commands decide post-processing on other weights and another fold than they apply it to."""
    notes.warn(
        key,
        fold,
        f"fold {fold} is trained, and its post-processing is decided with the weights it is applied to; the article's commands mix folds "
        "0, 2 and 4 and decide with iteration 2000 for iteration 30000",
    )


def low_resolution(notes: Notes, key: str, stage: int) -> None:
    """The article's headline, called nnU-Net, is one fold of the low-resolution stage."""
    notes.warn(
        key,
        stage,
        "the low-resolution stage of a cascade, 3d_lowres, of one fold is what this trains and what the article's headline is of; "
        "--config 3d_fullres or 3d_cascade_fullres for the full resolution",
    )


def datasets_of_vnet(notes: Notes, kinds: Mapping[str, str]) -> None:
    """The article's V-Net file names a dataset that public MedicalSeg cannot make of it."""
    for key, kind in kinds.items():
        if kind == "MSDDataset":
            notes.warn(
                key, kind, "public MedicalSeg's MSDDataset serves nnU-Net only and cannot be made of these keys; DATASET is opened instead"
            )
    if len(set(kinds.values())) > 1:
        notes.warn(" and ".join(kinds), list(kinds.values()), "training and validation are cases of one DATASET, split by segrt")


def batch_of_nnunet(notes: Notes, batch: int) -> None:
    """MedicalSeg's nnU-Net ignores the batch size of the file."""
    notes.warn(
        "batch_size",
        batch,
        "the plan's batch is trained, as MedicalSeg does too: there this number only scales the images per second "
        "it prints (--batch-size for another)",
    )


def time_of_article(notes: Notes, key: str, model: str, minutes: str) -> None:
    """The article's times per image are mostly the CPU's."""
    notes.warn(
        key, model, f"the article's {minutes} min per image were probably most of them CPU work around the network; expect other times"
    )
