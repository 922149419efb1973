"""Where rank 0 listens, found by MPI itself: for mpirun on several machines with nothing that names the first one.

Rank 0 broadcasts all of its addresses and a port that it listens on; the ranks of other machines try them, and the
first address that every one of them has reached is the one. A host's name would not do: it may be unknown to the
others, or mean the loopback there. Then MPI is left again: the ranks talk through torch.distributed.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import threading
from dataclasses import replace

from configs.errors import ConfigError
from pretrain.placement import Placement, is_mpich

REACH_SECONDS = 3.0  # an address of rank 0 that does not answer in this time is not the one


def meeting(place: Placement) -> Placement:
    """`place` with the address and port of rank 0; every rank of mpirun calls it, once.

    Raises ConfigError where mpi4py finds another MPI than this mpirun's, or all ranks reach no address of rank 0.
    """
    if is_mpich(os.environ):
        os.environ.setdefault("MPI4PY_MPIABI", "mpich")  # where there are several libraries, mpirun's own
    import mpi4py

    mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"mpi4py finds no MPI library ({error}): {_by_hand(place)}") from None
    ranks = MPI.COMM_WORLD
    if ranks.Get_size() != int(place.world_size):
        raise ConfigError(
            f"mpirun has started {place.world_size} ranks, of which mpi4py sees {ranks.Get_size()}: it uses "
            f"{MPI.Get_library_version().splitlines()[0]}, not this mpirun's library; {_by_hand(place)}"
        )
    listener = Listener() if ranks.Get_rank() == 0 else None
    addresses, port, word = ranks.bcast((own_addresses(), listener.port, listener.word) if listener else None)
    reached = [listener is not None or answers(address, port, word) for address in addresses]
    good = [all(by_all) for by_all in zip(*ranks.allgather(reached), strict=True)]
    if listener:
        listener.close()
    MPI.Finalize()
    if not any(good):
        raise ConfigError(f"no address of rank 0 ({', '.join(addresses)}) is reached by all ranks: {_by_hand(place)}")
    return replace(place, master_addr=addresses[good.index(True)], master_port=str(port))


def own_addresses() -> list[str]:
    """Of this machine, IPv4, without the loopback."""
    try:
        listed = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        listed = []
    if not listed:
        listed = [str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    return [address for address in dict.fromkeys(listed) if ":" not in address and not address.startswith("127.")]


def answers(address: str, port: int, word: bytes) -> bool:
    """Whether the one who listens there is the one who knows `word`."""
    try:
        with socket.create_connection((address, port), timeout=REACH_SECONDS) as connection:
            return connection.recv(len(word)) == word
    except OSError:
        return False


class Listener:
    """Says `word` to everyone who connects to `port`, until it is closed."""

    def __init__(self) -> None:
        self.word = secrets.token_hex(16).encode()
        self._socket = socket.create_server(("", 0), backlog=1024)
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._answer, name="meeting", daemon=True).start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
                with connection:
                    connection.sendall(self.word)
            except OSError:
                return


def _by_hand(place: Placement) -> str:
    return (
        f"tell the {place.world_size} ranks the machine of rank 0 (Open MPI: mpirun -x MASTER_ADDR=HOST -x "
        f"MASTER_PORT=29500; MPICH, Intel MPI: mpirun -genv MASTER_ADDR HOST -genv MASTER_PORT 29500)"
    )
