"""RemotePredictor when it does not go well, against a real tritonserver and a model that does what it is told; see scripted_model.py."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_side import PATIENCE_S, SHARED_MEMORY, Served, told
from factories import banded, make_spec, write_case
from scripted_model import BUNDLE_SHA, write_scripted

from segrt.errors import BackendError, InputError
from segrt.serving import Connection, RemotePredictor, Server, ServerOptions
from segrt.serving.wire import Failure
from segrt.spec import PreviousStage

IMAGE = banded((9, 8, 7), seed=7)
LARGE = banded((40, 90, 110), seed=8)  # enough bytes for shared memory


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[Server]:
    if not (folder / "repository").exists():
        write_scripted(folder / "repository", make_spec(previous=PreviousStage(values=(1, 2))), folder / "signs", name="scripted")
    with Server(folder / "repository", ServerOptions(exit_s=5, **options)) as server:
        yield server


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("triton")
    with running(folder) as server:
        yield Served(server, folder / "signs")


@pytest.fixture(params=["grpc", "http"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_triton_gets_labels_of_a_first_stage(served: Served, protocol: str, tmp_path: Path) -> None:
    stage = banded(IMAGE.shape, seed=3)
    path = write_case(tmp_path / "stage.nii.gz", stage)
    with RemotePredictor(served.url(protocol), "scripted") as remote:
        assert remote.takes_previous
        for previous in (stage, path, stage.astype(bool)):
            remote(told("cascade", IMAGE), previous=previous)
            seen = json.loads((served.signs / "last.json").read_text())["seen"]
            assert seen["PREVIOUS"] == ["uint16", list(IMAGE.shape)]
            arrived = np.fromfile(served.signs / "PREVIOUS", np.uint16).reshape(IMAGE.shape)
            assert np.array_equal(arrived, previous if isinstance(previous, np.ndarray) else stage)
        with pytest.raises(InputError, match="expected whole numbers from 0 to 65535"):
            remote(told("cascade", IMAGE), previous=stage - 1)


def test_triton_gets_files_as_they_are(served: Served, protocol: str, tmp_path: Path) -> None:
    """The server reads them, so it also says where the image lies."""
    path = write_case(tmp_path / "case_0000.nii.gz", IMAGE)
    with RemotePredictor(served.url(protocol), "scripted", connection=Connection(send_files=True)) as remote:
        found = remote(str(path))
    assert (served.signs / "FILE").read_bytes() == path.read_bytes()
    report = json.loads((served.signs / "last.json").read_text())
    assert report["options"]["name"] == path.name
    assert report["seen"]["FILE_SIZES"] == ["int64", [1]]
    assert found.grid.spacing == (3.0, 2.0, 1.0)
    assert found.labels.shape == found.grid.shape


def test_triton_answers_many_threads_of_one_client(served: Served, protocol: str) -> None:
    images = [told(str(seed), banded((30, 70, 80), seed=seed)) for seed in range(8)]
    with RemotePredictor(served.url(protocol), "scripted") as remote, ThreadPoolExecutor(8) as pool:
        for image, found in zip(images * 4, pool.map(remote, images * 4), strict=True):
            assert np.array_equal(found.labels, image.data[0])
    assert served.left() == []


@pytest.mark.parametrize("streams", [False, True])
def test_triton_refuses_once_and_the_sentence_arrives(served: Served, protocol: str, streams: bool) -> None:
    name = f"refused {protocol} {streams}"
    with RemotePredictor(served.url(protocol), "scripted") as remote:
        for image in (told(name, IMAGE), told(name.replace("refused", "broken"), IMAGE)):
            wanted = InputError if "refused" in image.name else BackendError
            sentence = "expected what it is not$" if "refused" in image.name else "model 'scripted' failed: the engine failed$"
            with pytest.raises(wanted, match=sentence):
                remote(image, progress=(lambda done, total: None) if streams else None)
            assert (served.signs / image.name).exists()
            assert not (served.signs / f"{image.name}.again").exists()
        assert np.array_equal(remote(told("afterwards", IMAGE)).labels, IMAGE)


@pytest.mark.parametrize("what", ["busy once", "dies once"])
@pytest.mark.parametrize("streams", [False, True])
def test_triton_is_asked_again_when_a_process_dies_or_nobody_is_free(served: Served, protocol: str, what: str, streams: bool) -> None:
    with RemotePredictor(served.url(protocol), "scripted", connection=Connection(shared_memory="system")) as remote:
        image = told(f"{what} {protocol} {streams}", LARGE)
        found = remote(image, progress=(lambda done, total: None) if streams else None)
    assert np.array_equal(found.labels, LARGE)
    assert (served.signs / image.name).exists()
    assert served.left() == []


def let_go(served: Served, protocol: str, name: str) -> None:
    """The server has stopped and forgotten a request; this Triton is not told of a client that leaves over HTTP, so there it goes on."""
    if protocol == "grpc":
        served.wait_for(f"{name}.cancelled")
    else:
        assert not (served.signs / f"{name}.cancelled").exists()
        (served.signs / f"{name}.stop").touch()
        served.wait_for(f"{name}.cancelled")
        swept(served)
    assert served.left() == []


def swept(served: Served) -> None:
    """What the server could not let go of is forgotten by the next that shares memory with it."""
    with RemotePredictor(served.server.grpc, "scripted") as remote:
        remote(told("the next", LARGE))


@pytest.mark.parametrize("streams", [False, True])
def test_triton_stops_when_the_client_is_closed(served: Served, protocol: str, streams: bool) -> None:
    """What another thread waits for ends in a sentence, the server hears of it over gRPC, and nothing is left behind."""
    image = told(f"slow close {protocol} {streams}", LARGE)
    remote = RemotePredictor(served.url(protocol), "scripted")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(remote, image, progress=(lambda done, total: None) if streams else None)
        served.wait_for(f"{image.name}.began")
        remote.close()
        with pytest.raises(BackendError, match="closed while it waited"):
            waiting.result(PATIENCE_S)
    let_go(served, protocol, image.name)
    with pytest.raises(BackendError, match="was closed; open another one"):
        remote(image)


def test_triton_is_given_up_after_the_time_allowed(served: Served, protocol: str) -> None:
    image = told(f"slow late {protocol}", LARGE)
    with RemotePredictor(served.url(protocol), "scripted", connection=Connection(timeout_s=1.5)) as remote:
        with pytest.raises(BackendError, match=r"model 'scripted' gave no answer within 1.5 s"):
            remote(image)
        let_go(served, protocol, image.name)


def test_triton_hears_of_a_failing_progress(served: Served) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with RemotePredictor(served.server.grpc, "scripted") as remote:
        with pytest.raises(KeyboardInterrupt):
            remote(told("stopped", LARGE), progress=stop)
        assert served.left() == []
        assert np.array_equal(remote(told("afterwards", IMAGE)).labels, IMAGE)


def test_triton_forgets_what_a_killed_client_left(served: Served) -> None:
    code = (
        "import sys, numpy as np; from segrt.serving import RemotePredictor; from segrt.volume import Grid, Volume\n"
        "data = np.zeros((1, 40, 90, 110), np.int16)\n"
        f"RemotePredictor({served.server.grpc!r}, 'scripted')(Volume(data, Grid(data.shape[1:]), 'slow killed'))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        served.wait_for("slow killed.began")
        process.kill()
    end = time.monotonic() + PATIENCE_S
    while list(SHARED_MEMORY.glob(f"segrt-client-{process.pid}-*")):  # Python's own cleaner removes it
        assert time.monotonic() < end
        time.sleep(0.05)
    assert [name for name in served.regions() if f"-{process.pid}-" in name] != []
    served.wait_for("slow killed.cancelled")
    swept(served)
    assert served.left() == []


def test_triton_has_no_such_model(served: Served, protocol: str) -> None:
    with pytest.raises(InputError, match="has no model 'liver'"):
        RemotePredictor(served.url(protocol), "liver")
    with pytest.raises(InputError, match="no parameter 'spec'"):
        RemotePredictor(served.url(protocol), "scripted_stream")


def test_triton_serves_another_bundle_now(served: Served, protocol: str, caplog: pytest.LogCaptureFixture) -> None:
    """The client says so, and goes on with what the model is now."""
    with RemotePredictor(served.url(protocol), "scripted") as remote:
        assert remote.provenance["bundle_sha256"] == BUNDLE_SHA
        remote._served = remote._served.model_copy(update={"bundle_sha": "cd" * 32})
        remote(told("image", IMAGE))
        assert remote.provenance["bundle_sha256"] == BUNDLE_SHA
    assert "is served from another bundle now" in caplog.text


@pytest.mark.parametrize("how", [signal.SIGINT])
def test_triton_hears_of_ctrl_c(served: Served, protocol: str, tmp_path: Path, how: signal.Signals) -> None:
    write_case(tmp_path / "images" / f"slow ctrl {protocol}_0000.nii.gz", LARGE)
    command = [sys.executable, "-c", "from segrt.cli.predict import main; main()", "images", "out", "--model", "scripted"]
    flags = ["--triton", served.url(protocol)]
    with subprocess.Popen([*command, *flags], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        served.wait_for(f"slow ctrl {protocol}_0000.nii.gz.began")
        process.send_signal(how)
        try:
            _, err = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()  # of one that does not end there is no waiting
    assert process.returncode != 0
    assert "Traceback" not in err
    let_go(served, protocol, f"slow ctrl {protocol}_0000.nii.gz")
    assert list(SHARED_MEMORY.glob(f"segrt-client-{process.pid}-*")) == []


def test_triton_client_that_hears_no_answers_any_more_gives_up_in_time(served: Served) -> None:
    """As after a Ctrl-C that left one of gRPC's locks taken: the thread that reads all answers of a channel waits for it."""
    remote = RemotePredictor(served.server.grpc, "scripted")
    transport, release, held = remote._transport, threading.Event(), threading.Event()

    def hold(_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            held.set()
            release.wait(PATIENCE_S)

    try:
        while not held.wait(0.2):  # an answer that was there before is told to this thread
            transport._calls.ServerLive.future(transport._messages.ServerLiveRequest()).add_done_callback(hold)
        with pytest.raises(Failure, match="no answer"):
            transport.unregister("system", "nothing", 0.2)
    finally:
        release.set()
        remote.close()


def test_triton_that_is_started_again_is_found_by_the_next_repeat(tmp_path: Path, protocol: str) -> None:
    with running(tmp_path) as first:
        ports = {"http_port": int(first.http.rsplit(":", 1)[1]), "grpc_port": int(first.grpc.rsplit(":", 1)[1])}
        remote = RemotePredictor(first.grpc if protocol == "grpc" else f"http://{first.http}", "scripted")
        remote(told("before", LARGE))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(remote, told("after", LARGE))
        with running(tmp_path, **ports):
            assert np.array_equal(waiting.result(PATIENCE_S).labels, LARGE)
    remote.close()
    with pytest.raises(BackendError, match="check the address, and that the server runs"):
        RemotePredictor(remote.where, "scripted")


def test_triton_that_loads_another_version_loses_no_request(tmp_path: Path, protocol: str) -> None:
    """Requests that come while the model is away are asked again."""
    with running(tmp_path, control="explicit") as server, ThreadPoolExecutor(4) as pool:
        remote = RemotePredictor(server.grpc if protocol == "grpc" else f"http://{server.http}", "scripted")
        waiting = [pool.submit(remote, told(str(number), IMAGE)) for number in range(40)]
        for action in ("unload", "load"):
            request = urllib.request.Request(f"http://{server.http}/v2/repository/models/scripted/{action}", method="POST")
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                assert answer.status == 200
        waiting += [pool.submit(remote, told(str(number), IMAGE)) for number in range(4)]
        assert all(np.array_equal(each.result(PATIENCE_S).labels, IMAGE) for each in waiting)
        remote.close()
