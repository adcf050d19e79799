"""What segrt-serve decides before and beside a server: which one, with which arguments, and whether a model's process died."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segrt.cli import serve
from segrt.errors import BackendError, InputError
from segrt.serving import launch
from segrt.serving.options import ServerOptions
from segrt.serving.process import reason_in
from segrt.serving.server import Server
from segrt.serving.watch import Watch, _children, _model_of

STUB = b"\x7fELF ... libpython3.%d.so.1.0 ..."


def write_installation(root: Path, minor: int = sys.version_info.minor) -> Path:
    """What a container image has in /opt/tritonserver, in outline."""
    program = root / "bin" / "tritonserver"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (root / "backends" / "python").mkdir(parents=True)
    (root / "backends" / "python" / "triton_python_backend_stub").write_bytes(STUB % minor)
    return program


def test_the_server_is_found_in_the_wheel_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = launch.find_tritonserver()
    assert found.program.parts[-4:] == ("pytriton", "tritonserver", "bin", "tritonserver")
    assert found.stub.parent.name == f"3.{sys.version_info.minor}"
    assert "pytriton" not in sys.modules


def test_the_server_on_the_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = write_installation(tmp_path)
    monkeypatch.setenv("PATH", str(program.parent))
    assert launch.find_tritonserver().program == program
    # its own backend folder has the stub already
    assert launch.prepare_backends(launch.find_tritonserver(), tmp_path / "unused") == tmp_path / "backends"


def test_without_a_server_a_sentence_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_candidates", lambda: iter([Path("/nowhere/tritonserver")]))
    with pytest.raises(BackendError, match=r"pip install --no-deps nvidia-pytriton==0\.7\.0.*container image"):
        launch.find_tritonserver()


def test_a_container_without_shared_memory_of_its_own_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    launch.warn_of_little_shared_memory(tmp_path / "none")
    assert caplog.text == ""
    launch.warn_of_little_shared_memory(Path("/proc/self"))  # a file system of no size
    assert "/proc/self has 0 MB, which is too little for volumes; give it more" in caplog.text


def test_a_server_for_another_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"runs Python 3\.8, but segrt is installed in Python 3"):
        launch.find_tritonserver(write_installation(tmp_path, minor=8))


def test_a_program_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no executable file"):
        launch.find_tritonserver(tmp_path)


def test_the_wheels_backends_are_prepared_with_this_pythons_stub(tmp_path: Path) -> None:
    folder = launch.prepare_backends(launch.find_tritonserver(), tmp_path)
    names = {path.name for path in (folder / "python").iterdir()}
    assert names == {"libtriton_python.so", "triton_python_backend_utils.py", "triton_python_backend_stub"}
    assert f"libpython3.{sys.version_info.minor}.so".encode() in (folder / "python" / "triton_python_backend_stub").read_bytes()


def test_the_models_processes_find_this_python_first() -> None:
    environment = launch.server_environment(launch.find_tritonserver(), {"PATH": "/bin", "HOME": "/root"})
    assert environment["PATH"] == f"{Path(sys.executable).parent}:/bin"
    assert environment["HOME"] == "/root"
    assert any((Path(folder) / "segrt").is_dir() for folder in environment["PYTHONPATH"].split(":"))
    assert any(Path(folder).glob("libpython3*") for folder in environment["LD_LIBRARY_PATH"].split(":"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"host": "example.org"}, "host: expected an IP address"),
        ({"http_port": 70000}, "http_port: expected 0 to 65535, got 70000"),
        ({"log_level": "loud"}, "log_level: expected error, warning, info, verbose, got 'loud'"),
        ({"host": "0.0.0.0", "control": "explicit"}, "replace the models, which are programs"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        ServerOptions(**options).check()  # type: ignore[arg-type]


def arguments_of(options: ServerOptions) -> list[str]:
    return options.server_arguments(Path("models"), Path("backends"), http=1234, name="segrt_", key="secret")


def test_by_default_nobody_else_reaches_the_server_or_replaces_its_models() -> None:
    arguments = arguments_of(ServerOptions())
    assert {f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")} <= set(arguments)
    assert "--http-restricted-api=model-repository:segrt-key=secret" in arguments
    assert "--grpc-restricted-protocol=model-repository:segrt-key=secret" in arguments
    assert not any("shared-memory" in argument for argument in arguments)


def test_clients_of_the_network_may_not_name_memory_or_files_of_the_server() -> None:
    kept = [a for a in arguments_of(ServerOptions(host="0.0.0.0")) if a.startswith("--http-restricted-api=shared-memory,trace,logging:")]
    assert len(kept) == 1


def test_free_ports_differ_and_given_ones_stay() -> None:
    chosen = ServerOptions(grpc_port=8001).with_free_ports()
    assert chosen.grpc_port == 8001
    assert len({*chosen.ports, 0}) == 4


def test_a_port_that_is_taken_is_refused_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"http_port: 127.0.0.1:{port} cannot be used .Address already in use.; choose another, or 0"):
            ServerOptions(http_port=port).with_free_ports()


def test_addresses_are_those_a_client_on_this_machine_connects_to() -> None:
    assert ServerOptions(host="0.0.0.0").address(80) == "127.0.0.1:80"
    assert ServerOptions(host="::").address(80) == "[::1]:80"
    assert ServerOptions(host="10.0.0.7").address(80) == "10.0.0.7:80"


def test_the_log_level_chooses_lines_and_what_models_print_is_always_shown() -> None:
    lines = [
        'I1120 18:36:00.1 7 a.cc:1] "x"',
        'W1120 18:36:00.1 7 a.cc:1] "x"',
        'E1120 18:36:00.1 7 a.cc:1] "x"',
        "| a | table |",
        "printed",
    ]
    shown = {
        level: [lines.index(line) for line in lines if ServerOptions(log_level=level).shows(line)] for level in ("error", "warning", "info")
    }
    assert shown == {"error": [2, 4], "warning": [1, 2, 4], "info": [0, 1, 2, 3, 4]}


def test_the_first_model_that_fails_is_thereason_in() -> None:
    log = [
        "E1120 18:36:00.1 7 model_lifecycle.cc:654] \"failed to load 'organ' version 1: Internal: no engine",
        "E1120 18:36:00.1 7 model_lifecycle.cc:654] \"failed to load 'organ_bls' version 1: Internal: no organ",
        "error: creating server: Internal - failed to load all models",
    ]
    assert reason_in(log) == "failed to load 'organ' version 1: Internal: no engine"
    assert reason_in(["/opt/tritonserver: unrecognized option '--foo'", "Usage: tritonserver [options]"]) == "unrecognized option '--foo'"
    assert reason_in([]) == "it logged nothing"


def test_a_folder_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a model repository"):
        Server(tmp_path)


def test_models_are_loaded_after_those_they_call(tmp_path: Path) -> None:
    for name in ("organ", "organ_bls", "organ_patch_0", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.pbtxt").touch()
    assert Server(tmp_path).models() == ["organ_patch_0", "a", "organ", "organ_bls"]


def test_a_server_that_was_not_started_can_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "organ").mkdir()
    (tmp_path / "organ" / "config.pbtxt").touch()
    server = Server(tmp_path)
    assert (server.stop(), server.wait(), server.is_running, server.restarts) == (None, None, False, 0)


PARENT = """
import os, subprocess, sys, time
stub = sys.argv[1]
child = subprocess.Popen([stub, "/models/organ/1/model.py", "1000"])
print(child.pid, flush=True)
sys.stdin.readline()
child.kill()
if sys.argv[2] == "wait":
    child.wait()
