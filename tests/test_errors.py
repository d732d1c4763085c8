"""Every error survives pickling and the wire, and says how to treat it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import msgspec
import pytest

from raftlog import errors
from raftlog.errors import RaftlogError, from_wire, to_wire

CLASSES = sorted(errors._all_subclasses().values(), key=lambda cls: cls.__name__)
DETAILS: dict[str, Any] = {
    "topic": "t",
    "partition": 3,
    "leader": None,
    "failures": ["a", "b"],
    "more": {"k": 1},
}


def assert_same(found: RaftlogError, sent: RaftlogError) -> None:
    assert type(found) is type(sent)
    assert (found.message, found.details, str(found)) == (sent.message, sent.details, str(sent))
    assert (found.retriable, found.fatal, found.indeterminate) == (
        sent.retriable,
        sent.fatal,
        sent.indeterminate,
    )


def test_there_are_as_many_errors_as_the_module_defines() -> None:
    defined = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, RaftlogError)
    }
    assert defined <= set(CLASSES)
    assert len(defined) > 40


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_pickling_and_copying(cls: type[RaftlogError]) -> None:
    error = cls("what happened", **DETAILS)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert_same(pickle.loads(pickle.dumps(error, protocol)), error)
    assert_same(copy.copy(error), error)
    assert_same(copy.deepcopy(error), error)
    assert_same(pickle.loads(pickle.dumps(cls())), cls())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_wire(cls: type[RaftlogError]) -> None:
    error = cls("what happened", **DETAILS)
    name, message, details = msgspec.msgpack.decode(msgspec.msgpack.encode(to_wire(error)))
    assert_same(from_wire(name, message, details), error)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_what_each_class_says(cls: type[RaftlogError]) -> None:
    error = cls("what happened")
    assert cls.__doc__
    assert str(error).startswith("what happened")
    assert (error.hint in str(error)) == bool(error.hint) or not error.hint
    assert error.retriable + error.abortable + error.fatal <= 1, "there is one thing to do about it"
    if (error.abortable or error.fatal) and not isinstance(error, errors.DataDirError):
        assert error.hint, "what is over says how to go on"
    assert isinstance(error, RaftlogError)


def test_details_are_attributes() -> None:
    error = errors.NotLeader("not here", leader=3, term=7)
    assert (error.leader, error.term) == (3, 7)
    with pytest.raises(AttributeError, match="'NotLeader' object has no attribute 'partition'"):
        _ = error.partition


def test_indeterminate_can_be_told_per_instance_and_survives() -> None:
    assert errors.RequestTimeout("x").indeterminate
    for cls, given in (
        (errors.DeliveryTimeout, True),
        (errors.ConnectionLost, True),
        (errors.RequestTimeout, False),
    ):
        error = cls("x", indeterminate=given)
        assert error.indeterminate is given
        assert pickle.loads(pickle.dumps(error)).indeterminate is given
        assert from_wire(*to_wire(error)).indeterminate is given
    assert not errors.ConnectionLost("x").indeterminate


def test_an_error_of_a_newer_release_is_still_an_error() -> None:
    error = from_wire("QuotaExceeded", "too fast", {"limit": 5, "indeterminate": True})
    assert type(error) is RaftlogError
    assert error.message == "QuotaExceeded: too fast"
    assert error.limit == 5
    assert error.indeterminate


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.InvalidRecord, TypeError),
        (errors.RequestTimeout, TimeoutError),
        (errors.DeliveryTimeout, TimeoutError),
        (errors.ConnectionLost, ConnectionError),
        (errors.StorageFull, OSError),
    ],
)
def test_errors_are_caught_by_the_built_in_that_fits(
    cls: type[RaftlogError], builtin: type[Exception]
) -> None:
    with pytest.raises(builtin, match="what happened"):
        raise cls("what happened", path="x")
