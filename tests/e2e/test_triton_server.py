"""A real tritonserver over the repository of two tiny bundles: the Predictor's labels, whatever else is asked of it at the same time."""

from __future__ import annotations

import gzip
import json
import queue
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.utils.shared_memory as shared_memory
from factories import banded, make_bundle, make_spec, write_case
from triton_server import TIMEOUT_S, Asking, metric, report_of, serving, write_repository
from tritonclient.utils import InferenceServerException

from segrt.arrays import Array
from segrt.bundle import Bundle
from segrt.export.triton import write_triton
from segrt.io import read_labels
from segrt.predictor import Predictor
from segrt.protocol import grid_of
from segrt.serving.server import Server
from segrt.spec import Channel, KeepLargest, NoNorm

SPACING = (2.0, 1.0, 1.5)
# with windows of 8 voxels this keeps a CPU busy for a long while; noise, for windows of one value share their logits
SIDE = 30
SLOW = {"IMAGE": np.random.default_rng(0).random((1, SIDE, SIDE, SIDE), np.float32), "SPACING": np.ones(3)}
SLOW_STEP = "0.1"
PIPELINES = ("organ", "organ_bls")


@dataclass(frozen=True)
class Served:
    """The server, and the bundles whose models it runs."""

    server: Server
    repository: Path
    organ: Bundle
    slice: Bundle


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`organ` sees one channel in 3-D, mirrors, averages two members and keeps the largest piece; `slice` sees two channels in 2-D."""
    folder = tmp_path_factory.mktemp("triton")
    repository = folder / "repository"
    step = KeepLargest(values=(1,))
    organ = make_bundle(folder / "a", make_spec(mirror_axes=(2,), postprocess=(step,), members=("0", "1")))
    channels = tuple(Channel(name=name, normalization=NoNorm()) for name in ("T1", "T2"))
    flat = make_bundle(folder / "b", make_spec(patch=(1, 16, 16), channels=channels, name="slice"))
    write_repository(repository, organ, "organ")
    write_repository(repository, flat, "slice", alone=True)
    with serving(repository) as server:
        yield Served(server, repository, organ, flat)


@pytest.fixture(params=["grpc", "http"])
def asking(request: pytest.FixtureRequest, served: Served) -> Asking:
    return Asking.over(request.param, served.server)


@pytest.fixture
def grpc(served: Served) -> Asking:
    return Asking.over("grpc", served.server)


@pytest.fixture(scope="module")
def image() -> Array:
    return banded((11, 9, 8), seed=7)


@pytest.fixture(scope="module")
def predictor(served: Served) -> Predictor:
    return Predictor(served.organ, device="cpu")


@pytest.fixture(scope="module")
def labels(predictor: Predictor, image: Array) -> Array:
    return predictor((image, SPACING)).labels


def tensors_of(image: Array, *, name: str = "IMAGE_INT16") -> dict[str, Array]:
    return {name: image[None].astype(np.float32 if name == "IMAGE" else np.int16), "SPACING": np.array(SPACING)}


@pytest.mark.parametrize("model", PIPELINES)
@pytest.mark.parametrize("name", ["IMAGE", "IMAGE_INT16"])
def test_triton_answers_an_array_with_the_predictor_s_labels(asking: Asking, model: str, name: str, image: Array, labels: Array) -> None:
    answer = asking.labels(model, tensors_of(image, name=name))
    assert answer.dtype == labels.dtype
    np.testing.assert_array_equal(answer, labels)


@pytest.mark.parametrize(
    ("model", "suffix"), [("organ", ".nii.gz"), ("organ", ".nii"), ("organ", ".nrrd"), ("organ", ".mha"), ("organ_bls", ".nii.gz")]
)
def test_triton_answers_a_file_with_the_predictor_s_labels(
    grpc: Asking, predictor: Predictor, tmp_path: Path, model: str, suffix: str, image: Array
) -> None:
    path = write_case(tmp_path / f"case{suffix}", image, SPACING, origin=(5.0, -3.0, 8.0))
    expected = predictor(path)
    answer = grpc.ask(model, file_of(path), wanted=["LABELS", "REPORT"], name=path.name)
    np.testing.assert_array_equal(answer.as_numpy("LABELS"), expected.labels)
    report = report_of(answer)
    told = grid_of(expected.labels.shape, report["spacing"], report["origin"], report["direction"], flat=report["dimensions"] == 2)
    assert told == expected.grid
    assert report["voxels"] == expected.voxels()
    assert tuple(report["windows"]) == expected.windows


def file_of(*paths: Path) -> dict[str, Array]:
    parts = [np.frombuffer(path.read_bytes(), np.uint8) for path in paths]
    sizes = {"FILE_SIZES": np.array([len(part) for part in parts])} if len(paths) > 1 else {}
    return {"FILE": np.concatenate(parts), **sizes}


def test_triton_answers_from_and_to_shared_memory(asking: Asking, served: Served, image: Array, labels: Array) -> None:
    """The image and the labels each lie in a region both sides see."""
    given, wanted = image[None].astype(np.int16), labels.nbytes
    key, size = f"segrt-test-{served.server.pid}-{time.monotonic_ns()}", given.nbytes + wanted
    region = shared_memory.create_shared_memory_region(key, f"/{key}", size)
    try:
        shared_memory.set_shared_memory_region(region, [given])
        asking.client.register_system_shared_memory(key, f"/{key}", size)
        image_there = asking.kind.InferInput("IMAGE_INT16", list(given.shape), "INT16")
        image_there.set_shared_memory(key, given.nbytes)
        labels_there = asking.kind.InferRequestedOutput("LABELS")
        labels_there.set_shared_memory(key, wanted, offset=given.nbytes)
        asking.client.infer("organ", [image_there, *asking.inputs({"SPACING": np.array(SPACING)})], outputs=[labels_there])
        answer = shared_memory.get_contents_as_numpy(region, labels.dtype, labels.shape, offset=given.nbytes)
        np.testing.assert_array_equal(answer, labels)
        del answer
    finally:
        asking.client.unregister_system_shared_memory(key)
        shared_memory.destroy_shared_memory_region(region)


def test_triton_answers_pictures_of_a_two_dimensional_model(asking: Asking, served: Served, tmp_path: Path) -> None:
    """As an array with Z = 1 and no spacing, and as a picture per channel; the label file is a picture too."""
    pictures = [banded((1, 20, 30), seed=seed).astype(np.uint8) for seed in (1, 2)]
    paths = [write_case(tmp_path / f"x_{number:04d}.png", picture, dimensions=2) for number, picture in enumerate(pictures)]
    expected = Predictor(served.slice, device="cpu")(paths)
    by_array = asking.labels("slice", {"IMAGE": np.stack(pictures).astype(np.float32)})
    by_file = asking.ask("slice", file_of(*paths), wanted=["LABELS", "LABEL_FILE", "REPORT"], format=".png")
    np.testing.assert_array_equal(by_array, expected.labels)
    np.testing.assert_array_equal(by_file.as_numpy("LABELS"), expected.labels)
    assert report_of(by_file)["dimensions"] == 2
    written = tmp_path / "labels.png"
    written.write_bytes(by_file.as_numpy("LABEL_FILE").tobytes())
    np.testing.assert_array_equal(read_labels(written)[0], expected.labels)


@pytest.mark.parametrize("model", PIPELINES)
def test_triton_does_what_a_request_asks_for(asking: Asking, served: Served, model: str, image: Array) -> None:
    noise = (image + np.random.default_rng(5).normal(size=image.shape)).astype(np.float32)
    for options in ({"tta": False}, {"step": 0.9}, {"postprocess": False}, {"tta": False, "step": 0.7, "postprocess": False}):
        expected = Predictor(served.organ, device="cpu", **options)((noise, SPACING), probabilities=True)
        sent = {key: str(value) if isinstance(value, float) else value for key, value in options.items()}
        answer = asking.ask(model, tensors_of(noise, name="IMAGE"), probabilities=True, **sent)
        np.testing.assert_array_equal(answer.as_numpy("LABELS"), expected.labels)
        np.testing.assert_array_equal(answer.as_numpy("PROBABILITIES"), expected.probabilities)
        assert report_of(answer)["bundle_sha"] == served.organ.fingerprint


def test_triton_writes_label_files_that_lie_on_the_image(grpc: Asking, predictor: Predictor, tmp_path: Path, image: Array) -> None:
    path = write_case(tmp_path / "case.nii.gz", image, SPACING, origin=(5.0, -3.0, 8.0))
    answer = grpc.ask("organ", file_of(path), wanted=["LABEL_FILE"], format=".nii.gz")
    (tmp_path / "labels.nii.gz").write_bytes(answer.as_numpy("LABEL_FILE").tobytes())
    expected = predictor(path)
    found, grid = read_labels(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(found, expected.labels)
    assert grid == expected.grid


def test_triton_streams_windows_done_and_then_the_labels(served: Served, image: Array, labels: Array) -> None:
    answers = list(streamed(served, tensors_of(image)))
    told = [tuple(answer.as_numpy("PROGRESS").tolist()) for answer in answers[:-1]]
    assert told == sorted(told)
    done, total = told[-1]
    assert done == total == report_of(answers[-1])["windows"][0] * len(served.organ.spec.members)
    np.testing.assert_array_equal(answers[-1].as_numpy("LABELS"), labels)


def test_triton_stream_ends_with_a_sentence_for_a_wrong_request(served: Served, image: Array) -> None:
    with pytest.raises(InferenceServerException, match="unknown option 'colour'"):
        list(streamed(served, tensors_of(image), colour="blue"))


def streamed(served: Served, tensors: Mapping[str, Array], *, answers: int | None = None, **options: Any) -> Iterator[Any]:
    """Answers of organ_stream until the final one, or until there were `answers`, when the stream is left with its request."""
    arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
    asking = Asking.over("grpc", served.server)
    asking.client.start_stream(lambda result, error: arrived.put((result, error)))
    try:
        asking.client.async_stream_infer("organ_stream", asking.inputs(tensors), parameters=options or None)
        while answers != 0:
            result, error = arrived.get(timeout=TIMEOUT_S)
            if error is not None:
                raise error
            yield result
            if result.get_response().parameters["triton_final_response"].bool_param:
                return
            answers = None if answers is None else answers - 1
    finally:
        asking.client.stop_stream(cancel_requests=True)


def test_triton_shares_batches_of_windows_between_requests(served: Served, image: Array, labels: Array) -> None:
    """Several requests at once: fewer executions of the network than requests for windows, and the same labels."""
    before = patch_statistics(served)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: Asking.over("grpc", served.server).labels("organ_bls", tensors_of(image)), range(8)))
    asked, executed = (now - then for now, then in zip(patch_statistics(served), before, strict=True))
    for answer in answers:
        np.testing.assert_array_equal(answer, labels)
    assert executed < asked


def patch_statistics(served: Served) -> tuple[int, int]:
    """Requests for windows and executions of the networks of organ."""
    client = Asking.over("http", served.server).client
    found = [
        entry
        for member in served.organ.spec.members
        for entry in client.get_inference_statistics(patch_name(served, member))["model_stats"]
    ]
    return sum(entry["inference_stats"]["success"]["count"] for entry in found), sum(entry["execution_count"] for entry in found)


def patch_name(served: Served, member: str) -> str:
    return f"organ_patch_{member}" if len(served.organ.spec.members) > 1 else "organ_patch"


def test_triton_stops_the_windows_of_a_request_that_is_cancelled(served: Served, grpc: Asking, image: Array, labels: Array) -> None:
    for model in PIPELINES:
        before = metric(served.server, "segrt_cases_total", model=model, outcome="cancelled")
        begun = metric(served.server, "segrt_cases_total", model=model)
        call = send(grpc, model, SLOW, step=SLOW_STEP)
        time.sleep(0.5)
        assert metric(served.server, "segrt_cases_total", model=model) == begun
        call.cancel()
        wait_for(
            lambda model=model, before=before: metric(served.server, "segrt_cases_total", model=model, outcome="cancelled") == before + 1
        )
        np.testing.assert_array_equal(grpc.labels(model, tensors_of(image)), labels)


def test_triton_never_begins_a_request_that_was_cancelled_while_it_waited(served: Served, grpc: Asking) -> None:
    before = metric(served.server, "segrt_windows_total", model="organ")
    outcome = {what: metric(served.server, "segrt_cases_total", model="organ", outcome=what) for what in ("cancelled", "done")}
    first, second = send(grpc, "organ", SLOW, step=SLOW_STEP), send(grpc, "organ", SLOW, step=SLOW_STEP)
    time.sleep(0.3)
    second.cancel()
    first.cancel()
    wait_for(lambda: metric(served.server, "segrt_cases_total", model="organ", outcome="cancelled") == outcome["cancelled"] + 2)
    assert metric(served.server, "segrt_cases_total", model="organ", outcome="done") == outcome["done"]
    assert metric(served.server, "segrt_windows_total", model="organ") == before


def test_triton_stops_a_stream_whose_client_leaves(served: Served, image: Array, labels: Array) -> None:
    before = metric(served.server, "segrt_cases_total", model="organ_stream", outcome="cancelled")
    (first,) = streamed(served, SLOW, step=SLOW_STEP, answers=1)
    assert first.as_numpy("PROGRESS")[0] < first.as_numpy("PROGRESS")[1]
    wait_for(lambda: metric(served.server, "segrt_cases_total", model="organ_stream", outcome="cancelled") == before + 1)
    np.testing.assert_array_equal(list(streamed(served, tensors_of(image)))[-1].as_numpy("LABELS"), labels)


def send(asking: Asking, model: str, tensors: Mapping[str, Array], **options: Any) -> Any:
    """Send a request whose answer nobody reads; it can be cancelled."""
    return asking.client.async_infer(model, asking.inputs(tensors), lambda result, error: None, parameters=options)


def wait_for(condition: Any) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("model", PIPELINES)
def test_triton_gives_up_when_a_request_s_time_is_over(asking: Asking, model: str, image: Array, labels: Array) -> None:
    """By segrt's option, and by the parameter that the protocol has for it."""
    with pytest.raises(InferenceServerException, match=r"gave up after 0.5 s") as caught:
        asking.ask(model, SLOW, step=SLOW_STEP, timeout_s="0.5")
    assert caught.value.status() in ("StatusCode.UNAVAILABLE", "503")
    with pytest.raises(InferenceServerException, match=r"gave up after 0.25 s"):
        asking.client.infer(model, asking.inputs(SLOW), parameters={"step": SLOW_STEP}, timeout=250_000)
    np.testing.assert_array_equal(asking.labels(model, tensors_of(image)), labels)


