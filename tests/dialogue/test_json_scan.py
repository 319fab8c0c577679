"""JsonScan against Python's json: where objects end, what their members are, and that no sound start is refused."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from isotherm.dialogue.json_scan import JsonScan, object_of

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=5)
TEXTS = st.builds(
    lambda value, ascii_only, indent: json.dumps(value, ensure_ascii=ascii_only, indent=indent),
    OBJECTS,
    st.booleans(),
    st.sampled_from([None, 0, 2]),
)
MUTATIONS = st.text(alphabet='{}[]",:\\u0123e+-.tfn \n\x00', max_size=3)


def refuse(word: str) -> None:
    raise ValueError(word)


def decoded(text: str) -> tuple[Any, int] | None:
    try:
        return json.JSONDecoder(parse_constant=refuse).raw_decode(text)
    except ValueError:
        return None


def scanned(text: str, cuts: list[int]) -> JsonScan:
    scan = JsonScan(0)
    for cut in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
        scan.advance(text[:cut])
    return scan


@given(TEXTS, st.lists(st.integers(0, 200), max_size=5))
def test_a_sound_object_is_read_to_its_end(text: str, cuts: list[int]) -> None:
    scan = scanned(text + "} tail", cuts)
    assert scan.has_ended
    assert scan.end == len(text)
    assert {key: json.loads(value) for key, value in scan.members.items()} == json.loads(text)
    assert object_of(text) == json.loads(text)


@given(TEXTS)
def test_no_start_of_a_sound_object_is_refused(text: str) -> None:
    scan = JsonScan(0)
    for size in range(len(text)):
        scan.advance(text[:size])
        assert not scan.has_failed
        assert not scan.has_ended


@given(TEXTS, st.integers(0, 60), st.integers(0, 4), MUTATIONS)
def test_damaged_objects_end_where_python_ends(text: str, start: int, removed: int, added: str) -> None:
    damaged = "{" + text[1:start] + added + text[start + removed :]
    scan, expected = scanned(damaged, []), decoded(damaged)
    assert scan.has_ended == (expected is not None)
    if expected is not None:
        assert scan.end == expected[1]
    if scan.has_failed:  # then nothing that follows could have helped
        assert decoded(damaged + '"}]}') is None


def test_nesting_and_numbers_have_limits() -> None:
    scan = JsonScan(0)
    scan.advance('{"a":' * 100)
    assert scan.has_failed
    assert object_of('{"a": ' + "1" * 5000 + "}") is None
    assert object_of("[1]") is None
    assert object_of('{"a": 1} x') is None
    assert object_of("") is None
