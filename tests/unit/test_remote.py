"""The client without a server: addresses, tensors, patience, what servers that are no Triton say, flags that do not go together."""

from __future__ import annotations

import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import make_spec, volume_of
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segrt.cli import predict as predict_command
from segrt.errors import BackendError, InputError
from segrt.protocol import FILE, FILE_SIZES, IMAGE, IMAGE_INT16, PREVIOUS, REPORT, Report
from segrt.serving import Connection, RemotePredictor, Tls
from segrt.serving.connection import parse_address
from segrt.serving.grpc_transport import GrpcTransport
from segrt.serving.patience import Patience
from segrt.serving.questions import file_tensors, files_of, report_in, segmentation_of, tensors_of
from segrt.serving.shared import SharedMemoryUse, SystemRegion
from segrt.serving.wire import Failure, Question
from segrt.volume import Grid

NOBODY = "127.0.0.1:9"


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("127.0.0.1:8001", ("grpc", "127.0.0.1:8001", "", False, True)),
        ("grpcs://gpu7:8001", ("grpc", "gpu7:8001", "", True, False)),
        ("http://localhost:8000/", ("http", "localhost:8000", "", False, True)),
        ("https://[::1]/triton", ("http", "[::1]:443", "/triton", True, True)),
    ],
)
def test_an_address_is_read(url: str, found: tuple[Any, ...]) -> None:
    address = parse_address(url)
    assert (address.kind, address.netloc, address.path, address.encrypted, address.is_loopback) == found


