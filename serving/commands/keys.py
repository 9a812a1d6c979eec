"""``python -m serving keys``: make, list, rotate and revoke API keys. A running server notices by itself."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

from perturbscope.errors import InvalidParameterError
from serving.access.keys import Key, keys_to_json, make_key, read_keys
from serving.call import Right

GRACE_HOURS = 24
"""Default of the hours that a key stays good beside the one that replaces it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, or 2 for a bad option or file."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except InvalidParameterError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 2
    return 0


def add(options: argparse.Namespace) -> None:
    """Make a key and print it, once."""
    with edited(options.file, create=True) as keys:
        key, text = make_key(
            options.name,
            rights=tuple(dict.fromkeys(options.right or ["infer"])),
            expires=_time(options.expires),
            requests_per_minute=options.requests_per_minute,
            cells_per_minute=options.cells_per_minute,
        )
        keys.append(key)
    _print_once(key, text)


def list_keys(options: argparse.Namespace) -> None:
    """Print the entry of each key; the key itself is not known."""
    now = datetime.now(UTC).timestamp()
    for key in read_keys(options.file):
        state = "revoked" if key.disabled else "expired" if key.expires_at <= now else "good"
        share = f"{key.requests_per_minute or '-'} requests/min {key.cells_per_minute or '-'} cells/min"
        sys.stdout.write(
            f"{key.id}  {key.name}  {state}  {','.join(key.rights)}  expires {key.expires or 'never'}  {share}\n"
        )


def revoke(options: argparse.Namespace) -> None:
    """Revoke a key by its id, or all keys of a name."""
    with edited(options.file) as keys:
        matches = [i for i, key in enumerate(keys) if options.key in (key.id, key.name)]
        if not matches:
            raise InvalidParameterError(f"{options.file} has no key with the id or name {options.key!r}.")
        for i in matches:
            keys[i] = replace(keys[i], disabled=True)
    sys.stdout.write("".join(f"revoked {keys[i].id} ({keys[i].name})\n" for i in matches))


def rotate(options: argparse.Namespace) -> None:
    """Make a successor with the same name, rights and limits; the old key expires after the grace."""
    with edited(options.file) as keys:
        matches = [i for i, key in enumerate(keys) if options.key in (key.id, key.name) and not key.disabled]
        if not matches:
            raise InvalidParameterError(f"{options.file} has no good key with the id or name {options.key!r}.")
        old = keys[matches[-1]]
        end = datetime.now(UTC) + timedelta(hours=options.grace_hours)
        for i in matches:
            if keys[i].expires_at > end.timestamp():
                keys[i] = replace(keys[i], expires=end.isoformat(timespec="seconds"))
        key, text = make_key(
            old.name,
            rights=old.rights,
            expires=_time(options.expires),
            requests_per_minute=old.requests_per_minute,
            cells_per_minute=old.cells_per_minute,
        )
        keys.append(key)
    _print_once(key, text)
    sys.stderr.write(f"The old key of {old.name} is good until {end.isoformat(timespec='seconds')}.\n")


@contextlib.contextmanager
def edited(path: Path, *, create: bool = False) -> Iterator[list[Key]]:
    """Edit the keys of a file, which is then replaced whole: readers see the old file or the new one; editors queue."""
    folder = os.open(path.parent, os.O_RDONLY) if path.parent.is_dir() else None
    if folder is None:
        raise InvalidParameterError(f"{path.parent} is no directory.", field="file")
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = [] if create and not path.exists() else list(read_keys(path))
        yield keys
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            try:
                # A temporary file has mode 0600. The owner stays, or the server could not read it.
                if path.exists() and os.geteuid() == 0:
                    os.fchown(file.fileno(), path.stat().st_uid, path.stat().st_gid)
                file.write(keys_to_json(tuple(keys)))
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    finally:
        os.close(folder)


def _print_once(key: Key, text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stderr.write(f"This is the key of {key.name} (id {key.id}). It is shown once and stored nowhere.\n")


def _time(text: str | None) -> str | None:
    """Parse a time, or a date, which means the end of that day in UTC."""
    if text is None:
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidParameterError(f"--expires {text!r} is no date; give 2027-01-31.", field="expires") from error
    if len(text) <= len("2027-01-31"):
        when += timedelta(days=1)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).isoformat(timespec="seconds")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serving keys", description="API keys of a PerturbScope server.")
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        options = commands.add_parser(name, help=text, description=text)
        options.add_argument("--file", type=Path, required=True, help="file of keys (PERTURBSCOPE_KEYS of the server)")
        options.set_defaults(run=run)
        return options

    options = command("add", add, "Make a key; it is printed once.")
    options.add_argument("--name", required=True, help="name of the caller, for the log")
    options.add_argument("--right", action="append", choices=get_args(Right), help="repeatable; default infer")
    options.add_argument("--expires", metavar="DATE", help="last day, such as 2027-01-31, or a time with zone")
    options.add_argument("--requests-per-minute", type=int, metavar="N")
    options.add_argument("--cells-per-minute", type=int, metavar="N")
    command("list", list_keys, "Show the keys' ids, names, rights and ends.")
    for name, run, text in (
        ("revoke", revoke, "End a key at once."),
        ("rotate", rotate, "Make a successor of a key; the old one stays good for a while."),
    ):
        options = command(name, run, text)
        options.add_argument("key", metavar="ID_OR_NAME")
        if name == "rotate":
            options.add_argument("--grace-hours", type=float, default=GRACE_HOURS, help="default %(default)s")
            options.add_argument("--expires", metavar="DATE", help="last day of the new key")
    return parser
