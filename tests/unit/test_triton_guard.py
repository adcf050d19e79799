"""The guard in front of tritonserver's HTTP port, before a server of a few lines that says what reached it."""

from __future__ import annotations

import gzip
import http.client
import http.server
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from segrt import protocol
from segrt.serving import guard
from segrt.serving.announced import MOST_JSON, Refused, check_announced
from segrt.serving.front import Front
from segrt.serving.options import free_port

WAIT_S = 30
INFER = "/v2/models/organ/infer"
HUGE = [1, 10_000, 10_000, 10_000]


def asking(**tensor: Any) -> bytes:
    given = {"name": "IMAGE", "datatype": "FP32", "shape": [1, 2, 2, 2], "data": [0.5] * 8}
    return json.dumps({"inputs": [given | tensor]}).encode()


class Server(http.server.ThreadingHTTPServer):
    """Answers every request with its body, and keeps the heads and bodies it saw."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.begun, self.has_left = list[str](), threading.Event()
        self.holds = threading.Event()
        self.holds.set()
        super().__init__(("127.0.0.1", port), Echo)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def end(self) -> None:
        self.shutdown()
        self.server_close()


class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        self.server.begun.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding"):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.seen.append((self.path, dict(self.headers), body))
        self.server.holds.wait(WAIT_S)
        self.send_response(200)
        self.send_header("Inference-Header-Content-Length", "7")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"3\r\nrea\r\n2\r\ndy\r\n0\r\n\r\n")
        if self.headers.get("leave"):
            self.close_connection = True

    def finish(self) -> None:
        super().finish()
        with suppress(OSError):  # the client left first
            self.connection.shutdown(socket.SHUT_RDWR)
        self.server.has_left.set()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.end()


@pytest.fixture
def front(server: Server) -> Iterator[tuple[str, int]]:
    said, address = list[str](), ("127.0.0.1", free_port())
    opened = Front(*address, server.port, said.append)
    yield address
    opened.close()
    assert said == []


@pytest.fixture
def client(front: tuple[str, int]) -> Iterator[http.client.HTTPConnection]:
    with closing(http.client.HTTPConnection(*front, timeout=WAIT_S)) as connection:
        yield connection


def post(client: http.client.HTTPConnection, body: Any, path: str = INFER, **headers: str) -> tuple[int, bytes]:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    client.request("POST", path, body, sent, encode_chunked="Transfer-Encoding" in sent)
    answer = client.getresponse()
    return answer.status, answer.read()


def sentence(answer: tuple[int, bytes]) -> str:
    return str(json.loads(answer[1])["error"])


@pytest.mark.parametrize("encoding", ["identity", "gzip", "deflate"])
def test_triton_guard_passes_everything_else_byte_by_byte(client: http.client.HTTPConnection, server: Server, encoding: str) -> None:
    """Several requests over one connection: tensors as binary data, as JSON, in chunks, and what is no inference."""
    pack = {"identity": bytes, "gzip": gzip.compress, "deflate": zlib.compress}[encoding]
    head = json.dumps({"inputs": [{"name": "IMAGE", "shape": [1, 8, 512, 512], "parameters": {"binary_data_size": 2**23}}]}).encode()
    binary = pack(head + os.urandom(2**23))
    header = {"Inference_Header_Content_Length": str(len(head)), "Content_Encoding": encoding}
    assert post(client, binary, **header) == (200, binary)
    text = pack(asking())
    assert post(client, text, Content_Encoding=encoding) == (200, text)
    assert post(client, iter([binary[:1000], binary[1000:]]), **header, Transfer_Encoding="chunked") == (200, binary)
    assert post(client, b"[no inference", "/v2/repository/models/organ/load")[0] == 200
    client.request("GET", "/v2/health/ready")
    assert client.getresponse().read() == b"ready"
    path, headers, body = server.seen[0]
    assert (path, body, headers["Inference-Header-Content-Length"]) == (INFER, binary, str(len(head)))


def test_triton_guard_passes_on_what_holds_no_json_where_others_have_it(client: http.client.HTTPConnection, server: Server) -> None:
    for path, body in ((INFER, b"bytes of one tensor"), ("/v2/systemsharedmemory/region/my%20region/unregister", b"")):
        assert post(client, body, path, Inference_Header_Content_Length="0") == (200, body)
    for name in ("my%20region", "infer_buf", "organ/infer"):
        assert post(client, b"", f"/v2/systemsharedmemory/region/{name}/unregister") == (200, b"")
    assert len(server.seen) == 5


@pytest.mark.parametrize("path", ["/v2/models/organ/versions/1/infer", "/v2/models/organ/%69nfer", "http://a/v2//models/organ/infer?x=1"])
def test_triton_guard_sees_through_a_path_in_disguise(client: http.client.HTTPConnection, server: Server, path: str) -> None:
    assert post(client, asking(shape=HUGE), path)[0] == 400
    assert server.seen == []


def test_triton_guard_says_when_a_request_came_and_lets_nobody_else_say_so(client: http.client.HTTPConnection, server: Server) -> None:
    before = time.time()
    post(client, asking(), segrt_arrived="7")
    (_, headers, _) = server.seen[0]
    assert before - 1e-3 <= float(headers[protocol.ARRIVED]) <= time.time()
    assert guard._ARRIVED.decode() == protocol.ARRIVED


def test_triton_guard_asks_for_the_body_of_a_client_that_waits(client: http.client.HTTPConnection, server: Server) -> None:
    client.putrequest("POST", INFER)
    client.putheader("Expect", "100-continue")
    client.putheader("Content-Length", str(len(asking())))
    client.endheaders()
    assert client.sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(asking())
    assert client.getresponse().read() == asking()
    assert "Expect" not in server.seen[0][1]


@pytest.mark.parametrize("how", ["plain", "gzip", "chunked", "with binary data"])
def test_triton_guard_refuses_a_million_million_voxels_that_are_announced(
    client: http.client.HTTPConnection, server: Server, how: str
) -> None:
    body = asking(shape=HUGE)
    how_sent: dict[str, tuple[Any, dict[str, str]]] = {
        "plain": (body, {}),
        "gzip": (gzip.compress(body), {"Content_Encoding": "gzip"}),
        "chunked": (iter([body[:50], body[50:]]), {"Transfer_Encoding": "chunked"}),
        "with binary data": (body + bytes(2**22), {"Inference_Header_Content_Length": str(len(body))}),
    }
    sent, headers = how_sent[how]
    answer = post(client, sent, **headers)
    assert answer[0] == 400
    assert f"IMAGE announces 1 x 10000 x 10000 x 10000 voxels, but the request brings {len(body)} bytes" in sentence(answer)
    assert post(client, asking())[0] == 200
    assert [body for _, _, body in server.seen] == [asking()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (asking(shape=[-10_000, -10_000]), "no shape that can be read"),
        (asking(shape=[1e12]), "no shape that can be read"),
        (asking(shape="many"), "no shape that can be read"),
        (b'{"inputs": [{"name": "A", "shape": [10000, 10000], "shape": [1], "data": [1]}]}', "a name appears twice"),
        (b'{"inputs": [{"name": "A", "sh\\u0061pe": [10000, 10000], "data": [1]}]}', "announces 10000 x 10000"),
        (b'{"inputs": [{"name": "\xff", "shape": [10000, 10000], "data": [1]}]}', "no JSON that can be read"),
        (b'{"inputs": ' + b"[" * 10**5, "nested too deeply"),
        (asking(parameters={"x": 1}, shape=HUGE), "announces 1 x 10000"),
        (asking(data=[0.25] * 300_000, shape=HUGE), "announces 1 x 10000"),
        (asking(data=[[0.25] * 100] * 3_000, shape=HUGE), "announces 1 x 10000"),
        (
            b'{"sh\\u0061pe": [1, 2], "inputs": [{"name": "A", "sh\\u0061pe": [10000000,10000000]' + b" " * 2**20 + b"}]}",
            "bytes of JSON that is not",
        ),
        (b'{"inputs": [{"name": "A", "sh\\u0061pe": [10000000,10000000' + b" " * 2**20 + b"]}]}", "no shape that can be read"),
        (asking(name="A" * 2**21), "bytes of JSON that is not numbers"),
        (asking(data=[[0.5, 1.5]] * 200_000, shape=HUGE), "announces 1 x 10000"),
        (b'{"inputs": [{"name": "A", "shape": [[1, 2], [3]], "data": [' + b"[1,2]," * 300_000 + b"0]}]}", "no shape that can be read"),
        (b"[" * 2**20 + b"]" * 2**20, "bytes of JSON that is not numbers"),
    ],
)
def test_triton_guard_reads_no_request_otherwise_than_the_server_does(text: bytes, said: str) -> None:
    with pytest.raises(Refused) as refused:
        check_announced(text)
    assert said in refused.value.text


@pytest.mark.parametrize(
    "text",
    [
        asking(),
        asking(shape=[0, 5]),
        asking(shape=HUGE, parameters={"shared_memory_region": "images", "shared_memory_byte_size": 2 * 10**12}),
        asking(shape=HUGE, parameters={"binary_data_size": 4}),
        asking(data=[0.25] * 300_000, shape=[1, 3, 1000, 100]),
        asking(data=[[-1.5e-3] * 100] * 3_000, shape=[3_000, 100]),
        asking(data=[[0.5, 1.5]] * 200_000, shape=[200_000, 2]),
        asking(data=[[[[[0.5]]], [[[1.5]]]]] * 100_000, shape=[100_000, 2, 1, 1, 1]),
        b'{"text_input": "no tensors"}',
        b"[]",
    ],
)
def test_triton_guard_lets_pass_what_is_there_or_lies_in_shared_memory(text: bytes) -> None:
    check_announced(text)


@pytest.mark.parametrize(
    "head",
    [
        "POST {0} HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        "POST {0} HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST {0} HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        "POST {0} HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        "POST {0} HTTP/1.1\r\nContent-Length : 5\r\n\r\n",
        "GET /v2 HTTP/1.1\r\nHost: a\n\nPOST {0} HTTP/1.1\r\n\r\n",
        "GET /v2 HTTP/1.1\r\n more: 5\r\n\r\n",
        "GET  /v2\r\n\r\n",
        "POST {0} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        "POST {0} HTTP/1.1\r\nContent-Encoding: br\r\nContent-Length: 1\r\n\r\n1",
        "POST {0} HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n1234",
        "POST {0} HTTP/1.1\r\nInference-Header-Content-Length: -3\r\nContent-Length: 4\r\n\r\n1234",
        "POST {0} HTTP/1.1\r\nContent-Length: 9000000000000000\r\n\r\n",
    ],
)
def test_triton_guard_refuses_what_a_server_may_understand_otherwise(front: tuple[str, int], server: Server, head: str) -> None:
    with socket.create_connection(front, WAIT_S) as connection:
        connection.sendall(head.format(INFER).encode())
        answer = b""
        while part := connection.recv(2**16):
            answer += part
    assert answer.split(b" ")[1] in (b"400", b"413", b"415")
    assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]
    assert server.seen == []


def test_triton_guard_reads_no_more_json_than_a_server_can_hold(client: http.client.HTTPConnection, server: Server) -> None:
    """The client goes on sending meanwhile, and gets to read why it need not."""
    body = gzip.compress(b'{"inputs": [{"data": [' + b"0," * (MOST_JSON // 2 + 10), compresslevel=1)
    answer = post(client, body, Content_Encoding="gzip")
    assert (answer[0], "more than 64 MB of JSON" in sentence(answer)) == (413, True)
    assert server.seen == []


def test_triton_guard_takes_what_fits_once_the_room_that_earlier_requests_took_is_used_again(
    client: http.client.HTTPConnection, server: Server
) -> None:
    """Of shared memory, the server keeps what it took: what is free there when a request comes says nothing."""
    taken = Path("/dev/shm", f"segrt_test_{os.getpid()}")
    if not taken.parent.is_dir():
        return  # nothing is checked there
    with taken.open("wb") as earlier:
        try:
            client.putrequest("POST", INFER)
            os.posix_fallocate(earlier.fileno(), 0, 2**20)
            client.putheader("Content-Length", str(shutil.disk_usage(taken.parent).total))
            client.putheader("Inference-Header-Content-Length", str(len(asking())))
            client.endheaders(asking())
            until = time.monotonic() + WAIT_S
            while not server.begun:
                assert time.monotonic() < until
                time.sleep(0.01)
        finally:
            taken.unlink()


def test_triton_guard_refuses_a_compressed_body_that_goes_on_after_its_end(client: http.client.HTTPConnection, server: Server) -> None:
    """What no request brings would be kept, and copied again with each piece that comes."""
    for packed in (gzip.compress(asking()), zlib.compress(asking())):
        answer = post(client, packed + bytes(2**24), Content_Encoding="gzip")
        assert (answer[0], "goes on after its end" in sentence(answer)) == (400, True)
    assert server.seen == []


def test_triton_guard_holds_only_so_much_json_at_once(front: tuple[str, int], server: Server) -> None:
    """Others are answered meanwhile."""
    text = b'{"inputs": [{"data": [' + b"0," * (MOST_JSON // 2 - 100)
    waiting = [http.client.HTTPConnection(*front, timeout=WAIT_S) for _ in range(5)]
    for number, client in enumerate(waiting):
        client.putrequest("POST", INFER)
        client.putheader("Content-Length", str(2 * len(text)))
        client.endheaders(text)
        with closing(http.client.HTTPConnection(*front, timeout=WAIT_S)) as other:
            assert post(other, asking()) == (200, asking()), number
    answer = waiting[-1].getresponse()
    assert (answer.status, "try again later" in json.loads(answer.read())["error"]) == (503, True)
    for client in waiting:
        client.close()


def test_triton_guard_answers_others_while_one_sends_chunks_of_a_byte(front: tuple[str, int], server: Server) -> None:
    """A hundred thousand chunks are in its hands at once, and another asks in the middle of them."""
    count = 100_000
    head = f"POST {INFER} HTTP/1.1\r\nTransfer-Encoding: chunked\r\nInference-Header-Content-Length: {count}\r\n\r\n"
    with socket.create_connection(front, WAIT_S) as busy, closing(http.client.HTTPConnection(*front, timeout=WAIT_S)) as other:
        other.request("GET", "/v2/health/live")
        assert other.getresponse().read() == b"ready"
        busy.sendall(head.encode() + b"1\r\n \r\n" * count)
        other.request("GET", "/v2/health/live")
        assert other.getresponse().read() == b"ready"
        assert (server.begun, select.select([busy], [], [], 0)[0]) == ([], [])
        busy.sendall(b"0\r\n\r\n")
        assert busy.recv(12) == b"HTTP/1.1 400"


def test_triton_guard_takes_up_a_server_that_was_started_again_between_two_requests_of_a_client(
    client: http.client.HTTPConnection, server: Server
) -> None:
    client.request("GET", "/v2/health/live", headers={"leave": "now"})
    assert client.getresponse().read() == b"ready"
    assert server.has_left.wait(WAIT_S)
    assert post(client, asking()) == (200, asking())


def test_triton_guard_goes_on_after_clients_that_leave(front: tuple[str, int], client: http.client.HTTPConnection, server: Server) -> None:
    for cut in (b"", b"POST ", f"POST {INFER} HTTP/1.1\r\nContent-Length: 10000\r\n\r\n12".encode(), os.urandom(1000)):
        with socket.create_connection(front, WAIT_S) as connection:
            connection.sendall(cut)
    assert post(client, asking()) == (200, asking())


def test_triton_guard_answers_for_a_server_that_is_away_and_finds_it_again(
    client: http.client.HTTPConnection, server: Server, front: tuple[str, int]
) -> None:
    assert post(client, asking())[0] == 200
    port = server.port
    server.end()
    with closing(http.client.HTTPConnection(*front, timeout=WAIT_S)) as other:
        answer = post(other, asking())
        assert (answer[0], "is not there now" in sentence(answer)) == (503, True)
    again = Server(port)
    try:
        with closing(http.client.HTTPConnection(*front, timeout=WAIT_S)) as other:
            assert post(other, asking()) == (200, asking())
    finally:
        again.end()


def test_triton_guard_that_is_killed_is_started_again(server: Server) -> None:
    address = ("127.0.0.1", free_port())
    front = Front(*address, server.port, lambda _: None)
    try:
        first = front.pid
        os.kill(first, signal.SIGKILL)
        # made meanwhile, it waits
        with closing(http.client.HTTPConnection(*address, timeout=WAIT_S)) as client:
            assert post(client, asking()) == (200, asking())
        assert front.pid != first
    finally:
        front.close()
    assert not Path(f"/proc/{front.pid}").exists()


def test_triton_guard_that_dies_again_and_again_is_given_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a folder's own modules are no part of it
    (tmp_path / "json.py").write_text("raise SystemExit('a stranger ran')")
    monkeypatch.chdir(tmp_path)
    sentences, given_up = list[str](), threading.Event()
    front = Front("127.0.0.1", free_port(), server.port, sentences.append, lambda said: (sentences.append(said), given_up.set()))
    try:
        until = time.monotonic() + WAIT_S
        while not given_up.wait(0.05):
            assert time.monotonic() < until
            with suppress(ProcessLookupError):
                os.kill(front.pid, signal.SIGKILL)
    finally:
        front.close()
    assert sentences == ["the guard of the HTTP port died 5 times within 60 s: it logged nothing"]


def test_triton_guard_ends_when_whoever_started_it_is_gone() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        command = [sys.executable, "-c", "from segrt.serving.guard import main; main()", str(listening.fileno()), "1", "1"]
        assert subprocess.run(command, pass_fds=[listening.fileno()], timeout=WAIT_S, check=False).returncode == 0


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (b"HTTP/1.1\r\n\r\n", b"HTTP/1.1 502"),
        (b"HTTP/1.1 200 OK\r\n no header\r\n\r\n", b"HTTP/1.1 502"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 200"),
    ],
)
def test_triton_guard_says_one_thing_of_an_answer_that_is_none(answer: bytes, seen: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        said, address = list[str](), ("127.0.0.1", free_port())
        front = Front(*address, server.getsockname()[1], said.append)
        try:
            with socket.create_connection(address, WAIT_S) as client:
                client.sendall(b"GET /v2 HTTP/1.1\r\n\r\n")
                asked, _ = server.accept()
                with asked:
                    asked.settimeout(WAIT_S)
                    asked.recv(1000)
                    asked.sendall(answer)
                    found = b""
                    while part := client.recv(2**16):
                        found += part
        finally:
            front.close()
    assert (found.startswith(seen), found.count(b"HTTP/1.1"), said) == (True, 1, [])


def test_triton_guard_finishes_what_is_under_way_and_hangs_up_on_who_is_idle(server: Server) -> None:
    address = ("127.0.0.1", free_port())
    front = Front(*address, server.port, lambda _: None)
    idle = socket.create_connection(address, WAIT_S)
    with ThreadPoolExecutor(1) as pool, closing(idle), closing(http.client.HTTPConnection(*address, timeout=WAIT_S)) as client:
        server.holds.clear()
        waiting = pool.submit(post, client, asking())
        until = time.monotonic() + WAIT_S
        while not server.seen:
            assert time.monotonic() < until
            time.sleep(0.01)
        front.drain()
        assert idle.recv(10) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, WAIT_S)
        server.holds.set()
        assert waiting.result(WAIT_S) == (200, asking())
        front.close()
