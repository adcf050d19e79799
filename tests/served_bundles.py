"""Bundles of every kind that is served, with networks that answer differently, so that one in another's place would be seen."""

from __future__ import annotations

import json
from pathlib import Path

from factories import make_bundle, make_spec, write_nearest_onnx

from segrt.bundle import Bundle
from segrt.files import sha256
from segrt.spec import Label, PreviousStage, UNetPPSpec

CASCADE = PreviousStage(values=(1, 2))


def plain(path: Path) -> Bundle:
    return make_bundle(path)


def members(path: Path) -> Bundle:
    return make_bundle(path, make_spec(members=("0", "all")))


def flat(path: Path) -> Bundle:
    return make_bundle(path, make_spec(patch=(1, 8, 8)))


def regions(path: Path) -> Bundle:
    parts = (Label(name="both", values=(1, 2)), Label(name="core", values=(2,)))
    return make_bundle(path, make_spec(values=(1, 2), activation="sigmoid", labels=parts))


def cascade(path: Path) -> Bundle:
    low = make_bundle(path.parent / "low", make_spec(name="low", members=("0", "1")))
    return make_bundle(path, make_spec(previous=CASCADE), previous=low)


def pair(path: Path) -> Bundle:
    low = make_bundle(path.parent / "low", make_spec(name="low"))
    other = make_bundle(path.parent / "other", make_spec(previous=CASCADE), centres=(0, 3, 4), previous=low)
    return make_bundle(path, make_spec(patch=(1, 8, 8)), partner=other)


def levels(path: Path) -> Bundle:
    """A UNet++ of which level L1 was built; its networks answer differently."""
    network = UNetPPSpec(family="unetpp", in_channels=1, out_channels=3, level=2, deep_supervision=True)
    bundle = make_bundle(path, make_spec(patch=(1, 8, 8), network=network))
    level, record = bundle.at_level("L1"), path / "onnx" / "build.json"
    write_nearest_onnx(level.onnx_path("0"), level.spec, (0, 3, 4))
    values = json.loads(record.read_text())
    values["sha256"]["0-L1"] = sha256(level.onnx_path("0"))
    values["level_of"] = {"0-L1": sha256(bundle.onnx_path("0"))}
    record.write_text(json.dumps(values))
    return bundle
