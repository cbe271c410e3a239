"""Messages over a stream socket: short ones framed, KV straight from and into its memory.

The kernel waits inside of a call, so few calls move much. A peer that is silent for longer than the
socket's time limit, that closes, or that says what nobody says here, is a TransferError.
"""

import array
import os
import select
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import msgspec
import torch
import xxhash

from ....vmem.errors import InvalidConfig, TransferError

_HEAD = struct.Struct("<4sI")
_MAGIC = b"vkv1"
_END = struct.Struct("<4sQ")
_END_MAGIC = b"vkvE"
_MOST_MESSAGE_BYTES = 16 << 20
_MOST_BUFFERS = 1024  # of one call (IOV_MAX)
_CHECKED_BYTES = 4 << 20  # digested while the next are under way
_STAGED_BYTES = 16 << 20  # of a GPU's memory at a time
MOST_DESCRIPTORS = 253  # of one message (SCM_MAX_FD)

Message = TypeVar("Message")


def prepare(sock: socket.socket, timeout_s: float) -> None:
    """Let calls on `sock` wait in the kernel, and for `timeout_s` at most while nothing moves."""
    if sock.type != socket.SOCK_STREAM:
        raise InvalidConfig(f"{sock} is no stream; use one")
    if timeout_s < 1e-3:
        raise InvalidConfig(f"timeout_s is {timeout_s}; use at least a millisecond")
    sock.settimeout(None)
    limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def wait_for_more(sock: socket.socket) -> bool:
    """Wait until the other side says something, as long as it takes; False once it has closed."""
    waiting = select.poll()  # unlike `select`, of any descriptor, however many are open
    waiting.register(sock, select.POLLIN)
    waiting.poll()
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except OSError:
        return False


# -- short messages ------------------------------------------------------------------------------


def send_message(sock: socket.socket, message: msgspec.Struct) -> None:
    body = msgspec.msgpack.encode(message)
    _send(sock, [memoryview(_HEAD.pack(_MAGIC, len(body))), memoryview(body)])


def receive_message(sock: socket.socket, kind: type[Message]) -> Message:
    head = bytearray(_HEAD.size)
    _receive(sock, [memoryview(head)])
    magic, size = _HEAD.unpack(head)
    if magic != _MAGIC or size > _MOST_MESSAGE_BYTES:
        raise TransferError(f"the other side sent {bytes(head)!r}, which begins no message")
    body = bytearray(size)
    _receive(sock, [memoryview(body)])
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise TransferError(f"the other side sent no {kind}: {error}") from error


# -- bytes of KV ---------------------------------------------------------------------------------


def send_bytes(sock: socket.socket, pieces: Sequence[torch.Tensor], is_checked: bool) -> None:
    """Send uint8 tensors, one after the other, and what they should add up to."""
    digest = xxhash.xxh3_64()
    if is_checked or _are_staged(pieces):
        with _beside(pieces) as buffer:
            for piece in _cut(pieces):
                view = _view(piece if piece.is_cpu else buffer[: len(piece)].copy_(piece))
                if is_checked:
                    digest.update(view)
                _send(sock, [view])
    else:
        _send(sock, [_view(piece) for piece in pieces])
    _send(sock, [memoryview(_END.pack(_END_MAGIC, digest.intdigest()))])


def receive_bytes(sock: socket.socket, pieces: Sequence[torch.Tensor], is_checked: bool) -> None:
    """Fill uint8 tensors. Raises Damaged if others came than were sent."""
    digest = xxhash.xxh3_64()
    if is_checked or _are_staged(pieces):
        with _beside(pieces) as buffer:
            for piece in _cut(pieces):
                staged = piece if piece.is_cpu else buffer[: len(piece)]
                view = _view(staged)
                _receive(sock, [view])
                if is_checked:
                    digest.update(view)
                if staged is not piece:
                    piece.copy_(staged)
    else:
        _receive(sock, [_view(piece) for piece in pieces])
    end = bytearray(_END.size)
    _receive(sock, [memoryview(end)])
    magic, expected = _END.unpack(end)
    if magic != _END_MAGIC:
        raise TransferError("the other side sent more or other bytes than it had said")
    if digest.intdigest() != expected:
        raise Damaged("other bytes of KV came than were sent")


