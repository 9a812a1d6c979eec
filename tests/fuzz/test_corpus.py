"""A replay of fuzzing: the committed corpus, the seeds, and some seeded mutations of them through every decoder."""

from __future__ import annotations

import warnings
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.seeds import seeds
from tests.fuzz.targets import MUTATORS, TARGETS

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(path for path in CORPUS.glob("*/*") if path.name != "attribute-loop")
"""Inputs that once were findings. (The file that loops has its own test, in tests/unit/serving.)"""
MUTATIONS = {"json": 150, "arrow": 150, "proto": 150, "stream": 200, "kserve": 200, "h5ad": 12}
"""Number of mutations of each seed."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_once_is_refused_or_right(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TARGETS[path.parent.name](path.read_bytes()) is path.name.startswith("accepted")


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_seeds_are_accepted(target: str) -> None:
    for name, data in seeds()[target].items():
        assert TARGETS[target](data), name


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_mutations_are_accepted_or_refused_and_nothing_else(target: str) -> None:
    """Any other exception, and any warning (an overflow, a deprecated cast), fails."""
    accepted = 0
    for name, data in seeds()[target].items():
        mutate = MUTATORS[target](data[0])
        for number in range(MUTATIONS[target]):
            changed = data[:1] + mutate(data[1:], Random(number))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    accepted += TARGETS[target](changed)
                except Exception as error:
                    raise AssertionError(f"{target} {name}, mutation {number}") from error
    assert accepted < MUTATIONS[target] * len(seeds()[target]), "mutations that change nothing test nothing"
