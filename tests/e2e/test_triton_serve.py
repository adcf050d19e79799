"""Starting, watching and stopping a real tritonserver, as a context manager and by `segrt-serve`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import banded, make_bundle, make_spec, volume_of

import segrt.serving.watch
from segrt.arrays import Array
from segrt.errors import BackendError
from segrt.export.triton import write_triton
from segrt.predictor import Predictor
from segrt.serving.options import ServerOptions
from segrt.serving.remote import RemotePredictor
from segrt.serving.server import Server

# answers with the number of its process after as many seconds as it is told
ECHO = """
import os, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.answer = np.full(1, os.getpid(), np.int32)

    def execute(self, requests):
        answers = []
        for request in requests:
            time.sleep(float(np.from_dlpack(pb_utils.get_input_tensor_by_name(request, "SECONDS"))[0]))
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("PROCESS", self.answer)]))
        return answers
"""
CONFIG = """
name: "echo"
backend: "python"
max_batch_size: 0
input [{ name: "SECONDS" data_type: TYPE_FP32 dims: [1] }]
output [{ name: "PROCESS" data_type: TYPE_INT32 dims: [1] }]
instance_group [{ kind: KIND_CPU count: 1 }]
"""
QUICK = ServerOptions(exit_s=30, ready_s=120)
TIMEOUT_S = 120


def write_echo(repository: Path, model: str = ECHO) -> Path:
    (repository / "echo" / "1").mkdir(parents=True)
    (repository / "echo" / "config.pbtxt").write_text(CONFIG)
    (repository / "echo" / "1" / "model.py").write_text(model)
    return repository


class RefusedError(Exception):
    """What a server answers instead."""


def post(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(f"http://{address}/v2/{path}", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.loads(answer.read() or "{}")
    except urllib.error.HTTPError as err:
        with err:
            raise RefusedError(f"{err.code} {err.reason} {err.read().decode()}") from None


def ask_echo(address: str, seconds: float = 0) -> int:
    body = {"inputs": [{"name": "SECONDS", "shape": [1], "datatype": "FP32", "data": [seconds]}]}
    return post(address, "models/echo/infer", body)["outputs"][0]["data"][0]


def ask_until_answered(address: str) -> int:
    """As a client does that tries again."""
    until = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return ask_echo(address)
        except RefusedError as err:
            if "is not healthy" not in str(err):
                raise
        except OSError:  # nobody listens, or it ends under our hands
            pass
        assert time.monotonic() < until
        time.sleep(0.2)


def ask_labels(address: str, model: str, image: Array) -> tuple[Array, dict[str, Any]]:
    """Labels and the report of an image with voxels of 1 mm."""
    inputs = [
        {"name": "IMAGE", "shape": image.shape, "datatype": "FP32", "data": image.ravel().tolist()},
        {"name": "SPACING", "shape": [3], "datatype": "FP64", "data": [1.0, 1.0, 1.0]},
    ]
    answer = post(address, f"models/{model}/infer", {"inputs": inputs})
    found = {output["name"]: np.array(output["data"], np.uint8).reshape(output["shape"]) for output in answer["outputs"]}
    return found["LABELS"], json.loads(found["REPORT"].tobytes())


def left_behind(process: int) -> list[str]:
    """What the servers of a process keep outside the repository."""
    shared, temporary = Path("/dev/shm"), Path(tempfile.gettempdir())
    return [path.name for path in [*shared.glob(f"segrt_{process}_*"), *temporary.glob(f"segrt-*-{process}-*")]]


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """A model repository that starts at once."""
    return write_echo(tmp_path / "repository")


def test_triton_server_is_ready_at_its_start_and_leaves_nothing(echo: Path) -> None:
    with Server(echo, QUICK) as server:
        process = ask_echo(server.http)
        metrics, until = "", time.monotonic() + TIMEOUT_S
        # a request is counted a moment after its answer was sent
        while 'nv_inference_request_success{model="echo",version="1"} 1' not in metrics:
            assert time.monotonic() < until, metrics
            with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=TIMEOUT_S) as answer:
                metrics = answer.read().decode()
        # what deploy/kubernetes.yaml scales on
        assert 'nv_inference_queue_duration_us{model="echo",version="1"}' in metrics
        assert all(address.startswith("127.0.0.1:") for address in (server.http, server.grpc, server.metrics))
    assert not server.is_running
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert left_behind(os.getpid()) == []


def test_triton_requests_in_flight_and_in_the_queue_finish_when_the_server_stops(echo: Path) -> None:
    with ThreadPoolExecutor(4) as pool, Server(echo, QUICK) as server:
        answers = [pool.submit(ask_echo, server.http, 0.5) for _ in range(4)]
        wait(answers, return_when="FIRST_COMPLETED")
        assert server.stop() == 0
        assert len({answer.result() for answer in answers}) == 1


def test_triton_model_whose_process_is_killed_comes_back(echo: Path) -> None:
    with ThreadPoolExecutor(1) as pool, Server(echo, QUICK) as server:
        first = ask_echo(server.http)
        working = pool.submit(ask_echo, server.http, 60)
        time.sleep(0.5)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(RefusedError, match=r"500 .*is not healthy"):
            working.result()
        assert ask_until_answered(server.http) != first
        assert server.restarts == 1
        # the one that was killed keeps tritonserver from unloading it, but not us from stopping
        assert server.stop() == 0


def test_triton_server_ends_when_a_model_cannot_be_kept_alive(echo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segrt.serving.watch, "_MOST", 0)
    with Server(echo, QUICK) as server:
        os.kill(ask_echo(server.http), signal.SIGKILL)
        assert server.wait(TIMEOUT_S) == -signal.SIGKILL
        assert server.failure == "the process of model 'echo' died 1 times within 10 minutes"


def test_triton_model_that_cannot_be_loaded_is_a_sentence(tmp_path: Path) -> None:
    broken = ECHO.replace("self.answer = ", "raise ValueError('no such engine') #")
    with pytest.raises(BackendError, match=r"before it was ready: .*echo.*no such engine"):
        Server(write_echo(tmp_path, broken), QUICK).start()
    assert left_behind(os.getpid()) == []


def test_triton_clients_load_models_only_where_they_may(echo: Path) -> None:
    with Server(echo, QUICK) as server:
        first = ask_echo(server.http)
        with pytest.raises(RefusedError, match="403"):
            post(server.http, "repository/models/echo/load", {})
        # nor do they learn the key
        seen = Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert b"segrt-key=xxxx" in seen
        assert server._key.encode() not in seen
        # unchanged: not loaded again
        server.reload()
        assert ask_echo(server.http) == first
        os.utime(echo / "echo" / "1" / "model.py")
        server.reload()
        assert ask_echo(server.http) != first
        with pytest.raises(BackendError, match="other"):
            server.load("other")
    with Server(echo, ServerOptions(control="explicit")) as server:
        post(server.http, "repository/models/echo/load", {})


class Command:
    """A running segrt-serve."""

    def __init__(self, *arguments: str | Path) -> None:
        ports = [text for name in ("http", "grpc", "metrics") for text in (f"--{name}-port", "0")]
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from segrt.cli.serve import main; main()", *map(str, arguments), *ports],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.said = ""
        for line in self.process.stdout:
            self.said += line
            if line.startswith("try:"):
                break
        found = re.search(r"http://(\S+)", self.said)
        self.http = found[1] if found else ""

    @property
    def server(self) -> int:
        """Process of its tritonserver."""
        (found,) = [pid for pid, (name, _) in segrt.serving.watch._children(self.process.pid).items() if name == "tritonserver"]
        return found

    def end(self, number: signal.Signals | None = None) -> tuple[int, str]:
        """Exit code and what it said on stderr."""
        if number is not None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, errors


@pytest.fixture
def started() -> Iterator[list[Command]]:
    """Commands that are ended whatever happens."""
    commands: list[Command] = []
    yield commands
    for command in commands:
        if command.process.poll() is None:
            command.process.terminate()
            command.process.communicate(timeout=TIMEOUT_S)


def only(repository: Path, name: str) -> None:
    """Leave one model, for a quick start."""
    for folder in repository.iterdir():
        if folder.name != name:
            shutil.rmtree(folder)


def test_triton_command_serves_a_bundle_loads_its_next_version_and_stops(tmp_path: Path, started: list[Command]) -> None:
    bundle, changed = make_bundle(tmp_path / "organ"), make_bundle(tmp_path / "new" / "organ", centres=(2, 1, 0))
    image = banded((8, 12, 10)).astype(np.float32)[None]
    with Predictor(bundle) as predictor, Predictor(changed) as other:
        wanted, then = predictor(volume_of(image)).labels, other(volume_of(image)).labels
    command = Command(bundle.path, "--repository", tmp_path / "repository")
    started.append(command)
    assert "ready: organ, organ_bls, organ_patch, organ_stream" in command.said
    assert re.search(r"gRPC +(\S+)\n(.*\n)*try: segrt-predict images/ out/ --triton \1 --model organ\n", command.said)
    labels, report = ask_labels(command.http, "organ", image)
    np.testing.assert_array_equal(labels, wanted)
    assert report["bundle_sha"] == bundle.fingerprint

    write_triton(changed, tmp_path / "repository", device="cpu")
    command.process.send_signal(signal.SIGHUP)
    until = time.monotonic() + TIMEOUT_S
    while ask_labels(command.http, "organ", image)[1]["bundle_sha"] != changed.fingerprint:
        assert time.monotonic() < until
        time.sleep(0.2)
    np.testing.assert_array_equal(ask_labels(command.http, "organ", image)[0], then)
    code, errors = command.end(signal.SIGTERM)
    assert code == 0, errors
    assert left_behind(command.process.pid) == []


def test_triton_model_of_a_bundle_is_the_same_after_its_process_was_killed(tmp_path: Path) -> None:
    bundle, image = make_bundle(tmp_path / "organ", make_spec()), banded((8, 12, 10)).astype(np.float32)[None]
    write_triton(bundle, tmp_path / "repository", device="cpu")
    only(tmp_path / "repository", "organ")
    with Predictor(bundle) as predictor, Server(tmp_path / "repository", QUICK) as server:
        for child in server.processes():
            os.kill(child, signal.SIGKILL)
        until = time.monotonic() + TIMEOUT_S
        while server.restarts == 0:
            assert time.monotonic() < until
            time.sleep(0.1)
        while True:
            try:
                labels, _ = ask_labels(server.http, "organ", image)
                break
            except RefusedError:
                assert time.monotonic() < until
        np.testing.assert_array_equal(labels, predictor(volume_of(image)).labels)


def test_triton_client_sends_images_where_a_server_refuses_to_share_memory(tmp_path: Path) -> None:
    """As it does when it listens for others than this machine."""
    bundle, image = make_bundle(tmp_path / "organ"), volume_of(banded((8, 40, 40)).astype(np.float32)[None])
    write_triton(bundle, tmp_path / "repository", device="cpu")
    only(tmp_path / "repository", "organ")
    refusing = tuple(f"--{flag}=shared-memory:segrt-key-local=x" for flag in ("http-restricted-api", "grpc-restricted-protocol"))
    with Predictor(bundle) as predictor, Server(tmp_path / "repository", ServerOptions(exit_s=30, arguments=refusing)) as server:
        for url in (server.grpc, f"http://{server.http}"):
            with RemotePredictor(url, "organ") as remote:
                np.testing.assert_array_equal(remote(image).labels, predictor(image).labels)


def test_triton_server_that_dies_is_started_again_at_the_same_address(echo: Path, started: list[Command]) -> None:
    command = Command(echo)
    started.append(command)
    server = command.server
    os.kill(server, signal.SIGKILL)
    assert command.process.stderr is not None
    said = ""
    while "ready again" not in said:
        line = command.process.stderr.readline()
        assert line, said
        said += line
    assert "error: tritonserver ended by itself with code -9" in said
    assert command.server != server
    assert ask_echo(command.http)
    assert command.end(signal.SIGTERM)[0] == 0


def test_triton_command_ends_as_its_server_does_when_another_cannot_be_started(echo: Path, started: list[Command]) -> None:
    command = Command(echo)
    started.append(command)
    server = command.server
    (echo / "echo" / "1" / "model.py").write_text("import nowhere\n")
    os.kill(server, signal.SIGKILL)
    code, errors = command.end()
    assert code == 128 + signal.SIGKILL
    assert "before it was ready" in errors
    assert errors.count("error: tritonserver ended by itself with code -9") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_triton_command_stops_while_it_starts(tmp_path: Path, started: list[Command], number: signal.Signals) -> None:
    slow = write_echo(tmp_path, ECHO.replace("def initialize(self, args):", "def initialize(self, args):\n        time.sleep(60)"))
    process = subprocess.Popen(
        [sys.executable, "-c", "from segrt.cli.serve import main; main()", str(slow), "--http-port", "0", "--grpc-port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + TIMEOUT_S
    while not segrt.serving.watch._children(process.pid):
        assert time.monotonic() < until
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(number)
    said, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, said) == (2, ""), errors
    assert left_behind(process.pid) == []
