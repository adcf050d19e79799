"""PyTorch: on the CPU the reference every compiled engine is held against, on a GPU an engine that needs no build."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..arrays import Array, FloatArray, require
from ..bundle import Bundle
from ..device import device_number, on_device, use_device
from ..errors import BackendError
from ..spec import NetworkSpec, OnnxNetwork
from .batches import gpu_batch, in_batches, smaller_batch_after_memory_error

logger = logging.getLogger(__name__)

_PRECISIONS = {"cpu": ("fp32", "bf16"), "gpu": ("fp32", "fp16", "bf16")}


class _Settings:
    """cuDNN's settings while an engine runs: they are the process's, so of several engines at once the last one out puts them back."""

    def __init__(self) -> None:
        self._lock, self._running, self._before = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._running:
                cudnn = require("torch", extra="export").backends.cudnn
                # without benchmark: it times the algorithms anew in every thread, and the same patches got other bytes in another thread;
                # without tf32, for fp32 means it
                self._before.enter_context(cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False))
            self._running += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                self._before.close()


_SETTINGS = _Settings()


class TorchEngine:
    """A torch module in evaluation mode, on memory shared with CuPy or NumPy.

    On the CPU bf16 is autocast. On a GPU ("simulated" goes the same way on the CPU) fp16 and bf16 are the weights' own type: autocast
    would round every weight anew in each call. Channels are last, as the matrix units want them, where our own kernels (`torch_fused`)
    or torch.compile make the normalisation: torch's own turns them first and back. Normalisation keeps float32 parameters and sums in
    float32, for a 16-bit sum over a window overflows; only what it reads and writes has 16 bits. fp16 logits stay float16; bf16 ones come
    out as float32, which holds their range.

    Parameters
    ----------
    network : module whose result is logits (N, `classes`, (Z,) Y, X); it is moved and converted in place
    batch : windows per call
    compiled : let torch.compile fuse normalisation and activation; takes a minute at the first call. Where it cannot, a warning says why
        and the network runs as it is
    """

    def __init__(
        self,
        network: Any,
        *,
        classes: int,
        dimensions: int,
        precision: str = "fp32",
        batch: int = 1,
        device: str = "cpu",
        compiled: bool = False,
    ) -> None:
        torch = require("torch", extra="export")
        self._number = device_number(device)
        self._place = torch.device("cpu" if self._number is None else f"cuda:{self._number}")
        self._classes, self._dimensions, self._precision = classes, dimensions, precision
        self._dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        self._network = network.eval()
        self._format, self._separate = torch.contiguous_format, None
        if device != "cpu":
            self._network = _rounded(self._network.to(self._place), self._dtype)
            self._separate = _fuse(self._network, self._dtype) if self._number is not None and not compiled else None
            if compiled or self._separate or not _has_instance_norms(self._network):
                self._format = _channels_last(dimensions)
            self._network = self._network.to(memory_format=self._format)
        self._compiled = torch.compile(self._network) if compiled else None
        self._lock: Any = nullcontext() if device == "cpu" else threading.Lock()
        self.batch = batch
        self.held_bytes = 0
        self.device = device
        self.name = f"pytorch, {device}, {precision}{', compiled' if compiled else ''}"

    def __call__(self, patches: FloatArray) -> Array:
        """Run the network; see `Engine`."""
        dtype = np.float16 if self._precision == "fp16" else np.float32
        with self._lock, self._context(), smaller_batch_after_memory_error(self):
            # torch picks its algorithm by the batch, and equal patches must give equal logits
            return in_batches(patches, self.batch, self._classes, dtype, self._run)

    def close(self) -> None:
        """Release the network, and on a GPU the memory torch keeps."""
        del self._network, self._compiled
        _release(self._number)

    def _run(self, part: Any, out: Any) -> None:
        source, target = _tensor(part), _tensor(out)
        if self._dimensions == 2:
            source, target = source[:, :, 0], target[:, :, 0]
        if self.device != "cpu":
            source = source.to(self._dtype, memory_format=self._format)
        logits = self._logits(source)
        self._separate(logits, target) if self._separate else target.copy_(logits)

    def _logits(self, source: Any) -> Any:
        if self._compiled is None:
            return self._network(source)
        torch = require("torch", extra="export")
        try:
            return self._compiled(source)
        except torch._dynamo.exc.TorchDynamoException as err:
            logger.warning(
                "%s: torch.compile does not work here, the network runs as it is: %s", self.name, " ".join(str(err).split())[:300]
            )
            self._compiled, self.name = None, self.name.removesuffix(", compiled")
            return self._network(source)

    @contextmanager
    def _context(self) -> Iterator[None]:
        """Device, stream and settings for one call; what they were before comes back after it."""
        torch = require("torch", extra="export")
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if self.device == "cpu":
                stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=self._precision == "bf16"))
            else:
                stack.enter_context(use_device(self.device))
                stack.enter_context(_SETTINGS)
            if self._number is not None:
                stack.enter_context(torch.cuda.stream(_torch_stream(torch, self._number)))
            yield


_compile = False


def use_compile(wanted: bool) -> None:
    """Have torch.compile fuse the networks that are opened on a GPU from now on; the commands do for SEGRT_TORCH_COMPILE=1."""
    global _compile
    _compile = wanted


def open_member(bundle: Bundle, member: str, precision: str, threads: int, device: str) -> TorchEngine:
    """Build the network of the spec and load a member's weights.

    `threads` is torch's own process-wide setting and is left alone: set it with torch.set_num_threads.

    Raises
    ------
    BackendError
        When torch or the weights are missing, torch sees no GPU, or the precision is none it serves there.
    """
    place = "cpu" if device == "cpu" else "gpu"
    if precision not in _PRECISIONS[place]:
        served = " and ".join((", ".join(_PRECISIONS[place][:-1]), _PRECISIONS[place][-1]))
        raise BackendError(f"PyTorch on a {place.upper()} serves {served}, not {precision}")
    spec = bundle.spec
    if isinstance(spec.network, OnnxNetwork):
        raise BackendError(
            f"{bundle.path}: network family {spec.network.family!r} has no PyTorch form; use backend openvino or onnxruntime"
        )
    _check_torch(device)
    network = _load(bundle, member, spec.network)
    batch = 1 if device == "cpu" else gpu_batch(spec.inference.patch)
    # on trial: of the networks our kernels know it was the slower one, with more than twice the memory, and of others nobody knows
    compiled = device != "cpu" and _compile
    how: dict[str, Any] = {"precision": precision, "batch": batch, "device": device, "compiled": compiled}
    return TorchEngine(network, classes=spec.classes, dimensions=spec.dimensions, **how)


def _load(bundle: Bundle, member: str, network: NetworkSpec) -> Any:
    path = bundle.weights_path(member)
    if not path.is_file():
        raise BackendError(f"{path} is missing: this bundle runs from its ONNX file; use backend openvino or onnxruntime")
    require("torch", extra="export")
    from ..networks import build, load_weights

    safetensors = require("safetensors", extra="export")
    try:
        weights = require("safetensors.torch", extra="export").load_file(str(path))
    except (safetensors.SafetensorError, OSError) as err:
        raise BackendError(f"{path}: not readable as safetensors ({err}); copy the bundle again") from err
    built = build(network)
    load_weights(built, weights, where=str(path), whole=bundle.whole.spec.network if bundle.whole else None)
    return built


def _check_torch(device: str) -> None:
    """Refuse a torch that cannot compute on a GPU which CuPy sees."""
    torch = require("torch", extra="export")
    number = device_number(device)
    if number is not None and (not torch.cuda.is_available() or number >= torch.cuda.device_count()):
        raise BackendError(f"torch {torch.__version__} cannot compute on {device}; install a build of torch for CUDA 13")


def _rounded(network: Any, dtype: Any) -> Any:
    """The network with weights of `dtype`, and normalisation left in float32."""
    torch = require("torch", extra="export")
    norms = (torch.nn.modules.batchnorm._NormBase, torch.nn.GroupNorm)
    for module in network.modules():
        if not isinstance(module, norms):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
    return network


def _fuse(network: Any, dtype: Any) -> Callable[[Any, Any], None] | None:
    """Put our kernels between the convolutions; what takes the channels-last logits apart, or None where it is not our kind of network."""
    if find_spec("cupy") is None:
        return None
    from .torch_fused import fuse, separate

    return separate if fuse(network, dtype) else None


def _has_instance_norms(network: Any) -> bool:
    instance = require("torch", extra="export").nn.modules.instancenorm._InstanceNorm
    return any(isinstance(module, instance) for module in network.modules())


def _channels_last(dimensions: int) -> Any:
    torch = require("torch", extra="export")
    return torch.channels_last_3d if dimensions == 3 else torch.channels_last


def _tensor(array: Any) -> Any:
    """A torch tensor of the same memory, wherever it lies."""
    torch = require("torch", extra="export")
    return torch.from_dlpack(array if on_device(array) and not isinstance(array, np.ndarray) else np.asarray(array))


def _torch_stream(torch: Any, number: int) -> Any:
    """CuPy's current stream, for torch."""
    address = require("cupy", extra="cuda").cuda.get_current_stream().ptr
    return torch.cuda.ExternalStream(address, device=number) if address else torch.cuda.default_stream(number)


def _release(number: int | None) -> None:
    if number is not None:
        require("torch", extra="export").cuda.empty_cache()
