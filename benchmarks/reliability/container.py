"""A container of 4 GiB, whose memory a caller with a key, or a stranger without one, tries to take."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import h5py
import httpx
import numpy as np
import psutil
import pyarrow as pa

from benchmarks.reliability.inputs import Asker, is_right, real_cells, right_vectors
from benchmarks.reliability.keys import add_key
from benchmarks.reliability.trial import MIB, Trial, fault
from perturbscope import protocol
from perturbscope.protocol.arrow_ipc import KEY
from tests.fuzz.seeds import cells as seed_cells
from tests.fuzz.seeds import h5ad
from tests.integration.server import RunningServer

LIMIT = 4 * 2**30
"""Bytes of the container: what deploy/docker-compose.yml gives."""
AT_ONCE = 4
"""Hostile calls of one kind at a time."""
PATIENCE = 60
"""Seconds that a hostile caller waits for its answer."""


class Group:
    """A memory cgroup of the kernel, version 1 or 2, for the processes of a service.

    Raises
    ------
    OSError
        None can be made: this process is not root, or sees no cgroup that it may change.
    """

    def __init__(self) -> None:
        first = Path("/sys/fs/cgroup/memory")
        self._v1 = first.is_dir()
        self.path = (first if self._v1 else Path("/sys/fs/cgroup")) / f"perturbscope-trial-{os.getpid()}"
        self.path.mkdir()
        (self.path / ("memory.limit_in_bytes" if self._v1 else "memory.max")).write_text(str(LIMIT))

    def add(self, process: int) -> None:
        """Move a process into the group; those that it begins later are born there."""
        (self.path / "cgroup.procs").write_text(str(process))

    @property
    def peak(self) -> int:
        """Most bytes that were used at a time, files in memory included."""
        return int((self.path / ("memory.max_usage_in_bytes" if self._v1 else "memory.peak")).read_text())

    @property
    def kills(self) -> int:
        """Number of processes that the kernel ended for want of memory."""
        text = (self.path / ("memory.oom_control" if self._v1 else "memory.events")).read_text()
        return int(dict(line.split() for line in text.splitlines()).get("oom_kill", 0))

    def close(self) -> None:
        """Remove the group, once its processes are gone."""
        for _ in range(50):
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.2)


def _table(columns: dict[str, Any], meta: str) -> pa.Table:
    return pa.table(columns).replace_schema_metadata({KEY: meta.encode()})


def _stream(table: pa.Table, *, rows: int | None = None, deltas: bool = False) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=deltas)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, rows)
    return bytes(sink.getvalue().to_pybytes())


def _one_cell(genes: list[str]) -> bytes:
    return json.dumps({"cells": {"gene_ids": genes, "indptr": [0, 1], "indices": [0], "data": [1]}}).encode()


def _growing_dictionary() -> bytes:
    words = pa.array([f"{i:08d}" * 16 for i in range(40_000)] + [f"w{i}" for i in range(3_000)])
    parts = []
    for n in range(40_000, 43_000):
        labels = pa.DictionaryArray.from_arrays(pa.array([n - 1], pa.int32()), words.slice(0, n))
        parts.append(
            pa.table(
                {
                    "embedding": pa.FixedSizeListArray.from_arrays(pa.array([1.0], pa.float32()), 1),
                    "perturbation": labels,
                }
            )
        )
    return _stream(pa.concat_tables(parts).replace_schema_metadata({KEY: b'{"control":"w1"}'}), deltas=True)


def _changed(change: Callable[[h5py.File], object]) -> bytes:
    target = io.BytesIO(h5ad(seed_cells(40)))
    with h5py.File(target, "r+", libver="latest") as file:
        change(file)
    return target.getvalue()


def _shared_texts() -> bytes:
    """Let 3,000 entries of an attribute share one string of a mebibyte."""
    n, size = 3000, MIB

    def change(file: h5py.File) -> None:
        del file["obs"].attrs["column-order"]
        texts = np.array(["Z" * size] + [f"q{i:07d}" for i in range(n - 1)], dtype=object)
        file["obs"].attrs.create("column-order", texts, dtype=h5py.string_dtype())

    content = bytearray(_changed(change))
    at = content.find(struct.pack("<I", size))
    while [struct.unpack_from("<I", content, at + 16 * i)[0] for i in (1, 2)] != [8, 8]:
        at = content.find(struct.pack("<I", size), at + 1)
    content[at : at + 16 * n] = bytes(content[at : at + 16]) * n
    return bytes(content)


def _dense(n_cells: int, n_genes: int) -> bytes:
    """Return a dense matrix of ones, which gzip makes a thousand times smaller."""
    target = io.BytesIO()
    text = h5py.string_dtype()
    with h5py.File(target, "w") as file:
        item = file.create_dataset(
            "X", data=np.ones((n_cells, n_genes), "u1"), compression="gzip", chunks=(1000, n_genes)
        )
        item.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for name, n in (("obs", n_cells), ("var", n_genes)):
            frame = file.create_group(name)
            frame.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
            frame.attrs.create("column-order", np.array([], dtype=object), dtype=text)
            frame.create_dataset("_index", data=np.array([f"{name}{i}" for i in range(n)], object), dtype=text)
    return target.getvalue()


def _shared_vectors(n: int) -> dict[str, Any]:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(n, np.float16)), 1)
    codes = pa.array(np.arange(n) % 9, pa.int8())
    labels = pa.DictionaryArray.from_arrays(
        codes, pa.array(["\U0001f600" * 500 + str(i) for i in range(8)] + ["control"])
    )
    return {"embedding": vectors, "perturbation": labels, "batch": labels}


CELL = {"indices": pa.array([[0]], pa.list_(pa.int32())), "counts": pa.array([[1]], pa.list_(pa.int32()))}
EMBED, SCORE, COMPARE, COLUMNS = "/v1/embed", "/v1/score", "/v1/compare", "/v1/columns"
BODIES: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "200,000 genes, one twice": (EMBED, protocol.JSON, lambda: _one_cell([*(f"g{i}" for i in range(199_999)), "g0"])),
    "a long name among 2,000,000": (EMBED, protocol.JSON, lambda: _one_cell([*map(str, range(2_000_000)), "x" * 512])),
    "30 MB of empty pairs": (
        COMPARE,
        protocol.JSON,
        lambda: b'{"perturbations":["a"],"embeddings":[[1]],"pairs":[' + b"[]," * 10_000_000 + b"[]]}",
    ),
    "60 MB of empty lists as metadata of Arrow": (
        COMPARE,
        protocol.ARROW,
        lambda: _stream(
            _table({**CELL, "perturbation": ["a"]}, '{"gene_ids":["a"],"pairs":[' + "[]," * 20_000_000 + "[]]}")
        ),
    ),
    "20,000,000 labels of one byte": (
        SCORE,
        protocol.ARROW,
        lambda: _stream(_table(_shared_vectors(20_000_000), '{"control":"control"}')),
    ),
    "a dictionary that grows 3,000 times": (SCORE, protocol.ARROW, _growing_dictionary),
    "100,000 batches of a row": (
        SCORE,
        protocol.ARROW,
        lambda: _stream(
            _table({k: v for k, v in _shared_vectors(100_000).items() if k != "batch"}, '{"control":"a"}'), rows=1
        ),
    ),
    "texts of a file that share their bytes": (COLUMNS, protocol.HDF5, _shared_texts),
    "180,000,000 ones in 0.2 MB": (EMBED, protocol.HDF5, lambda: _dense(20_000, 9_000)),
    "200,000,000 ones, too many by one column": (EMBED, protocol.HDF5, lambda: _dense(20_000, 10_001)),
}
"""Bodies that take much more than their bytes: path, media type, and the function that makes each."""


def _empty_pairs(n: int) -> bytes:
    number = protocol_number("pairs")
    return bytes([(number << 3) | 2, 0]) * n


def protocol_number(name: str) -> int:
    """Return the number of a field of CompareRequest."""
    from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb

    return int(pb.CompareRequest.DESCRIPTOR.fields_by_name[name].number)


async def _post(http: httpx.AsyncClient, path: str, kind: str, body: bytes, key: str) -> str:
    headers = {"content-type": kind, **({"x-api-key": key} if key else {})}
    try:
        reply = await http.post(path, content=body, headers=headers)
        return (
            f"{reply.status_code} {json.loads(reply.content)['error']['code']}" if reply.status_code != 200 else "200"
        )
    except httpx.TransportError as error:
        return type(error).__name__
    except (ValueError, KeyError, TypeError):
        return f"{reply.status_code}"


async def _call(channel: Any, method: str, body: bytes, key: str) -> str:
    try:
        metadata = (("x-api-key", key),) if key else ()
        await channel.unary_unary(method)(body, metadata=metadata, timeout=PATIENCE)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


def _percentile(seconds: list[float], share: float) -> str:
    return f"{1000 * float(np.quantile(seconds, share)):,.0f} ms" if seconds else "-"


@contextlib.contextmanager
def _limited(trial: Trial) -> Iterator[Group | None]:
    """Make the cgroup; where that is not possible, say so, and only sample what is resident."""
    try:
        group = Group()
    except OSError as error:
        trial.note(f"no cgroup could be made ({error}): the memory was only sampled, and nothing enforced the limit")
        yield None
        return
    try:
        yield group
    finally:
        group.close()


async def _attack(trial: Trial, *, key: bool) -> None:
    file = trial.folder / "keys.json"
    honest, hostile = add_key(file, "honest"), add_key(file, "hostile") if key else ""
    cells, expected = real_cells("pbmc3k", 1), right_vectors("pbmc3k", 1)
    bodies = {name: (path, kind, make()) for name, (path, kind, make) in BODIES.items()}
    got: dict[str, Counter[str]] = defaultdict(Counter)
    rss: list[int] = []
    quiet: dict[str, list[float]] = defaultdict(list)
    beside: dict[str, list[float]] = defaultdict(list)
    failures: Counter[str] = Counter()
    with (
        _limited(trial) as group,
        trial.service(keys=file, launched=group.add if group else None, inference_timeout=120) as server,
    ):
        async with (
            Asker(server, api_key=honest, timeout=120) as asker,
            httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http,
            grpc.aio.insecure_channel(server.target, [("grpc.max_send_message_length", -1)]) as channel,
        ):
            await asker.warm(cells)
            before = trial.before(server)
            workers = server.worker().pid
            stop = asyncio.Event()
            seconds = quiet

            async def caller(name: str) -> None:
                while not stop.is_set():
                    started = time.monotonic()
                    code, values = await trial.outcome(asker.ways[name](cells), count=False)
                    seconds[name].append(time.monotonic() - started)
                    if code != "ok" or not is_right(values, expected):
                        failures[f"{name}: {code}"] += 1
                    await asyncio.sleep(0.05)

            async def watch() -> None:
                while not stop.is_set():
                    rss.append((await asyncio.to_thread(_resident, server))[0])
                    await asyncio.sleep(0.1)

            ways = ("HTTP JSON", "HTTP Arrow", "gRPC")
            tasks = [asyncio.ensure_future(caller(name)) for name in ways] + [asyncio.ensure_future(watch())]
            await asyncio.sleep(trial.plan.times(10, 3))
            seconds = beside
            for name, (path, kind, body) in bodies.items():
                found = await asyncio.gather(*(_post(http, path, kind, body, hostile) for _ in range(AT_ONCE)))
                got[name].update(found)
            for name, method, body in (
                ("gRPC, 16 MB of empty pairs", "/perturbscope.v1.PerturbScope/Compare", _empty_pairs(8_000_000)),
                (
                    "gRPC, 64 MB to the health check",
                    "/grpc.health.v1.Health/Check",
                    b"\n\x80\x80\x80\x1e" + bytes(60 * MIB),
                ),
            ):
                found = await asyncio.gather(*(_call(channel, method, body, hostile) for _ in range(AT_ONCE)))
                got[name].update(found)
            stop.set()
            await asyncio.gather(*tasks)
            for name, codes in got.items():
                trial.note(f"{name}: {', '.join(f'{code} {n}' for code, n in codes.most_common())}")
                for code, n in codes.items():
                    trial.saw(code, n)
            for name in ways:
                alone, under = quiet[name], beside[name]
                trial.note(
                    f"honest, {name}: alone p50 {_percentile(alone, 0.5)}, p99 {_percentile(alone, 0.99)}; beside the "
                    f"attack {len(under):,} requests, p50 {_percentile(under, 0.5)}, p99 {_percentile(under, 0.99)}, "
                    f"at most {_percentile(under, 1.0)}"
                )
            answered = sum(map(len, beside.values()))
            trial.check(
                f"all {answered:,} requests of the honest key were answered rightly ({dict(failures) or 'no failure'})",
                answered > 0 and not failures,
            )
            trial.check(
                f"all processes together took at most {max(rss) / MIB:,.0f} MiB resident (before: "
                f"{before.rss / MIB:,.0f}; the container has {LIMIT / MIB:,.0f})",
                max(rss) < LIMIT,
            )
            if group:
                trial.check(
                    f"the kernel ended no process for want of memory ({group.kills}); its peak, files included: "
                    f"{group.peak / MIB:,.0f} MiB",
                    group.kills == 0,
                )
            trial.check("the process that answers is the same as before", server.worker().pid == workers)
            odd = {
                f"{name}: {code}" for name, codes in got.items() for code in codes if code[:1] == "5" or "Error" in code
            }
            trial.check(
                f"every hostile call got a typed refusal or an answer ({sorted(odd)[:4] or 'no exception'})", not odd
            )
            if not key:
                # The health check is open to all, and reads nothing of what it is sent.
                asked = {name: codes for name, codes in got.items() if "health" not in name}
                let_in = {code for codes in asked.values() for code in codes} - {
                    "401 unauthenticated",
                    "429 rate_limited",
                }
                let_in -= {"UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "429 overloaded", "WriteError", "ReadError"}
                trial.check(f"no stranger was let in ({sorted(let_in) or 'none'})", not let_in)
        trial.after(server, before, rss_mib=512, files=16)


def _resident(server: RunningServer) -> tuple[int, int]:
    total = n = 0
    for process in server.processes():
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
            n += 1
    return total, n


@fault("container", "A container of 4 GiB, one hostile key, others unharmed")
async def container(trial: Trial) -> None:
    """The service runs in a memory cgroup of 4 GiB (the kernel enforces it). A caller with a key sends, four at a time,
    all that is known to take much more memory or time than its bytes: names that are repeated, padded or without end,
    empty pairs, Arrow with metadata, labels, batches and dictionaries that grow, .h5ad files whose texts share their
    bytes or that unpack a thousandfold. Another key embeds one cell after the other over three interfaces."""
    await _attack(trial, key=True)


@fault("stranger", "A container of 4 GiB, a stranger without a key")
async def stranger(trial: Trial) -> None:
    """The same bodies, sent without a key, while a caller with a key embeds."""
    await _attack(trial, key=False)
