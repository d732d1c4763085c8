"""How commands and snapshots of state machines stand in the log, and what happens when applying cannot go on.

A command is the msgpack array ``(type, version, field, …)``. Type and version together name one layout for
ever: a changed command is a new version, and leaders propose it only once the cluster's feature level says
that every replica knows it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar

import msgspec

from raftlog.errors import NeedsUpgrade
from raftlog.record.frame import Buffer


class ApplyHalted(AssertionError):
    """Applying this entry cannot go on: the replica must stop here and must not skip the entry."""


class ApplyMismatch(ApplyHalted):
    """A committed entry contradicts the state it is applied to: the leader decided on another state."""


class UnknownToRelease(ApplyHalted):
    """What was written by a newer release: with it, the replica goes on from here."""


class UnknownCommand(UnknownToRelease):
    """A committed command that this release does not know."""


class UnknownSnapshot(UnknownToRelease):
    """A snapshot that this release does not know."""


class CommandStruct(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of commands. A field more than the version has is refused, never ignored: ignoring it would
    diverge."""

    type: ClassVar[int]
    version: ClassVar[int] = 1
    needs_level: ClassVar[int] = 1
    """The feature level from which on leaders may propose it."""
    result: ClassVar[Any] = None
    """The type of what applying it gives, for whoever asked from another broker."""


def needs_upgrade(command: CommandStruct, level: int) -> NeedsUpgrade | None:
    """Why a leader must not propose the command while the cluster runs at this feature level, or None."""
    if command.needs_level <= level:
        return None
    return NeedsUpgrade(
        f"{type(command).__name__} needs feature level {command.needs_level}; the cluster runs at {level}",
        level=level,
        needed=command.needs_level,
    )


C = TypeVar("C", bound=CommandStruct)


class CommandCodec(Generic[C]):
    """Encodes and decodes the commands of one state machine.

    Args:
        machine: name of the machine, for errors.
        commands: its commands; (type, version) must be unique among them.
    """

    def __init__(self, machine: str, *commands: type[C]) -> None:
        self._machine = machine
        self._types: dict[tuple[int, int], type[C]] = {(each.type, each.version): each for each in commands}
        assert len(self._types) == len(commands), "two commands share a type and version"

    def encode(self, command: C) -> bytes:
        """The command as an entry's payload."""
        return msgspec.msgpack.encode((command.type, command.version, *msgspec.structs.astuple(command)))

    def decode(self, payload: Buffer) -> C:
        """The command in an entry's payload.

        Raises:
            UnknownCommand: not a command of this release.
        """
        try:
            number, version, *fields = msgspec.msgpack.decode(payload, type=list[Any])
            found = self._types.get((number, version))
            if found is not None:
                return msgspec.convert(fields, found)
        except (msgspec.DecodeError, ValueError, TypeError) as error:
            # too few items to unpack, or ones that cannot be looked up, are as unknown as bad msgpack is
            raise UnknownCommand(f"undecodable {self._machine} command: {error}") from error
        raise UnknownCommand(f"{self._machine} command of type {number!r}, version {version!r}: upgrade")


class SnapshotStruct(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of snapshots: the version comes first, whatever follows."""

    version: int


S = TypeVar("S", bound=SnapshotStruct)


def decode_snapshot(data: Buffer, cls: type[S], version: int) -> S:
    """Decode a snapshot of exactly this version.

    Raises:
        UnknownSnapshot: of another version, or not a snapshot of this machine.
    """
    try:
        found = msgspec.msgpack.decode(data, type=list[Any])[:1]
        if found == [version]:
            return msgspec.msgpack.decode(data, type=cls)
    except msgspec.DecodeError as error:
        raise UnknownSnapshot(f"undecodable snapshot: {error}") from error
    raise UnknownSnapshot(f"snapshot of version {found}, this release reads {version}")
