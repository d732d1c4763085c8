"""The handshake: both sides prove that they know the cluster's secret before anything else is said.

::

    dialing side                                      accepting side
      HELLO      who I am, nonce            ->
                                            <-        CHALLENGE  who I am, nonce
      PROOF      mac("dialer", transcript)  ->        checks it, then cluster, versions, incarnation
      checks it                             <-        WELCOME    mac("acceptor", transcript)
                                                      or REFUSED with a typed error, and the connection closes

The transcript is the exact bytes of both hellos, nonces included, so a proof is worth nothing on another
connection, for another identity or in the other direction. The mac is HMAC-SHA256 keyed with the secret,
which itself never travels. The acceptor proves itself only to a dialer that did. Traffic after it is not
encrypted.

Sans-IO: frames' headers and payloads in and out, no transport, no clock.
"""

from __future__ import annotations

import hashlib
import hmac
import random
from typing import Final

import msgspec

from raftlog.errors import (
    AuthenticationFailed,
    IncompatibleVersion,
    ProtocolError,
    RaftlogError,
    from_wire,
    to_wire,
)
from raftlog.net.frames import Buffer
from raftlog.net.rpc import RPC_VERSION_MAX, RPC_VERSION_MIN, Struct, WireError
from raftlog.version import software_version

HANDSHAKE_VERSION: Final = 1
"""Travels in the version byte of all frames of the handshake: the one thing that can never be negotiated."""
NONCE_BYTES: Final = 32
ROLES: Final = ("broker", "client", "controller")
PURPOSES: Final = ("control", "bulk", "client")


class Local(msgspec.Struct, frozen=True):
    """Who we are, for all connections of this process.

    ``role`` is "broker", "client" or "controller"; ``broker_id`` is -1 for others than brokers;
    ``incarnation`` grows with each start of a broker; ``address`` is where it listens.
    """

    cluster_id: str
    role: str
    broker_id: int = -1
    client_id: str = ""
    incarnation: int = 0
    address: tuple[str, int] | None = None
    version_min: int = RPC_VERSION_MIN
    version_max: int = RPC_VERSION_MAX


class Hello(Struct, frozen=True):
    """Who the other side is, proved by the handshake. ``purpose``: "control", "bulk" or "client"."""

    cluster_id: str
    role: str
    broker_id: int
    client_id: str
    incarnation: int
    purpose: str
    address: tuple[str, int] | None
    version_min: int
    version_max: int
    software: str
    nonce: bytes

    def __str__(self) -> str:
        if self.role == "broker":
            return f"broker {self.broker_id}.{self.incarnation} ({self.purpose})"
        return f"{self.role} {self.client_id!r}"


class Proof(Struct, frozen=True):
    """Knowledge of the secret, bound to both hellos."""

    mac: bytes


_encoder = msgspec.msgpack.Encoder()
_hello_decoder = msgspec.msgpack.Decoder(Hello)
_proof_decoder = msgspec.msgpack.Decoder(Proof)
_error_decoder = msgspec.msgpack.Decoder(WireError)


def encode_error(error: RaftlogError) -> WireError:
    """``error`` as it travels; details that msgpack cannot carry travel as text."""
    name, message, details = to_wire(error)
    try:
        _encoder.encode(details)
    except (TypeError, ValueError, OverflowError):
        details = {key: str(value) for key, value in details.items()}
    return WireError(name, message, details)


def decode_error(header: Buffer) -> RaftlogError:
    """The error in the header of an ERROR or REFUSED frame.

    Raises:
        ProtocolError: it is none.
    """
    try:
        error = _error_decoder.decode(header)
    except (msgspec.DecodeError, ValueError) as cause:
        raise ProtocolError(f"error response that does not decode: {cause}") from cause
    return from_wire(error.name, error.message, error.details)


