"""Frames between the server and its readers of files: a JSON head, and matrices as Arrow."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import PerturbScopeError, from_code
from perturbscope.operations import OPERATIONS
from perturbscope.protocol import EmbedRequest
from perturbscope.report import Absent
from perturbscope.tasks.trained_on import Fingerprint
from serving.engine.columns import Columns, LabelColumn
from serving.engine.reports import ReportRequest
from serving.uploads.requests import Upload

LENGTH = struct.Struct("<Q")
"""Length of the head in bytes; precedes it."""


def frame(head: Mapping[str, Any], parts: Sequence[bytes] = ()) -> list[bytes]:
    """Return the pieces of a frame, to be written one after the other."""
    text = json.dumps({**head, "parts": [len(part) for part in parts]}).encode()
    return [LENGTH.pack(len(text)), text, *parts]


def error_to_frame(error: PerturbScopeError) -> list[bytes]:
    """Return the frame of an error for the caller."""
    return frame({"error": error.to_dict()})


def upload_to_frame(upload: Upload) -> list[bytes]:
    """Return the frame of the request that a file made."""
    head: dict[str, Any] = {
        "warnings": upload.warnings,
        "file": None if upload.file is None else asdict(upload.file),
        "left_out": dict(upload.left_out),
        "round_counts": upload.round_counts,
    }
    match upload.request:
        case ReportRequest(score=score, title=title, counts=counts):
            parts = [protocol.request_to_arrow(score)]
            if isinstance(counts, CountMatrix):
                parts.append(protocol.request_to_arrow(EmbedRequest(cells=counts)))
                return frame({**head, "kind": "report", "title": title}, parts)
            return frame({**head, "kind": "report", "title": title, "absent": asdict(counts)}, parts)
        case Columns() as columns:
            return frame({**head, "kind": "columns", "columns": asdict(columns)})
        case request:
            return frame({**head, "kind": OPERATIONS.of(request).name}, [protocol.request_to_arrow(request)])


def upload_from_parts(head: Mapping[str, Any], parts: Sequence[bytes]) -> Upload:
    """Return the request of a frame.

    Raises
    ------
    PerturbScopeError
        The reader refused the file.
    RuntimeError
        The reader has a bug; the message holds its traceback.
    """
    if "error" in head:
        raise from_code(**head["error"])
    if "bug" in head:
        raise RuntimeError(f"The reader of files failed:\n{head['bug']}")
    file = None if head["file"] is None else Fingerprint(**head["file"])
    left_out = {str(kind): int(n) for kind, n in head["left_out"].items()}
    return Upload(_request(head, parts), list(head["warnings"]), file, left_out, bool(head["round_counts"]))


def _request(head: Mapping[str, Any], parts: Sequence[bytes]) -> Any:
    match head["kind"]:
        case "report":
            fields = {"score": protocol.request_from_arrow(protocol.ScoreRequest, parts[0]), "title": head["title"]}
            if len(parts) > 1:
                return ReportRequest(
                    **fields, counts=protocol.request_from_arrow(protocol.EmbedRequest, parts[1]).cells
                )
            return ReportRequest(**fields, counts=Absent(**head["absent"]))
        case "columns":
            fields = dict(head["columns"])
            columns = [_column(column) for column in fields.pop("columns")]
            names: dict[str, Any] = {
                name: tuple(fields.pop(name)) for name in ("representations", "layers", "gene_columns")
            }
            return Columns(**fields, columns=tuple(columns), **names)
        case name:
            return protocol.request_from_arrow(OPERATIONS[name].request, parts[0])


def _column(values: Mapping[str, Any]) -> LabelColumn:
    labels = tuple((str(label), int(n)) for label, n in values["labels"])
    return LabelColumn(**{**values, "labels": labels, "controls": tuple(values["controls"])})
