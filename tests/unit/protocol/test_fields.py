"""A message with every kind of field, in every format; and what a message cannot be."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, make_dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidInputError, InvalidParameterError
from perturbscope.operations import OPERATIONS
from perturbscope.protocol.descriptors import proto_of
from perturbscope.protocol.fields import Labels, Meta, Vectors
from perturbscope.protocol.operations import Operation
from perturbscope.protocol.tables import form_of
from perturbscope.scoring.results import ScoreOptions
from tests.unit.protocol.messages import same


@dataclass(frozen=True, kw_only=True, eq=False)
class EverythingRequest:
    """A request with every kind of field.

    Attributes
    ----------
    cells
        Raw counts.
    doses, times
        Numbers of each cell.
    kinds
        Label of each cell.
    options
        Options.
    pairs
        Pairs.
    names
        Names.
    name, size, share, is_strict
        Values.
    note, limit, floor, is_quick
        Values that may be absent.
    """

    cells: CountMatrix
    doses: NDArray[np.float32]
    times: NDArray[np.int64] | None = None
    kinds: Labels
    options: ScoreOptions = field(default_factory=ScoreOptions)
    pairs: tuple[tuple[str, str], ...] = ()
    names: tuple[str, ...] | None = None
    name: str
    size: int
    share: float
    is_strict: bool
    note: str | None = None
    limit: int = 5
    floor: float = 0.5
    is_quick: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class EverythingAnswer:
    """An answer with every kind of field.

    Attributes
    ----------
    vectors
        Vectors.
    large, small, wide, narrow, flags
        Numbers of each cell.
    labels
        Names of each cell.
    total, mean, is_done, text, texts
        Values of all cells.
    meta
        The model.
    """

    vectors: Vectors
    large: NDArray[np.int64]
    small: NDArray[np.uint8]
    wide: NDArray[np.float64]
    narrow: NDArray[np.float32]
    flags: NDArray[np.bool_]
    labels: Labels
    total: int
    mean: float
    is_done: bool
    text: str
    texts: tuple[str, ...] = ()
    meta: Meta = field(default_factory=Meta)


EVERYTHING = Operation(
    name="everything", summary="Everything.", request=EverythingRequest, answer=EverythingAnswer, per_cell=True
)


def request_of(cells: CountMatrix, **changes: Any) -> EverythingRequest:
    values: dict[str, Any] = {
        "doses": np.array([0.1, np.nan, 3.0], dtype=np.float32),
        "times": np.array([-1, 0, 2**62], dtype=np.int64),
        "kinds": ("a", "ü", "a"),
        "options": ScoreOptions(seed=4),
        "pairs": (("a", "b"),),
        "names": ("x", "y"),
        "name": "",
        "size": -3,
        "share": 0.1,
        "is_strict": False,
        "note": "n",
        "limit": 0,
        "floor": 0.0,
        "is_quick": False,
    }
    return EverythingRequest(cells=cells[:3], **(values | changes))


ANSWER = EverythingAnswer(
    vectors=np.array([[0.1, 2], [3, 4], [5, 6]], dtype=np.float32),
    large=np.array([-(2**62), 0, 1]),
    small=np.array([0, 1, 255], dtype=np.uint8),
    wide=np.array([0.1, np.nan, -1e300]),
    narrow=np.array([0.1, np.nan, 3], dtype=np.float32),
    flags=np.array([True, False, True]),
    labels=("x", "", "y"),
    total=7,
    mean=0.25,
    is_done=True,
    text="t",
    texts=("a", "b"),
    meta=Meta(model_id="m", timings={"queue": 0.5}, warnings=("one",), provenance={"seed": 3}),
)


def travelled(message: Any, form: str) -> Any:
    what = "request" if type(message).__name__.endswith("Request") else "answer"
    sent = getattr(protocol, f"{what}_to_{form}")(message)
    if form == "proto":
        sent = type(sent).FromString(sent.SerializeToString())
    return getattr(protocol, f"{what}_from_{form}")(type(message), sent)


@pytest.mark.parametrize("form", ["json", "arrow", "proto"])
def test_what_is_written_is_read_back(form: str, tiny_cells: CountMatrix) -> None:
    with OPERATIONS.added(EVERYTHING):
        request = request_of(tiny_cells)
        absent = request_of(tiny_cells, times=None, names=None, note=None, pairs=(), limit=5, floor=0.5, is_quick=True)
        for message in (request, absent, ANSWER):
            assert same(travelled(message, form), message)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"doses": [1, 2]}, "doses"),
        ({"doses": ["1", 2, 3]}, "doses"),
        ({"times": [1.5, 2, 3]}, "times"),
        ({"times": [2**63, 2, 3]}, "times"),
        ({"kinds": ["a"]}, "kinds"),
        ({"pairs": [["a"]]}, "pairs"),
        ({"names": "ab"}, "names"),
        ({"size": 1.0}, "size"),
        ({"size": 2**63}, "size"),
        ({"size": True}, "size"),
        ({"share": "1"}, "share"),
        ({"is_strict": 1}, "is_strict"),
        ({"note": 1}, "note"),
        ({"name": None}, "name"),
    ],
)
def test_bad_values_name_their_field(change: dict[str, Any], name: str, tiny_cells: CountMatrix) -> None:
    body = json.loads(protocol.request_to_json(request_of(tiny_cells))) | change
    with pytest.raises(InvalidInputError) as caught:
        protocol.request_from_json(EverythingRequest, json.dumps(body).encode())
    assert caught.value.field == name


def test_answers_of_parts_are_joined(tiny_cells: CountMatrix) -> None:
    request = request_of(tiny_cells)
    part = EVERYTHING.part(request, 1, 3)
    assert (len(part.cells), part.kinds, part.doses.tolist()[1], part.size) == (2, ("ü", "a"), 3.0, -3)
    meta = replace(ANSWER.meta, timings={"queue": 1.0, "inference": 2.0}, warnings=("two", "one"))
    other = replace(ANSWER, meta=meta)
    whole = EVERYTHING.joined([ANSWER, other])
    assert (EVERYTHING.rows(request), EVERYTHING.rows(whole)) == (3, 6)
    assert whole.labels == ("x", "", "y") * 2
    assert whole.vectors.shape == (6, 2)
    assert whole.meta.timings == {"queue": 1.5, "inference": 2.0}
    assert whole.meta.warnings == ("one", "two")


def test_the_printed_proto_has_every_type() -> None:
    text = proto_of(EVERYTHING)
    for line in (
        "CountMatrix cells = 1;",
        "repeated float doses = 2;",
        "repeated int64 times = 3;",
        "ScoreOptions options = 5;",
        "repeated Pair pairs = 6;",
        "string name = 8;",
        "optional double floor = 14;",
        "EmbeddingMatrix vectors = 1;",
        "repeated bool flags = 6;",
        "Meta meta = 13;",
    ):
        assert f"  {line}\n" in text
    assert "  // Values that may be absent.\n  optional string note = 12;\n" in text


@pytest.mark.parametrize(
    "hint", [dict[str, str], list[str], tuple[int, ...], NDArray[np.str_], str | int, complex, tuple[str, str]]
)
def test_a_type_that_no_message_can_have(hint: Any) -> None:
    message = make_dataclass(
        "Odd", [("odd", hint)], namespace={"__doc__": "An odd one.\n\nAttributes\n----------\nodd\n    Odd."}
    )
    with pytest.raises(TypeError, match=r"Odd.odd has a type that no message can have"):
        form_of(message)


def test_a_field_without_a_sentence() -> None:
    message = make_dataclass("Silent", [("silent", str)], namespace={"__doc__": "A silent one."})
    with pytest.raises(TypeError, match=r"Silent.silent is not described in the docstring of its class"):
        OPERATIONS.add(Operation(name="silent", summary="", request=message, answer=EverythingAnswer))
    assert "silent" not in OPERATIONS


def test_the_table() -> None:
    assert list(OPERATIONS)[:4] == ["embed", "score", "compare", "models"]
    for name in ("Embed", "embed", "count__tokens", "count-tokens", "2d"):
        with pytest.raises(ValueError, match="is taken, or not made of"):
            OPERATIONS.add(replace(EVERYTHING, name=name))
    with OPERATIONS.added(EVERYTHING):
        assert OPERATIONS.of(request_of(CountMatrix.from_matrix([[1], [1], [1]], ["A"]))) is EVERYTHING
        assert (EVERYTHING.path, EVERYTHING.rpc) == ("/v1/everything", "Everything")
    assert "everything" not in OPERATIONS
    with pytest.raises(InvalidParameterError, match="A int is no request; give one of EmbedRequest"):
        OPERATIONS.of(3)
    with pytest.raises(InvalidParameterError, match="everything is answered by a server alone"):
        EVERYTHING.answered(None, None)  # type: ignore[arg-type]


def test_a_message_of_another_meaning_keeps_its_name() -> None:
    message = make_dataclass(
        "Pair", [("a", str)], namespace={"__doc__": "Not a pair.\n\nAttributes\n----------\na\n    One.\n"}
    )
    other = Operation(name="pairing", summary="Pairs.", request=message, answer=EverythingAnswer)
    from perturbscope.protocol.descriptors import file_of

    with pytest.raises(ValueError, match="Pair is a message of"):
        file_of(other)
