"""What a served model is asked: names that are folders' too, and options that arrive as text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from factories import make_spec
from hypothesis import given
from hypothesis import strategies as st

from segrt.errors import InputError, SpecError
from segrt.protocol import (
    DIRECTION,
    LABELS,
    ORIGIN,
    PROBABILITIES,
    SPACING,
    Report,
    RequestOptions,
    ServedModel,
    check_name,
    code_of,
    coded,
    geometry_of,
    grid_of,
    outputs_of,
)
from segrt.volume import Grid


@given(
    st.builds(
        RequestOptions,
        tta=st.booleans(),
        step=st.none() | st.floats(0.01, 1),
        level=st.none() | st.sampled_from(["L1", "L4"]),
        postprocess=st.booleans(),
        probabilities=st.booleans(),
        format=st.none() | st.just(".nii.gz"),
        name=st.text(max_size=20),
        timeout_s=st.none() | st.floats(0.1, 1e4),
    )
)
def test_options_arrive_as_they_were_sent(options: RequestOptions) -> None:
    sent = options.to_parameters()
    assert RequestOptions.from_parameters(sent) == options
    assert RequestOptions.from_parameters(json.dumps(sent)) == options
    assert all(isinstance(value, bool | str) for value in sent.values())


def test_no_parameters_are_the_defaults() -> None:
    assert RequestOptions.from_parameters("") == RequestOptions() == RequestOptions.from_parameters({})
    assert RequestOptions().to_parameters() == {}


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"tat": True}, "unknown option 'tat'; this model takes tta, step"),
        ({"step": 2}, "option 'step': Input should be less than or equal to 1, got 2"),
        ({"step": "nan"}, "option 'step'"),
        ({"tta": "maybe"}, "option 'tta'"),
        ({"timeout_s": 0}, "option 'timeout_s': Input should be greater than 0"),
        ({"timeout_s": "inf"}, "option 'timeout_s'"),
        ({"name": "x" * 256}, "option 'name'"),
        ('{"tta": ', "parameters: expected a JSON object"),
        ("[1]", "parameters: expected a JSON object"),
    ],
)
def test_a_wrong_option_is_named(parameters: Any, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        RequestOptions.from_parameters(parameters)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("name", ["", "../liver", "a/b", "a\\b", ".hidden", "-x", "liver\n", "x" * 65, "l\u00e9ber"])
def test_a_name_that_is_no_plain_folder_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="model name"):
        check_name(name)


def test_a_plain_name_is_kept() -> None:
    assert check_name("liver-2_A") == "liver-2_A"


def test_answers_have_the_type_of_the_models_labels() -> None:
    outputs = outputs_of(make_spec())
    assert outputs[LABELS] == ("UINT8", (-1, -1, -1))
    assert outputs[PROBABILITIES][0] == "FP32"


def test_a_clients_view_of_a_model_survives_its_configuration() -> None:
    served = ServedModel(spec=make_spec(values=(0, 300)), bundle_sha="ab" * 32, takes_previous=True)
    parameters = served.to_parameters()
    assert all(isinstance(value, str) and "\n" not in value for value in parameters.values())
    assert ServedModel.from_parameters({**parameters, "EXECUTION_ENV_PATH": "x"}) == served


def test_a_foreign_model_is_named_as_one() -> None:
    with pytest.raises(InputError, match="no parameter 'spec'; expected a model written by segrt-build --triton"):
        ServedModel.from_parameters({})
    with pytest.raises(SpecError, match="parameter 'spec'"):
        ServedModel.from_parameters({"spec": "{}", "bundle_sha": ""})


def test_a_report_of_a_newer_server_is_read() -> None:
    assert Report.model_validate_json('{"bundle_sha": "ab", "windows": [3, 1], "new": 1}').windows == (3, 1)


def test_a_grid_travels_as_the_file_formats_have_it() -> None:
    grid = Grid((2, 3, 4), (3.0, 2.0, 1.0), (1.5, -2.5, 3.5), ((0.0, 0.6, 0.8), (0.0, 0.8, -0.6), (1.0, 0.0, 0.0)), 2)
    sent = geometry_of(grid)
    # columns of DIRECTION are the axes x, y, z
    assert [row[0] for row in sent[DIRECTION]] == [row[2] for row in grid.axes]
    assert grid_of(grid.shape, sent[SPACING], sent[ORIGIN], sent[DIRECTION], flat=True) == grid


def test_an_error_on_a_stream_keeps_its_code() -> None:
    assert coded("INVALID_ARG", "what: why") == "[INVALID_ARG] what: why"
    assert code_of("[INVALID_ARG] what: why") == ("INVALID_ARG", "what: why")
    assert code_of("[x] y") == (None, "[x] y")
