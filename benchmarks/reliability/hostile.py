"""Hostile .h5ad files over the network."""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import h5py
import httpx
import numpy as np

from benchmarks.reliability.inputs import Asker, is_right, right_vectors_of
from benchmarks.reliability.trial import MIB, Trial, fault
from benchmarks.reliability.wire_bodies import BOUNDARY, form
from perturbscope import protocol
from tests.bundles import write_tiny_bundle
from tests.fuzz.mutators import mutate_bytes
from tests.fuzz.seeds import cells as seed_cells
from tests.fuzz.seeds import h5ad
from tests.integration.server import ROOT

LOOP = ROOT / "tests/fuzz/corpus/h5ad/attribute-loop"
"""A file found by fuzzing: libhdf5 1.14 loops for ever in one of its attributes."""
FILE_TIMEOUT = 3
"""Seconds that reading a file may take in this trial."""
ROUTES: tuple[tuple[str, dict[str, str]], ...] = (
    ("/v1/embed", {}),
    ("/v1/columns", {}),
    ("/v1/score", {"perturbation_key": "perturbation", "control": "control"}),
)


def changed(change: Callable[[h5py.File], object]) -> bytes:
    """Return a good file with a change."""
    target = io.BytesIO(h5ad(seed_cells(40)))
    with h5py.File(target, "r+") as file:
        change(file)
    return target.getvalue()


def _replace(path: str, **options: Any) -> Callable[[h5py.File], None]:
    """Return a change that replaces a dataset and keeps its attributes."""

    def change(file: h5py.File) -> None:
        attributes = dict(file[path].attrs)
        del file[path]
        file.create_dataset(path, **options).attrs.update(attributes)

    return change


def _object_column(file: h5py.File) -> None:
    kind = h5py.h5t.create(h5py.h5t.OPAQUE, 64)
    kind.set_tag(b"PYTHON:OBJECT")
    space = h5py.h5s.create_simple((8,))
    dataset = h5py.h5d.create(file["obs"].id, b"evil", kind, space)
    dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.full(8, b"cos\nsystem\n(S'id'\ntR.", "V64"), kind)
    file["obs"].attrs["column-order"] = np.array(["perturbation", "batch", "evil"], dtype=object)


def _ring(file: h5py.File) -> None:
    group = file["obs"].create_group("ring")
    group["back"] = file["obs"]
    group["self"] = group
    file["obs"].attrs["column-order"] = np.array(["ring"], dtype=object)


def _soft_ring(file: h5py.File) -> None:
    del file["X"]
    file["X"] = h5py.SoftLink("/Y")
    file["Y"] = h5py.SoftLink("/X")


def _deep(file: h5py.File) -> None:
    group = file
    for _ in range(3000):
        group = group.create_group("g")


def _wide(file: h5py.File) -> None:
    for number in range(20_000):
        file.create_group(f"uns/{number}")


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=(8,), dtype="i4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=(8,))
    attributes = dict(file["X/data"].attrs)
    del file["X/data"]
    file.create_virtual_dataset("X/data", layout).attrs.update(attributes)


def _external(file: h5py.File) -> None:
    del file["X"]
    file["X"] = h5py.ExternalLink("/etc/passwd", "/")


def _raw_storage(file: h5py.File) -> None:
    del file["X/data"]
    file.create_dataset("X/data", shape=(64,), dtype="i1", external=[("/etc/passwd", 0, 64)])


HUGE: dict[str, Any] = {"shape": (2**40,), "dtype": "i4", "chunks": (2**20,), "compression": "gzip"}
BOMB: dict[str, Any] = {"data": np.zeros(2**27, dtype=np.int8), "compression": "gzip", "compression_opts": 9}
ATTACKS: dict[str, Callable[[], bytes]] = {
    "filter bomb in counts (128 MiB of zeros)": lambda: changed(_replace("X/data", **BOMB)),
    "filter bomb in labels": lambda: changed(_replace("obs/perturbation", **BOMB)),
    "filter bomb in names of genes": lambda: changed(_replace("var/_index", **BOMB)),
    "bomb behind shuffle and gzip, twice as deep": lambda: changed(_replace("X/indices", **BOMB, shuffle=True)),
    "claimed shape of 2^40 counts": lambda: changed(_replace("X/data", **HUGE)),
    "claimed shape of 2^40 cells": lambda: changed(_replace("X/indptr", **HUGE)),
    "claimed dense matrix of 2^40": lambda: changed(
        _replace("X", shape=(2**20, 2**20), dtype="f4", chunks=(1024, 1024), compression="gzip")
    ),
    "shape attribute of 2^60 cells": lambda: changed(lambda file: file["X"].attrs.update({"shape": (2**60, 40)})),
    "negative shape attribute": lambda: changed(lambda file: file["X"].attrs.update({"shape": (-1, -1)})),
    "object column with a pickle": lambda: changed(_object_column),
    "cyclic groups": lambda: changed(_ring),
    "soft links in a ring": lambda: changed(_soft_ring),
    "groups 3,000 deep": lambda: changed(_deep),
    "20,000 groups": lambda: changed(_wide),
    "external link": lambda: changed(_external),
    "external storage": lambda: changed(_raw_storage),
    "virtual dataset": lambda: changed(_virtual),
    "attribute in which libhdf5 loops for ever": lambda: LOOP.read_bytes()[1:],
    "a file of zeros": lambda: bytes(MIB),
    "no bytes": lambda: b"",
    "the signature alone": lambda: b"\x89HDF\r\n\x1a\n",
}
HARMLESS = {"cyclic groups", "20,000 groups", "groups 3,000 deep", "object column with a pickle"}
"""Files that may be answered, since the changed parts are never read."""
REFUSED = {
    "unreadable_file",
    "limit_exceeded",
    "malformed_matrix",
    "not_raw_counts",
    "invalid_parameter",
    "missing_column",
    "control_label_missing",
    "empty_cell",
    "unknown_genes",
    "duplicate_genes",
    "too_few_cells",
    "too_few_controls",
}


