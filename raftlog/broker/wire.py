"""Raft messages on the wire: many messages of many groups in one frame between two brokers.

A message travels as a msgpack array that begins with its tag. The entries of an AppendRequest do not: their
frames stand one after another in the payload, as the same bytes that the journal and the segments hold, and
the receiver's entries are views of the buffer that came from the socket.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from raftlog.errors import CorruptFrame, ProtocolError
from raftlog.net.rpc import RaftMessages
from raftlog.raft import types as t
from raftlog.record.frame import Buffer, iter_frames

_FLAT: Final[dict[int, type[Any]]] = {
    1: t.VoteRequest,
    2: t.VoteResponse,
    4: t.AppendResponse,
    5: t.Heartbeat,
    6: t.HeartbeatResponse,
    8: t.InstallSnapshotResponse,
    9: t.TimeoutNow,
    10: t.ReadIndexRequest,
    11: t.ReadIndexResponse,
}
_APPEND: Final = 3
_SNAPSHOT: Final = 7


def encode_messages(messages: Sequence[t.Message]) -> tuple[RaftMessages, list[Buffer]]:
    """One frame's header and payload buffers (none of them copied)."""
    rows: list[Any] = []
    lengths: list[int] = []
    buffers: list[Buffer] = []
    for message in messages:
        if type(message) is t.AppendRequest:
            rows.append(
                (
                    _APPEND,
                    message.to,
                    message.sender,
                    message.term,
                    message.prev_index,
                    message.prev_term,
                    message.prev_crc,
                    message.commit,
                )
            )
            length = 0
            for entry in message.entries:
                buffers.append(entry.frame)
                length += len(entry.frame)
            lengths.append(length)
        else:
            rows.append(message)
    return RaftMessages(rows, lengths), buffers


def decode_messages(frame: RaftMessages, payload: memoryview) -> list[t.Message]:
    """The messages of one frame.

    Raises:
        ProtocolError: an unknown tag, or lengths that do not add up to the payload.
        CorruptFrame: an entry that does not check.
    """
    if sum(frame.lengths) != len(payload):
        raise ProtocolError(f"entries of {sum(frame.lengths)} bytes announced, {len(payload)} came")
    messages: list[t.Message] = []
    position = 0
    lengths = iter(frame.lengths)
    try:
        for row in frame.messages:
            tag = row[0]
            if tag == _APPEND:
                end = position + next(lengths)
                _, to, sender, term, prev_index, prev_term, prev_crc, commit = row
                entries = _entries(payload[position:end])
                messages.append(
                    t.AppendRequest(to, sender, term, prev_index, prev_term, prev_crc, commit, entries)
                )
                position = end
            elif tag == _SNAPSHOT:
                messages.append(msgspec.convert(row, t.InstallSnapshot))
            else:
                messages.append(_FLAT[tag](*row[1:]))
    except (KeyError, IndexError, TypeError, ValueError, StopIteration, msgspec.ValidationError) as error:
        raise ProtocolError(f"malformed Raft message: {error!r}") from error
    return messages


def _entries(frames: memoryview) -> tuple[t.Entry, ...]:
    if not frames:
        return ()
    try:
        return tuple(
            t.Entry.of(header, frames[position : position + header.length])
            for header, position in iter_frames(frames)
        )
    except CorruptFrame as error:
        raise ProtocolError(f"damaged entry from a peer: {error}") from error