class Handshake:
    """One side of a handshake.

    Args:
        local: who we are.
        secret: the cluster's.
        purpose: of the connection (dialing side; the acceptor has none to tell).
        rng: source of the nonce. It need not be unpredictable: the nonce is a mac of what it gives.

    Attributes:
        peer: the other side's Hello. Only to be trusted when the handshake is complete.
        version: the rpc version both sides speak, once complete.
    """

    __slots__ = ("_local", "_mine", "_secret", "_theirs", "hello", "peer", "version")

    def __init__(self, local: Local, secret: bytes, purpose: str, rng: random.Random) -> None:
        self._local = local
        self._secret = secret
        self.hello = Hello(
            local.cluster_id,
            local.role,
            local.broker_id,
            local.client_id,
            local.incarnation,
            purpose,
            local.address,
            local.version_min,
            local.version_max,
            software_version(),
            hmac.digest(secret, b"raftlog nonce" + rng.randbytes(NONCE_BYTES), hashlib.sha256),
        )
        self._mine = _encoder.encode(self.hello)
        self._theirs = b""
        self.peer: Hello | None = None
        self.version = 0

    def receive_hello(self, header: Buffer) -> Hello:
        """Take the other side's HELLO or CHALLENGE.

        Raises:
            ProtocolError: it does not decode or makes no sense.
        """
        try:
            peer = _hello_decoder.decode(header)
        except (msgspec.DecodeError, ValueError) as cause:
            raise ProtocolError(f"hello that does not decode: {cause}") from cause
        if peer.role not in ROLES or peer.purpose not in PURPOSES or len(peer.nonce) != NONCE_BYTES:
            raise ProtocolError(f"hello with role {peer.role!r}, purpose {peer.purpose!r}")
        self._theirs = bytes(header)
        self.peer = peer
        return peer

    def proof(self, *, dialer: bool) -> Proof:
        """Our proof, as the dialing or the accepting side."""
        return Proof(self._mac(dialer=dialer, ours=True))

    def verify(self, header: Buffer, *, dialer: bool) -> None:
        """Check the other side's proof; ``dialer``: whether the other side dialed.

        Raises:
            AuthenticationFailed: it does not know the secret.
            ProtocolError: it is no proof.
        """
        try:
            proof = _proof_decoder.decode(header)
        except (msgspec.DecodeError, ValueError) as cause:
            raise ProtocolError(f"proof that does not decode: {cause}") from cause
        if not hmac.compare_digest(proof.mac, self._mac(dialer=dialer, ours=False)):
            raise AuthenticationFailed("the peer does not know the secret of this cluster")

    def _mac(self, *, dialer: bool, ours: bool) -> bytes:
        """Of the proof that the dialer (or the acceptor) gives; ``ours``: that side is us."""
        first, second = (self._mine, self._theirs) if dialer == ours else (self._theirs, self._mine)
        label = b"raftlog dialer" if dialer else b"raftlog acceptor"
        size = len(first).to_bytes(4, "big")  # makes the border between the hellos part of the message
        return hmac.digest(self._secret, label + size + first + second, hashlib.sha256)

    def agree(self) -> None:
        """Check that the two sides belong together and settle the rpc version.

        Raises:
            AuthenticationFailed: the peer belongs to another cluster.
            IncompatibleVersion: there is no rpc version that both speak.
        """
        peer = self.peer
        assert peer is not None, "agree() before receive_hello()"
        ours = self.hello
        if peer.cluster_id != ours.cluster_id:
            raise AuthenticationFailed(
                f"the peer belongs to cluster {peer.cluster_id!r}, this is {ours.cluster_id!r}"
            )
        version = min(ours.version_max, peer.version_max)
        if version < max(ours.version_min, peer.version_min):
            raise IncompatibleVersion(
                f"this side (raftlog {ours.software}) speaks rpc versions {ours.version_min} to "
                f"{ours.version_max}, the peer (raftlog {peer.software}) {peer.version_min} "
                f"to {peer.version_max}"
            )
        self.version = version
