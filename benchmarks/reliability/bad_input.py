"""Bad input over every interface, beside good requests."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.reliability.inputs import Asker, is_right, right_vectors_of
from benchmarks.reliability.trial import Trial, fault
from benchmarks.reliability.wire_bodies import BOUNDARY, DEFECTS, Raw, form
from perturbscope import protocol
from perturbscope.protocol.proto.open_inference_pb2 import ModelInferRequest
from perturbscope.protocol.proto.open_inference_pb2_grpc import GRPCInferenceServiceStub
from perturbscope.protocol.proto.perturbscope_v1_pb2_grpc import PerturbScopeStub
from tests.bundles import write_tiny_bundle
from tests.fuzz.seeds import cells as seed_cells
from tests.integration.server import RunningServer

TOKEN_DEFECTS: dict[str, dict[str, Any]] = {
    "an id outside the vocabulary": {"ids": [[10**6, 5]]},
    "a negative id": {"ids": [[-3, 5]]},
    "a mask with a hole": {"ids": [[5, 6, 7]], "mask": [[1, 0, 1]]},
    "a mask of twos": {"ids": [[5, 6]], "mask": [[2, 2]]},
    "an empty cell": {"ids": [[5, 6]], "mask": [[0, 0]]},
    "ragged": {"ids": [[5, 6], [7]]},
    "shape and data differ": {"ids": [[5, 6]], "shape": [1, 3]},
    "too long": {"ids": [[5] * 5000]},
    "wrong type": {"ids": [[5, 6]], "datatype": "FP32"},
}
"""Defects of tokens, which only the Open Inference Protocol accepts from callers."""


def model_cells(server: RunningServer) -> float:
    """Return the number of cells that the model has run, by the service's own metrics."""
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=30).text)
    name = "perturbscope_model_cells_total"
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


@fault("bad-input", "Bad input over every interface, beside good requests")
async def bad_input(trial: Trial) -> None:
    """Every defect over every interface that takes it: JSON, Arrow, .h5ad as body and as form, protobuf, streams of
    protobuf; defects of tokens over the Open Inference Protocol, HTTP and gRPC. First alone, to see by the service's
    metrics that the model runs nothing for them; then many times beside good requests over all interfaces."""
    bundle = write_tiny_bundle(trial.folder / "tiny")
    cells = seed_cells(40)
    expected = right_vectors_of(cells, bundle)
    different: list[str] = []
    with trial.service(bundle=bundle, max_cells=4000) as server:
        async with (
            Asker(server) as asker,
            httpx.AsyncClient(base_url=server.url, timeout=120) as http,
            grpc.aio.insecure_channel(server.target) as channel,
        ):
            await asker.warm(cells)
            before = trial.before(server)
            ran = model_cells(server)

            async def table(count: bool) -> int:
                tried = 0
                for name, (spoil, codes) in DEFECTS.items():
                    raw = Raw.of(cells)
                    spoil(raw)
                    found = {way: await send for way, send in _sends(raw, http, channel).items()}
                    if not np.isfinite(raw.data).all() and found["JSON"] == "unreadable_file":
                        found["JSON"] = "cannot be said"  # JSON has no such numbers: the body is none
                    found = {way: code for way, code in found.items() if code != "cannot be said"}
                    tried += len(found)
                    for way, code in found.items():
                        trial.saw(code)
                        if code not in codes:
                            different.append(f"{name}, {way}: {code}")
                    memory = {code for way, code in found.items() if "h5ad" not in way and "form" not in way}
                    if count and len(memory) > 1:
                        different.append(f"{name}: {found}")
                for name, defect in TOKEN_DEFECTS.items():
                    for way, code in (
                        ("HTTP", await _kserve_http(http, **defect)),
                        ("gRPC", await _kserve_grpc(channel, **defect)),
                    ):
                        tried += 1
                        trial.saw(code)
                        if code not in ("HTTP 400", "HTTP 413", "HTTP 422", "INVALID_ARGUMENT", "cannot be said"):
                            different.append(f"tokens, {name}, {way}: {code}")
                return tried

            tried = await table(True)
            ran = model_cells(server) - ran
            trial.check(
                f"{tried} defects x interfaces: the same code over every interface "
                f"({'; '.join(different[:4]) or 'no exception'})",
                not different,
            )
            trial.check(f"refused before compute: the model ran {ran:.0f} cells for them", ran == 0)
            stop = asyncio.Event()
            good: Counter[str] = Counter()

            async def caller(name: str, way: Callable[[Any], Awaitable[Any]]) -> None:
                while not stop.is_set():
                    code, values = await trial.outcome(way(cells), count=False)
                    right = code == "ok" and is_right(values, expected)
                    good["right" if right else f"{name}: {'wrong' if code == 'ok' else code}"] += 1

            callers = [asyncio.ensure_future(caller(name, way)) for name, way in asker.ways.items()]
            for _ in range(trial.plan.times(10, 1)):
                tried += sum(await asyncio.gather(*(table(False) for _ in range(2))))
            stop.set()
            await asyncio.gather(*callers)
            trial.check(
                f"all {sum(good.values()):,} good requests beside {tried:,} bad ones were answered rightly "
                f"({dict(good)})",
                set(good) == {"right"},
            )
            trial.check(f"the codes were the same under load ({len(different)} differ)", not different)
        trial.after(server, before)


