"""Raft messages on the wire: many messages of many groups in one frame between two brokers.

A message travels as a msgpack array that begins with its tag. The entries of an AppendRequest do not: their
frames stand one after another in the payload, as the same bytes that the journal and the segments hold, and
the receiver's entries are views of the buffer that came from the socket.

What a peer sends is checked here, types included, so that the core only ever sees messages of the right form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from raftlog.errors import CorruptFrame, ProtocolError
from raftlog.net.rpc import RaftMessages
from raftlog.raft import types as t
from raftlog.record.frame import Buffer, split_frames

_APPEND: Final = 3


class _AppendRow(msgspec.Struct, frozen=True, array_like=True, tag_field="t", tag=_APPEND):
    """An AppendRequest without its entries."""

    to: int
    sender: int
    term: int
    prev_index: int
    prev_term: int
    prev_crc: int
    commit: int


class _Rows(msgspec.Struct, array_like=True):
    """All messages of a frame. A struct, for of other types msgspec works out the form at every call."""

    rows: list[
        _AppendRow
        | t.VoteRequest
        | t.VoteResponse
        | t.AppendResponse
        | t.Heartbeat
        | t.HeartbeatResponse
        | t.InstallSnapshot
        | t.InstallSnapshotResponse
        | t.TimeoutNow
        | t.ReadIndexRequest
        | t.ReadIndexResponse
    ]


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
        ProtocolError: an unknown tag, fields of wrong types, lengths that do not add up to the payload, or an
            entry that does not check.
    """
    lengths = frame.lengths
    if sum(lengths) != len(payload) or (lengths and min(lengths) < 0):
        raise ProtocolError(f"entries of {lengths} bytes announced, {len(payload)} came")
    messages: list[t.Message] = []
    position = appends = 0
    try:
        for row in msgspec.convert((frame.messages,), _Rows).rows:
            if isinstance(row, _AppendRow):
                end = position + lengths[appends]
                messages.append(_append_request(row, payload[position:end]))
                position = end
                appends += 1
            else:
                messages.append(row)
    except (LookupError, msgspec.ValidationError) as error:
        raise ProtocolError(f"malformed Raft message: {error!r}") from error
    if appends != len(lengths):
        raise ProtocolError(f"entries of {len(lengths)} messages announced, {appends} came")
    return messages


def _append_request(head: _AppendRow, frames: memoryview) -> t.AppendRequest:
    try:
        entries = tuple([t.Entry(*fields) for fields in split_frames(frames)])
    except CorruptFrame as error:
        raise ProtocolError(f"damaged entry from a peer: {error}") from error
    if entries and (
        entries[0].index != head.prev_index + 1 or entries[-1].index != head.prev_index + len(entries)
    ):
        raise ProtocolError(
            f"entries {entries[0].index} to {entries[-1].index} do not follow {head.prev_index}"
        )
    return t.AppendRequest(
        head.to,
        head.sender,
        head.term,
        head.prev_index,
        head.prev_term,
        head.prev_crc,
        head.commit,
        entries,
    )
