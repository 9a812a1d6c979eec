"""Trouble with models: a bundle that is corrupt when it is to replace the one that serves, a provider that is lost."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.reliability.inputs import Asker, is_right, real_cells, right_vectors
from benchmarks.reliability.keys import add_key
from benchmarks.reliability.trial import Trial, fault
from perturbscope.inference.bundle import Bundle
from tests.bundles import tiny_files, tiny_manifest
from tests.integration.server import ROOT, RunningServer

HOOKS = Path(__file__).parent / "hooks"
BATCH_SECONDS = 5
"""Seconds after which a forward pass counts as hung in this trial."""


def put_bundle(folder: Path, *, seed: int, version: str) -> Path:
    """Write a tiny bundle of a version; `seed` decides its weights."""
    return Bundle.write(folder, tiny_manifest(version=version), tiny_files(seed=seed), overwrite=True).path


@fault("swap", "Corrupt bundle during a swap")
async def swap(trial: Trial) -> None:
    """A service with a repository of models serves a tiny bundle to eight callers. Again and again another bundle takes
    its place in the repository and is loaded: damaged ones (a byte of the graph changed, the graph cut off, a manifest
    that is no JSON, a vocabulary that does not fit, a file missing) and, between them, good ones with other weights."""
    repository = trial.folder / "repository"
    expected: dict[str, Any] = {}
    cells = real_cells("hill", 20)
    for seed in (0, 1):
        path = put_bundle(trial.folder / f"good{seed}", seed=seed, version=str(seed))
        expected[Bundle.open(path).model_id] = right_vectors("hill", 20, path)
    good = [trial.folder / f"good{seed}" for seed in (0, 1)]
    shutil.copytree(good[0], repository / "tiny")
    keys = trial.folder / "keys.json"
    admin = add_key(keys, "operator", "--right", "admin", "--right", "infer")
    with trial.service(repository=repository, repository_poll=0, keys=keys) as server:
        stop, wrong = asyncio.Event(), 0
        async with Asker(server, api_key=admin) as asker, httpx.AsyncClient(base_url=server.url, timeout=60) as http:

            async def caller(client: Any) -> None:
                nonlocal wrong
                while not stop.is_set():
                    code, answer = await trial.outcome(client.embed_cells(cells))
                    if code == "ok" and not is_right(answer.values, expected.get(answer.model_id, np.zeros(0))):
                        wrong += 1
                    await asyncio.sleep(0.01)

            async def load() -> int:
                headers = {"authorization": f"Bearer {admin}"}
                return (await http.post("/v2/repository/models/tiny/load", headers=headers, json={})).status_code

            before = trial.before(server)
            callers = [asyncio.ensure_future(caller(client)) for client in (asker.arrow, asker.grpc) * 4]
            refused: dict[str, int] = {}
            swapped = 0
            for number in range(trial.plan.times(4, 1)):
                for name, damage in DAMAGES.items():
                    place(repository / "tiny", good[(number + 1) % 2], damage)
                    refused[name] = await load()
                place(repository / "tiny", good[(number + 1) % 2], None)
                swapped += await load() == 200
                await asyncio.sleep(0.3)
            stop.set()
            await asyncio.gather(*callers)
            n = trial.plan.times(4, 1)
            trial.check(
                f"each damaged bundle was refused ({', '.join(f'{name}: {code}' for name, code in refused.items())})",
                all(400 <= code < 500 for code in refused.values()),
            )
            trial.check(f"{swapped} of {n} good bundles were swapped in", swapped == n)
            failed = {code: count for code, count in trial.seen.items() if code != "ok"}
            trial.check(
                f"all of {sum(trial.seen.values()):,} requests beside were answered, each with the vectors of "
                f"the model that it names ({failed or 'no'} errors, {wrong} wrong)",
                not failed and not wrong,
            )
        trial.after(server, before)


def place(where: Path, source: Path, damage: Any) -> None:
    """Replace a bundle by a copy of another, damaged if `damage` is given, by one rename."""
    fresh = where.with_name(f".{where.name}-new")
    shutil.copytree(source, fresh)
    if damage is not None:
        damage(fresh)
    old = where.with_name(f".{where.name}-old")
    where.rename(old)
    fresh.rename(where)
    shutil.rmtree(old)


def _change_byte(folder: Path) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)


DAMAGES: dict[str, Any] = {
    "a byte of the graph": _change_byte,
    "graph cut off": lambda folder: os.truncate(folder / "model.onnx", 1000),
    "manifest no JSON": lambda folder: (folder / "manifest.json").write_text("{"),
    "other vocabulary": lambda folder: (folder / "vocabulary.tsv").write_text("gene_id\ttoken_id\tmedian\n"),
    "no graph": lambda folder: (folder / "model.onnx").unlink(),
}


@fault("provider", "The model's provider is lost, and comes back")
async def provider(trial: Trial) -> None:
    """Simulated, in the real service: every forward pass raises as CUDA does when its device is gone; later, every
    forward pass hangs. Six callers go on asking over HTTP and gRPC. Each time the provider comes back after some
    seconds."""
    switch = trial.folder / "switch"
    switch.mkdir()
    environ = {"PERTURBSCOPE_TRIAL": str(switch), "PYTHONPATH": os.pathsep.join([str(HOOKS), str(ROOT)])}
    settings: dict[str, Any] = {"environ": environ, "bundle": put_bundle(trial.folder / "b", seed=0, version="1")}
    with trial.service(**settings, inference_timeout=BATCH_SECONDS) as server:
        cells, expected = real_cells("hill", 5), right_vectors("hill", 5, trial.folder / "b")
        async with Asker(server, timeout=60) as asker:
            before = trial.before(server)
            for fault_name in ("raise", "hang"):
                stop = asyncio.Event()
                seen: list[str] = []

                async def caller(way: str, stop: asyncio.Event = stop, seen: list[str] = seen) -> None:
                    while not stop.is_set():
                        code, values = await trial.outcome(asker.ways[way](cells))
                        seen.append(code if code != "ok" or is_right(values, expected) else "wrong")
                        await asyncio.sleep(0.05)

                callers = [asyncio.ensure_future(caller(way)) for way in ("HTTP JSON", "HTTP Arrow", "gRPC") * 2]
                await asyncio.sleep(1)
                (switch / fault_name).touch()
                lost = time.monotonic()
                red = await _until(server, "/readyz", False, 60)
                trial.check(f"{fault_name}: /readyz is red {red - lost:.1f} s after", red < lost + 60)
                trial.check(f"{fault_name}: /livez stays green", await asyncio.to_thread(server.answers, "/livez"))
                await asyncio.sleep(2)
                (switch / fault_name).unlink()
                back = time.monotonic()
                green = await _until(server, "/readyz", True, 60)
                trial.check(
                    f"{fault_name}: /readyz is green {green - back:.1f} s after it came back", green < back + 60
                )
                at = len(seen)
                await asyncio.sleep(2)
                stop.set()
                await asyncio.gather(*callers)
                trial.check(
                    f"{fault_name}: once green, all {len(seen) - at} answers are right",
                    len(seen) > at and set(seen[at + 6 :]) <= {"ok"},
                )
                codes = set(seen) - {"ok"}
                allowed = {"inference_failed", "provider_unavailable", "overloaded", "deadline_exceeded"}
                trial.check(
                    f"{fault_name}: callers got typed errors ({sorted(codes)})", bool(codes) and codes <= allowed
                )
            trial.all_typed()
            code, values = await trial.outcome(asker.ways["gRPC"](cells))
            trial.check("the last answer is right", code == "ok" and is_right(values, expected))
        trial.after(server, before)


async def _until(server: RunningServer, probe: str, wanted: bool, seconds: float) -> float:
    """When the probe answered so; the end of the wait if it never did."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if await asyncio.to_thread(server.answers, probe) is wanted:
            return time.monotonic()
        await asyncio.sleep(0.2)
    return end
