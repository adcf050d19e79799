"""`RemotePredictor`: a model on a Triton server, asked as a `Predictor` is."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING

from ..arrays import Array, ProgressFn
from ..errors import BackendError, InputError
from ..io import read_volume
from ..io.read import Source, read_previous
from ..protocol import LABELS, PROBABILITIES, PROGRESS, REPORT, STREAM_SUFFIX, RequestOptions, ServedModel, check_name
from ..spec import ModelSpec
from ..volume import Grid, Segmentation
from .connection import Connection, parse_address
from .grpc_transport import GrpcTransport
from .http_transport import HttpTransport
from .patience import Patience
from .questions import answers_of, file_tensors, files_of, report_in, segmentation_of, tensors_of
from .shared import MOMENT_S, TIDY_S, SharedMemoryUse, Wanted
from .wire import Answer, Failure, Question, Transport

if TYPE_CHECKING:
    from ..predictor import Previous

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """An image as it is sent: tensors, its grid unless only the server will have read it, and its name."""

    inputs: Mapping[str, Array]
    grid: Grid | None
    name: str


class RemotePredictor:
    """Segment images with a model that `segrt-build --triton` wrote and a Triton server runs; the same labels as `Predictor`.

    One may be used by several threads. Ctrl-C, and `close` in another thread, cancel what is under way; over gRPC the server then stops its
    windows, over HTTP it is not told.

    Parameters
    ----------
    url : "host:port" or "grpc://host:port" (gRPC), "http://host:port"; "grpcs://" and "https://" are encrypted
    model : the model's name on the server
    level, step, tta, postprocess : as `Predictor` takes them; they travel with every request
    version : of the model; the server's newest by default
    connection : time-outs, repeats, compression, shared memory, encryption

    Raises
    ------
    InputError
        When the address, an option or the model's name cannot be used, or the server has no such model.
    BackendError
        When no server answers, or a library is missing.

    Examples
    --------
    >>> predictor = RemotePredictor("127.0.0.1:8001", "liver")            # doctest: +SKIP
    >>> predictor("case_0000.nii.gz").labels.shape                        # doctest: +SKIP
    (200, 512, 512)
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        level: str | None = None,
        step: float | None = None,
        tta: bool = True,
        postprocess: bool = True,
        version: str = "",
        connection: Connection | None = None,
    ) -> None:
        self.model, self.version, self.connection = check_name(model), version, connection or Connection()
        self.connection.check()
        given = {"level": level, "step": step, "tta": tta, "postprocess": postprocess}
        self.options = RequestOptions.from_parameters({name: value for name, value in given.items() if value is not None})
        address = parse_address(url, encrypted=self.connection.tls is not None)
        self.where = f"{address.kind}{'s' * address.encrypted}://{address.netloc}{address.path}"
        transport = GrpcTransport if address.kind == "grpc" else HttpTransport
        self._transport: Transport = transport(address, self.connection)
        self._memory = SharedMemoryUse(self._transport, self.connection.shared_memory, near=address.is_loopback)
        self._state, self._calls, self._closed = threading.Lock(), 0, threading.Event()
        self._streams: bool | None = None if self._transport.streams else False
        try:
            self._served = self._describe()
        except BaseException:
            self.close()
            raise

    def __call__(
        self, image: Source, *, previous: Previous | None = None, probabilities: bool = False, progress: ProgressFn | None = None
    ) -> Segmentation:
        """Segment one image; parameters and result are those of `Predictor.__call__`.

        `progress` is told of every window where the server streams (gRPC), else once, at the end.

        Raises
        ------
        InputError
            When the image cannot be read or does not fit the model, here or on the server.
        BackendError
            When no answer came: no server, a failure in it, out of time, or this RemotePredictor was closed.
        """
        start = time.perf_counter()
        asked = self._read(image, previous)
        read_s = time.perf_counter() - start
        options = self.options.model_copy(update={"probabilities": probabilities, "name": asked.name[-255:]})
        answer = self._ask(asked, options, progress)
        report = report_in(answer)
        self._follow(report.bundle_sha)
        if progress is not None and not self._streams:
            progress(report.windows[0], report.windows[0])
        seconds = {**report.seconds, "read": read_s if asked.grid else report.seconds.get("read", 0.0)}
        # what the stages do not explain: the way there and back, and waiting for others
        seconds["transfer"] = max(time.perf_counter() - start - sum(seconds.values()), 0.0)
        return segmentation_of(answer, report, self.spec, asked.grid, asked.name, seconds)

    def frames(self, frames: Iterable[Array], *, batch: int = 1, spacing: tuple[float, float] = (1.0, 1.0)) -> Iterator[Array]:
        """Segment a stream of pictures as they come; each gets the labels that a call would give it.

        Parameters
        ----------
        frames : as `Predictor.frames` takes them
        batch : frames that are waited for and then asked for at once, each as a request of its own
        spacing : (y, x) of a pixel in mm

        Yields
        ------
        (Y, X) labels of each frame, in their order

        Raises
        ------
        InputError
            As `Predictor.frames` does.
        BackendError
            As a call does.
        """
        from ..frames import check_stream, in_groups  # with all of the pipeline, which a client does without

        check_stream(self.spec, pair=False)
        with ThreadPoolExecutor(max(batch, 1), "segrt-frames") as pool:
            for group in in_groups(frames, batch, self.spec, spacing):
                for found in pool.map(self, group):
                    yield found.labels[0]

    @property
    def spec(self) -> ModelSpec:
        """The served bundle's."""
        return self._served.spec

    @property
    def takes_previous(self) -> bool:
        """Whether a call may be given labels of a cascade's first stage."""
        return self._served.takes_previous

    @property
    def provenance(self) -> dict[str, object]:
        """What labels depend on besides the image; see `Predictor.provenance`."""
        return {
            "bundle_sha256": self._served.bundle_sha,
            "settings": {
                "members": list(self.spec.members),
                "engines": [f"triton {self.model}"],
                "step": self.options.step or self.spec.inference.step,
                "accumulate": "float32",
                "postprocess": [step.model_dump(mode="json") for step in self.spec.postprocess] if self.options.postprocess else [],
                "threads": 0,
                **({"level": self.options.level} if self.options.level else {}),
            },
        }

    def close(self) -> None:
        """Cancel what is under way, and release the connection once that has tidied up."""
        with self._state:
            self._closed.set()
            idle = self._calls == 0
        self._transport.cancel()
        if idle:
            self._release()

    def __enter__(self) -> RemotePredictor:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _read(self, image: Source, previous: Previous | None) -> Asked:
        """The image as it is sent: its files where they may be, else its voxels."""
        files = files_of(image) if self.connection.send_files and previous is None else None
        if files is not None:
            return Asked(file_tensors(files), None, files[0].name)
        volume = read_volume(image, [channel.name for channel in self.spec.channels])
        if previous is not None and not self.takes_previous:
            raise InputError(f"{volume.name}: model {self.spec.name!r} is not the second stage of a cascade; pass no labels to it")
        stage = None if previous is None else read_previous(previous, volume.name, volume.grid)
        return Asked(tensors_of(volume, stage), volume.grid, volume.name)

    def _describe(self) -> ServedModel:
        """What the server says of the model; a server that is not there is not waited for."""
        patience = Patience(replace(self.connection, timeout_s=None, retries=0))
        try:
            parameters = self._transport.parameters(self.model, self.version, self.connection.connect_s)
        except Failure as failure:
            raise patience.error(failure, self.where, self.model) from failure
        try:
            return ServedModel.from_parameters(parameters)
        except InputError as err:
            raise InputError(f"{self.where}, model {self.model!r}: {err}") from err

    def _follow(self, bundle_sha: str) -> None:
        """Know the model anew once another version answers."""
        if bundle_sha != self._served.bundle_sha:
            logger.warning(
                "%s: model %r is served from another bundle now (%.12s, it was %.12s)",
                self.where,
                self.model,
                bundle_sha,
                self._served.bundle_sha,
            )
            self._served = self._describe().model_copy(update={"bundle_sha": bundle_sha})

    def _ask(self, asked: Asked, options: RequestOptions, progress: ProgressFn | None) -> Answer:
        """The answer of the first attempt that gets one."""
        outputs = [LABELS, REPORT, *([PROBABILITIES] if options.probabilities else [])]
        wanted = {} if asked.grid is None else answers_of(self.spec, asked.grid, probabilities=options.probabilities)
        patience = Patience(self.connection)
        with self._call():
            while True:
                try:
                    told = options.model_copy(update={"timeout_s": patience.left}).to_parameters()
                    question = Question(self.model, self.version, asked.inputs, outputs, told)
                    return self._attempt(question, wanted, patience.left, progress)
                except Failure as failure:
                    if self._closed.is_set():
                        raise BackendError(f"{self.where}: this RemotePredictor was closed while it waited for an answer") from failure
                    pause = patience.pause_after(failure)
                    if pause is None:
                        raise patience.error(failure, self.where, self.model) from failure
                    logger.info("%s: %s; asking again in %.1f s", self.where, failure.text, pause)
                    self._closed.wait(pause)

    def _attempt(self, question: Question, wanted: Mapping[str, Wanted], timeout: float | None, progress: ProgressFn | None) -> Answer:
        tell = progress if progress is not None and self._can_stream(timeout) else None
        if tell is not None:
            question = replace(question, model=question.model + STREAM_SUFFIX, outputs=[*question.outputs, PROGRESS])
        with self._memory.shelf(question, wanted, timeout) as shelf:
            if tell is None:
                return shelf.take(self._transport.infer(shelf.question, timeout))
            return shelf.take(self._streamed(shelf.question, timeout, tell))

    def _can_stream(self, timeout: float | None) -> bool:
        """Whether the server has the model that tells of its progress."""
        if self._streams is None:
            self._streams = self._transport.is_ready(self.model + STREAM_SUFFIX, self.version, timeout)
        return self._streams

    def _streamed(self, question: Question, timeout: float | None, progress: ProgressFn) -> Answer:
        last: Answer = {}
        with closing(self._transport.stream(question, timeout)) as answers:
            for answer in answers:
                if PROGRESS in answer:
                    done, total = (int(count) for count in answer[PROGRESS])
                    progress(done, total)
                if REPORT in answer:
                    last = answer
        if not last:
            raise Failure("unavailable", "the stream ended without labels")
        return last

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Count a call; the last one to leave a closed RemotePredictor releases the connection."""
        with self._state:
            if self._closed.is_set():
                raise BackendError(f"{self.where}: this RemotePredictor was closed; open another one")
            self._calls += 1
        try:
            yield
        finally:
            with self._state:
                self._calls -= 1
                last = self._calls == 0 and self._closed.is_set()
            if last:
                self._release()

    def _release(self) -> None:
        # over HTTP this server is not told that nobody waits any more, so there is nothing to wait for
        self._memory.tidy(TIDY_S if self._transport.streams else MOMENT_S)
        self._transport.close()
