"""Reference tables that the library ships; each file names its sources."""

from __future__ import annotations

import gzip
from importlib import resources


def read_text(name: str) -> str:
    """Read a gzipped table of this folder."""
    return gzip.decompress(resources.files(__name__).joinpath(name).read_bytes()).decode()