@pytest.mark.parametrize(
    "url", ["", "gpu7", "gpu7:port", "gpu7:99999", "ftp://gpu7:21", "gpu7:8001/path", "http://me@gpu7", "http://gpu7/?a=1"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="expected HOST:PORT"):
        parse_address(url)


@pytest.mark.parametrize(
    ("connection", "sentence"),
    [
        (Connection(timeout_s=0), "timeout_s: expected seconds above 0, got 0"),
        (Connection(backoff_s=float("nan")), "backoff_s: expected seconds"),
        (Connection(retries=-1), "retries: expected 0 or more, got -1"),
        (Connection(compression="zip"), "compression: expected gzip or deflate, got 'zip'"),  # type: ignore[arg-type]
        (Connection(shared_memory="on"), "shared_memory: expected auto, system, cuda, off"),  # type: ignore[arg-type]
        (Connection(tls=Tls(root_certificates=Path("none.pem"))), "root_certificates: none.pem is no file"),
        (Connection(tls=Tls(key=Path(__file__))), "key and certificate belong together"),
        (Connection(tls=Tls(root_certificates=Path(__file__), insecure=True)), "insecure means that no certificate is checked"),
        (Connection(tls=Tls(insecure=True)), "gRPC always checks the server's certificate"),
    ],
)
def test_a_connection_that_cannot_be_is_refused(connection: Connection, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        RemotePredictor(NOBODY, "liver", connection=connection)
    assert sentence in str(caught.value)


def test_a_file_that_is_no_certificate_is_named() -> None:
    for url in (f"https://{NOBODY}",):
        with pytest.raises(InputError, match="expected files in PEM format"):
            RemotePredictor(url, "liver", connection=Connection(tls=Tls(root_certificates=Path(__file__))))


@pytest.mark.parametrize("url", [NOBODY, f"http://{NOBODY}"])
def test_nobody_there_is_said_at_once(url: str) -> None:
    with pytest.raises(BackendError, match=r"no answer \(.*\); check the address, and that the server runs \(segrt-serve\)"):
        RemotePredictor(url, "liver")


def test_options_that_cannot_be_are_refused_before_anybody_is_asked() -> None:
    with pytest.raises(InputError, match="option 'step'"):
        RemotePredictor(NOBODY, "liver", step=2)
    with pytest.raises(InputError, match="model name"):
        RemotePredictor(NOBODY, "../liver")


REAL = (np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.float32)


@given(st.sampled_from(REAL).flatmap(lambda dtype: hnp.arrays(dtype, (2, 2, 3, 1))))
def test_voxels_travel_as_int16_or_float32_whichever_is_exact(data: Any) -> None:
    sent = tensors_of(volume_of(data), None)
    (name,) = {IMAGE, IMAGE_INT16} & sent.keys()
    assert sent[name].dtype == (np.float32 if name == IMAGE else np.int16)
    if data.dtype.itemsize < 4 or name == IMAGE_INT16 or data.dtype == np.float32:
        assert np.array_equal(sent[name].astype(np.float64), data.astype(np.float64), equal_nan=True)
    if data.dtype.kind != "f" and data.min() >= -(2**15) and data.max() < 2**15:
        assert name == IMAGE_INT16


def test_labels_of_a_first_stage_have_16_bits() -> None:
    volume = volume_of(np.zeros((2, 2, 2), np.int16))
    assert tensors_of(volume, np.full((2, 2, 2), 65535, np.int64))[PREVIOUS].dtype == np.uint16
    for wrong in (np.full((2, 2, 2), -1), np.full((2, 2, 2), 65536), np.zeros((2, 2, 2), np.float32)):
        with pytest.raises(InputError, match="expected whole numbers from 0 to 65535"):
            tensors_of(volume, wrong)


def test_only_whole_files_are_sent_as_they_are(tmp_path: Path) -> None:
    whole, headed, folder = tmp_path / "a_0000.nii.gz", tmp_path / "a.mhd", tmp_path / "series"
    whole.write_bytes(b"abc")
    headed.touch()
    folder.mkdir()
    assert files_of(str(whole)) == [whole]
    assert files_of([whole, whole]) == [whole, whole]
    for other in (headed, folder, tmp_path / "missing.nii", [], (np.zeros((2, 2, 2)), (1, 1, 1)), volume_of(np.zeros((2, 2, 2)))):
        assert files_of(other) is None
    sent = file_tensors([whole, whole])
    assert sent[FILE].tobytes() == b"abcabc"
    assert sent[FILE_SIZES].tolist() == [3, 3]


def test_pauses_grow_and_end() -> None:
    patience = Patience(Connection(retries=7, backoff_s=0.5))
    pauses = [patience.pause_after(Failure("unavailable", "busy")) for _ in range(8)]
    assert pauses[-1] is None
    for pause, longest in zip(pauses[:-1], (0.5, 1, 2, 4, 8, 8, 8), strict=True):
        assert pause is not None
        assert longest / 2 <= pause <= longest
    for reason in ("invalid", "unknown", "late", "cancelled", "failed"):
        assert Patience(Connection()).pause_after(Failure(reason, "no")) is None  # type: ignore[arg-type]
    assert Patience(Connection(timeout_s=0.01, backoff_s=1)).pause_after(Failure("unavailable", "busy")) is None


def test_an_answer_that_is_none_is_refused() -> None:
    report = Report(bundle_sha="ab")
    with pytest.raises(BackendError, match="as its report, expected JSON"):
        report_in({})
    assert report_in({REPORT: np.frombuffer(report.model_dump_json().encode(), np.uint8)}) == report
    for answer in ({}, {"LABELS": np.zeros((1, 2, 4), np.uint8)}, {"LABELS": np.zeros(8, np.uint8)}):
        with pytest.raises(BackendError, match="expected shape"):
            segmentation_of(answer, report, make_spec(), Grid((1, 2, 3)), "a", {})


def test_what_grpc_cannot_carry_is_said_before_it_is_sent() -> None:
    transport = GrpcTransport(parse_address(NOBODY), Connection())
    large = np.broadcast_to(np.int16(0), (1, 1200, 1000, 1000))
    with pytest.raises(InputError, match=r"the image takes 2.40 GB, gRPC carries 2 GB; use http:// or"):
        transport.infer(Question("liver", "", {IMAGE_INT16: large}, ["LABELS"]), 1)
    transport.close()


def test_a_gpus_memory_needs_a_gpu() -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is one")
    memory = SharedMemoryUse(GrpcTransport(parse_address(NOBODY), Connection()), "cuda", near=True)
    with pytest.raises(BackendError, match=r"cupy is needed here|of a GPU's memory"), memory.shelf(Question("liver", "", {}, []), {}, 1):
        pass


def test_a_region_is_gone_when_it_is_closed() -> None:
    region = SystemRegion(100)
    path = Path("/dev/shm") / region.name
    region.write(8, np.arange(6, dtype=np.int16).reshape(2, 3))
    assert region.read(8, (2, 3), np.dtype("<i2")).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert path.exists()
    region.close()
    assert not path.exists()


class NoTriton(http.server.BaseHTTPRequestHandler):
    """Whatever else may listen on a port: a page, a gateway whose server is away, something that hangs up."""

    def do_GET(self) -> None:
        if "hangs" in self.path:
            return
        self.send_response(503 if "away" in self.path else 200)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoTriton) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "sentence"),
    [("", "expected JSON; is this a Triton server"), ("/away", "no answer (<html>hello</html>)"), ("/hangs", "no answer (")],
)
def test_a_server_that_is_no_triton_is_named(gateway: str, path: str, sentence: str) -> None:
    with pytest.raises(BackendError) as caught:
        RemotePredictor(gateway + path, "liver")
    assert sentence in str(caught.value)


# ------------------------------------------------------------------ segrt-predict
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--timeout", "5"), "need a server: --triton HOST:PORT"),
        (("--insecure",), "need a server"),
        (("--client-key", "k.pem", "--client-certificate", "c.pem"), "need a server"),
        (("--triton", NOBODY, "--backend", "openvino"), "--backend: decided where the server was set up"),
        (("--triton", NOBODY, "--threads", "2", "--benchmark"), "--benchmark, --threads: decided where"),
        (("--triton", ","), "--triton: expected HOST:PORT, got ','"),
        (("--triton", "gpu7"), "expected HOST:PORT"),
        (("--triton", NOBODY, "--compression", "zip"), "compression: expected gzip or deflate"),
        (("--triton", NOBODY, "--shared-memory", "on"), "shared_memory: expected auto"),
        (("--triton", NOBODY, "--root-certificates", "none.pem"), "root_certificates: none.pem is no file"),
        (("--triton", NOBODY, "--insecure", "--send-files"), "gRPC always checks"),
        (("--triton", NOBODY), "no answer"),
    ],
)
def test_flags_that_do_not_go_together_are_one_sentence(
    flags: tuple[str, ...], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["segrt-predict", "images", "out", "--model", "liver", *flags])
    with pytest.raises(SystemExit) as left:
        predict_command.main()
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert sentence in err
    assert not (tmp_path / "out").exists()
