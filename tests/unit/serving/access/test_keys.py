"""API keys: good and bad ones, their clocks, and a file of keys that changes under a running server."""

from __future__ import annotations

import hmac
import json
import logging
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

from perturbscope.errors import InvalidParameterError, RateLimitedError, UnauthenticatedError
from serving.access.keys import CLOCK_TOLERANCE, MESSAGE, Key, KeyFile, keys_from_json, keys_to_json, make_key
from serving.access.rates import FAILURES_PER_MINUTE
from serving.commands import keys as command
from serving.telemetry.log import logger


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger=logger.name)
    yield caplog
    logger.removeHandler(caplog.handler)


def write(path: Path, *keys: Key) -> Path:
    """Replace the file at once, as the command does."""
    other = path.with_suffix(".new")
    other.write_bytes(keys_to_json(keys))
    other.replace(path)
    return path


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


def test_a_key_opens_in_either_header_and_says_who_it_is(tmp_path: Path) -> None:
    key, text = make_key("pipeline", rights=("infer", "admin"), requests_per_minute=5, cells_per_minute=7)
    door = KeyFile(write(tmp_path / "keys.json", key))
    for headers in (bearer(text), {"authorization": f"bearer  {text}"}, {"x-api-key": text}):
        caller = door.caller(headers)
        assert (caller.name, sorted(caller.rights)) == ("pipeline", ["admin", "infer"])
        assert (caller.requests_per_minute, caller.cells_per_minute) == (5, 7)
    # A proxy's own credentials do not matter.
    assert door.caller({"authorization": "Basic abc", "x-api-key": text}).name == "pipeline"


def test_whatever_is_wrong_with_a_key_the_answer_is_the_same(tmp_path: Path) -> None:
    (good, text), (off, off_text), (old, old_text) = make_key("a"), make_key("b"), make_key("c")
    door = KeyFile(
        write(tmp_path / "k.json", good, replace(off, disabled=True), replace(old, expires="2001-01-01T00:00:00+00:00"))
    )
    twice = Headers(raw=[(b"x-api-key", text.encode()), (b"x-api-key", text.encode())])
    bad: list[Any] = [
        {},
        bearer(""),
        bearer(text[:-1]),
        bearer(text + "x"),
        bearer(text.upper()),
        bearer(f"psk_{good.id}_{'a' * 43}"),
        bearer(f"psk_00000000_{'a' * 43}"),
        bearer(good.sha256),
        bearer("\u00fc\ud800" * 20),
        bearer(off_text),
        bearer(old_text),
        {"authorization": text},
        {"authorization": f"Basic {text}"},
        {"x-api-key": "a" * 100_000},
        {**bearer(text), "x-api-key": text},
        twice,
    ]
    for headers in bad:
        with pytest.raises(UnauthenticatedError) as refused:
            door.caller(headers)
        assert refused.value.message == MESSAGE
    assert door.caller(bearer(text)).name == "a"