sys.stdin.readline()
"""


def watch_a_death(tmp_path: Path, kind: str) -> list[str]:
    """What a Watch revives of a parent whose child is killed, and waited for or not."""
    stub = tmp_path / "triton_python_backend_stub"
    stub.symlink_to("/bin/sh")
    script = tmp_path / "model.py"
    script.write_text("sleep 1000\n")
    code = PARENT.replace("/models/organ/1/model.py", str(tmp_path / "organ" / "1" / "model.py"))
    (tmp_path / "organ" / "1").mkdir(parents=True)
    script.rename(tmp_path / "organ" / "1" / "model.py")
    revived: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", code, str(stub), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdout.readline()
        watch = Watch(parent.pid, revived.append, pytest.fail)
        while not _children(parent.pid):
            time.sleep(0.05)
        watch.start()
        parent.stdin.write("\n")
        parent.stdin.flush()
        until = time.monotonic() + (60 if kind == "leave" else 2)
        while not revived and time.monotonic() < until:
            time.sleep(0.05)
        watch.stop()
        parent.stdin.write("\n")
    assert watch.deaths == len(revived)
    return revived


def test_a_process_that_was_killed_and_not_waited_for_is_a_model_to_revive(tmp_path: Path) -> None:
    assert watch_a_death(tmp_path, "leave") == ["organ"]


def test_a_process_that_its_server_ended_is_not(tmp_path: Path) -> None:
    assert watch_a_death(tmp_path, "wait") == []


SHORT_LIVED = """
import subprocess, sys, time
for line in sys.stdin:
    child = subprocess.Popen(sys.argv[1:3])
    time.sleep(0.5)
    child.kill()
    print(child.pid, flush=True)
