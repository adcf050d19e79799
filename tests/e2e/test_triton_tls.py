"""Encrypted connections to a real tritonserver: its own over gRPC, which asks for the client's identity too, and a gateway's over HTTP."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from client_side import told
from factories import banded, make_spec
from scripted_model import write_scripted

from segrt.errors import BackendError
from segrt.serving import Connection, RemotePredictor, Server, ServerOptions, Tls

IMAGE = banded((9, 8, 7), seed=7)
_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Encrypted:
    """Addresses, and who vouches for whom."""

    grpc: str
    https: str
    known: Tls
    stranger: Path


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def certificates(folder: Path) -> None:
    """An authority, a server at 127.0.0.1 and a client that it vouches for, and an authority nobody knows."""
    for name in ("ca", "stranger"):
        openssl(folder, "req", "-x509", *_CURVE, "-days", "2", "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for name in ("server", "client"):
        openssl(folder, "req", *_CURVE, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "san")
        openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)


def relay(gateway: socket.socket, context: ssl.SSLContext, server: tuple[str, int]) -> None:
    """What a gateway does: take encrypted connections and hand them on in the clear, until it is closed."""
    while True:
        try:
            plain, _ = gateway.accept()
        except OSError:
            return
        threading.Thread(target=serve_one, args=(plain, context, server)).start()


def serve_one(plain: socket.socket, context: ssl.SSLContext, server: tuple[str, int]) -> None:
    try:
        with context.wrap_socket(plain, server_side=True) as outside, socket.create_connection(server) as inside:
            back = threading.Thread(target=copy, args=(inside, outside))
            back.start()
            copy(outside, inside)
            back.join()
    except OSError:
        plain.close()


def copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while block := source.recv(2**16):
            target.sendall(block)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encrypted]:
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl, which makes the certificates")
    folder = tmp_path_factory.mktemp("tls")
    certificates(folder)
    write_scripted(folder / "repository", make_spec(), folder / "signs")
    files = {"cert": "server.pem", "key": "server.key"}
    arguments = ["--grpc-use-ssl=1", "--grpc-use-ssl-mutual=1", f"--grpc-root-cert={folder / 'ca.pem'}"]
    arguments += [f"--grpc-server-{kind}={folder / name}" for kind, name in files.items()]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    with (
        Server(folder / "repository", ServerOptions(exit_s=5, arguments=tuple(arguments))) as server,
        socket.create_server(("127.0.0.1", 0)) as gateway,
    ):
        host, port = server.http.rsplit(":", 1)
        thread = threading.Thread(target=relay, args=(gateway, context, (host, int(port))))
        thread.start()
        known = Tls(folder / "ca.pem", folder / "client.key", folder / "client.pem")
        yield Encrypted(server.grpc, f"https://127.0.0.1:{gateway.getsockname()[1]}", known, folder / "stranger.pem")
        gateway.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("protocol", ["grpc", "https"])
def test_triton_answers_through_encryption(encrypted: Encrypted, protocol: str) -> None:
    url = encrypted.grpc if protocol == "grpc" else encrypted.https
    with RemotePredictor(url, "tiny", connection=Connection(tls=encrypted.known)) as remote:
        assert remote.where.startswith(("grpcs://", "https://"))
        assert np.array_equal(remote(told("image", IMAGE)).labels, IMAGE)


def test_triton_behind_an_unknown_certificate_is_refused(encrypted: Encrypted) -> None:
    for tls in (Tls(encrypted.stranger), Tls()):
        with pytest.raises(BackendError, match="its certificate is not accepted"):
            RemotePredictor(encrypted.https, "tiny", connection=Connection(tls=tls))
    with pytest.raises(BackendError, match="no answer"):
        RemotePredictor(
            encrypted.grpc, "tiny", connection=Connection(tls=Tls(encrypted.stranger, encrypted.known.key, encrypted.known.certificate))
        )
    with RemotePredictor(encrypted.https, "tiny", connection=Connection(tls=Tls(insecure=True))) as remote:
        assert np.array_equal(remote(told("image", IMAGE)).labels, IMAGE)


def test_triton_does_not_talk_to_whoever_has_no_identity(encrypted: Encrypted) -> None:
    for tls in (None, Tls(encrypted.known.root_certificates)):
        with pytest.raises(BackendError, match="no answer"):
            RemotePredictor(encrypted.grpc, "tiny", connection=Connection(tls=tls))
