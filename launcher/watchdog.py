"""A rank that dies ends the others, with one line that names it.

Every rank holds a connection to rank 0. However a process ends, its system closes its connections:
rank 0 sees it at once and tells the others, and its own end they all see. A machine that falls
silent is found by TCP's keepalive. Nothing beats in Python, so a rank that is busy for minutes or
paused (by a scheduler, say) is not taken for dead, and a rank that ends says goodbye before.
"""

import contextlib
import os
import secrets
import selectors
import signal
import socket
import struct
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

from launcher.errors import InputError

RESUMABLE = 75

_SILENCE_S = 30
_CONNECT_S = 60
_LEFT, _LOST = 0, 1
# What happened, and the exit code of the rank that left or the number of the one that is lost.
_WORD = struct.Struct("!ii")
_HELLO = struct.Struct("!16si")


def start(rank: int, size: int) -> None:
    """Watch the other ranks from now on; called by every rank of the process group.

    Raises:
        InputError: the machines can't connect to each other.
    """
    global _watch
    if size == 1:
        return
    listener = _listener(size) if rank == 0 else None
    port = listener.getsockname()[1] if listener else 0
    own = _Place(socket.gethostname(), os.getpid(), port, secrets.token_bytes(16))
    places: list[_Place] = [own] * size
    dist.all_gather_object(places, own)
    peers = _accepted(listener, places) if listener else {0: _connected(rank, places)}
    _watch = _Watch(rank, places, peers)


def goodbye(code: int) -> None:
    """Tell the others that this rank ends by itself, and stop watching them."""
    if _watch:
        _watch.leave(code)


def silence() -> None:
    """Stop watching the others, and tell them nothing: this rank fails by itself."""
    if _watch:
        _watch.leave(None)


def verdict(seconds: float | None = None) -> int | None:
    """Asked when this rank can't go on: is it because of another one?

    If another has died, this process ends here. Otherwise gives the exit code, not 0, of one that
    ended before the work was done and whose reason is told (rank 0 speaks for all); or None after
    `seconds`, by default as long as a death may take to show.
    """
    if not _watch:
        return None
    # A launcher stops all ranks when one has ended, which must not cut short what this one says.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return _watch.verdict(seconds)


@dataclass(frozen=True)
class _Place:
    host: str
    pid: int
    port: int
    token: bytes


class _Watch:
    def __init__(self, rank: int, places: list[_Place], peers: dict[int, socket.socket]) -> None:
        self.rank, self.places, self.peers = rank, places, peers
        self.left: dict[int, int] = {}
        self.over = False
        # Held to the end by whoever ends this process.
        self.lock = threading.Lock()
        for peer in peers.values():
            _keep_alive(peer)
        # A child's copy of a connection would keep it open when this process is killed.
        os.register_at_fork(after_in_child=self._close)
        self.settled = threading.Event()
        threading.Thread(target=self._follow, name="watchdog", daemon=True).start()

    def leave(self, code: int | None) -> None:
        with self.lock:
            if code is not None and not self.over:
                self._tell(_LEFT, code)
            self.over = True

    def verdict(self, seconds: float | None) -> int | None:
        if seconds is None:
            one_machine = len({place.host for place in self.places}) == 1
            seconds = 5 if one_machine else _SILENCE_S + 5
        self.settled.wait(seconds)
        with self.lock:
            return self._reason()

    def _reason(self) -> int | None:
        told = [c for rank, c in self.left.items() if c == RESUMABLE or (c and rank == 0)]
        return next(iter(told), None)

    def _close(self) -> None:
        for peer in self.peers.values():
            peer.close()

    def _follow(self) -> None:
        """Read what the connections bring until all are at their end."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self.peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    word = _read(self.peers[key.data], _WORD.size)
                    what, number = _WORD.unpack(word) if word else (_LOST, key.data)
                    with self.lock:
                        if what == _LEFT:
                            self.left[key.data] = number
                            if self._reason() is not None:
                                self.settled.set()
                        elif not self.over:
                            self._end(number)
        self.settled.set()

    def _end(self, lost: int) -> None:
        self._tell(_LOST, lost)
        here = self.places[self.rank].host
        alive = [r for r in range(len(self.places)) if r != lost and r not in self.left]
        if self.rank == min(r for r in alive if self.places[r].host == here):
            place = self.places[lost]
            line = (
                f"rank {lost} (host {place.host}, pid {place.pid}) is gone: it was killed, failed "
                "or lost its network; see what it printed and the system's out-of-memory "
                "messages. The same command with --resume goes on from what is saved\n"
            )
            # Past Python's buffers, whose locks another thread may hold for ever.
            os.write(2, line.encode())
        else:
            # A launcher kills every process when the first one leaves: the one that speaks.
            time.sleep(3)
        os._exit(RESUMABLE)

    def _tell(self, what: int, number: int) -> None:
        for peer in self.peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(_WORD.pack(what, number))


_watch: _Watch | None = None


def _listener(size: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=both)


def _accepted(listener: socket.socket, places: list[_Place]) -> dict[int, socket.socket]:
    """Connections of all other ranks, by rank; whoever doesn't know their tokens is sent away."""
    peers: dict[int, socket.socket] = {}
    end = time.monotonic() + _CONNECT_S
    with listener:
        while len(peers) < len(places) - 1:
            listener.settimeout(max(0.001, end - time.monotonic()))
            try:
                peer, _ = listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, len(places))) - peers.keys())
                raise _unreachable(places[0], missing) from None
            peer.settimeout(1)
            hello = _read(peer, _HELLO.size)
            token, rank = _HELLO.unpack(hello) if hello else (b"", 0)
            if 0 < rank < len(places) and secrets.compare_digest(token, places[rank].token):
                peer.settimeout(None)
                peers[rank] = peer
            else:
                peer.close()
    return peers


def _connected(rank: int, places: list[_Place]) -> socket.socket:
    try:
        address = os.environ["MASTER_ADDR"], places[0].port
        peer = socket.create_connection(address, timeout=_CONNECT_S)
        peer.sendall(_HELLO.pack(places[rank].token, rank))
    except OSError:
        raise _unreachable(places[0], [rank]) from None
    peer.settimeout(None)
    return peer


def _unreachable(first: _Place, ranks: list[int]) -> InputError:
    return InputError(
        f"rank 0 (host {first.host}) got no connection from rank {', '.join(map(str, ranks))} to "
        f"its port {first.port} within {_CONNECT_S} s: let the machines of a run connect to each "
        "other on all ports"
    )


def _keep_alive(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        socket.TCP_KEEPIDLE: _SILENCE_S // 3,
        socket.TCP_KEEPINTVL: max(1, _SILENCE_S // 6),
        socket.TCP_KEEPCNT: 4,
        socket.TCP_USER_TIMEOUT: 1000 * _SILENCE_S,
    }
    for option, value in options.items():
        peer.setsockopt(socket.IPPROTO_TCP, option, value)


def _read(peer: socket.socket, size: int) -> bytes:
    """`size` bytes, or none if the connection ends before."""
    data = b""
    with contextlib.suppress(OSError):
        while len(data) < size and (more := peer.recv(size - len(data))):
            data += more
    return data if len(data) == size else b""
