"""A cache in a process of its own, told by its parent what to do: the other end of a channel."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import standin
import xxhash
from allocator_model import KIND, FlakyHostDriver, FlakyStandInDriver, make_cache
from standin import StandInCudaDriver
from vkv.allocator import KVCache, Slot
from vkv.allocator.transfer import Incoming, Outgoing, TransferKey, Transfers
from vkv.allocator.transfer.channels import Channel, CopyChannel, PageChannel
from vkv.vmem import CudaDriver, VmemDriver

CHANNELS: dict[str, Callable[..., Channel]] = {"copies": CopyChannel, "pages": PageChannel}


def digest(cache: KVCache, slot: Slot, num_tokens: int) -> int:
    """Of the bytes of a slot's first tokens."""
    found = xxhash.xxh3_64()
    for stream in cache.spans(slot, 0, num_tokens):
        for piece in stream:
            found.update(piece.cpu().contiguous().numpy())
    return found.intdigest()


def make_driver(device: str, page_bytes: int) -> VmemDriver:
    """The host's, CUDA's, or CUDA's over the stand-in; a GPU's pages have a size of their own."""
    if device == "host":
        return FlakyHostDriver(page_bytes)
    if device == "cuda":
        return CudaDriver()
    standin.load()
    return FlakyStandInDriver()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Peer:
    """One side of transfers: a movable cache, its transfers, and a channel.

    Args:
        sock: what the channel is over.
        channel: `copies` or `pages`.
        kind, page_bytes, device: of the cache.
        options: of the channel.
    """

    def __init__(
        self,
        sock: socket.socket,
        channel: str,
        kind: str = "ragged",
        page_bytes: int = 4096,
        device: str = "host",
        **options: Any,
    ) -> None:
        self.driver = make_driver(device, page_bytes)
        self.cache = make_cache(KIND[kind], self.driver, rows=9, movable=True)
        self.transfers = Transfers(self.cache)
        self.begun: set[Outgoing | Incoming] = set()
        self.channel = CHANNELS[channel](sock, **options)
        self.base = descriptors()
        self.slots: dict[str, Slot] = {}
        self.by_pages = self.channel.moves_pages

    def fill(self, name: str, num_tokens: int, seed: int = 1) -> int:
        """Open a slot, or let it grow, with bytes that depend on the seed; their digest."""
        if name not in self.slots:
            self.slots[name] = self.cache.open()
        slot = self.slots[name]
        start = slot.num_tokens
        self.cache.grow(slot, num_tokens)
        for stream in self.cache.spans(slot, start, num_tokens):
            for piece in stream:
                piece.random_(1, 255) if seed == 1 else piece.fill_(seed)
        return self.digest(name)

    def digest(self, name: str) -> int:
        return digest(self.cache, self.slots[name], self.slots[name].num_tokens)

    def fork(self, name: str, child: str, num_tokens: int) -> None:
        self.slots[child] = self.cache.fork(self.slots[name], num_tokens)

    def send(self, name: str, start: int, stop: int) -> tuple[str, int, int]:
        """Send a stage; the error, the bytes copied and the pages handed over."""
        outgoing = self.transfers.send(TransferKey(name, 0), self.slots[name], stop)
        self.begun.add(outgoing)
        outgoing.extend(stop)
        job = self.channel.send(outgoing, start, stop)
        job.run()
        return repr(job.error or ""), job.num_bytes, job.num_pages

    def receive(
        self, name: str, start: int, stop: int, *, num_reserved: int = 0
    ) -> tuple[str, int, int]:
        """Receive a stage."""
        key, tokens = TransferKey(name, 0), list(range(stop))
        incoming = self.transfers.receive(key, tokens, by_pages=self.by_pages)
        self.begun.add(incoming)
        incoming.extend(tokens, num_reserved=num_reserved)
        job = self.channel.receive(incoming, start, stop)
        job.run()
        return repr(job.error or ""), job.num_bytes, job.num_pages

    def commit_receipt(self, name: str, stop: int) -> int:
        """The tokens are here; their digest."""
        incoming = self.transfers.receive(TransferKey(name, 0), list(range(stop)))
        incoming.commit()
        slot = incoming.claim()
        assert slot is not None
        self.slots[name] = slot
        return self.digest(name)

    def abort_receipt(self, name: str, stop: int) -> None:
        self.transfers.receive(TransferKey(name, 0), list(range(stop))).abort()

    def end_sending(self, name: str, *, is_done: bool) -> None:
        outgoing = self.transfers.send(TransferKey(name, 0), self.slots[name], 0)
        outgoing.commit() if is_done else outgoing.abort()

    def close(self, name: str) -> None:
        self.cache.close(self.slots.pop(name))

    def park(self, name: str) -> None:
        slot = self.slots.pop(name)
        self.cache.park(slot, list(range(slot.num_tokens)))

    def counts(self) -> dict[str, int]:
        """What is left of everything, once free memory went back."""
        self.cache.check_invariants()
        self.cache.pool.trim()
        stats, driver = self.cache.stats(), self.driver
        return {
            "open": stats.slots_open,
            "parked": stats.slots_parked,
            "pages": driver.num_pages,
            "held": self.cache.pool.num_held,
            "reserved": stats.pages_reserved,
            "descriptors": self._new_descriptors(),
        }

    def _new_descriptors(self) -> int:
        if isinstance(self.driver, StandInCudaDriver):
            return descriptors() - self.base - standin.load().num_files()
        if self.driver.device.type == "cuda":
            return 0  # PyTorch and CUDA open files when they first need them
        return descriptors() - self.base

    def shutdown(self) -> None:
        for transfer in self.begun:
            transfer.abort()  # without effect on what was committed
        self.cache.shutdown()
        self.driver.close()
        self.channel.close()


class Remote:
    """A `Peer` in another process. `begin` a call, then ask for its `result`; or `call` it."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, sock, args, options))
        self.process.start()
        theirs.close()
        sock.close()

    def begin(self, method: str, *args: Any, **options: Any) -> None:
        self._pipe.send((method, args, options))

    def result(self, timeout_s: float = 30) -> Any:
        assert self._pipe.poll(timeout_s), "the peer does not answer"
        result, error = self._pipe.recv()
        if error:
            raise AssertionError(error)
        return result

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        self.begin(method, *args, **options)
        return self.result()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)

    def end(self) -> None:
        if self.process.is_alive():
            self._pipe.send(("shutdown", (), {}))
            self.process.join(10)
            assert self.process.exitcode == 0
        self._pipe.close()
        self.process.close()


def _serve(pipe: Any, sock: socket.socket, args: Sequence[Any], options: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    if options.get("device") == "standin":
        standin.load().reset()
    peer = Peer(sock, *args, **options)
    pipe.send(("ready", None))
    while True:
        method, arguments, named = pipe.recv()
        try:
            pipe.send((getattr(peer, method)(*arguments, **named), None))
        except Exception as error:  # noqa: BLE001 - the parent's to judge
            pipe.send((None, repr(error)))
        if method == "shutdown":
            return


@contextmanager
def two_processes(channel: str, *, tcp: bool = False, **options: Any) -> Iterator[tuple]:
    """A peer here and one in another process, connected."""
    ours, theirs = connected(tcp)
    remote = Remote(theirs, channel, **options)
    peer = Peer(ours, channel, **options)
    remote.result(120)  # a process that imports PyTorch is silent for longer than channels wait
    try:
        yield peer, remote
    finally:
        peer.shutdown()
        remote.end()


def connected(tcp: bool = False) -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection."""
    if not tcp:
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    return ours, theirs
