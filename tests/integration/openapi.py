"""A check of the OpenAPI document: schemathesis, with all its checks, against a server that asks for keys.

``python -m tests.integration.openapi --max-examples 200`` runs it for longer than the tests do.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from serving.access.rates import FailedKeys
from tests.integration.in_process import Running, running

CONFIG = Path(__file__).with_name("schemathesis.toml")


def check(server: Running, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run schemathesis in its own folder; return its exit status, 0 if the document is true."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli"),
        *("--config-file", str(CONFIG)),
        *("run", f"http://{server.http}/v1/openapi.json"),
        *("--header", f"Authorization: Bearer {server.admin}"),
        *("--checks", "all", "--generation-database", "none"),
        *options,
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(CONFIG.parents[2]),
        "SCHEMATHESIS_HOOKS": "tests.integration.schemathesis_hooks",
    }
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)


def main(options: Sequence[str]) -> int:
    """Start a server, check its document, and print the findings."""
    with tempfile.TemporaryDirectory() as folder, patient_with_bad_keys(), running(Path(folder)) as server:
        done = check(server, Path(folder), *options)
    sys.stdout.write(done.stdout + done.stderr)
    return done.returncode


def patient_with_bad_keys() -> contextlib.AbstractContextManager[object]:
    """Lift the rate of failed keys for servers that start within: the checks of authentication send many."""
    return mock.patch("serving.access.keys.FailedKeys", functools.partial(FailedKeys, 10**9))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
