"""A model repository with a python model of a few lines, for what a client must take from a server: other speeds, failures and deaths.

Labels are the image's first channel. What else happens is told by the request's option `name`, see `behave`.
"""

from __future__ import annotations

import json
from pathlib import Path

from segrt.protocol import STREAM_SUFFIX, ServedModel
from segrt.spec import ModelSpec

BUNDLE_SHA = "ab" * 32

_MODEL = """
import json, os, pathlib, time
import numpy as np
import triton_python_backend_utils as pb

HERE = pathlib.Path(__file__).parent
SIGNALS = {signals!r}


def first_time(sign):
    try:
        (pathlib.Path(SIGNALS) / sign).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def behave(request, name):
    if name.startswith("slow"):  # until it is cancelled, or told to stop
        first_time(name + ".began")
        for _ in range(600):
            if request.is_cancelled() or pathlib.Path(SIGNALS, name + ".stop").exists():
                first_time(name + ".cancelled")
                raise pb.TritonModelException("cancelled")
            time.sleep(0.05)
    if name.startswith("dies once") and first_time(name):
        os._exit(1)
    if name.startswith("refused"):
        first_time(name) or first_time(name + ".again")
        return "INVALID_ARG", "image: expected what it is not"
    if name.startswith("busy once") and first_time(name):
        return "UNAVAILABLE", "busy"
    if name.startswith("broken"):
        first_time(name) or first_time(name + ".again")
        return "INTERNAL", "the engine failed"


def failed(code, text):
    return pb.InferenceResponse([], pb.TritonError(text, getattr(pb.TritonError, code)))


def answer(request, options):
    given = {{t.name(): np.from_dlpack(t) for t in request.inputs()}}
    if "FILE" in given:
        labels = np.zeros((2, 3, 4), {dtype!r})
    else:
        image = given.get("IMAGE", given.get("IMAGE_INT16"))
        labels = np.ascontiguousarray(image[0]).astype({dtype!r})
    report = {{"bundle_sha": {sha!r}, "windows": [3, 1], "seconds": {{"read": 0.0, "network": 0.001}}, "version": "1",
              "spacing": [3.0, 2.0, 1.0], "seen": {{k: [str(v.dtype), list(v.shape)] for k, v in given.items()}}, "options": options}}
    pathlib.Path(SIGNALS, "last.json").write_text(json.dumps(report))
    for name in ("FILE", "PREVIOUS"):
        if name in given:
            pathlib.Path(SIGNALS, name).write_bytes(given[name].tobytes())
    tensors = [("LABELS", labels), ("REPORT", np.frombuffer(json.dumps(report).encode(), np.uint8).copy())]
    if options.get("probabilities"):
        tensors.append(("PROBABILITIES", np.stack([labels] * {classes}).astype(np.float32)))
    return pb.InferenceResponse([pb.Tensor.from_dlpack(name, array) for name, array in tensors])


class TritonPythonModel:
    def initialize(self, args):
        self.streams = args["model_name"].endswith("_stream")

    def execute(self, requests):
        responses = []
        for request in requests:
            options = json.loads(request.parameters() or "{{}}")
            try:
                error = behave(request, options.get("name", ""))
            except pb.TritonModelException as err:
                error = "CANCELLED", str(err)
            if not self.streams:
                responses.append(failed(*error) if error else answer(request, options))
                continue
            sender = request.get_response_sender()
            if error:
                sender.send(failed(error[0], f"[{{error[0]}}] {{error[1]}}"))
            else:
                for done in (1, 2, 3):
                    sender.send(pb.InferenceResponse([pb.Tensor.from_dlpack("PROGRESS", np.array([done, 3], np.int32))]))
                sender.send(answer(request, options))
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None if self.streams else responses
"""


def write_scripted(repository: Path, spec: ModelSpec, signals: Path, *, name: str = "tiny") -> Path:
    """The repository; what the models saw and did appears as files in `signals`."""
    from segrt.protocol import INPUTS, PROGRESS, outputs_of

    signals.mkdir(parents=True, exist_ok=True)
    parameters = ServedModel(spec=spec, bundle_sha=BUNDLE_SHA, takes_previous=spec.previous is not None).to_parameters()
    for model, streams in ((name, False), (name + STREAM_SUFFIX, True)):
        folder = repository / model
        (folder / "1").mkdir(parents=True)
        text = _MODEL.format(signals=str(signals), sha=BUNDLE_SHA, dtype=spec.label_dtype, classes=spec.classes)
        (folder / "1" / "model.py").write_text(text)
        outputs = {**outputs_of(spec), **({PROGRESS: ("INT32", (2,))} if streams else {})}
        lines = [f'name: "{model}"', 'backend: "python"', "max_batch_size: 0", "instance_group [{ kind: KIND_CPU count: 2 }]"]
        for kind, tensors in (("input", INPUTS), ("output", outputs)):
            for tensor, (dtype, shape) in tensors.items():
                optional = " optional: true" if kind == "input" else ""
                lines.append(f'{kind} [{{ name: "{tensor}" data_type: TYPE_{dtype} dims: {list(shape)}{optional} }}]')
        lines += [f'parameters [{{ key: "{key}" value: {{ string_value: {json.dumps(value)} }} }}]' for key, value in parameters.items()]
        if streams:
            lines.append("model_transaction_policy { decoupled: true }")
            lines = [line for line in lines if not line.startswith('parameters [{ key: "spec"')]
        (folder / "config.pbtxt").write_text("\n".join(lines) + "\n")
    return repository
