"""All errors that PerturbScope raises on purpose.

The tree::

    PerturbScopeError
    ├── InvalidInputError                 the caller's data or parameters; never retried
    │   ├── NotRawCountsError             negative, fractional, NaN or log-normalised values
    │   ├── MalformedMatrixError          ragged CSR, wrong dtype, shapes that disagree
    │   ├── EmptyCellError                a cell without counts, or without a known gene
    │   ├── UnknownGenesError             no or too few genes of the vocabulary
    │   ├── DuplicateGenesError           one gene identifier names two columns
    │   ├── MissingColumnError            a label, batch or gene column that does not exist
    │   ├── ControlLabelMissingError      no cell carries the control label
    │   ├── TooFewCellsError              a group with fewer cells than the minimum
    │   ├── TooFewControlsError           fewer control cells than the minimum
    │   ├── InvalidEmbeddingError         NaN, infinite or all-zero vectors
    │   ├── InvalidParameterError         an option outside its range
    │   ├── UnsupportedMediaTypeError     a body of a content type that the server does not read
    │   └── UnreadableFileError           truncated, or of another format
    ├── LimitExceededError                the request is larger than the server allows
    ├── UnauthenticatedError              no API key, or one that is unknown, expired or revoked
    ├── PermissionDeniedError             the API key is good, but not for this
    ├── UnknownModelError                 the server has no such model
    ├── UnsupportedOperationError         the model cannot do what is asked
    ├── BundleError
    │   ├── CorruptBundleError            a file is missing or its checksum differs
    │   ├── UnsupportedBundleError        newer format, or unknown family
    │   ├── VocabularyMismatchError       tokens of one vocabulary, weights of another
    │   ├── GoldenMismatchError           the model gives other vectors here than at export
    │   └── UntrustedBundleError          no trusted signer vouches for it, where one is required
    ├── ProviderUnavailableError          an accelerator was asked for and is not available
    ├── InferenceError                    the model's forward pass failed
    ├── SolverError                       optimal transport did not converge
    ├── OverloadedError                   the queue is full; retry after ``retry_after`` seconds
    │   └── RateLimitedError              this API key has used up its share for now
    ├── DeadlineExceededError             the caller's own time ran out; not retried
    ├── ServerUnreachableError            no answer from the server
    └── ServerError                       the server failed without an explanation

Each class has a stable ``code``: the same string in Python, on the command line, over HTTP and
over gRPC. A message names the fault and its place, the limit, and the remedy.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Iterable
from heapq import nlargest
from typing import ClassVar


class PerturbScopeError(Exception):
    """Base class of all errors raised on purpose.

    Parameters
    ----------
    message
        Description of the fault, its place, the limit and the remedy.
    field
        Name of the parameter, column or request field at fault, or None.
    """

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field

    def to_dict(self) -> dict[str, str | None]:
        """Return the wire form: ``{"code", "message", "field"}``."""
        return {"code": self.code, "message": self.message, "field": self.field}


class InvalidInputError(PerturbScopeError):
    """The caller's data or parameters cannot be used."""

    code = "invalid_input"


class NotRawCountsError(InvalidInputError):
    """Values are not raw counts: they are negative, fractional, NaN or infinite."""

    code = "not_raw_counts"


class MalformedMatrixError(InvalidInputError):
    """The matrix does not describe cells x genes."""

    code = "malformed_matrix"


class EmptyCellError(InvalidInputError):
    """A cell has no counts, or none in the model's vocabulary."""

    code = "empty_cell"


class UnknownGenesError(InvalidInputError):
    """None, or too few, of the genes are in the model's vocabulary."""

    code = "unknown_genes"


class DuplicateGenesError(InvalidInputError):
    """The same gene identifier names more than one column."""

    code = "duplicate_genes"


class MissingColumnError(InvalidInputError):
    """A column that was asked for does not exist."""

    code = "missing_column"


class ControlLabelMissingError(InvalidInputError):
    """No cell carries the control label."""

    code = "control_label_missing"


class TooFewCellsError(InvalidInputError):
    """A group has fewer cells than the statistic needs."""

    code = "too_few_cells"


class TooFewControlsError(InvalidInputError):
    """There are fewer control cells than the statistic needs."""

    code = "too_few_controls"


class InvalidEmbeddingError(InvalidInputError):
    """Embeddings have NaN, infinite or all-zero rows."""

    code = "invalid_embedding"


class InvalidParameterError(InvalidInputError):
    """An option has a value outside its range."""

    code = "invalid_parameter"


class UnsupportedMediaTypeError(InvalidInputError):
    """A body has a content type that the server does not read."""

    code = "unsupported_media_type"


class UnreadableFileError(InvalidInputError):
    """A file is missing, truncated, or not of the format that its reader expects."""

    code = "unreadable_file"


class LimitExceededError(PerturbScopeError):
    """The request is larger than the server allows."""

    code = "limit_exceeded"


