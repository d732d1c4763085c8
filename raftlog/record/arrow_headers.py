"""Columns of headers and timestamps, checked and laid out as records have them.

Headers are a list of pairs of ``key`` (text) and ``value`` (bytes), which keeps their order and names that
are there twice, or a map. The section of a record is (numbers are zigzag varints)::

    | number of headers | key length | key | value length (-1: null) | value | … |

Source: Kafka's documentation, "Record Header".
"""

from __future__ import annotations

from typing import Any, Final

import pyarrow.compute as pc

from raftlog.errors import InvalidRecord
from raftlog.record.arrow import Integers, np, pa
from raftlog.record.arrow_rows import COLUMN, is_bytes_or_text, lengths_of, varints
from raftlog.record.codec import TIMESTAMP_MS_MAX

_NAMES: Final = {"key", "value"}


def timestamps_of(column: pa.ChunkedArray, name: str, now_ms: int) -> Integers:
    """The timestamps that a column says, in milliseconds; ``now_ms`` where it is null.

    Args:
        column: integers (milliseconds), or Arrow's timestamps of any unit. Those without a zone are UTC.
        name: of the column, for errors.
        now_ms: milliseconds since the epoch.

    Raises:
        InvalidRecord: it holds something else, or a time before 1970 or after the year 9999.
    """
    kinds = pa.types
    if kinds.is_timestamp(column.type):
        column = pc.cast(column, pa.timestamp("ms", column.type.tz), safe=False)
    elif not (kinds.is_integer(column.type) or kinds.is_null(column.type)):
        raise InvalidRecord(
            f"column {name!r} holds {column.type}, and a timestamp is an integer (milliseconds) or an Arrow "
            "timestamp"
        )
    try:
        moments: Integers = column.cast(pa.int64()).fill_null(now_ms).to_numpy()
    except pa.ArrowInvalid as error:  # an unsigned one that is too large
        raise InvalidRecord(f"column {name!r} is not milliseconds: {error}") from error
    wrong = (moments < 0) | (moments > TIMESTAMP_MS_MAX)
    if wrong.any():
        row = int(wrong.argmax())
        raise InvalidRecord(
            f"row {row} of column {name!r} says {moments[row]} ms, not 0 to {TIMESTAMP_MS_MAX}"
        )
    return moments


def headers_of(column: pa.ChunkedArray, name: str) -> pa.LargeBinaryArray | None:
    """The headers section of each record; None where no record has any.

    Args:
        column: lists of pairs, or maps. Null: no headers.
        name: of the column, for errors.

    Raises:
        InvalidRecord: it holds something else, or a header without a key.
    """
    _check_type(column.type, name)
    if pa.types.is_null(column.type):
        return None
    lists = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_map(lists.type):
        lists = lists.cast(
            pa.list_(pa.struct([("key", lists.type.key_type), ("value", lists.type.item_type)]))
        )
    counts: Integers = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
    if not counts.any():
        return None
    pairs = pc.list_flatten(lists)
    if pa.types.is_null(pairs.type):
        raise InvalidRecord(f"column {name!r} has a header that is null")
    keys = pc.struct_field(pairs, "key").cast(COLUMN)
    values = pc.struct_field(pairs, "value").cast(COLUMN)
    if keys.null_count:
        raise InvalidRecord(f"column {name!r} has a header without a key")
    nothing = pa.scalar(b"", COLUMN)
    each = pc.binary_join_element_wise(
        varints(lengths_of(keys)), keys, varints(lengths_of(values)), pc.fill_null(values, b""), nothing
    )
    bounds = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=bounds[1:])
    joined = pc.binary_join(pa.LargeListArray.from_arrays(pa.array(bounds), each), nothing)
    return pc.binary_join_element_wise(varints(counts), joined, nothing)


def _check_type(kind: Any, name: str) -> None:
    kinds = pa.types
    pair: Any = None
    if kinds.is_null(kind):
        return
    if kinds.is_map(kind):
        pair = kind.key_type, kind.item_type
    elif kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind):
        if kinds.is_null(kind.value_type):  # lists that are all empty
            return
        if kinds.is_struct(kind.value_type) and {field.name for field in kind.value_type} == _NAMES:
            pair = kind.value_type.field("key").type, kind.value_type.field("value").type
    if pair is None or not is_text(pair[0]) or not (is_bytes_or_text(pair[1]) or kinds.is_null(pair[1])):
        raise InvalidRecord(
            f"column {name!r} holds {kind}, and headers are lists of structs of key (text) and value (bytes) "
            "or maps"
        )


def is_text(kind: Any) -> bool:
    """Whether a column of this type holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
