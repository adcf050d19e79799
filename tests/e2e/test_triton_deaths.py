"""Processes of models that die under a real tritonserver: what ran comes back, and an image that kills is not tried for ever."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from factories import banded, make_bundle, volume_of

from segrt.bundle import Bundle
from segrt.errors import InputError
from segrt.export.triton import write_triton
from segrt.predictor import Predictor
from segrt.serving import Connection, RemotePredictor, Server, ServerOptions
from segrt.volume import Segmentation

QUICK = ServerOptions(exit_s=5, ready_s=120)
WAIT_S = 60
IMAGE = volume_of(banded((8, 12, 10)).astype(np.float32)[None])
# as where there is no memory left for what an image needs
MORTAL = """
import os, signal
from segrt.serving import backend

read = backend.read_request

def read_or_die(tensors, *rest):
    if tensors["IMAGE_INT16" if "IMAGE_INT16" in tensors else "IMAGE"].max() == 1000:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(tensors, *rest)

backend.read_request = read_or_die
TritonPythonModel = backend.PipelineModel
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "organ")


@pytest.fixture
def repository(bundle: Bundle, tmp_path: Path) -> Path:
    write_alone(bundle, tmp_path / "repository")
    return tmp_path / "repository"


def write_alone(bundle: Bundle, repository: Path) -> None:
    """The one model of whole images, for a quick start."""
    write_triton(bundle, repository, device="cpu")
    for folder in repository.iterdir():
        if folder.name != "organ":
            shutil.rmtree(folder)


def test_triton_gives_up_an_image_at_which_its_process_died_twice(repository: Path, bundle: Bundle) -> None:
    (repository / "organ" / "1" / "model.py").write_text(MORTAL)
    fatal = replace(IMAGE, data=np.where(IMAGE.data == IMAGE.data.max(), 1000, IMAGE.data), name="whole body")
    with Predictor(bundle, device="cpu") as predictor:
        labels = predictor(IMAGE).labels
    with Server(repository, QUICK) as server, RemotePredictor(server.grpc, "organ", connection=Connection(retries=20)) as remote:
        said = r"died twice while it worked on whole body .out of memory, most likely."
        with pytest.raises(InputError, match=said):
            remote(fatal)
        np.testing.assert_array_equal(remote(IMAGE).labels, labels)
        (process,) = server.processes()
        with pytest.raises(InputError, match=said):
            remote(fatal)
        np.testing.assert_array_equal(remote(IMAGE).labels, labels)
        assert server.processes() == {process: "organ"}


def test_triton_brings_back_the_version_that_ran_and_not_one_that_was_written_since(
    repository: Path, bundle: Bundle, tmp_path: Path
) -> None:
    changed = make_bundle(tmp_path / "new" / "organ", centres=(2, 1, 0))
    with Predictor(bundle, device="cpu") as first, Predictor(changed, device="cpu") as second:
        before, after = first(IMAGE).labels, second(IMAGE).labels
    with Server(repository, QUICK) as server, RemotePredictor(server.grpc, "organ", connection=Connection(retries=20)) as remote:
        write_alone(changed, repository)
        for process in server.processes():
            os.kill(process, signal.SIGKILL)
        np.testing.assert_array_equal(asked_when_back(server, remote).labels, before)
        server.reload()
        np.testing.assert_array_equal(remote(IMAGE).labels, after)


def asked_when_back(server: Server, remote: RemotePredictor) -> Segmentation:
    until = time.monotonic() + WAIT_S
    while server.restarts == 0:
        assert time.monotonic() < until
        time.sleep(0.05)
    return remote(IMAGE)
