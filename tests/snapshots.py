"""Snapshots of what clients rely on, kept beside the tests that compare them with the present."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def renew(path: Path, new: Any, broken: Callable[[Any, Any], Sequence[str]]) -> int:
    """Write a snapshot, and print the changes that break clients of the one before; 1 if there are any."""
    changes = broken(json.loads(path.read_text()), new) if path.exists() else []
    path.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n")
    sys.stdout.write("".join(f"breaks clients: {change}\n" for change in changes) + f"wrote {path}\n")
    return bool(changes)
