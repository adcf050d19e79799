"""A real tritonserver over repositories of tiny bundles, and what tests ask it by NVIDIA's own client."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http

from segrt.arrays import Array
from segrt.bundle import Bundle
from segrt.export.triton import write_triton
from segrt.protocol import BLS_SUFFIX, INPUTS
from segrt.serving.options import ServerOptions
from segrt.serving.server import Server

# enough for windows to meet: two wait while those of a third are run; each is a process that has to start
_BLS_INSTANCES = 3
TIMEOUT_S = 60


def write_repository(repository: Path, bundle: Bundle, name: str, *, alone: bool = False, instances: int = _BLS_INSTANCES) -> None:
    """Write the models of a bundle as users do, with fewer instances; `alone` for the model of the whole pipeline and no other."""
    written = write_triton(bundle, repository, name=name, device="cpu")
    for model in written.models:
        config = repository / model / "config.pbtxt"
        if alone and model != name:
            shutil.rmtree(config.parent)
        else:
            most = instances if model == f"{name}{BLS_SUFFIX}" else 1
            config.write_text(re.sub(r"(instance_group \{\s*count: )\d+", rf"\g<1>{most}", config.read_text()))


@contextmanager
def serving(repository: Path) -> Iterator[Server]:
    """Start a server whose models clients may load and unload; it is stopped whatever happens."""
    options = ServerOptions(control="explicit", ready_s=240, exit_s=5)
    with Server(repository, options) as server:
        yield server


@dataclass(frozen=True)
class Asking:
    """One protocol's client."""

    kind: ModuleType
    client: Any

    @classmethod
    def over(cls, protocol: str, server: Server) -> Asking:
        """A client over "grpc" or "http"."""
        if protocol == "grpc":
            return cls(tritonclient.grpc, tritonclient.grpc.InferenceServerClient(server.grpc))
        how = {"connection_timeout": TIMEOUT_S, "network_timeout": TIMEOUT_S}
        return cls(tritonclient.http, tritonclient.http.InferenceServerClient(server.http, **how))

    def inputs(self, tensors: Mapping[str, Array]) -> list[Any]:
        """Tensors as the client sends them, with the types they have."""
        made = []
        for name, array in tensors.items():
            kind = INPUTS[name][0] if name in INPUTS else "FP32"
            made.append(self.kind.InferInput(name, list(array.shape), kind))
            made[-1].set_data_from_numpy(np.ascontiguousarray(array))
        return made

    def ask(self, model: str, tensors: Mapping[str, Array], *, wanted: Sequence[str] = (), **options: Any) -> Any:
        """One answer; options are segrt's."""
        outputs = [self.kind.InferRequestedOutput(name) for name in wanted] or None
        return self.client.infer(model, self.inputs(tensors), outputs=outputs, parameters=options or None)

    def labels(self, model: str, tensors: Mapping[str, Array], **options: Any) -> Array:
        """LABELS of one answer."""
        return self.ask(model, tensors, wanted=["LABELS"], **options).as_numpy("LABELS")


def metric(server: Server, name: str, **labels: str) -> float:
    """Sum of one metric over all that have these labels."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{") and all(text in line for text in wanted))


def report_of(answer: Any) -> dict[str, Any]:
    """REPORT of an answer."""
    return json.loads(answer.as_numpy("REPORT").tobytes())
