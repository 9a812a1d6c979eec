"""The one table of operations: what can be asked of a model, or of a server.

From an operation's request and answer, two dataclasses (:mod:`perturbscope.protocol.fields`), follow JSON, Arrow and
protobuf, the route and the gRPC method, the parameters of an uploaded file, the methods of all clients, the command and
the reference page. A further operation is a module in :mod:`perturbscope.operations`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from perturbscope.errors import InvalidParameterError
from perturbscope.inference.embeddings import Embeddings
from perturbscope.protocol.fields import Form
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
    """

    name: str
    summary: str
    request: type[Q]
    answer: type[A]
    run: Callable[[Embedder, Q], A] | None = None
    capability: str = "embed"

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


def _embed(model: Embedder, request: EmbedRequest) -> Embeddings:
    return model.embed(request.cells)


EMBED = Operation(name="embed", summary="Vectors of cells.", request=EmbedRequest, answer=Embeddings, run=_embed)
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