def test_every_key_is_compared_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown id, or no key at all, costs one hash and one comparison of equal lengths, as a known one does."""
    key, text = make_key("a")
    door = KeyFile(write(tmp_path / "k.json", key))
    compared: list[tuple[int, int]] = []

    def compare(a: str, b: str) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert door.caller(bearer(text))
    for headers in ({}, bearer(f"psk_{key.id}_{'a' * 43}"), bearer(f"psk_00000000_{'a' * 43}"), bearer("x")):
        with pytest.raises(UnauthenticatedError):
            door.caller(headers)
    assert compared == [(64, 64)] * 5


def test_a_changed_file_counts_at_once(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    (one, one_text), (two, two_text) = make_key("one"), make_key("two")
    path = write(tmp_path / "k.json", one)
    door = KeyFile(path)
    write(path, one, two)
    assert door.caller(bearer(two_text)).name == "two"
    write(path, replace(one, disabled=True), two)
    with pytest.raises(UnauthenticatedError):
        door.caller(bearer(one_text))
    assert "read again: 2 keys" in logged.text


@pytest.mark.parametrize("damage", [b"", b"{", b'{"keys": 3}', b"\xff" * 10, None], ids=repr)
def test_a_bad_or_missing_new_file_leaves_the_keys_as_they_were(
    tmp_path: Path, logged: pytest.LogCaptureFixture, damage: bytes | None
) -> None:
    (key, text), (other, other_text) = make_key("a"), make_key("b")
    path = write(tmp_path / "k.json", key)
    door = KeyFile(path)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    for _ in range(3):
        assert door.caller(bearer(text)).name == "a"
    assert [record.levelname for record in logged.records] == ["ERROR"]  # said once, not at every request
    assert "the 1 keys before stay" in logged.text
    write(path, other)
    assert door.caller(bearer(other_text)).name == "b"
    with pytest.raises(UnauthenticatedError):
        door.caller(bearer(text))


def test_a_server_does_not_start_without_its_keys(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="cannot be read"):
        KeyFile(tmp_path / "none.json")
    (tmp_path / "large.json").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(InvalidParameterError, match="larger than"):
        KeyFile(tmp_path / "large.json")


def test_an_empty_file_of_keys_lets_nobody_in(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    door = KeyFile(write(tmp_path / "k.json"))
    with pytest.raises(UnauthenticatedError):
        door.caller({})
    assert "nobody can get in" in logged.text


def test_a_key_ends_by_either_clock(tmp_path: Path) -> None:
    wall, monotonic = Clock(1_800_000_000.0), Clock(5.0)
    key, text = make_key("a", expires="2027-01-15T09:00:00+00:00")
    assert key.expires_at == wall.now + 3600
    door = KeyFile(write(tmp_path / "k.json", key), wall=wall, monotonic=monotonic)
    assert door.caller(bearer(text))
    wall.now += 3600
    with pytest.raises(UnauthenticatedError):
        door.caller(bearer(text))
    wall.now -= 3600  # set forward by mistake, and put right
    assert door.caller(bearer(text))
    # An hour passes while the wall clock is set back again and again.
    monotonic.now += 3600 + CLOCK_TOLERANCE - 1
    assert door.caller(bearer(text))
    monotonic.now += 1
    with pytest.raises(UnauthenticatedError):
        door.caller(bearer(text))
    for now in (0.0, -1e18, 1e18, float("inf")):
        wall.now = now
        with pytest.raises(UnauthenticatedError):
            door.caller(bearer(text))


def test_a_key_never_stands_in_the_log(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    key, text = make_key("pipeline", expires="2001-01-01T00:00:00+00:00")
    door = KeyFile(write(tmp_path / "k.json", key))
    for headers in (bearer(text), bearer(text + "x"), {"x-api-key": text[:-1]}):
        with pytest.raises(UnauthenticatedError) as refused:
            door.caller(headers, "10.0.0.1")
        assert text[:-1] not in repr(refused.value)
    assert "key refused: expired key=pipeline" in logged.text
    assert "peer=10.0.0.1" in logged.text
    assert text[13:33] not in logged.text
    assert key.sha256 not in logged.text


def test_bad_keys_of_one_address_are_slowed_down_and_good_ones_are_not(
    tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    key, text = make_key("a")
    door = KeyFile(write(tmp_path / "k.json", key), monotonic=Clock(0.0))
    for _ in range(FAILURES_PER_MINUTE):
        with pytest.raises(UnauthenticatedError):
            door.caller({}, "10.0.0.1")
    lines = len(logged.records)
    with pytest.raises(RateLimitedError) as refused:
        door.caller({}, "10.0.0.1")
    assert 0 < refused.value.retry_after <= 60
    assert len(logged.records) == lines  # the log does not grow with it
    assert door.caller(bearer(text), "10.0.0.1").name == "a"  # behind one proxy, one bad caller harms no other
    with pytest.raises(UnauthenticatedError):
        door.caller({}, "10.0.0.2")


GOOD = {"id": "0123abcd", "name": "a", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": "x"}, "eight hexadecimal"),
        ({"id": 5}, "eight hexadecimal"),
        ({"name": "a b"}, "the name"),
        ({"name": "a\nb"}, "the name"),
        ({"sha256": "abc"}, "sha256"),
        ({"rights": []}, "rights"),
        ({"rights": ["root"]}, "rights"),
        ({"rights": "infer"}, "a list of words"),
        ({"expires": "soon"}, "give a time"),
        ({"expires": 5}, "give a time"),
        ({"expires": "2027-01-01T00:00:00"}, "without a time zone"),
        ({"expire": "2027-01-01T00:00:00+00:00"}, "unknown field 'expire'"),
        ({"cells_per_minute": 0}, "above 0"),
        ({"requests_per_minute": True}, "above 0"),
        ({"disabled": "no"}, "true or false"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_slip_in_the_file_is_an_error_and_never_a_key_that_does_more(change: dict[str, Any], said: str) -> None:
    assert len(keys_from_json(json.dumps({"keys": [GOOD]}).encode())) == 1
    with pytest.raises(InvalidParameterError, match=said):
        keys_from_json(json.dumps({"keys": [GOOD | change]}).encode())


def test_missing_and_double_entries_are_errors() -> None:
    with pytest.raises(InvalidParameterError, match="missing"):
        keys_from_json(b'{"keys": [{"id": "0123abcd"}]}')
    with pytest.raises(InvalidParameterError, match="same id"):
        keys_from_json(json.dumps({"keys": [GOOD, GOOD]}).encode())


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = command.main(arguments)
    found = capsys.readouterr()
    return code, found.out.strip(), found.err


def test_the_command_makes_lists_rotates_and_revokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    made = ["--file", str(path), "--name", "pipeline", "--right", "infer", "--right", "metrics"]
    code, text, said = run(capsys, "add", *made, "--expires", "2999-01-31", "--cells-per-minute", "1000")
    assert code == 0
    assert "shown once" in said
    assert text not in said
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert text.encode() not in path.read_bytes()
    door = KeyFile(path)
    caller = door.caller(bearer(text))
    assert (caller.name, sorted(caller.rights), caller.cells_per_minute) == ("pipeline", ["infer", "metrics"], 1000)

    code, listing, _ = run(capsys, "list", "--file", str(path))
    assert code == 0
    assert "pipeline  good  infer,metrics  expires 2999-02-01T00:00:00+00:00" in listing
    assert text[13:] not in listing

    code, new_text, said = run(capsys, "rotate", "--file", str(path), "pipeline")
    assert code == 0
    assert "good until" in said
    assert door.caller(bearer(new_text)) == door.caller(bearer(text))  # both, for a day

    assert run(capsys, "revoke", "--file", str(path), text.split("_")[1])[0] == 0
    with pytest.raises(UnauthenticatedError):
        door.caller(bearer(text))
    assert door.caller(bearer(new_text)).name == "pipeline"
    assert "revoked" in run(capsys, "list", "--file", str(path))[1]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["keys.json"]


def test_the_command_says_what_is_wrong_and_leaves_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    run(capsys, "add", "--file", str(path), "--name", "a")
    before = path.read_bytes()
    for arguments, said in (
        (["add", "--file", str(path), "--name", "a b"], "the name 'a b'"),
        (["add", "--file", str(path), "--name", "b", "--expires", "soon"], "no date"),
        (["revoke", "--file", str(path), "nobody"], "no key with the id or name 'nobody'"),
        (["rotate", "--file", str(path), "nobody"], "no good key"),
        (["list", "--file", str(tmp_path / "none.json")], "cannot be read"),
        (["add", "--file", str(tmp_path / "none" / "k.json"), "--name", "a"], "no directory"),
    ):
        code, _, error = run(capsys, *arguments)
        assert code == 2
        assert said in error
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["keys.json"]