"""


def test_a_process_that_dies_before_its_revival_has_returned_is_noticed_too(tmp_path: Path) -> None:
    """As of an image that is sent again as soon as there is a process to work on it."""
    stub, script = tmp_path / "triton_python_backend_stub", tmp_path / "organ" / "1" / "model.py"
    stub.symlink_to("/bin/sh")
    script.parent.mkdir(parents=True)
    script.write_text("sleep 1000\n")
    command = [sys.executable, "-c", SHORT_LIVED, str(stub), str(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        revived: list[str] = []

        def revive(model: str) -> None:
            revived.append(model)
            if len(revived) < 3:
                parent.stdin.write("\n")
                parent.stdin.flush()
                parent.stdout.readline()

        watch = Watch(parent.pid, revive, pytest.fail)
        with watch._learning():
            parent.stdin.write("\n")
            parent.stdin.flush()
            parent.stdout.readline()
        watch.start()
        until = time.monotonic() + 60
        while len(revived) < 3:
            assert time.monotonic() < until
            time.sleep(0.05)
        watch.stop()
    assert revived == ["organ"] * 3


def test_only_stubs_are_models() -> None:
    assert _model_of(["/b/python/triton_python_backend_stub", "/r/organ/2/model.py", "region"]) == "organ"
    assert _model_of(["/bin/sh", "/r/organ/2/model.py"]) is None
    assert _model_of([]) is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{repository}", "--name", "liver"], "are for a bundle"),
        (["{repository}", "--host", "localhost"], "host: expected an IP address"),
        (["{empty}"], "expected a model repository"),
        (["{repository}", "--tritonserver", "/nowhere"], "found no executable file"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    (tmp_path / "repository" / "organ").mkdir(parents=True)
    (tmp_path / "repository" / "organ" / "config.pbtxt").touch()
    (tmp_path / "empty").mkdir()
    places = {"repository": tmp_path / "repository", "empty": tmp_path / "empty"}
    monkeypatch.setattr(sys, "argv", ["segrt-serve", *(argument.format(**places) for argument in arguments)])
    with pytest.raises(SystemExit) as ended:
        serve.main()
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("given", [True, False])
def test_a_port_that_is_lost_after_its_choice_is_said_or_chosen_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool) -> None:
    (tmp_path / "models" / "organ").mkdir(parents=True)
    (tmp_path / "models" / "organ" / "config.pbtxt").touch()
    program = write_installation(tmp_path / "triton")
    program.write_text("#!/bin/sh\necho it ran\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        chosen = [ServerOptions(http_port=port)]
        options = ServerOptions(program=program, http_port=port if given else 0)
        # as if another program took it at this moment
        choose = ServerOptions.with_free_ports
        monkeypatch.setattr(ServerOptions, "with_free_ports", lambda own: chosen.pop() if chosen else choose(own))
        sentence = f"http_port: 127.0.0.1:{port} cannot be used .Address already in use" if given else "before it was ready: it ran"
        with pytest.raises(BackendError, match=sentence):
            Server(tmp_path / "models", options).start()


@pytest.mark.parametrize(
    ("words", "signal_", "starts"),
    [
        ("terminate called, what():  boost::interprocess::lock_exception", "ABRT", 5),
        ("what():  std::bad_alloc", "ABRT", 1),
        ("no", "KILL", 1),
    ],
)
def test_a_server_that_got_no_cpu_at_its_start_is_started_again(tmp_path: Path, words: str, signal_: str, starts: int) -> None:
    (tmp_path / "models" / "organ").mkdir(parents=True)
    (tmp_path / "models" / "organ" / "config.pbtxt").touch()
    program = write_installation(tmp_path / "triton")
    program.write_text(f"#!/bin/sh\necho started >> {tmp_path}/starts\necho '{words}'\nkill -{signal_} $$\n")
    with pytest.raises(BackendError, match="before it was ready"):
        Server(tmp_path / "models", ServerOptions(program=program)).start()
    assert (tmp_path / "starts").read_text().count("started") == starts
