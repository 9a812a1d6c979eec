"""The one table of operations: what can be asked of a model, or of a server.

From an operation's request and answer, two dataclasses (:mod:`perturbscope.protocol.fields`), follow JSON, Arrow and
protobuf, the route and the gRPC method, the parameters of an uploaded file, the methods of all clients, the command and
the reference page. A further operation is a module in :mod:`perturbscope.operations`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import numpy as np

from perturbscope.errors import InvalidParameterError, UnsupportedOperationError
from perturbscope.inference.embeddings import Embeddings, join
from perturbscope.protocol import checks as check
from perturbscope.protocol.fields import PER_ROW, Field, Form
from perturbscope.protocol.messages import (
    CompareAnswer,
    CompareRequest,
    EmbedRequest,
    ModelsAnswer,
    ModelsRequest,
    ScoreAnswer,
    ScoreRequest,
)
from perturbscope.protocol.tables import form_of

if TYPE_CHECKING:
    from perturbscope.inference.embedder import Embedder
    from perturbscope.scoring.cost import Cost

Q = TypeVar("Q")
A = TypeVar("A")


@dataclass(frozen=True, kw_only=True, eq=False)
class Operation(Generic[Q, A]):
    """One thing that can be asked.

    Attributes
    ----------
    name
        Words joined by underscores: the last part of the HTTP path, the method of the clients, and, with hyphens, the
        command.
    summary
        Sentence about it.
    request, answer
        Dataclasses of the request and of the answer.
    run
        Answers a request with a model. It is called where the model is: in the process that loaded a bundle, or on a
        server, there with a model whose tokenizing and inference go through the server's queue. None: only a server can
        answer.
    capability
        What the model must be able to do.
    per_cell
        Whether each row of the answer follows from one cell alone, so that clients may divide a request and join the
        answers.
    cost
        Estimates the cost of a request that computes long and does not run the model. A server refuses what costs too
        much, charges the rest to its caller, and lets it take turns with scores: such a function calls
        :func:`perturbscope.threads.checkpoint`.
    """

    name: str
    summary: str
    request: type[Q]
    answer: type[A]
    run: Callable[[Embedder, Q], A] | None = None
    capability: str = "embed"
    per_cell: bool = False
    cost: Callable[[Q], Cost] | None = None

    def answered(self, model: Embedder, request: Q) -> A:
        """Answer a request with a model.

        Raises
        ------
        InvalidParameterError
            Only a server can answer it.
        """
        if self.run is None:
            raise InvalidParameterError(f"{self.name} is answered by a server alone; load its URL.")
        return self.run(model, request)

    def asked(self, *values: Any, **fields: Any) -> Q:
        """Return a request; values without a name are its fields in their order, and lists may stand for tuples.

        Raises
        ------
        TypeError
            There is no such field, or a required one is missing.
        InvalidInputError
            The values do not go together.
        """
        named = dict(zip(self.takes.names, values, strict=False)) | fields
        for item in self.takes.of("labels", "texts", "names", "pairs"):
            if isinstance(named.get(item.name), list):
                named[item.name] = check.READERS[item.kind](named[item.name], item.name)
        found: Q = self.takes.make(**named)
        return found

    def rows(self, message: Any) -> int:
        """Return the number of rows of a request or answer; 0 if it has none."""
        form = self.takes if isinstance(message, self.request) else self.gives
        values = form.take(message)
        return max((len(values[item.name]) for item in _rowed(form) if values[item.name] is not None), default=0)

    def part(self, request: Q, start: int, stop: int) -> Q:
        """Return the request for some rows alone."""
        values = {item.name: getattr(request, item.name) for item in _rowed(self.takes)}
        cut = {name: value[start:stop] for name, value in values.items() if value is not None}
        return cast("Q", replace(cast("Any", request), **cut))

    def joined(self, answers: Sequence[A]) -> A:
        """Join the answers to the parts of a request; seconds are added up, and a warning is said once."""
        if self.answer is Embeddings:
            return cast("A", join(cast("list[Embeddings]", list(answers))))
        values = dict(self.gives.take(answers[0]))
        for item in self.gives.fields:
            parts = [self.gives.take(answer)[item.name] for answer in answers]
            if item.kind in PER_ROW and parts[0] is not None:
                values[item.name] = tuple(chain(*parts)) if item.kind == "labels" else np.concatenate(parts)
            elif item.kind == "meta":
                seconds = Counter[str]()
                for meta in parts:
                    seconds.update(meta.timings)
                warnings = tuple(dict.fromkeys(warning for meta in parts for warning in meta.warnings))
                values[item.name] = replace(parts[0], timings=dict(seconds), warnings=warnings)
        found: A = self.gives.make(**values)
        return found

    @property
    def path(self) -> str:
        """HTTP path: ``/v1/count_tokens``."""
        return f"/v1/{self.name}"

    @property
    def rpc(self) -> str:
        """The name in the words of gRPC: ``CountTokens``."""
        return "".join(word.capitalize() for word in self.name.split("_"))

    @property
    def has_body(self) -> bool:
        """Whether it takes something; over HTTP, GET asks for one that does not."""
        return bool(self.takes.fields)

    @property
    def has_arrow(self) -> bool:
        """Whether its answer travels as Arrow too, which has no rows of mixed texts and lists."""
        return not self.gives.of("records")

    @property
    def takes(self) -> Form:
        """Form of the request."""
        return form_of(self.request)

    @property
    def gives(self) -> Form:
        """Form of the answer."""
        return form_of(self.answer)


def _rowed(form: Form) -> tuple[Field, ...]:
    return form.of("cells", *PER_ROW)


class Operations(Mapping[str, Operation[Any, Any]]):
    """Operations by name, in the order in which they were added."""

    def __init__(self) -> None:
        self._found: dict[str, Operation[Any, Any]] = {}

    def __getitem__(self, name: str) -> Operation[Any, Any]:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def add(self, operation: Operation[Any, Any]) -> None:
        """Add an operation.

        Raises
        ------
        ValueError
            Its name is taken, or not made of lower-case words and underscores.
        TypeError
            A field of its messages has a type that no message can have, or is not described.
        """
        if not re.fullmatch(r"[a-z]+(_[a-z]+)*", operation.name) or operation.name in self._found:
            raise ValueError(f"{operation.name!r} is taken, or not made of lower-case words joined by underscores")
        _ = operation.takes, operation.gives
        self._found[operation.name] = operation

    @contextmanager
    def added(self, operation: Operation[Any, Any]) -> Iterator[None]:
        """Add an operation, and remove it again at the end: for tests."""
        self.add(operation)
        try:
            yield
        finally:
            del self._found[operation.name]

    def named(self, name: str) -> Operation[Any, Any]:
        """Return the operation of a name that a caller gave.

        Raises
        ------
        InvalidParameterError
            There is none; the message lists those that there are.
        """
        if name not in self._found:
            raise InvalidParameterError(f"There is no operation {name[:60]!r}; there are {', '.join(self)}.")
        return self._found[name]

    def of(self, request: Any) -> Operation[Any, Any]:
        """Return the operation that a request asks for.

        Raises
        ------
        InvalidParameterError
            It is not a request of any.
        """
        for operation in self._found.values():
            if operation.request is type(request):
                return operation
        kinds = ", ".join(operation.request.__name__ for operation in self._found.values())
        raise InvalidParameterError(f"A {type(request).__name__} is no request; give one of {kinds}.")


def check_capability(
    operation: Operation[Any, Any], name: str, capabilities: Sequence[str], able: Sequence[str] | None = None
) -> None:
    """Refuse what a model cannot do, before it costs anything.

    Parameters
    ----------
    operation
        Operation that is asked.
    name
        Name of the model.
    capabilities
        What it can do.
    able
        Models of the server that can do what is asked; None: there is no server.

    Raises
    ------
    UnsupportedOperationError
        The message says what the model can do, and which models of the server can do what is asked.
    """
    if operation.capability in capabilities:
        return
    remedy = f"Name one of the models that can: {', '.join(able)}." if able else "No model of this server can."
    can = ", ".join(capabilities)
    raise UnsupportedOperationError(
        f"{operation.name} needs the capability {operation.capability!r}, and the model {name} has {can}. "
        f"{'Load a model that can.' if able is None else remedy}",
        field="model",
    )


def _embed(model: Embedder, request: EmbedRequest) -> Embeddings:
    return model.embed(request.cells)


EMBED = Operation(
    name="embed", summary="Vectors of cells.", request=EmbedRequest, answer=Embeddings, run=_embed, per_cell=True
)
SCORE = Operation(
    name="score",
    summary="How far each perturbation moved its cells from control.",
    request=ScoreRequest,
    answer=ScoreAnswer,
)
COMPARE = Operation(
    name="compare",
    summary="How far perturbations lie from each other.",
    request=CompareRequest,
    answer=CompareAnswer,
)
MODELS = Operation(
    name="models",
    summary="The models that are served; the first is the default.",
    request=ModelsRequest,
    answer=ModelsAnswer,
)
OPERATIONS = Operations()
"""The table."""
for _operation in (EMBED, SCORE, COMPARE, MODELS):
    OPERATIONS.add(_operation)
