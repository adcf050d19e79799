"""The model of one network: patches (N, C, Z, Y, X) in, logits out; requests that wait together run as one batch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..arrays import Array, FloatArray
from ..device import compute_on, open_stream, to_device, to_host
from ..engines import Engine, open_engine
from ..errors import InputError
from ..protocol import LOGITS, PATCHES, coded
from .attention import Attention, outcome_of
from .setting import ServerLog, Setting
from .tensors import server_module, to_tensor, views_of

logger = logging.getLogger(__name__)


class PatchModel:
    """What the server's python backend runs for a network of a bundle.

    It has no metrics of its own: the server counts its windows (nv_inference_count) and batches (nv_inference_exec_count) itself.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the engine of the one network this model is told."""
        ServerLog.start()
        setting = Setting.from_server(args)
        (network,) = setting.told.patch_models
        bundle, told = network.bundle_in(setting.bundle), setting.told
        self._window = (bundle.spec.in_channels, *bundle.spec.inference.patch)
        how: dict[str, Any] = {"backend": told.backend, "precision": told.precision, "threads": told.threads}
        self._engine = open_engine(bundle, network.member, device=setting.device, **how)
        self._stream = open_stream(self._engine.device)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Run what several requests brought as one batch; one that nobody waits for, or that is wrong, does not hold up the others."""
        responses: list[Any] = [None] * len(requests)
        patches: dict[int, FloatArray] = {}
        for number, request in enumerate(requests):
            try:
                Attention(request.is_cancelled).check()
                patches[number] = self._patches_of(request)
            except Exception as err:  # noqa: BLE001 - the border of the process
                responses[number] = failed(err)
        try:
            for number, logits in self._run(patches).items():
                responses[number] = server_module().InferenceResponse([to_tensor(LOGITS, logits)])
        except Exception as err:  # noqa: BLE001 - the border of the process
            for number in patches:
                responses[number] = failed(err)
        return responses

    def finalize(self) -> None:
        """Release the engine."""
        self._engine.close()

    def _patches_of(self, request: Any) -> FloatArray:
        patches: FloatArray = views_of(request)[PATCHES]
        if patches.shape[1:] != self._window:
            raise InputError(f"{PATCHES} are {patches.shape[1:]}, this version's network takes {self._window}: (C, Z, Y, X)")
        return patches

    def _run(self, patches: Mapping[int, FloatArray]) -> dict[int, Array]:
        """Logits of each request."""
        if not patches:
            return {}
        # also one request's are copied: engines may be given memory that can be written
        together = np.concatenate(list(patches.values()))
        logits = self._logits(together)
        stops = np.cumsum([len(part) for part in patches.values()])
        return dict(zip(patches, np.split(logits, stops[:-1]), strict=True))

    def _logits(self, patches: FloatArray) -> FloatArray:
        with compute_on(self._engine.device, self._stream):
            there = to_device(patches, self._engine.device)
            logits: FloatArray = to_host(_run_or_halve(self._engine, there))
        return logits.astype(np.float32, copy=False)


def _run_or_halve(engine: Engine, patches: FloatArray) -> Array:
    """Run; an engine of a GPU whose memory ran out asks for less at its next try."""
    while True:
        batch = engine.batch
        try:
            return engine(patches)
        except MemoryError:
            if engine.batch >= batch:
                raise
            logger.warning("%s: a batch of %d does not fit; going on with %d", engine.name, batch, engine.batch)


def failed(error: BaseException, *, on_stream: bool = False) -> Any:
    """The server's response to a request that ends with an error; on a stream its code is part of the text."""
    _, code, sentence = outcome_of(error)
    if code == "INTERNAL":
        logger.error("%s", sentence, exc_info=error)
    server = server_module()
    text = coded(code, sentence) if on_stream else sentence
    return server.InferenceResponse(error=server.TritonError(text, getattr(server.TritonError, code)))
