"""``python -m training COMMAND``: prepare data, run the stages of training, measure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import cast

COMMANDS = {
    "download": "fetch a public data set",
    "prepare": "bring a published perturbation data set into the form that fine-tuning reads",
    "census": "list what the filters of a configuration would keep, without reading counts",
    "medians": "compute a vocabulary with the gene medians of a corpus",
    "corpus": "build token shards from raw counts",
    "adopt": "turn published weights into a checkpoint",
    "pretrain": "pre-train a model on a corpus of cells",
    "finetune": "fine-tune a pre-trained model on perturbation data sets",
    "evaluate": "score a pre-trained checkpoint on cells it was not trained on",
    "cost": "estimate what a training run costs",
}
"""Commands, each a module of ``training/commands/``, with one line of help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names. Returns its exit code; 2 for an unknown command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # The deepspeed launcher puts --local_rank=N first; the environment has the same number.
    words = [word for word in words if not word.startswith(("--local_rank=", "--local-rank="))]
    if not words or words[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
        sys.stdout.write(f"usage: python -m training COMMAND [-h] ...\n\n{lines}\n")
        return 0 if words else 2
    if words[0] not in COMMANDS:
        sys.stderr.write(f"error: {words[0]!r} is not a command; the commands are {', '.join(COMMANDS)}.\n")
        return 2
    command = import_module(f"training.commands.{words[0]}")
    sys.argv[0] = f"python -m training {words[0]}"  # the program's name in the help of argparse
    return cast("int", command.main(words[1:]))


if __name__ == "__main__":
    raise SystemExit(main())
