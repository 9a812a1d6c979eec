"""Fuzz the stream target; see :mod:`tests.fuzz._run`."""

from tests.fuzz._run import run

if __name__ == "__main__":
    run("stream")
