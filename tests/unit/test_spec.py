"""model.json: what is accepted, and the sentence for what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from factories import UNET_2D, UNET_3D, make_spec
from pydantic import ValidationError

from segrt.errors import SegrtError, SpecError
from segrt.spec import (
    SCHEMA,
    Channel,
    Label,
    PreviousStage,
    Resampling,
    ShapeTarget,
    WindowNorm,
    load_spec,
    parse_spec,
)


def dictionary(**changes: Any) -> dict[str, Any]:
    return json.loads(make_spec(network=UNET_3D, **changes).to_json())


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(values, where="model.json")
    text = str(caught.value)
    assert "\n" not in text
    return text


def edited(path: str, value: Any) -> dict[str, Any]:
    """A good spec with one value set, by its dotted path."""
    values: Any = dictionary()
    root = values
    *parents, last = path.split(".")
    for key in parents:
        values = values[int(key) if key.isdigit() else key]
    values[last] = value
    return root


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("inference.step", 1.5),
        ("inference.step", 0),
        ("inference.blending", "cosine"),
        ("inference.patch", [8, 8]),
        ("inference.patch", [8, 0, 8]),
        ("inference.mirror_axes", [3]),
        ("head.activation", "relu"),
        ("head.threshold", 1),
        ("head.values", []),
        ("labels.0.values", []),
        ("resample_image.order", 2),
        ("resample_logits.method", "cubic"),
        ("members", []),
        ("channels", []),
        ("target.spacing", [1, 1]),
        ("target.spacing", [1, -1, 1]),
        ("network.in_channels", 0),
        ("name", 5),
    ],
)
def test_a_wrong_value_is_named_by_its_dotted_path(path: str, value: Any) -> None:
    assert f"{path}" in refusal(edited(path, value))


@pytest.mark.parametrize("path", ["colour", "inference.colour", "network.colour", "target.colour", "channels.0.normalization.colour"])
def test_an_unknown_key_is_named_by_its_dotted_path(path: str) -> None:
    assert f"{path}:" in refusal(edited(path, "blue"))


def test_a_wrong_value_is_shown() -> None:
    assert "1.5" in refusal(edited("inference.step", 1.5))


def test_an_unknown_kind_lists_the_known_ones() -> None:
    text = refusal(edited("channels.0.normalization.kind", "gamma"))
    assert "channels.0.normalization" in text
    assert "gamma" in text
    assert "zscore" in text


@pytest.mark.parametrize("key", ["name", "channels", "head", "target", "inference", "network", "members"])
def test_a_missing_key_is_named(key: str) -> None:
    values = dictionary()
    del values[key]
    assert f"{key}:" in refusal(values)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"transpose": (0, 0, 2)}, "transpose"),
        ({"members": ("../up",)}, "members"),
        ({"members": ("0", "0")}, "members"),
        (
            {"channels": (Channel(name="CT", normalization=WindowNorm(lower=-100, upper=240)),) * 2, "network": UNET_3D},
            "network.in_channels",
        ),
        ({"previous": PreviousStage(values=(1, 2)), "network": UNET_3D}, "network.in_channels"),
        ({"values": (0, 1), "network": UNET_3D}, "head.values"),
        ({"network": UNET_2D, "patch": (8, 8, 8)}, "inference.patch"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(changes: dict[str, Any], word: str) -> None:
    good = dictionary()
    other = {k: v for k, v in changes.items() if k not in ("values", "patch")}
    values = good | json.loads(make_spec().model_copy(update=other).model_dump_json(by_alias=True, include=set(other)))
    if "values" in changes:
        values["head"]["values"] = changes["values"]
    if "patch" in changes:
        values["inference"]["patch"] = changes["patch"]
    assert word in refusal(values)


def test_a_patch_of_one_voxel_at_the_coarsest_level_is_for_networks_without_instance_normalisation() -> None:
    assert make_spec(network=UNET_3D.model_copy(update={"norm": "batch"}), patch=(2, 2, 2)).inference.patch == (2, 2, 2)
    assert make_spec(network=UNET_3D, patch=(2, 2, 4)).inference.patch == (2, 2, 4)


def test_kernels_and_strides_have_an_entry_per_stage_and_axis() -> None:
    assert "strides" in refusal(edited("network.strides", [[1, 1, 1]]))
    assert "kernels" in refusal(edited("network.kernels", [[3, 3], [3, 3]]))


def test_a_spec_is_frozen() -> None:
    with pytest.raises(ValidationError):
        make_spec().name = "other"  # type: ignore[misc]


def test_load_spec_reads_what_to_json_wrote(tmp_path: Path) -> None:
    spec = make_spec(network=UNET_3D, target=ShapeTarget(shape=(16, 16, 16)))
    (tmp_path / "model.json").write_text(spec.to_json())
    assert load_spec(tmp_path / "model.json") == spec
    assert json.loads(spec.to_json())["schema"] == SCHEMA


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not a readable model.json"),
        ("[]", "expected a JSON object"),
        ('{"schema": 99}', "schema 99"),
        ("{}", "schema None"),
    ],
)
def test_a_file_that_is_no_spec_is_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(SegrtError, match=word) as caught:
        load_spec(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="not a readable"):
        load_spec(tmp_path / "model.json")
    (tmp_path / "model.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="not a readable"):
        load_spec(tmp_path / "model.json")


def test_dimensions_follow_the_network_or_the_patch() -> None:
    assert make_spec(network=UNET_3D).dimensions == 3
    assert make_spec(network=UNET_2D, patch=(1, 8, 8)).dimensions == 2
    assert make_spec(patch=(1, 8, 8)).dimensions == 2
    assert make_spec().dimensions == 3


@pytest.mark.parametrize(
    ("values", "dtype"),
    [((0, 1, 2), "uint8"), (tuple(range(255)), "uint8"), (tuple(range(256)), "uint16"), ((0, 300), "uint16")],
)
def test_label_maps_widen_from_255_foreground_labels_on(values: tuple[int, ...], dtype: str) -> None:
    assert make_spec(values=values).label_dtype == dtype


def test_channels_of_a_cascade_count_the_previous_labels() -> None:
    assert make_spec(previous=PreviousStage(values=(1, 2))).in_channels == 3


def test_names_map_to_their_values() -> None:
    spec = make_spec(labels=(Label(name="tumour", values=(1, 2)), Label(name="core", values=(2,))))
    assert spec.names == {"tumour": (1, 2), "core": (2,)}


@pytest.mark.parametrize(
    ("current", "new", "separate", "axis"),
    [
        ((6.0, 1, 1), (3, 3, 3), None, 0),
        ((1, 1, 1), (5.0, 1, 1), None, 0),
        ((1, 1, 4.0), (9, 1, 1), None, 2),  # the current spacing decides when it is anisotropic
        ((3.0, 1, 1), (1, 1, 1), None, None),  # the ratio must exceed the threshold
        ((9.0, 9, 1), (1, 1, 1), None, None),  # two axes equally coarse
        ((6.0, 1, 1), (5, 1, 1), False, None),
        ((1.5, 1, 1), (1, 1, 1), True, 0),
        ((1, 1, 1), (5.0, 1, 1), True, None),
    ],
)
def test_separate_axis_follows_nnunets_rule(current: Any, new: Any, separate: bool | None, axis: int | None) -> None:
    assert Resampling(separate=separate).separate_axis(current, new) == axis


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("inference.step", 1.5, "inference.step: expected less than or equal to 1, got 1.5"),
        ("head.values", [0, -1, 2], "head.values.1: expected greater than or equal to 0, got -1"),
        ("head.values", [0, 1], "head.values: expected 3 values (network.out_channels), got 2"),
        ("inference.patch", [8, 9, 8], "inference.patch: expected multiples of 2 on axis y, got 9"),
        ("inference.patch", [2, 2, 2], "inference.patch: (2, 2, 2) leaves one voxel at the coarsest level of the network"),
        ("network.strides", [[1, 1, 1], [2, 0, 2]], "network.strides.1.1: expected greater than or equal to 1, got 0"),
        ("members", ["0", "0-argmax"], "members: a member's name may not end like those of its other files"),
        ("inference.mirror_axes", [1, 1], "inference.mirror_axes: expected no entry twice, got (1, 1)"),
        ("resample_image.threshold", float("nan"), "resample_image.threshold: expected a finite number, got nan"),
    ],
)
def test_the_sentence_says_what_was_expected_and_found(path: str, value: Any, sentence: str) -> None:
    assert sentence in refusal(edited(path, value))


def test_an_empty_intensity_window_is_refused() -> None:
    window = {"kind": "hu_window", "lower": 240, "upper": -100}
    assert "channels.0.normalization: lower: expected less than upper (-100), got 240" in refusal(
        edited("channels.0.normalization", window)
    )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"resample_logits": {"method": "none"}}, "resample_logits.method: 'none'"),
        ({"resample_image": {"method": "none"}, "target": {"kind": "shape", "shape": [8, 8, 8]}}, "resample_image.method: 'none'"),
    ],
)
def test_grids_that_could_not_meet_again_are_refused(changes: dict[str, Any], word: str) -> None:
    assert word in refusal(dictionary() | changes)


def test_a_2d_model_is_not_mirrored_along_z() -> None:
    values = json.loads(make_spec(network=UNET_2D, patch=(1, 8, 8), mirror_axes=(1, 2)).to_json())
    values["inference"]["mirror_axes"] = [0, 1]
    assert "inference.mirror_axes: a 2-D model" in refusal(values)
