"""The operator's routes: only with the right ``admin``, and never with a path."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families import FAMILIES, rank
from perturbscope.families.rank import RankFamily
from perturbscope.families.tokens import TokenizedCells
from perturbscope.inference.bundle import MANIFEST
from serving.call import ANYONE, Caller
from serving.engine.engine import Engine
from serving.models.registry import ModelRegistry
from serving.settings import Settings
from tests.bundles import write_tiny_bundle
from tests.unit.serving.conftest import Connect

ADMIN = Caller("operator", frozenset({"infer", "admin"}))


class Door:
    """Knows one operator by a header."""

    def caller(self, headers: Mapping[str, str], peer: str = "") -> Caller:
        return ADMIN if headers.get("x-api-key") == "operator" else ANYONE


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def models(tmp_path: Path, bundle: Path) -> Path:
    shutil.copytree(bundle, tmp_path / "models" / "one")
    return tmp_path / "models"


@pytest.fixture
async def admin(models: Path, connect: Connect) -> AsyncIterator[httpx.AsyncClient]:
    settings = Settings(repository=str(models), threads=1)
    engine = Engine(ModelRegistry(settings), settings)
    engine.front.doorkeeper = Door()
    client = connect(engine)
    client.headers["x-api-key"] = "operator"
    yield client
    await engine.close()


async def test_a_model_comes_and_goes(admin: httpx.AsyncClient, models: Path) -> None:
    assert (await admin.get("/v1/repository")).json() == {"bundles": []}
    loaded = await admin.post("/v1/models/one/load")
    assert loaded.status_code == 200, loaded.text
    assert (loaded.json()["name"], loaded.json()["golden"]) == ("tiny", "absent")
    assert (await admin.get("/v1/models")).json() == {"models": [loaded.json()], "problems": []}
    listed = {"name": "tiny", "version": "0.1", "folder": "one", "state": "READY", "reason": ""}
    assert (await admin.get("/v1/repository")).json() == {"bundles": [listed]}
    gone = await admin.post("/v1/models/tiny/unload", params={"version": "0.1"})
    assert gone.json() == loaded.json()
    assert (await admin.get("/v1/models")).json() == {"models": [], "problems": []}
    assert (await admin.get("/v1/repository")).json()["bundles"][0]["reason"] == "It was unloaded on request."


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/models/one/load"), ("POST", "/v1/models/one/unload"), ("GET", "/v1/repository")],
)
async def test_the_right_is_needed(admin: httpx.AsyncClient, method: str, path: str) -> None:
    refused = await admin.request(method, path, headers={"x-api-key": "someone"})
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "permission_denied"
    assert (await admin.get("/v1/models")).json() == {"models": [], "problems": []}


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("..%2Fone", 404),
        ("%2e%2e", 422),
        ("%2e%2e%2fone", 404),
        ("..", 404),
        ("%2Fetc", 404),
        ("..%5Cone", 422),
        (".hidden", 422),
        ("one%00", 422),
        ("%0Aone", 422),
        ("two", 404),
    ],
)
async def test_a_name_is_never_a_path(admin: httpx.AsyncClient, name: str, status: int) -> None:
    refused = await admin.post(f"/v1/models/{name}/load")
    assert refused.status_code == status, refused.text
    assert (await admin.get("/v1/models")).json() == {"models": [], "problems": []}


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (types.SimpleNamespace(name="broken"), "it has no tokenize"),
        (None, r"cannot be built \(TypeError: no options"),
        ("rank", r"tiny-0\.1-\w+ of the family 'broken' does not run \(KeyError: 'input_ids'\)"),
    ],
)
async def test_a_family_that_breaks_its_contract_is_a_conflict(
    admin: httpx.AsyncClient, models: Path, monkeypatch: pytest.MonkeyPatch, family: Any, message: str
) -> None:
    """It lacks methods; its module fails; it fails on a cell."""

    class Failing(RankFamily):
        name = "broken"

        def tokenize(self, cells: CountMatrix) -> TokenizedCells:
            raise KeyError("input_ids")

    def build(config: dict[str, Any], vocabulary: GeneVocabulary) -> Any:
        if family is None:
            raise TypeError("no\noptions")
        right = rank.build(config, vocabulary)
        return Failing(right.config, right.vocabulary, right.resolver) if family == "rank" else family

    module = types.ModuleType("broken_family")
    module.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "broken_family", module)
    monkeypatch.setitem(FAMILIES, "broken", "broken_family")
    assert (await admin.post("/v1/models/one/load")).status_code == 200
    manifest = json.loads((models / "one" / MANIFEST).read_text())
    (models / "one" / MANIFEST).write_text(json.dumps(manifest | {"family": "broken"}))
    for path in ("/v1/models/one/load", "/v2/repository/models/one/load"):
        refused = await admin.post(path)
        assert refused.status_code == 409, refused.text
        assert re.search(message, refused.text)
        assert "The family 'broken'" in refused.text or family == "rank"
    answer = (await admin.get("/v1/models")).json()
    assert [info["family"] for info in answer["models"]] == ["rank"]
    assert [item["name"] for item in answer["problems"]] == ["one"]


async def test_a_corrupt_bundle_is_a_conflict_that_says_why(admin: httpx.AsyncClient, models: Path) -> None:
    assert (await admin.post("/v1/models/one/load")).status_code == 200
    manifest = json.loads((models / "one" / MANIFEST).read_text())
    (models / "one" / MANIFEST).write_text(json.dumps(manifest | {"licence": "other"}))
    with (models / "one" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    refused = await admin.post("/v1/models/one/load")
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "corrupt_bundle"
    assert "model.onnx has the SHA-256" in refused.json()["error"]["message"]
    assert len((await admin.get("/v1/models")).json()["models"]) == 1


async def test_unloading_what_is_not_there(admin: httpx.AsyncClient) -> None:
    assert (await admin.post("/v1/models/one/unload")).status_code == 404
    refused = await admin.post("/v1/models/one/unload", params={"verson": "1"})
    assert refused.status_code == 422
    assert "Unknown parameter 'verson'" in refused.json()["error"]["message"]


async def test_the_document_describes_the_routes(admin: httpx.AsyncClient) -> None:
    paths = (await admin.get("/v1/openapi.json")).json()["paths"]
    names = [item["name"] for item in paths["/v1/models/{name}/unload"]["post"]["parameters"]]
    assert names[:2] == ["name", "version"]
    assert {"200", "403", "409"} <= set(paths["/v1/models/{name}/load"]["post"]["responses"])
    assert "get" in paths["/v1/repository"]