@fault("hostile-files", "Hostile .h5ad files over the network")
async def hostile(trial: Trial) -> None:
    """Files with filter bombs, claimed shapes, object columns, rings, links out of the file and depth; a good file cut
    off at every tenth of its length; 500 copies with random damage. As body and as form, to embed, columns and score.
    Beside them, requests of good callers over HTTP and gRPC. A file may take 3 s to read in place of the default."""
    bundle = write_tiny_bundle(trial.folder / "tiny")
    good, cells = h5ad(seed_cells(40)), seed_cells(40)
    expected = right_vectors_of(cells, bundle)
    found: Counter[str] = Counter()
    odd: list[str] = []
    most = 0
    with trial.service(bundle=bundle, file_timeout=FILE_TIMEOUT, max_values=2_000_000, score_workers=2) as server:
        async with Asker(server) as asker, httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            await asker.warm(cells)
            before = trial.before(server)
            stop, right = asyncio.Event(), [0, 0]

            async def caller(client: Any) -> None:
                while not stop.is_set():
                    code, answer = await trial.outcome(client.embed_cells(cells), count=False)
                    right[code == "ok" and is_right(answer.values, expected)] += 1
                    await asyncio.sleep(0.05)

            async def watch() -> None:
                nonlocal most
                while not stop.is_set():
                    most = max(most, (await asyncio.to_thread(server.usage)).rss)
                    await asyncio.sleep(0.2)

            async def attack(name: str, content: bytes, route: int, as_form: bool, may_pass: bool) -> None:
                path, query = ROUTES[route % len(ROUTES)]
                if as_form:
                    kind, content, query = f"multipart/form-data; boundary={BOUNDARY}", form(content, **query), {}
                else:
                    kind = protocol.HDF5
                reply = await http.post(path, content=content, params=query, headers={"content-type": kind})
                code = "ok" if reply.status_code == 200 else _code(reply)
                found[code] += 1
                trial.saw(code)
                if code not in REFUSED and not (code == "ok" and may_pass):
                    odd.append(f"{name} to {path}: {reply.status_code} {code}")

            tasks = [asyncio.ensure_future(caller(client)) for client in (asker.json, asker.grpc)]
            tasks.append(asyncio.ensure_future(watch()))
            for name, make in ATTACKS.items():
                content = await asyncio.to_thread(make)
                for route in range(len(ROUTES)):
                    # A part that a route never reads cannot hurt it: columns and scores may be answered.
                    await attack(name, content, route, route == 1, name in HARMLESS or route > 0)
            whole = len(good)
            for tenth in range(10):
                await attack(f"cut at {tenth * 10} %", good[: whole * tenth // 10], tenth, tenth % 2 == 1, False)
            n = trial.plan.times(500, 30)
            for number in range(n):
                await attack("damaged", mutate_bytes(good, Random(number)), number, number % 2 == 1, True)
            stop.set()
            await asyncio.gather(*tasks)
            trial.check(
                f"all {sum(found.values())} files ended in a typed error, or were read where the damage did not matter "
                f"({odd[:5] or 'no exception'})",
                not odd,
            )
            trial.check(f"all {sum(right):,} good requests beside were answered rightly", not right[0] and right[1] > 0)
            grown = (most - before.rss) / MIB
            trial.check(
                f"memory of all processes at most {grown:.0f} MiB above that before (at most 1,024)", grown <= 1024
            )
        trial.after(server, before, rss_mib=256, files=16)


def _code(reply: httpx.Response) -> str:
    try:
        return str(json.loads(reply.content)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "no error of ours"
