"""Configurations for Triton's own backends, in front of the real server: it reads them, and asks for backends its wheel does not have."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import make_bundle
from triton_server import write_repository

from segrt.errors import BackendError
from segrt.serving.options import ServerOptions
from segrt.serving.server import Server


@pytest.mark.parametrize(("config", "backend"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino"), ("tensorrt_plan", "tensorrt")])
def test_triton_takes_a_native_configuration_by_its_name(tmp_path: Path, config: str, backend: str) -> None:
    repository = tmp_path / "repository"
    write_repository(repository, make_bundle(tmp_path / "liver"), "liver")
    options = ServerOptions(ready_s=240, exit_s=20, arguments=(f"--model-config-name={config}",))
    reason = f"failed to load 'liver_patch'.*unable to find backend library for backend '{backend}'"
    with pytest.raises(BackendError, match=reason), Server(repository, options):
        pass