def test_triton_outlives_a_client_that_hangs_up(served: Served, grpc: Asking, image: Array, labels: Array) -> None:
    host, port = served.server.http.split(":")
    question = {
        "inputs": [
            {
                "name": "IMAGE",
                "shape": list(SLOW["IMAGE"].shape),
                "datatype": "FP32",
                "parameters": {"binary_data_size": SLOW["IMAGE"].nbytes},
            },
            {"name": "SPACING", "shape": [3], "datatype": "FP64", "data": [1, 1, 1]},
        ],
        "parameters": {"step": SLOW_STEP, "timeout_s": "1"},
    }
    body = json.dumps(question).encode()
    for content in (body + SLOW["IMAGE"].tobytes(), body):  # everything, and half a request
        with socket.create_connection((host, int(port))) as connection:
            length = len(body) + SLOW["IMAGE"].nbytes
            head = ["POST /v2/models/organ/infer HTTP/1.1", "Host: x", f"Inference-Header-Content-Length: {len(body)}"]
            connection.sendall("\r\n".join([*head, f"Content-Length: {length}", "", ""]).encode() + content)
    np.testing.assert_array_equal(grpc.labels("organ", tensors_of(image)), labels)


def nifti(tmp_path: Path, image: Array) -> bytearray:
    return bytearray(write_case(tmp_path / "case.nii", image).read_bytes())