class UnauthenticatedError(PerturbScopeError):
    """The server requires an API key, and got none that it knows."""

    code = "unauthenticated"


class PermissionDeniedError(PerturbScopeError):
    """The API key does not have the right that the request needs."""

    code = "permission_denied"


class UnknownModelError(PerturbScopeError):
    """No model of that name is loaded."""

    code = "unknown_model"


class UnsupportedOperationError(PerturbScopeError):
    """The model cannot do what is asked of it."""

    code = "unsupported_operation"


class BundleError(PerturbScopeError):
    """A bundle cannot be used."""

    code = "bundle"


class CorruptBundleError(BundleError):
    """A file of the bundle is missing, or differs from its checksum."""

    code = "corrupt_bundle"


class UnsupportedBundleError(BundleError):
    """The bundle needs a newer PerturbScope, or a family that is not installed."""

    code = "unsupported_bundle"


class VocabularyMismatchError(BundleError):
    """Two parts were made with different vocabularies."""

    code = "vocab_mismatch"


class GoldenMismatchError(BundleError):
    """The model does not give the vectors that its bundle records, on this machine and with this tokenizer."""

    code = "golden_mismatch"


class UntrustedBundleError(BundleError):
    """A signature is required, and the bundle has none of a trusted signer."""

    code = "untrusted_bundle"


class ProviderUnavailableError(PerturbScopeError):
    """The execution provider that was asked for could not be used."""

    code = "provider_unavailable"


class InferenceError(PerturbScopeError):
    """The model's forward pass failed."""

    code = "inference_failed"


class SolverError(PerturbScopeError):
    """A numerical solver stopped before it converged."""

    code = "solver_failed"


class OverloadedError(PerturbScopeError):
    """The queue is full.

    Parameters
    ----------
    message
        Name of the queue that is full, and its limit.
    retry_after
        Seconds after which a retry is worthwhile.
    """

    code = "overloaded"

    def __init__(self, message: str, *, retry_after: float = 1.0, field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.retry_after = retry_after


class RateLimitedError(OverloadedError):
    """An API key asked for more than its share; there is room again after ``retry_after`` seconds."""

    code = "rate_limited"


class DeadlineExceededError(PerturbScopeError):
    """The caller's time limit has passed, or would pass before the answer is ready."""

    code = "deadline_exceeded"


class ServerUnreachableError(PerturbScopeError):
    """The server did not answer."""

    code = "server_unreachable"


class ServerError(PerturbScopeError):
    """The server failed without an explanation that this client knows."""

    code = "server_error"


def error_classes() -> dict[str, type[PerturbScopeError]]:
    """Return all classes of the tree by ``code``."""
    classes: dict[str, type[PerturbScopeError]] = {}
    pending: list[type[PerturbScopeError]] = [PerturbScopeError]
    while pending:
        cls = pending.pop()
        classes[cls.code] = cls
        pending.extend(cls.__subclasses__())
    return classes


def from_code(code: str, message: str, *, field: str | None = None) -> PerturbScopeError:
    """Rebuild the error that a server sent; an unknown code becomes :class:`ServerError`."""
    return error_classes().get(code, ServerError)(message, field=field)


_LONGEST, _CANDIDATES, _COMPARED = 64, 400, 200_000
"""Longest name that is looked for, names that are compared by their letters, and pairs of letters that are compared in
full: a hostile list of 200,000 names takes 50 ms, where difflib alone takes minutes."""


def near(name: str, known: Iterable[str], n: int = 3, cutoff: float = 0.6) -> list[str]:
    """Return at most `n` of the `known` names that are spelled like `name`, the nearest first, for a message.

    As :func:`difflib.get_close_matches`, in bounded time: of many names, those that are near in the alphabet.
    """
    if not 0 < len(name) <= _LONGEST:
        return []
    # Names of other lengths cannot reach the cutoff.
    low, high = len(name) * cutoff / (2 - cutoff), len(name) * (2 - cutoff) / cutoff
    similar = [other for other in known if low <= len(other) <= high]
    if len(similar) > _CANDIDATES:
        similar.sort()
        middle = bisect_left(similar, name)
        start = max(0, min(middle - _CANDIDATES // 2, len(similar) - _CANDIDATES))
        similar = similar[start : start + _CANDIDATES]
    matcher = difflib.SequenceMatcher()
    matcher.set_seq2(name)
    rated = []
    for other in similar:
        matcher.set_seq1(other)
        if matcher.real_quick_ratio() >= cutoff and (rate := matcher.quick_ratio()) >= cutoff:
            rated.append((rate, other))
    close, left = [], _COMPARED
    for _, other in sorted(rated, reverse=True):
        left -= len(name) * len(other)
        if left < 0:
            break
        matcher.set_seq1(other)
        if (rate := matcher.ratio()) >= cutoff:
            close.append((rate, other))
    return [other for _, other in nlargest(n, close)]
