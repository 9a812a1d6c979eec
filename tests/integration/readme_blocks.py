"""Read the code blocks of a Markdown file and run them as a reader would: in order, in one folder.

A block marked ``bash`` runs in a shell that stops at the first error, one marked ``python`` in an interpreter of its
own. A comment right before a block leaves it out, and says why: ``<!-- not run: needs four GPUs -->``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

COMMANDS = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
SAME_AS = {"sh": "bash", "shell": "bash", "py": "python"}
FENCE = re.compile(r"^```(?P<language>[A-Za-z]*)[^\n]*\n(?P<code>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^\n]*\S) -->\s*\Z")


class BlockError(AssertionError):
    """A block failed; the message holds its line, code and output."""


@dataclass(frozen=True)
class Block:
    """A fenced block that a reader could run.

    Attributes
    ----------
    line
        Line number of its first line of code.
    language
        ``bash`` or ``python``.
    code
        Text between the fences.
    not_run
        Why it is left out; empty if it is run.
    """

    line: int
    language: str
    code: str
    not_run: str

    def run(self, folder: Path, *, environ: Mapping[str, str], ports: Mapping[int, int], timeout: float) -> str:
        """Run the block in `folder` and return its output; ``localhost:3000`` becomes ``localhost:ports[3000]``."""
        code = self.code
        for documented, port in ports.items():
            code = re.sub(rf"(?<=localhost:|127\.0\.0\.1:){documented}\b", str(port), code)
        try:
            result = subprocess.run(
                [*COMMANDS[self.language], code],
                cwd=folder,
                env={**os.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise BlockError(f"The {self.language} block at line {self.line} ran past {timeout} s:\n{code}") from error
        status, printed = result.returncode, result.stdout
        if status != 0:
            raise BlockError(f"The {self.language} block at line {self.line} ended with {status}:\n{code}\n{printed}")
        return printed


def read_blocks(text: str) -> list[Block]:
    """Return the bash and python blocks of a Markdown text, in order."""
    blocks = []
    for match in FENCE.finditer(text):
        language = SAME_AS.get(match["language"].lower(), match["language"].lower())
        if language in COMMANDS:
            before = NOT_RUN.search(text, 0, match.start())
            line = text.count("\n", 0, match.start()) + 2
            blocks.append(Block(line, language, match["code"], before["reason"] if before else ""))
    return blocks