class Damaged(TransferError):
    """All bytes came, and are not those that were sent. What follows can be understood."""


def _view(piece: torch.Tensor) -> memoryview:
    return piece.numpy().data


def _are_staged(pieces: Sequence[torch.Tensor]) -> bool:
    return not all(piece.is_cpu for piece in pieces)


def _cut(pieces: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    for piece in pieces:
        yield from piece.split(_CHECKED_BYTES if piece.is_cpu else _STAGED_BYTES)


@contextmanager
def _beside(pieces: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """A buffer in pinned memory for pieces that are a GPU's. They are copied, each call until it is
    over, on a stream that waits for what this thread's has now (pages may be being cleared), and
    not for what is computed meanwhile."""
    device = next((piece.device for piece in pieces if not piece.is_cpu), None)
    if device is None:
        yield torch.empty(0, dtype=torch.uint8)
        return
    longest = max(len(piece) for piece in pieces if not piece.is_cpu)
    size = min(longest, _STAGED_BYTES)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield torch.empty(size, dtype=torch.uint8, pin_memory=True)


# -- descriptors ---------------------------------------------------------------------------------


def send_descriptors(sock: socket.socket, descriptors: Sequence[int]) -> None:
    """Send file descriptors, as many a message as the kernel allows."""
    for start in range(0, len(descriptors), MOST_DESCRIPTORS):
        batch = array.array("i", descriptors[start : start + MOST_DESCRIPTORS])
        with _understood():
            sock.sendmsg([b"d"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, batch)])


def receive_descriptors(sock: socket.socket, count: int) -> list[int]:
    """`count` descriptors, the caller's to close. None are left open if it raises."""
    found: list[int] = []
    try:
        while len(found) < count:
            expected = min(MOST_DESCRIPTORS, count - len(found))
            with _understood():
                data, ancillary, flags, _ = sock.recvmsg(
                    1, socket.CMSG_SPACE(4 * MOST_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
                )
            before = len(found)
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    found.extend(array.array("i", content[: len(content) // 4 * 4]))
            if data != b"d" or flags & socket.MSG_CTRUNC or len(found) - before != expected:
                raise TransferError(
                    f"{len(found) - before} of {expected} file descriptors came; the other side "
                    "died or sent others, or this process may open no more files (ulimit -n)"
                )
    except BaseException:
        close_all(found)
        raise
    return found


def close_all(descriptors: Sequence[int]) -> None:
    """Close what was received or made to be sent."""
    for descriptor in descriptors:
        os.close(descriptor)


# -- calls ---------------------------------------------------------------------------------------


@contextmanager
def _understood() -> Iterator[None]:
    """Says of a socket's errors what they mean for a transfer."""
    try:
        yield
    except BlockingIOError as error:
        raise TransferError("the other side was silent for too long") from error
    except OSError as error:
        raise TransferError(f"the connection to the other side broke: {error}") from error


def _send(sock: socket.socket, views: Sequence[memoryview]) -> None:
    rest = [view for view in views if len(view)]
    while rest:
        with _understood():
            sent = sock.sendmsg(rest[:_MOST_BUFFERS])
        rest = _behind(rest, sent)


def _receive(sock: socket.socket, views: Sequence[memoryview]) -> None:
    rest = [view for view in views if len(view)]
    while rest:
        with _understood():
            came, *_ = sock.recvmsg_into(rest[:_MOST_BUFFERS], 0, socket.MSG_WAITALL)
        if not came:
            raise TransferError("the other side closed the connection, or ended")
        rest = _behind(rest, came)


def _behind(views: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of buffers without their first bytes."""
    for index, view in enumerate(views):
        if num_bytes < len(view):
            return [view[num_bytes:], *views[index + 1 :]]
        num_bytes -= len(view)
    return []