def _sends(raw: Raw, http: httpx.AsyncClient, channel: Any) -> dict[str, Awaitable[str]]:
    query = {key: str(value) for key, value in raw.extra.items()}
    content = raw.h5ad()
    return {
        "JSON": _http(http, raw.json(), protocol.JSON),
        "Arrow": _http(http, raw.arrow(), protocol.ARROW),
        "h5ad": _http(http, content, protocol.HDF5, query),
        "form": _http(http, form(content, **query), f"multipart/form-data; boundary={BOUNDARY}"),
        "gRPC": _grpc(PerturbScopeStub(channel).Embed(raw.proto())),
        "stream": _stream(channel, copy.copy(raw)),
    }


async def _http(http: httpx.AsyncClient, body: bytes, kind: str, query: dict[str, str] | None = None) -> str:
    reply = await http.post("/v1/embed", content=body, headers={"content-type": kind}, params=query)
    if reply.status_code == 200:
        return "ok"
    return str(json.loads(reply.content)["error"]["code"])


async def _grpc(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return _code(error)
    return "ok"


def _code(error: grpc.aio.AioRpcError) -> str:
    found = dict(error.trailing_metadata() or ()).get("perturbscope-code", error.code().name)
    return found.decode() if isinstance(found, bytes) else str(found)


async def _stream(channel: Any, raw: Raw) -> str:
    if len(raw.indptr) > 4000:
        return "cannot be said"  # a stream may have any number of cells
    # Where a stream is refused while its caller writes, grpc.aio may call it INTERNAL of its own, whatever the server
    # said: then it is asked again.
    for _ in range(20):
        if (code := await _stream_once(channel, raw)) != "INTERNAL":
            break
    return code


async def _stream_once(channel: Any, raw: Raw) -> str:
    call = PerturbScopeStub(channel).EmbedStream()
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        for message in raw.stream():
            await call.write(message)
        await call.done_writing()
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await call.read() is not grpc.aio.EOF:
            pass
    if await call.code() is grpc.StatusCode.OK:
        return "ok"
    found = dict(await call.trailing_metadata() or ()).get("perturbscope-code", (await call.code()).name)
    return found.decode() if isinstance(found, bytes) else str(found)


def _tensors(ids: Any, mask: Any = None, shape: Any = None, datatype: str = "INT64") -> list[dict[str, Any]]:
    mask = [[1] * len(row) for row in ids] if mask is None else mask
    shape = [len(ids), max(len(row) for row in ids)] if shape is None else shape
    return [
        {"name": name, "shape": shape, "datatype": datatype, "data": values}
        for name, values in (("input_ids", ids), ("attention_mask", mask))
    ]


async def _kserve_http(http: httpx.AsyncClient, **defect: Any) -> str:
    reply = await http.post("/v2/models/tiny/infer", json={"inputs": _tensors(**defect)})
    return f"HTTP {reply.status_code}"


async def _kserve_grpc(channel: Any, **defect: Any) -> str:
    message = ModelInferRequest(model_name="tiny")
    for item in _tensors(**defect):
        tensor = message.inputs.add(name=item["name"], datatype=item["datatype"], shape=item["shape"])
        flat = [value for row in item["data"] for value in row]
        if item["datatype"] == "FP32":
            tensor.contents.fp32_contents.extend(flat)
        else:
            tensor.contents.int64_contents.extend(flat)
    try:
        await GRPCInferenceServiceStub(channel).ModelInfer(message)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "ok"
