"""Callers with keys that are wrong, expired or revoked, and keys that change while the service runs."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx

from benchmarks.reliability.inputs import Asker, is_right, real_cells, right_vectors
from benchmarks.reliability.trial import Trial, fault
from perturbscope import protocol
from perturbscope.protocol import EmbedRequest
from perturbscope.protocol.proto.perturbscope_v1_pb2_grpc import PerturbScopeStub
from tests.bundles import write_tiny_bundle
from tests.integration.server import ROOT

PATHS = ("/v1/embed", "/v1/models", "/metrics", "/docs.json", "/v1/openapi.json", "/v2", "/v2/repository/index")


def add_key(file: Path, name: str, *options: str, command: str = "add") -> str:
    """Make a key with the server's own command, and return it."""
    arguments = [sys.executable, "-m", "serving", "keys", command, "--file", str(file)]
    arguments += ["--name", name, *options] if command == "add" else [*options, name]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    return next((word for word in done.stdout.split() if word.startswith("psk_")), "")


def edit_key(file: Path, name: str, **changes: Any) -> None:
    """Change an entry of the file, as an operator's tool would: a new file in its place."""
    data = json.loads(file.read_text())
    entries = data["keys"] if isinstance(data, dict) else data
    for entry in entries:
        if entry["name"] == name:
            entry.update(changes)
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(data))
    fresh.chmod(0o600)
    fresh.replace(file)


@fault("keys", "Expired, wrong and revoked keys")
async def keys(trial: Trial) -> None:
    """While four callers with good keys embed without a pause, others try without a key, with wrong, truncated,
    lengthened, expired, revoked and disabled keys, with good ones of the wrong right, in every header, over HTTP (all
    paths) and gRPC. A key expires, one is revoked and one is replaced while its holder is at work; the file is broken
    for some seconds."""
    file = trial.folder / "keys.json"
    good, other = add_key(file, "pipeline"), add_key(file, "second")
    past = (datetime.now(UTC) - timedelta(hours=1)).isoformat(timespec="seconds")
    expired, revoked = add_key(file, "expired", "--expires", past), add_key(file, "revoked")
    edit_key(file, "revoked", disabled=True)
    soon, leaving = add_key(file, "soon"), add_key(file, "leaving")
    bundle = write_tiny_bundle(trial.folder / "tiny")
    cells, expected = real_cells("hill", 2), right_vectors("hill", 2, bundle)
    bad = {
        "none": "",
        "wrong": "psk_00000000_" + "x" * 43,
        "cut": good[:-1],
        "lengthened": good + "x",
        "of another case": good.swapcase(),
        "expired": expired,
        "revoked": revoked,
        "not ASCII": "psk_\u00fc",
        "very long": "x" * 7000,
    }
    message = protocol.request_to_proto(EmbedRequest(cells=cells))
    body = protocol.request_to_arrow(EmbedRequest(cells=cells))
    let_in: list[str] = []
    with trial.service(bundle=bundle, keys=file) as server:
        async with (
            Asker(server, api_key=good) as asker,
            Asker(server, api_key=other) as second,
            httpx.AsyncClient(base_url=server.url, timeout=60) as http,
            grpc.aio.insecure_channel(server.target) as channel,
        ):
            stop, right = asyncio.Event(), [0, 0]

            async def caller(client: Any) -> None:
                while not stop.is_set():
                    code, answer = await trial.outcome(client.embed_cells(cells))
                    right[code == "ok" and is_right(answer.values, expected)] += 1
                    await asyncio.sleep(0.01)

            before = trial.before(server)
            callers = [asyncio.ensure_future(caller(c)) for c in (asker.arrow, asker.grpc, second.json, second.grpc)]
            tried = 0
            for _ in range(trial.plan.times(5, 1)):
                for name, key in bad.items():
                    for header in ("authorization", "x-api-key"):
                        value = f"Bearer {key}" if header == "authorization" else key
                        for path in PATHS:
                            sent = {header: value.encode()} if key else {}
                            status = await _http(http, path, body, sent)
                            tried += 1
                            trial.saw(f"HTTP {status}")
                            if status not in (401, 429):
                                let_in.append(f"{name} {header} {path}: {status}")
                        tried += 1
                        status = await _grpc(channel, message, header, value if key else "")
                        trial.saw(f"gRPC {status}")
                        if status not in ("UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "not sent"):
                            let_in.append(f"{name} {header} gRPC: {status}")
            admin = await _http(http, "/v2/repository/index", b"", {"x-api-key": good.encode()})
            trial.note(f"a key with the right to infer asks for the models of the repository: {admin}")
            load = await _http(http, "/v2/repository/models/tiny/unload", b"{}", {"x-api-key": good.encode()})
            trial.check(f"a key without the right to administer may not unload a model ({load})", load == 403)
            trial.check(f"no one of {tried} callers without a good key was let in ({let_in[:3] or 'none'})", not let_in)
            await _changes(trial, http, body, file, soon, leaving)
            stop.set()
            await asyncio.gather(*callers)
            trial.check(f"all {sum(right):,} requests with good keys were answered rightly meanwhile", not right[0])
            secrets = [key for key in (good, other, expired, revoked, soon, leaving) if key in server.log]
            trial.check(f"no key stands in the log ({len(secrets)})", not secrets)
        trial.after(server, before)


async def _changes(trial: Trial, http: httpx.AsyncClient, body: bytes, file: Path, soon: str, leaving: str) -> None:
    async def status(key: str) -> int:
        return await _http(http, "/v1/embed", body, {"x-api-key": key.encode()})

    async def until(key: str, wanted: int) -> float:
        started = time.monotonic()
        while (found := await status(key)) != wanted and time.monotonic() < started + 30:
            await asyncio.sleep(0.1)
        return time.monotonic() - started if found == wanted else float("inf")

    trial.check("a good key is let in before it expires", await status(soon) == 200)
    edit_key(file, "soon", expires=(datetime.now(UTC) + timedelta(seconds=3)).isoformat(timespec="seconds"))
    seconds = await until(soon, 401)
    trial.check(f"a key that expires in 3 s is refused after {seconds:.1f} s", seconds < 10)
    edit_key(file, "leaving", disabled=True)
    seconds = await until(leaving, 401)
    trial.check(f"a key that is revoked is refused after {seconds:.1f} s, without a restart", seconds < 10)
    added = add_key(file, "newcomer")
    seconds = await until(added, 200)
    trial.check(f"a key that is added is let in after {seconds:.1f} s, without a restart", seconds < 10)
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    await asyncio.sleep(3)
    trial.check("while the file of keys is broken, the keys before it hold", await status(added) == 200)
    trial.check("and those that were refused stay so", await status(leaving) == 401)
    file.write_text(whole)


async def _http(http: httpx.AsyncClient, path: str, body: bytes, headers: dict[str, bytes]) -> int:
    post = path in ("/v1/embed", "/v2/repository/index") or path.endswith("load")
    kind = protocol.ARROW if path == "/v1/embed" else protocol.JSON
    sent = {b"content-type": kind.encode(), **{name.encode(): value for name, value in headers.items()}}
    reply = await http.request("POST" if post else "GET", path, content=body if post else None, headers=sent)
    return reply.status_code


async def _grpc(channel: Any, message: Any, header: str, value: str) -> str:
    try:
        await PerturbScopeStub(channel).Embed(message, metadata=((header, value),) if value else ())
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    except Exception:  # noqa: BLE001  grpc refuses to send what is no metadata, with errors that it does not export
        return "not sent"
    return "OK"
