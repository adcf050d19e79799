"""What runs inside tritonserver's python backend: each model.py of a repository binds one of these classes.

One process is one instance, and works on one request at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arrays import Array, ProgressFn
from ..bundle import Bundle
from ..engines import Engine, open_engine
from ..engines.batches import gpu_batch
from ..engines.compose import Hosted
from ..engines.openvino import batch_size
from ..errors import InputError
from ..protocol import PROGRESS, RequestOptions
from .answers import answer
from .attention import DONE, Attention, outcome_of
from .fatal import check_fatal, mark_of, working_on
from .files import plain_name
from .limits import Limits
from .metrics import Meters
from .patch import PatchModel, failed
from .predictors import Predictors
from .requests import read_request
from .setting import ServerLog, Setting
from .tensors import server_module, to_tensor, views_of
from .windows import PatchCaller, Watched

__all__ = ["BlsModel", "PatchModel", "PipelineModel", "StreamModel"]

_TELL_S = 0.05  # progress is told no more often


class PipelineModel:
    """The whole pipeline with engines of its own: image in, labels out."""

    _streams = False

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle and its engines; what fails here is why the server says that the model is not ready."""
        ServerLog.start()
        self._setting = Setting.from_server(args)
        self._meters = Meters(self._setting.model, self._setting.version)
        self._attention: Attention | None = None
        self._waited: list[float] = []
        how: dict[str, Any] = {"device": self._setting.device, "threads": self._setting.told.threads}
        self._predictors = Predictors(self._setting.bundle, self._watched, **how)
        self._predictors.choose(RequestOptions())
        self._limits = Limits.here(self._setting.told.max_voxels, sharing=self._setting.instances)

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer requests, one after the other."""
        return [self._respond(request, request.is_cancelled, None) for request in requests]

    def finalize(self) -> None:
        """Release the engines."""
        self._predictors.close()
        self._meters.close()

    def _open(self, bundle: Bundle, member: str) -> Engine:
        """The engine of a bundle's member."""
        told = self._setting.told
        how: dict[str, Any] = {"backend": told.backend, "precision": told.precision, "threads": told.threads}
        return open_engine(bundle, member, device=self._setting.device, **how)

    def _watched(self, bundle: Bundle, member: str) -> Engine:
        return Watched(self._open(bundle, member), self._check)

    def _check(self) -> None:
        if self._attention is not None:
            self._attention.check()

    def _respond(self, request: Any, is_cancelled: Callable[[], bool], progress: ProgressFn | None) -> Any:
        """The response to one request, whatever it brings."""
        start = time.perf_counter()
        try:
            tensors = [to_tensor(name, array) for name, array in self._segment(request, is_cancelled, progress).items()]
            response, outcome = server_module().InferenceResponse(tensors), DONE
        except Exception as err:  # noqa: BLE001 - the border of the process
            response, outcome = failed(err, on_stream=self._streams), outcome_of(err)[0]
        finally:
            self._attention = None
            self._waited.clear()
        self._meters.count_case(outcome, time.perf_counter() - start)
        return response

    def _segment(self, request: Any, is_cancelled: Callable[[], bool], progress: ProgressFn | None) -> dict[str, Array]:
        options = RequestOptions.from_parameters(request.parameters())
        waited_s = 0.0 if options.arrived is None else max(time.time() - options.arrived, 0.0)
        self._attention = Attention(is_cancelled, _shortest(options.timeout_s, request.timeout()), waited_s=waited_s)
        self._attention.check()  # it may have waited long
        setting, tensors = self._setting, views_of(request)
        mark = mark_of(tensors, options)
        check_fatal(mark, setting.fatal, plain_name(options.name))
        with working_on(mark):
            start = time.perf_counter()
            asked = read_request(tensors, options, setting.bundle, self._limits)
            read_s = time.perf_counter() - start
            segmentation = self._predictors.choose(options)(
                asked.volume, previous=asked.previous, probabilities=options.probabilities, progress=progress
            )
        seconds = {**segmentation.seconds, "read": read_s}
        self._meters.count_work(segmentation, len(asked.volume.data), seconds)
        self._meters.count_wait(sum(self._waited))
        done = replace(segmentation, seconds=seconds)
        how = {"bundle_sha": setting.bundle.fingerprint, "version": setting.version}
        return answer(done, options, setting.bundle.spec, request.requested_output_names(), **how)


class BlsModel(PipelineModel):
    """The whole pipeline without engines: windows are run by the patch models, where those of several requests share batches."""

    def _open(self, bundle: Bundle, member: str) -> Engine:
        setting = self._setting
        for network in setting.told.patch_models:
            found = network.bundle_in(setting.bundle)
            if (found.path, found.level, network.member) == (bundle.path, bundle.level, member):
                on_gpu = setting.device != "cpu"
                batch = gpu_batch(bundle.spec.inference.patch) if on_gpu else batch_size(bundle)
                caller = PatchCaller(network.model, int(setting.version), batch=batch, told=self._waited.append, check=self._check)
                return Hosted(caller, setting.device) if on_gpu else caller
        raise InputError(f"model {setting.model!r} has no network for member {member!r} of {bundle.path.name}, level {bundle.level}")


class StreamModel(BlsModel):
    """As `BlsModel`, with several answers to a request: the windows done so far, again and again, and then the result."""

    _streams = True

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer requests, one after the other, through their streams."""
        for request in requests:
            sender = request.get_response_sender()
            response = self._respond(request, sender.is_cancelled, _Telling(sender.send))
            sender.send(response, flags=server_module().TRITONSERVER_RESPONSE_COMPLETE_FINAL)


@dataclass
class _Telling:
    """Tell a client about windows done, now and then and at the end."""

    send: Callable[[Any], None]
    last_s: float = -np.inf

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self.last_s < _TELL_S:
            return
        self.last_s = now
        self.send(server_module().InferenceResponse([to_tensor(PROGRESS, np.array([done, total], np.int32))]))


def _shortest(timeout_s: float | None, timeout_us: int) -> float | None:
    """The time a request gives us: our option, or the server's own parameter in microseconds, which is 0 when it was not set."""
    given = [seconds for seconds in (timeout_s, timeout_us / 1e6) if seconds]
    return min(given, default=None)
