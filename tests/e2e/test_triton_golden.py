"""A real tritonserver segments a golden set's CT: byte for byte the Predictor's labels, whichever way they travel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from golden_sets import golden_bundle
from triton_server import Asking, serving, write_repository

from segrt.io import write_labels
from segrt.predictor import Predictor
from segrt.serving import Connection, RemotePredictor
from segrt.serving.server import Server
from segrt.volume import Segmentation


@dataclass(frozen=True)
class Served:
    """The server, the CT, and what the Predictor makes of it, without mirroring."""

    server: Server
    image: Path
    expected: Segmentation


@pytest.fixture(scope="module")
def served(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("golden")
    bundle = golden_bundle(golden, "S2", folder / "bundle")
    (image,) = (golden / "S2_organs_ct" / "imagesTs").iterdir()
    write_repository(folder / "repository", bundle, "ct", alone=True)
    with Predictor(bundle, device="cpu", tta=False) as predictor:
        expected = predictor(image)
    assert len(np.unique(expected.labels)) > 2, "several organs are found"
    with serving(folder / "repository") as server:
        yield Served(server, image, expected)


@pytest.mark.parametrize(("protocol", "memory"), [("http", "off"), ("grpc", "off"), ("http", "system"), ("grpc", "system")])
def test_triton_gives_a_golden_ct_the_predictor_s_labels(served: Served, protocol: str, memory: str) -> None:
    url = served.server.grpc if protocol == "grpc" else f"http://{served.server.http}"
    with RemotePredictor(url, "ct", tta=False, connection=Connection(shared_memory=memory)) as remote:
        found = remote(served.image)
    assert (found.labels.dtype, found.grid) == (served.expected.labels.dtype, served.expected.grid)
    assert found.labels.tobytes() == served.expected.labels.tobytes()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_triton_gives_a_golden_ct_s_file_the_predictor_s_labels(served: Served, protocol: str, tmp_path: Path) -> None:
    """NIfTI bytes in, labels and NIfTI bytes out: the file segrt-predict would have written."""
    asking = Asking.over(protocol, served.server)
    sent = {"FILE": np.frombuffer(served.image.read_bytes(), np.uint8)}
    answer = asking.ask("ct", sent, wanted=["LABELS", "LABEL_FILE"], format=".nii.gz", name=served.image.name, tta=False)
    assert answer.as_numpy("LABELS").tobytes() == served.expected.labels.tobytes()
    write_labels(tmp_path / "labels.nii.gz", served.expected.labels, served.expected.grid)
    assert answer.as_numpy("LABEL_FILE").tobytes() == (tmp_path / "labels.nii.gz").read_bytes()
