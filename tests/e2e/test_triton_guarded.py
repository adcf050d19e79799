"""A real tritonserver behind its guard: what would end it is refused over HTTP, and it is the same process afterwards."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from factories import banded, make_bundle, volume_of

from segrt.arrays import Array
from segrt.export.triton import write_triton
from segrt.predictor import Predictor
from segrt.serving import Connection, RemotePredictor, Server, ServerOptions

WAIT_S = 60
INFER = "/v2/models/organ/infer"
IMAGE = volume_of(banded((8, 12, 10)).astype(np.float32)[None])


@dataclass(frozen=True)
class Served:
    server: Server
    labels: Array

    def client(self) -> http.client.HTTPConnection:
        host, port = self.server.http.split(":")
        return http.client.HTTPConnection(host, int(port), timeout=WAIT_S)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("triton")
    bundle = make_bundle(folder / "organ")
    write_triton(bundle, folder / "repository", device="cpu")
    for model in (folder / "repository").iterdir():
        if model.name != "organ":
            shutil.rmtree(model)
    with Predictor(bundle, device="cpu") as predictor, Server(folder / "repository", ServerOptions(exit_s=5, ready_s=120)) as server:
        yield Served(server, predictor(IMAGE).labels)


def tensor(shape: list[int], **more: Any) -> dict[str, Any]:
    return {"name": "IMAGE", "datatype": "FP32", "shape": shape, **more}


def refused(served: Served, body: bytes, **headers: str) -> tuple[int, str]:
    with closing(served.client()) as client:
        client.request("POST", INFER, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = client.getresponse()
        return answer.status, str(json.loads(answer.read())["error"])


HUGE = [1, 10_000, 10_000, 10_000]


def test_triton_outlives_a_million_million_voxels_that_json_announces(served: Served) -> None:
    process = served.server.pid
    text = json.dumps({"inputs": [tensor(HUGE, data=[0.0])]}).encode()
    for headers in ({}, {"Inference_Header_Content_Length": str(len(text))}):
        status, said = refused(served, text, **headers)
        assert status == 400
        assert said.startswith("IMAGE announces 1 x 10000 x 10000 x 10000 voxels, but the request brings")
    # what the guard leaves to the server
    for more in (
        {"parameters": {"binary_data_size": 4}},
        {"parameters": {"binary_data_size": 0}},
        {"parameters": {"shared_memory_region": "x"}},
    ):
        text = json.dumps({"inputs": [tensor(HUGE, data=[0.0], **more)]}).encode()
        status, _ = refused(served, text + b"1234", Inference_Header_Content_Length=str(len(text)))
        assert 400 <= status < 500
    assert (served.server.pid, served.server.is_running, served.server.restarts) == (process, True, 0)
    with RemotePredictor(f"http://{served.server.http}", "organ") as remote:
        np.testing.assert_array_equal(remote(IMAGE).labels, served.labels)


def test_triton_outlives_bodies_that_are_cut_or_nothing(served: Served) -> None:
    process = served.server.pid
    host, port = served.server.http.split(":")
    cuts = (
        b"\0" * 1000,
        f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n{{".encode(),
        f"POST {INFER} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n12".encode(),
    )
    for cut in cuts:
        with socket.create_connection((host, int(port)), WAIT_S) as connection:
            connection.sendall(cut)
    for body in (b"{", b"[" * 10**6, b'{"inputs": [[]]}', b'{"inputs": {"shape": [1]}}'):
        assert 400 <= refused(served, body)[0] <= 500
    assert (served.server.pid, served.server.is_running, served.server.restarts) == (process, True, 0)


def test_triton_answers_many_connections_through_the_guard(served: Served) -> None:
    sent = Connection(shared_memory="off")
    with RemotePredictor(f"http://{served.server.http}", "organ", connection=sent) as remote, ThreadPoolExecutor(30) as pool:
        for found in pool.map(lambda _: remote(IMAGE), range(60)):
            np.testing.assert_array_equal(found.labels, served.labels)


def test_triton_counts_the_time_a_request_waited_among_what_it_was_given(served: Served) -> None:
    """An image that would take a moment is too late once it has waited for another one."""
    slow, quick = np.random.default_rng(0).random((1, 30, 30, 30)), IMAGE.data
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(refused, served, asking(slow, step="0.1", timeout_s="3"))
        time.sleep(0.5)
        status, said = refused(served, asking(quick, timeout_s="1"))
        assert busy.result(WAIT_S)[0] == 503
    assert (status, said) == (503, "gave up after 1 s, the time this request was given; allow more or ask for less")


def asking(image: Array, **options: str) -> bytes:
    spacing = {"name": "SPACING", "datatype": "FP64", "shape": [3], "data": [1.0] * 3}
    return json.dumps({"inputs": [tensor([*image.shape], data=image.ravel().tolist()), spacing], "parameters": options}).encode()
