"""How far a result page is, for who waits for it."""

from __future__ import annotations

from serving.call import Call

STAGES = {
    "receive": 4,
    "decode": 8,
    "tokenize": 4,
    "queue": 0,
    "inference": 34,
    "score_queue": 0,
    "score": 10,
    "degs": 10,
    "compare": 5,
    "map": 12,
    "calibrate": 12,
    "encode": 1,
}
"""Stages of a result page in their order, and about how much of its time each takes, in percent."""


def percent(call: Call) -> int:
    """Return how much of a result page is done, 0 to 100: an estimate, by the stage that it is in."""
    stage, share = call.at
    done = 0.0
    for name, part in STAGES.items():
        if name == stage:
            return min(99, int(done + part * min(max(share, 0.0), 1.0)))
        done += part
    return 0
