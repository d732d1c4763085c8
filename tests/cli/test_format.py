"""How records are printed and how --from is read: tables of what a user may type."""

from __future__ import annotations

import base64
import json

import pytest

from raftlog.cli.consume import Start, Where, parse_start
from raftlog.cli.format import as_json, template, unescape
from raftlog.cli.produce import Line, MissingSeparator, split_lines
from raftlog.errors import ConfigError
from raftlog.record.types import Record

RECORD = Record(
    topic="t",
    partition=3,
    offset=17,
    timestamp_ms=1_357_035_420_000,
    key=b"k\xff",
    value="grün".encode(),
    headers=(("a", b"1"), ("b", None)),
)
BARE = Record(topic="t", partition=0, offset=0, timestamp_ms=0, key=None, value=None, headers=())


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("%p %o %k %v", b"3 17 k\xff gr\xc3\xbcn\n"),
        ("%t@%T", b"t@1357035420000\n"),
        ("%D", b"2013-01-01T10:17:00.000+00:00\n"),
        ("%K/%V", b"2/5\n"),
        ("%h", b"a=1,b=\n"),
        (r"100%%\t%o\x21", b"100%\t17!\n"),
        ("", b"\n"),
    ],
)
def test_template(text: str, printed: bytes) -> None:
    assert template(text)(RECORD) == printed


def test_template_of_a_record_without_key_and_value() -> None:
    assert template("[%k][%v][%K][%V][%h]")(BARE) == b"[][][-1][-1][]\n"


def test_raw_is_the_value_and_nothing_else() -> None:
    assert template("%v", end="")(RECORD) == "grün".encode()


@pytest.mark.parametrize("text", ["%q", "%", r"\q", "%p\\"])
def test_template_refuses_what_it_does_not_know_and_says_what_it_knows(text: str) -> None:
    with pytest.raises(ConfigError, match=r"there are"):
        template(text)


@pytest.mark.parametrize(
    ("text", "data"),
    [("\\t", b"\t"), ("::", b"::"), ("%", b"%"), ("\\x00", b"\0"), ("\\\\", b"\\"), ("ü", b"\xc3\xbc")],
)
def test_unescape(text: str, data: bytes) -> None:
    assert unescape(text) == data


def test_json_keeps_every_byte() -> None:
    line = as_json(RECORD)
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    found = json.loads(line)
    assert found["value"] == "grün"
    assert base64.b64decode(found["key"]["base64"]) == b"k\xff"
    assert found["headers"] == [["a", "1"], ["b", None]]
    assert (found["topic"], found["partition"], found["offset"], found["timestamp_ms"]) == (
        "t",
        3,
        17,
        1357035420000,
    )
    assert json.loads(as_json(BARE))["key"] is None


NOW_MS = 1_700_000_000_000


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("start", Start(Where.START)),
        ("earliest", Start(Where.START)),
        ("end", Start(Where.END)),
        ("latest", Start(Where.END)),
        ("0", Start(Where.OFFSET, 0)),
        ("1234", Start(Where.OFFSET, 1234)),
        ("-5", Start(Where.LAST, 5)),
        ("@1357035420000", Start(Where.TIME, 1_357_035_420_000)),
        ("90s", Start(Where.TIME, NOW_MS - 90_000)),
        ("30m", Start(Where.TIME, NOW_MS - 1_800_000)),
        ("2h", Start(Where.TIME, NOW_MS - 7_200_000)),
        ("1d", Start(Where.TIME, NOW_MS - 86_400_000)),
        ("2013-01-01T10:17:00", Start(Where.TIME, 1_357_035_420_000)),
        ("2013-01-01 10:17:00.250Z", Start(Where.TIME, 1_357_035_420_250)),
        ("2013-01-01T05:17-05:00", Start(Where.TIME, 1_357_035_420_000)),
        ("2013-01-01", Start(Where.TIME, 1_356_998_400_000)),
    ],
)
def test_parse_start(text: str, start: Start) -> None:
    assert parse_start(text, NOW_MS) == start


@pytest.mark.parametrize("text", ["", "nowhere", "1.5", "@", "-", "5w", "2013-13-01"])
def test_parse_start_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="--from"):
        parse_start(text, NOW_MS)


def test_lines_become_records() -> None:
    assert list(split_lines([b"a\n", b"\n", b"last"], None)) == [
        Line(None, b"a"),
        Line(None, b""),
        Line(None, b"last"),
    ]
    assert list(split_lines([b"k:v:w\n", b":\n"], b":")) == [Line(b"k", b"v:w"), Line(b"", b"")]


def test_a_line_without_the_separator_is_named() -> None:
    lines = split_lines([b"k:v\n", b"oops\xff\n"], b":")
    assert next(lines) == Line(b"k", b"v")
    with pytest.raises(MissingSeparator, match=r"line 2 has no ':'"):
        next(lines)