def announcing(tmp_path: Path, image: Array, *sizes: int) -> bytes:
    """A NIfTI file whose header says other sizes."""
    content = nifti(tmp_path, image)
    struct.pack_into("<4h", content, 40, len(sizes), *sizes)
    return bytes(content)


def file_tensor(content: bytes) -> dict[str, Array]:
    return {"FILE": np.frombuffer(content, np.uint8)}


def array(shape: tuple[int, ...] = (1, 8, 8, 8), **tensors: Any) -> dict[str, Array]:
    return {"IMAGE": np.ones(shape, np.float32), "SPACING": np.ones(3), **{key: np.asarray(value) for key, value in tensors.items()}}


NAN = np.full((1, 8, 8, 8), np.nan, np.float32)
BAD: dict[str, tuple[dict[str, Array], dict[str, Any], str]] = {
    "no image": ({"SPACING": np.ones(3)}, {}, "expected one image as IMAGE, IMAGE_INT16 or FILE, got none"),
    "two images": (array(IMAGE_INT16=np.ones((1, 8, 8, 8), np.int16)), {}, "got IMAGE and IMAGE_INT16"),
    "rank": (array((8, 8, 8)), {}, "unexpected shape for input 'IMAGE'"),
    "empty": (array((1, 0, 8, 8)), {}, "image has an axis of size 0"),
    "no bytes": ({"FILE": np.zeros(0, np.uint8)}, {}, "FILE holds an empty file"),
    "spacing 0": (array(SPACING=[1.0, 0.0, 1.0]), {}, "expected three positive numbers in mm"),
    "spacing below 0": (array(SPACING=[1.0, -2.0, 1.0]), {}, "expected three positive numbers in mm"),
    "spacing NaN": (array(SPACING=[1.0, np.nan, 1.0]), {}, "a SPACING of .*nan.*, expected finite numbers"),
    "spacing of a light year": (array(SPACING=[1.0, 1e300, 1.0]), {}, "expected at most 1e\\+06"),
    "no spacing": ({"IMAGE": np.ones((1, 8, 8, 8), np.float32)}, {}, "comes without SPACING"),
    "sheared": (array(DIRECTION=[[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), {}, "sheared or singular direction"),
    "NaN": ({**array(), "IMAGE": NAN}, {}, "512 NaN or infinite voxels of 512"),
    "channels": (array((2, 8, 8, 8)), {}, r"image has 2 channels, model needs 1 \(CT\)"),
    "first stage": (array(PREVIOUS=np.ones((8, 8, 8), np.uint16)), {}, "is not the second stage of a cascade"),
    "spacing of a file": ({"FILE": np.ones(9, np.uint8), "SPACING": np.ones(3)}, {}, "SPACING comes with an array"),
    "sizes of an array": (array(FILE_SIZES=[9]), {}, "FILE_SIZES comes with FILE"),
    "sizes that do not add up": ({"FILE": np.ones(9, np.uint8), "FILE_SIZES": np.array([8])}, {}, "adds up to 8 bytes, FILE has 9"),
    "sizes below 0": ({"FILE": np.ones(9, np.uint8), "FILE_SIZES": np.array([-9])}, {}, "FILE holds an empty file"),
    "too many files": ({"FILE": np.ones(9, np.uint8), "FILE_SIZES": np.array([4, 5])}, {}, "FILE_SIZES tells of 2 files"),
    "no image file": ({"FILE": np.arange(200, dtype=np.uint8)}, {"name": "../../etc/passwd"}, "^.*passwd is of no image format known here"),
    "unknown option": (array(), {"colour": "blue"}, "unknown option 'colour'; this model takes tta, step"),
    "step 0": (array(), {"step": "0"}, "option 'step'"),
    "step without end": (array((1, 9, 9, 9)), {"step": "1e-9"}, "image takes [0-9]+ windows, this server runs at most"),
    "no number": (array(), {"step": "half"}, "option 'step'"),
    "time below 0": (array(), {"timeout_s": "-1"}, "option 'timeout_s'"),
    "no level": (array(), {"level": "L2"}, "only a UNet\\+\\+ has levels"),
    "format": (array(), {"format": ".exe"}, "option 'format': expected one of .nii.gz"),
    "format with two files": (array(), {"format": ".mhd"}, "option 'format': expected one of .nii.gz"),
    "format that leads elsewhere": (array(), {"format": "/../../x.nii"}, "option 'format': expected one of .nii.gz"),
    "picture of a volume": (array(), {"format": ".png"}, "a picture holds one slice, got 8"),
}


@pytest.mark.parametrize("case", BAD)
def test_triton_says_what_is_wrong_with_a_request(asking: Asking, case: str) -> None:
    tensors, options, sentence = BAD[case]
    refused(asking, tensors, sentence, **options)


def refused(asking: Asking, tensors: Mapping[str, Array], sentence: str, **options: Any) -> None:
    with pytest.raises(InferenceServerException, match=sentence) as caught:
        asking.ask("organ", tensors, **options)
    assert caught.value.status() in ("StatusCode.INVALID_ARGUMENT", "400")


def test_triton_says_what_is_wrong_with_a_file(asking: Asking, tmp_path: Path, image: Array, labels: Array) -> None:
    whole = bytes(nifti(tmp_path, image))
    noise = np.random.default_rng(0).bytes(10_000)
    refused(
        asking,
        file_tensor(announcing(tmp_path, image, 10_000, 10_000, 10_000)),
        "case announces|announces 10000 x 10000 x 10000",
        name="case",
    )
    refused(asking, file_tensor(announcing(tmp_path, image, 100, 100, 100)), "truncated or its header is wrong")
    refused(asking, file_tensor(gzip.compress(whole + noise)[:-200]), "truncated or damaged")
    refused(asking, file_tensor(gzip.compress(noise)), "is not a NIfTI file")
    refused(asking, file_tensor(whole[:300]), "is of no image format known here")
    refused(asking, file_tensor(whole[:-1]), "truncated or its header is wrong")
    np.testing.assert_array_equal(asking.labels("organ", tensors_of(image)), labels)


def test_triton_refuses_a_type_that_is_not_the_input_s(asking: Asking) -> None:
    wrong = asking.kind.InferInput("IMAGE", [1, 8, 8, 8], "FP64")
    wrong.set_data_from_numpy(np.ones((1, 8, 8, 8)))
    with pytest.raises(InferenceServerException, match="data-type is 'FP64', but model 'organ' expects 'FP32'") as caught:
        asking.client.infer("organ", [wrong])
    assert caught.value.status() in ("StatusCode.INVALID_ARGUMENT", "400")


def test_triton_refuses_a_million_million_voxels_that_are_announced(grpc: Asking) -> None:
    announced = tritonclient.grpc.InferInput("IMAGE", [1, 10_000, 10_000, 10_000], "FP32")
    announced._raw_content = b"1234"  # the client itself would refuse to send it
    with pytest.raises(InferenceServerException, match="Expected 4000000000000, got 4") as caught:
        grpc.client.infer("organ", [announced])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_triton_counts_what_it_does(served: Served, grpc: Asking, image: Array) -> None:
    def counted(name: str, **labels: str) -> float:
        return metric(served.server, name, model="organ_bls", **labels)

    names = ("segrt_windows_total", "segrt_stage_seconds_total", "segrt_case_seconds_total", "segrt_window_wait_seconds_total")
    before = {name: counted(name) for name in names}
    cases = counted("segrt_cases_total", outcome="done")
    answer = grpc.ask("organ_bls", tensors_of(image))
    assert counted("segrt_cases_total", outcome="done") == cases + 1
    assert counted("segrt_windows_total") == before["segrt_windows_total"] + report_of(answer)["windows"][0]
    assert counted("segrt_windows_per_second") > 0
    for name in names:
        assert counted(name) > before[name]


def test_triton_networks_answer_alone(grpc: Asking, served: Served) -> None:
    """`_patch` is the bare network; several patches in a request are a batch."""
    patches = np.random.default_rng(3).normal(size=(3, 1, 8, 8, 8)).astype(np.float32)
    logits = grpc.client.infer(patch_name(served, "1"), grpc.inputs({"patches": patches})).as_numpy("logits")
    centres = np.arange(3, dtype=np.float32)[None, :, None, None, None]
    np.testing.assert_allclose(logits, 2 * centres * patches - centres**2, rtol=1e-6, atol=1e-6)


TRAFFIC = (*((protocol, model) for protocol in ("grpc", "http") for model in PIPELINES), ("grpc", "organ_stream"))


def test_triton_swaps_a_model_under_traffic_without_a_failed_request(served: Served, image: Array, labels: Array, tmp_path: Path) -> None:
    """Version 2 sees other classes; every answer is that of one version or the other, and in the end all are the new one's."""
    changed = make_bundle(tmp_path / "new", served.organ.spec, centres=(0, 1.2, 5))
    later = Predictor(changed, device="cpu")((image, SPACING)).labels
    assert not np.array_equal(later, labels)
    stop, phase = threading.Event(), ["before"]
    answered = {way: Counter[str]() for way in TRAFFIC}

    def keep_asking(way: tuple[str, str]) -> None:
        protocol, model = way
        asking = Asking.over(protocol, served.server)
        while not stop.is_set():
            began = phase[0]
            if model == "organ_stream":
                answer = list(streamed(served, tensors_of(image)))[-1].as_numpy("LABELS")
            else:
                answer = asking.labels(model, tensors_of(image))
            allowed = [later] if began == "after" else [labels, later]
            assert any(np.array_equal(answer, one) for one in allowed), f"{way}, begun {began} the change"
            answered[way][began if began == phase[0] else "during"] += 1
            time.sleep(0.1)  # leaves the loading some of the CPU

    client = Asking.over("grpc", served.server).client
    with ThreadPoolExecutor(len(TRAFFIC)) as pool:
        running = [pool.submit(keep_asking, way) for way in TRAFFIC]

        def all_answered() -> bool:
            for failed in (one for one in running if one.done()):
                failed.result()
            return all(count[phase[0]] > 0 for count in answered.values())

        try:
            wait_for(all_answered)
            phase[0] = "during"
            version = write_triton(changed, served.repository, name="organ", device="cpu").version
            for model in (*(patch_name(served, member) for member in changed.spec.members), *PIPELINES, "organ_stream"):
                client.load_model(model, client_timeout=4 * TIMEOUT_S)  # new processes start, on a machine that is busy with the others
            wait_for(all_answered)
            phase[0] = "after"
            wait_for(all_answered)
            after = [Asking.over("grpc", served.server).ask(model, tensors_of(image)) for model in PIPELINES]
        finally:
            stop.set()
    for one in running:
        one.result()
    for answer in after:
        assert report_of(answer)["version"] == str(version) == "2"
        np.testing.assert_array_equal(answer.as_numpy("LABELS"), later)
