"""The loop of atheris around one target; run by the scripts ``fuzz_<target>.py``.

    python -m tests.fuzz.fuzz_arrow CORPUS -max_total_time=300

CORPUS is a folder of inputs that grows; ``python -m tests.fuzz.seeds CORPORA`` writes a first one for every target.
Options are those of libFuzzer. Half of the mutations are libFuzzer's own, the others know the format. Needs the
packages of requirements/fuzz.txt.
"""

from __future__ import annotations

import sys
from random import Random


def run(name: str) -> None:
    """Fuzz a target until libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["perturbscope", "serving", "anndata"]):
        from tests.fuzz.targets import MUTATORS, TARGETS

    def once(data: bytes) -> None:
        TARGETS[name](data)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = Random(seed)
        if len(data) < 2 or rng.random() < 0.5:
            return bytes(atheris.Mutate(data, max_size))
        return (data[:1] + MUTATORS[name](data[0])(data[1:], rng))[:max_size]

    atheris.Setup(sys.argv, once, custom_mutator=mutate)
    atheris.Fuzz()
