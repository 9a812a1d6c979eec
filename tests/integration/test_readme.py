"""The README tells the truth: its blocks run, in order, against the service that they talk about."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.readme_blocks import Block, BlockError, read_blocks
from tests.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()

SAMPLE = """
# Sample

```bash
echo 3 > number.txt
```

```python
from pathlib import Path
print(2 * int(Path("number.txt").read_text()), "localhost:3000")
```

Text, and a block that is no program:

```json
{"a": 1}
```

<!-- not run: needs four GPUs -->
```bash
exit 7
```

<!-- a comment -->

```sh
false | true
```
"""


def test_blocks_are_read_in_order_with_their_lines() -> None:
    blocks = read_blocks(SAMPLE)
    assert [(block.language, block.not_run) for block in blocks] == [
        ("bash", ""),
        ("python", ""),
        ("bash", "needs four GPUs"),
        ("bash", ""),
    ]
    lines = SAMPLE.splitlines()
    for block in blocks:
        assert lines[block.line - 1] == block.code.splitlines()[0]


def test_blocks_share_a_folder_and_documented_ports_are_replaced(tmp_path: Path) -> None:
    first, second, *_ = read_blocks(SAMPLE)
    first.run(tmp_path, environ={}, ports={}, timeout=30)
    assert second.run(tmp_path, environ={}, ports={3000: 45678}, timeout=30) == "6 localhost:45678\n"


def test_a_failing_block_names_its_line_and_code(tmp_path: Path) -> None:
    block = read_blocks(SAMPLE)[-1]
    with pytest.raises(BlockError, match=rf"line {block.line} ended with 1:\nfalse"):
        block.run(tmp_path, environ={}, ports={}, timeout=30)


def test_a_block_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(BlockError, match="line 3 ran past"):
        Block(3, "bash", "sleep 60", "").run(tmp_path, environ={}, ports={}, timeout=0.2)


def test_each_block_that_is_left_out_says_why() -> None:
    marks = re.findall(r"<!--\s*not[ -]run.*?-->", README, flags=re.DOTALL)
    reasons = [block.not_run for block in read_blocks(README) if block.not_run]
    assert len(reasons) == len(marks), "a mark is misspelt, or does not stand right before a bash or python block"


def test_the_readme_runs(tmp_path: Path) -> None:
    blocks = [block for block in read_blocks(README) if not block.not_run]
    assert blocks, "the README shows nothing that runs"
    checkout = tmp_path / "perturbscope"
    checkout.mkdir()
    for entry in ROOT.iterdir():  # what the blocks write stays out of the real checkout
        if entry.name not in {".git", "runs", "build", "dist"}:
            (checkout / entry.name).symlink_to(entry)
    environ = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
        "HOME": str(tmp_path),
    }
    with served(tmp_path / "service.log") as ports:
        for block in blocks:
            block.run(checkout, environ=environ, ports=ports, timeout=300)


@contextmanager
def served(log: Path) -> Iterator[dict[int, int]]:
    """The service with the default bundle on free ports: documented port -> real port."""
    ports = dict(zip((3000, 3001), free_ports(2), strict=True))
    environ = {
        **os.environ,
        "PERTURBSCOPE_HOST": "127.0.0.1",
        "PERTURBSCOPE_HTTP_PORT": str(ports[3000]),
        "PERTURBSCOPE_GRPC_PORT": str(ports[3001]),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving"], cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 120
        while not ready(ports[3000]):
            assert process.poll() is None, f"the service ended with {process.returncode}:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"the service was not ready after 120 s:\n{log.read_text()}"
            time.sleep(0.25)
        yield ports
        assert process.poll() is None, f"the service ended with {process.returncode}:\n{log.read_text()}"
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
