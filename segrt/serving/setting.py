"""Where a model process finds itself: its version, device and bundle, from what the server tells it when it starts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..bundle import Bundle
from ..errors import SpecError
from ..repository import Deployment
from .fatal import fatal_in
from .tensors import server_module


@dataclass(frozen=True)
class Setting:
    """One instance of a served model.

    Attributes
    ----------
    model, version : as the server has them
    device : "cpu" or "cuda:N"
    told : the parameters in config.pbtxt
    bundle : of this version
    instances : requests that the model works on at once, on all devices
    fatal : images at which its process died before, see `segrt.serving.fatal`
    """

    model: str
    version: str
    device: str
    told: Deployment
    bundle: Bundle
    instances: int = 1
    fatal: frozenset[str] = frozenset()

    @classmethod
    def from_server(cls, args: Mapping[str, str]) -> Setting:
        """Read the arguments of `initialize`, and open the bundle.

        Raises
        ------
        InputError
            When the configuration was not written for segrt, or leads out of the repository.
        SpecError
            When the bundle is missing, damaged, or another one than the configuration was written for.
        """
        version = args["model_version"]
        config = json.loads(args["model_config"])
        told = Deployment.from_parameters(config.get("parameters", {}))
        bundle = Bundle.open(told.bundle_folder(Path(args["model_repository"]).parent, version))
        expected = told.bundle_shas.get(version)
        if bundle.fingerprint != expected:
            raise SpecError(
                f"{bundle.path} is not the bundle that version {version} was written with ({bundle.fingerprint[:12]}, config.pbtxt says "
                f"{str(expected)[:12]}); write the repository again with segrt-build --triton"
            )
        gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if gpu else "cpu"
        instances = sum(group.get("count", 1) * max(len(group.get("gpus", [])), 1) for group in config.get("instance_group", [{}]))
        return cls(args["model_name"], version, device, told, bundle, instances, fatal_in(config))


class ServerLog(logging.Handler):
    """Hand segrt's log records on to the server, which knows what level is wanted and where they go."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log one record."""
        log = server_module().Logger
        show = {logging.WARNING: log.log_warn, logging.INFO: log.log_info, logging.DEBUG: log.log_verbose}
        show.get(record.levelno, log.log_error)(self.format(record))

    @classmethod
    def start(cls) -> None:
        """Take over what segrt logs in this process, which is the server's and runs nothing else."""
        logger = logging.getLogger("segrt")
        logger.handlers, logger.propagate = [cls()], False
        logger.setLevel(logging.INFO)
