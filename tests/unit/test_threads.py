"""One thread ahead of another: order, bound, errors, and its end."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import PerturbScopeError
from perturbscope.families.outputs import CELL_EMBEDDING
from perturbscope.inference.batching import BatchLimits
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.encoder import Values
from perturbscope.threads import ahead, checkpoint, in_order, interruptible
from tests.fakes import FakeEncoder

PATIENCE = 60.0


def threads() -> int:
    return sum(thread.name == "perturbscope-ahead" for thread in threading.enumerate())


@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_all_items_in_order(n: int) -> None:
    assert list(ahead(range(n))) == list(range(n))
    assert threads() == 0


def test_the_next_item_is_computed_while_one_is_in_use() -> None:
    second = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        second.set()
        yield 2

    stream = ahead(items())
    assert next(stream) == 1
    assert second.wait(PATIENCE)
    assert list(stream) == [2]


def test_it_is_never_more_than_one_ahead() -> None:
    begun: list[int] = []
    stepped = threading.Semaphore(0)

    def items() -> Iterator[int]:
        for number in range(5):
            begun.append(number)
            stepped.release()
            yield number

    stream = ahead(items())
    for taken in range(5):
        assert next(stream) == taken
        # What may be begun by now: this item, and the next.
        assert stepped.acquire(timeout=PATIENCE)
        assert len(begun) <= taken + 2
    assert next(stream, None) is None


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise LookupError("the third")

    stream = ahead(items())
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(LookupError, match="the third"):
        next(stream)
    assert threads() == 0


def test_closing_it_closes_the_source_first() -> None:
    closed = threading.Event()
    begun: list[int] = []

    def items() -> Iterator[int]:
        try:
            for number in range(1000):
                begun.append(number)
                yield number
        finally:
            closed.set()

    stream = ahead(items())
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert closed.is_set()
    assert len(begun) <= 2
    assert threads() == 0


def test_nothing_is_read_of_what_is_never_asked_for() -> None:
    class Source:
        def __iter__(self) -> Iterator[int]:
            raise AssertionError("read")

    stream = ahead(Source())
    stream.close()  # type: ignore[attr-defined]
    assert threads() == 0


def test_it_keeps_no_item_that_the_caller_has_let_go() -> None:
    class Chunk:
        pass

    def items() -> Iterator[Chunk]:
        for _ in range(3):
            yield Chunk()

    stream = ahead(items())
    for _ in range(3):
        chunk = next(stream)
        held = weakref.ref(chunk)
        del chunk
    assert next(stream, None) is None
    assert held() is None


# The embedder


def overlapping(tiny_bundle: Path, *, overlap: bool) -> Embedder:
    embedder = Embedder.from_bundle(Bundle.open(tiny_bundle), threads=1, limits=BatchLimits(max_cells=3))
    embedder.overlap = overlap
    return embedder


def chunks(cells: CountMatrix) -> Iterator[CountMatrix]:
    return (cells[start : start + 7] for start in range(0, len(cells), 7))


def test_overlapping_changes_no_result(tiny_bundle: Path, tiny_cells: CountMatrix) -> None:
    progress: list[int] = []
    plain = list(overlapping(tiny_bundle, overlap=False).embed_stream(chunks(tiny_cells)))
    found = list(overlapping(tiny_bundle, overlap=True).embed_stream(chunks(tiny_cells), progress=progress.append))
    assert [len(part) for part in found] == [7, 7, 7, 3]
    assert sum(progress) == 24
    for one, other in zip(found, plain, strict=True):
        for name in ("values", "lengths", "n_detected", "known_share"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert set(one.timings) == {"tokenize", "inference"}
    assert threads() == 0


def test_the_next_chunk_is_tokenized_while_one_is_run(tiny_bundle: Path, tiny_cells: CountMatrix) -> None:
    embedder = overlapping(tiny_bundle, overlap=True)
    second = threading.Event()
    encoder = embedder.encoder

    class Waiting(FakeEncoder):
        def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] = (CELL_EMBEDDING,)) -> Values:
            assert second.wait(PATIENCE)
            return encoder.run(inputs)

    def source() -> Iterator[CountMatrix]:
        for number, cells in enumerate(chunks(tiny_cells)):
            if number == 1:
                second.set()
            yield cells

    embedder.encoder = Waiting()
    assert sum(len(part) for part in embedder.embed_stream(source())) == 24


def test_a_bad_chunk_is_an_error_after_the_good_ones(tiny_bundle: Path, tiny_cells: CountMatrix) -> None:
    bad = CountMatrix.from_matrix(np.ones((1, 3)), ["no", "such", "genes"])
    stream = overlapping(tiny_bundle, overlap=True).embed_stream(iter([tiny_cells[:5], bad]))
    assert len(next(stream)) == 5
    with pytest.raises(PerturbScopeError, match="None of the 3 genes is in the model's vocabulary"):
        next(stream)
    assert threads() == 0


def test_only_an_accelerator_overlaps(tiny_bundle: Path) -> None:
    assert not Embedder.from_bundle(Bundle.open(tiny_bundle), threads=1).overlap


def test_a_checkpoint_asks_only_within_its_context() -> None:
    asked: list[int] = []
    checkpoint()
    with interruptible(lambda: asked.append(1)):
        checkpoint()
        with interruptible(lambda: asked.append(2)):
            checkpoint()
        checkpoint()
    checkpoint()
    assert asked == [1, 2, 1]


def test_work_on_all_cores_ends_with_the_error_of_a_checkpoint() -> None:
    begun: list[int] = []

    def over() -> None:
        raise KeyError("over")

    def work(number: int) -> int:
        begun.append(number)
        checkpoint()
        return number

    with interruptible(over), pytest.raises(KeyError, match="over"):
        list(in_order(work, range(10_000)))
    assert len(begun) < 1000
