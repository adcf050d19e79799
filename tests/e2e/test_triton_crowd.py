"""A real tritonserver with models of several kinds and many clients: each gets its own image's labels, from the networks it asked for."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from factories import banded
from served_bundles import cascade, levels, pair, plain, regions
from triton_server import metric, serving, write_repository

from segrt.arrays import Array
from segrt.bundle import Bundle
from segrt.predictor import Predictor
from segrt.serving import RemotePredictor
from segrt.serving.server import Server

CLIENTS, FOR_S = 30, 20.0
SPACING = (3.0, 1.5, 2.0)
KINDS: dict[str, Callable[[Path], Bundle]] = {f.__name__: f for f in (plain, cascade, pair, levels, regions)}


@dataclass(frozen=True)
class Served:
    """The server, and the bundles whose models it runs: name -> folder."""

    server: Server
    bundles: dict[str, Bundle]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("crowd")
    bundles = {name: make(folder / name / "bundle") for name, make in KINDS.items()}
    for name, bundle in bundles.items():
        # every model is a process that has to start: windows of two kinds go through shared networks, of the others not
        write_repository(folder / "repository", bundle, name, alone=name not in ("plain", "levels"), instances=2)
    for stream in (folder / "repository").glob("*_stream"):
        shutil.rmtree(stream)
    with serving(folder / "repository") as server:
        yield Served(server, bundles)


def labels_of(bundle: Bundle, image: Array, level: str | None = None) -> Array:
    with Predictor(bundle, level=level, device="cpu") as predictor:
        return predictor((image, SPACING)).labels


@pytest.mark.parametrize(
    ("model", "level"),
    [(name, None) for name in KINDS] + [("plain_bls", None), ("levels", "L1"), ("levels_bls", None), ("levels_bls", "L1")],
)
def test_triton_runs_the_networks_that_are_meant(served: Served, model: str, level: str | None) -> None:
    image = banded((9, 14, 11), seed=4)
    with RemotePredictor(served.server.grpc, model, level=level) as remote:
        answer = remote((image, SPACING)).labels
    np.testing.assert_array_equal(answer, labels_of(served.bundles[model.split("_")[0]], image, level))
    # the other level, or the other bundle, would have answered otherwise
    if model.startswith("levels"):
        assert not np.array_equal(answer, labels_of(served.bundles["levels"], image, None if level else "L1"))


@pytest.mark.slow
def test_triton_answers_thirty_clients_without_a_wrong_label(served: Served) -> None:
    images = [banded((8 + n % 5, 9 + n % 3, 10), seed=n) for n in range(CLIENTS)]
    expected = [labels_of(served.bundles["plain"], image) for image in images]
    windows = metric(served.server, "segrt_windows_total")
    until = time.monotonic() + FOR_S

    def ask(number: int) -> int:
        """As long as there is time, one request after the other; how many had their answers comes out."""
        url, model = ((served.server.grpc, f"http://{served.server.http}")[number % 2], ("plain", "plain_bls")[number // 2 % 2])
        answers = 0
        with RemotePredictor(url, model) as remote:
            while answers == 0 or time.monotonic() < until:
                np.testing.assert_array_equal(remote((images[number], SPACING)).labels, expected[number])
                answers += 1
        return answers

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(ask, range(CLIENTS)))
    assert len(answers) == CLIENTS
    assert metric(served.server, "segrt_windows_total") - windows >= sum(answers)
