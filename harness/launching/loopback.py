"""Where the ranks of one machine meet: a store that listens on loopback alone.

torch's launcher keeps a store for its ranks that listens on every address of the machine. This rendezvous, registered
with torch as `--rdzv_backend loopback`, opens the port itself, so nothing outside can reach it and nobody can take it
between its choice and its use.
"""

from __future__ import annotations

import datetime
import socket

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from harness.launching.ports import free_port

BACKEND = "loopback"
ADDRESS = "127.0.0.1"
_STORE_LIMIT = datetime.timedelta(seconds=600)
_TRIES = 20


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of a single launcher, which is its own master."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        server = _listen()
        self._port = int(server.getsockname()[1])
        self._store = TCPStore(
            ADDRESS,
            self._port,
            is_master=True,
            timeout=_STORE_LIMIT,
            wait_for_workers=False,
            master_listen_fd=server.detach(),
        )

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        store = PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(ADDRESS, self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None: ...

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def register() -> None:
    """Make the backend known to torch's launcher; again in the same process changes nothing."""
    rendezvous_handler_registry.register(BACKEND, _create)


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    return LoopbackRendezvous(parameters.run_id)


def _listen() -> socket.socket:
    for _ in range(_TRIES):
        try:
            return socket.create_server((ADDRESS, free_port()))
        except OSError:  # somebody was quicker
            continue
    return socket.create_server((ADDRESS, 0))
