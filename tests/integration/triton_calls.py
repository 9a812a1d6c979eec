"""Calls of the real tritonclient, made in a process of their own.

Its module of messages and the server's describe the same package, and one process can load only one of the two. So
nothing of the server is imported here.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import queue
from typing import Any

from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

KINDS = ("http", "grpc", "http.aio", "grpc.aio")
Failure = tuple[str, str]
"""Status and message of an InferenceServerException."""


def call(kind: str, url: str, method: str, *args: Any, **options: Any) -> Any:
    """Return the result of `method` of a client of `kind`, or the :data:`Failure` that it raises."""
    return asyncio.run(_call(kind, url, method, *args, **options))


async def _call(kind: str, url: str, method: str, *args: Any, **options: Any) -> Any:
    module = importlib.import_module(f"tritonclient.{kind}")
    client = module.InferenceServerClient(url)
    try:
        return await _settled(getattr(client, method)(*args, **options))
    except InferenceServerException as error:
        return error.status(), error.message()
    finally:
        await _settled(client.close())


def infer(kind: str, url: str, model: str, arrays: dict[str, NDArray[Any]], **options: Any) -> Any:
    """Return vectors and the rest of the answer, or the failure; options are ``binary`` (HTTP) and the client's."""
    binary = options.pop("binary", None)
    found = asyncio.run(_infer(kind, url, model, arrays, binary, options))
    if isinstance(found, tuple):
        return found
    answer = found.get_response() if kind.startswith("http") else found.get_response(as_json=True)
    return found.as_numpy("cell_embedding"), answer


async def _infer(
    kind: str, url: str, model: str, arrays: dict[str, NDArray[Any]], binary: bool | None, options: dict[str, Any]
) -> Any:
    module = importlib.import_module(f"tritonclient.{kind}")
    inputs = []
    for name, values in arrays.items():
        inputs.append(module.InferInput(name, list(values.shape), "INT64"))
        inputs[-1].set_data_from_numpy(values, **({} if binary is None else {"binary_data": binary}))
    if binary is not None:
        options["outputs"] = [module.InferRequestedOutput("cell_embedding", binary_data=binary)]
    return await _call(kind, url, "infer", model, inputs, **options)


def stream(
    url: str, model: str, arrays: dict[str, NDArray[Any]], names: list[str], headers: dict[str, str]
) -> list[tuple[str, Any]]:
    """Send a stream with a request for each model of `names`; return ids and vectors, or messages."""
    module = importlib.import_module("tritonclient.grpc")
    found: queue.Queue[tuple[Any, Any]] = queue.Queue()
    inputs = [module.InferInput(name, list(values.shape), "INT64") for name, values in arrays.items()]
    for item, values in zip(inputs, arrays.values(), strict=True):
        item.set_data_from_numpy(values)
    with module.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: found.put((result, error)), headers=headers)
        for at, name in enumerate(names):
            client.async_stream_infer(name or model, inputs, request_id=str(at))
        answers = [found.get(timeout=60) for _ in names]
        client.stop_stream()
    return [
        ("", error.message()) if error else (result.get_response().id, result.as_numpy("cell_embedding"))
        for result, error in answers
    ]


async def _settled(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
