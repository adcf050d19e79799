"""What the tests of the client share: addresses, images that tell a scripted model what to do, and what is left in shared memory."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from factories import volume_of

from segrt.serving import Connection, Server
from segrt.serving.connection import parse_address
from segrt.serving.grpc_transport import GrpcTransport
from segrt.volume import Volume

PATIENCE_S = 40
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Served:
    """A server, and the folder where a scripted model leaves signs."""

    server: Server
    signs: Path

    def url(self, protocol: str) -> str:
        return self.server.grpc if protocol == "grpc" else f"http://{self.server.http}"

    def wait_for(self, sign: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not (self.signs / sign).exists():
            assert time.monotonic() < end, sign
            time.sleep(0.02)

    def left(self) -> list[str]:
        """`regions` once the server has let go of them, which it does when it has cleared a request away."""
        end = time.monotonic() + PATIENCE_S / 4
        while (found := self.regions()) and time.monotonic() < end:
            time.sleep(0.1)
        return found

    def regions(self) -> list[str]:
        """Shared memory of clients: what the server knows of, and what this process has left."""
        asked = GrpcTransport(parse_address(self.server.grpc), Connection())
        known = [name for name in asked.system_regions(10) if name.startswith("segrt-client-")]
        asked.close()
        return known + [path.name for path in SHARED_MEMORY.glob(f"segrt-client-{os.getpid()}-*")]


def told(name: str, data: Any) -> Volume:
    """An image whose name tells the scripted model what to do."""
    return replace(volume_of(data), name=name)
