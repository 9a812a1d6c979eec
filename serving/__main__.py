"""``python -m serving`` starts the server; ``python -m serving keys`` and ``python -m serving healthcheck`` help it."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; without one, serve. Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Each command is imported when it is asked for: a container runs the health check every few seconds.
    match words[:1]:
        case ["healthcheck"]:
            from serving.commands import healthcheck

            return healthcheck.main()
        case ["keys"]:
            from serving.commands import keys

            return keys.main(words[1:])
        case _:
            from serving.commands import serve

            return serve.main(words)


if __name__ == "__main__":
    raise SystemExit(main())
