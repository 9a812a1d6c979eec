"""The promises of the JSON routes of /v1, as plain data, and which changes break a client.

``python -m tests.unit.serving.http.openapi_snapshot`` writes it anew, after a change that breaks nobody.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from serving.http import openapi
from serving.http.app import build_app
from tests.snapshots import renew

SNAPSHOT = Path(__file__).with_name("openapi_v1.json")
Promise = dict[str, Any]
_JSON = "application/json"


@functools.cache
def current() -> Promise:
    """Return the promise of the present document; it must not be modified."""
    return of_document(openapi.document(build_app(), keys=False))


def of_document(document: dict[str, Any]) -> Promise:
    """Return, for each method and path, the fields of its bodies as paths into the JSON with their types."""
    found: Promise = {}
    for path, operations in document["paths"].items():
        if not path.startswith("/v1/"):
            continue
        for method, operation in operations.items():
            body = operation.get("requestBody", {}).get("content", {})
            answer = operation["responses"]["200"].get("content", {})
            takes = _walk(body.get(_JSON, {}).get("schema", {}), document)
            found[f"{method.upper()} {path}"] = {
                "reads": sorted(body),
                "writes": sorted(answer),
                "takes": {name: kind for name, (kind, _) in takes.items()},
                "needs": sorted(name for name, (_, needed) in takes.items() if needed),
                "gives": {
                    name: kind for name, (kind, _) in _walk(answer.get(_JSON, {}).get("schema", {}), document).items()
                },
                "parameters": sorted(item["name"] for item in operation.get("parameters", ())),
            }
    return found


def _walk(schema: Any, document: dict[str, Any], where: str = "", needed: bool = False) -> dict[str, tuple[str, bool]]:
    """Every place of a body: its types, and whether it must be there. ``cells.data[]`` is an item of a list."""

    def resolved(part: Any) -> Any:
        name = part.get("$ref", "").rsplit("/", 1)[-1]
        return document["components"]["schemas"][name] if name else part

    schema = resolved(schema)
    choices = [resolved(choice) for choice in schema.get("anyOf", [schema])]
    kinds = sorted({str(choice.get("type", "any")) for choice in choices})
    found = {where: ("|".join(kinds), needed)} if where else {}
    for choice in choices:
        for name, inner in choice.get("properties", {}).items():
            found |= _walk(inner, document, f"{where}.{name}".lstrip("."), name in choice.get("required", ()))
        if isinstance(choice.get("items"), dict):
            found |= _walk(choice["items"], document, f"{where}[]")
    return found


def broken(old: Promise, new: Promise) -> list[str]:
    """Describe what would break a client of `old` under `new`; empty if nothing does."""
    found: list[str] = []
    for route, promise in old.items():
        now = new.get(route)
        if now is None:
            found.append(f"{route} is gone")
            continue
        for key, what in (("reads", "no longer reads"), ("writes", "no longer writes"), ("parameters", "lost")):
            found += [f"{route} {what} {item}" for item in promise[key] if item not in now[key]]
        found += [f"{route} now needs {item}" for item in now["needs"] if item not in promise["needs"]]
        for key, what in (("takes", "takes"), ("gives", "gives")):
            for name, kind in promise[key].items():
                if name not in now[key]:
                    found.append(f"{route} no longer {what} {name}")
                elif not _fits(kind, now[key][name], taken=key == "takes"):
                    found.append(f"{route} {what} {name} as {now[key][name]}, no longer as {kind}")
    return found


def _fits(old: str, new: str, *, taken: bool) -> bool:
    """Tell whether a type that was accepted still is; or whether clients expect a type that is returned."""
    before, after = set(old.split("|")), set(new.split("|"))
    return before <= after if taken else after <= before


if __name__ == "__main__":
    sys.exit(renew(SNAPSHOT, current(), broken))
