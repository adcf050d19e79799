"""A spec survives its own JSON, and a damaged one is refused by a sentence, whatever the damage."""

from __future__ import annotations

import json
from typing import Any

from factories import UNET_2D, UNET_3D
from hypothesis import given
from hypothesis import strategies as st

from segrt.errors import SpecError
from segrt.spec import (
    Channel,
    CTNorm,
    DropSmall,
    FillHoles,
    Head,
    Inference,
    KeepLargest,
    Label,
    ModelSpec,
    NoNorm,
    OnnxNetwork,
    PreviousStage,
    Resampling,
    RescaleNorm,
    RGBNorm,
    ShapeTarget,
    SpacingTarget,
    WindowNorm,
    ZScoreNorm,
    parse_spec,
)

finite = st.floats(-1e4, 1e4)
positive = st.floats(1e-3, 1e3)
size = st.integers(1, 300)
value = st.integers(0, 65535)
text = st.text(max_size=12)
values = st.lists(value, min_size=1, max_size=5).map(tuple)

normalizations = st.one_of(
    st.builds(CTNorm, lower=finite, upper=finite, mean=finite, std=positive),
    st.builds(ZScoreNorm, masked=st.booleans()),
    st.builds(WindowNorm, lower=st.floats(-1000, 0), upper=st.floats(1, 1000), scale=positive),
    st.sampled_from([RescaleNorm(), RGBNorm(), NoNorm()]),
)
targets = st.one_of(
    st.builds(SpacingTarget, spacing=st.tuples(*[st.none() | positive] * 3)),
    st.builds(ShapeTarget, shape=st.tuples(size, size, size)),
)
resamplings = st.builds(
    Resampling,
    method=st.sampled_from(["spline", "linear"]),
    order=st.sampled_from([0, 1, 3]),
    order_z=st.sampled_from([0, 1, 3]),
    separate=st.sampled_from([None, True, False]),
    threshold=positive,
)
steps = st.lists(
    st.one_of(
        st.builds(KeepLargest, values=values),
        st.builds(DropSmall, values=values, minimum_mm3=positive),
        st.builds(FillHoles, value=st.integers(1, 255)),
    ),
    max_size=3,
).map(tuple)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    channels = draw(st.lists(st.builds(Channel, name=text, normalization=normalizations), min_size=1, max_size=3))
    previous = draw(st.none() | st.builds(PreviousStage, values=values))
    head = draw(st.builds(Head, activation=st.sampled_from(["softmax", "sigmoid"]), values=values, threshold=st.floats(0.01, 0.99)))
    inputs = len(channels) + (len(previous.values) if previous else 0)
    sizes = {"in_channels": inputs, "out_channels": len(head.values)}
    network = draw(st.sampled_from([OnnxNetwork(**sizes), UNET_2D.model_copy(update=sizes), UNET_3D.model_copy(update=sizes)]))
    flat = network.family != "onnx" and network.dimensions == 2
    side = st.integers(2, 300) if network.family == "onnx" else st.integers(2, 150).map(lambda half: 2 * half)  # their stride is 2
    patch = (1 if flat else draw(side), draw(side), draw(side))
    axes = draw(st.lists(st.sampled_from([1, 2] if flat else [0, 1, 2]), unique=True).map(tuple))
    return ModelSpec(
        name=draw(text),
        source=draw(text),
        channels=tuple(channels),
        labels=tuple(draw(st.lists(st.builds(Label, name=text, values=values), max_size=3))),
        ignore=draw(st.none() | value),
        head=head,
        transpose=draw(st.permutations((0, 1, 2)).map(tuple)),
        crop_nonzero=draw(st.booleans()),
        target=draw(targets),
        resample_image=draw(resamplings),
        resample_labels=draw(resamplings),
        resample_logits=draw(resamplings),
        inference=Inference(
            patch=patch, step=draw(st.floats(0.01, 1)), blending=draw(st.sampled_from(["gaussian", "uniform"])), mirror_axes=axes
        ),
        network=network,
        members=tuple(draw(st.lists(st.from_regex(r"[a-z0-9_-]{0,4}[a-z0-9]", fullmatch=True), min_size=1, max_size=3, unique=True))),
        previous=previous,
        postprocess=draw(steps),
    )


@given(specs())
def test_json_round_trip(spec: ModelSpec) -> None:
    again = parse_spec(json.loads(spec.to_json()))
    assert again == spec
    assert again.to_json() == spec.to_json()


def _paths(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested lists and dictionaries."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [p for key, inner in items for p in [(*path, key), *_paths(inner, (*path, key))]]


@given(specs(), st.data(), st.sampled_from(["x", -7, 1e300, [], {}, None, True, float("nan")]))
def test_any_one_value_replaced_gives_a_spec_or_a_sentence(spec: ModelSpec, data: st.DataObject, junk: Any) -> None:
    values = json.loads(spec.to_json())
    *parents, last = data.draw(st.sampled_from(_paths(values)))
    part = values
    for key in parents:
        part = part[key]
    part[last] = junk
    sentence = _sentence(values)
    assert sentence is None or sentence.startswith("model.json: ")


@given(specs(), st.data())
def test_any_unknown_key_is_refused_by_its_path(spec: ModelSpec, data: st.DataObject) -> None:
    values = json.loads(spec.to_json())
    places = [p for p in [(), *_paths(values)] if isinstance(_at(values, p), dict)]
    place = data.draw(st.sampled_from(places))
    _at(values, place)["colour"] = 1
    assert f"{'.'.join(map(str, (*place, 'colour')))}: " in (_sentence(values) or "accepted")


def _sentence(values: Any) -> str | None:
    """What the refusal says, or None for a good spec."""
    try:
        parse_spec(values, where="model.json")
    except SpecError as err:
        return str(err)
    return None


def _at(values: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        values = values[key]
    return values
