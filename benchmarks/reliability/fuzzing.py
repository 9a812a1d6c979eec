"""Fuzzed requests over the network, and fuzzed decoders."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import grpc
import httpx
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from benchmarks.reliability.inputs import Asker, is_right, right_vectors_of
from benchmarks.reliability.trial import Trial, fault
from benchmarks.reliability.wire_bodies import BOUNDARY, form
from perturbscope import protocol
from perturbscope.protocol import EmbedRequest
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
from perturbscope.protocol.proto.open_inference_pb2 import ModelInferRequest
from tests.bundles import write_tiny_bundle
from tests.fuzz.mutators import mutate_arrow, mutate_bytes, mutate_json, mutate_proto
from tests.fuzz.seeds import cells as seed_cells
from tests.fuzz.seeds import h5ad, seeds
from tests.integration.server import ROOT

AT_A_TIME = 25
FUZZ_ENVIRONMENT = ROOT / "runs" / "fuzz"
"""Environment with atheris, beside the project's own."""
Mutator = Callable[[bytes, Random], bytes]


@dataclass(frozen=True)
class Case:
    """A valid request that is mutated."""

    name: str
    body: bytes
    mutate: Mutator
    path: str = ""
    kind: str = ""
    query: tuple[tuple[str, str], ...] = ()
    rpc: str = ""


def cases() -> list[Case]:
    """Return a valid request for every route and form."""
    found = {
        target: {name: data[1:] for name, data in items.items()}
        for target, items in seeds().items()
        if target != "h5ad"
    }
    cells = seed_cells(40)
    small = EmbedRequest(cells=cells)
    labelled = (("perturbation_key", "perturbation"), ("control", "control"))
    routes = {"embed": "embed_request", "score": "score_request", "compare": "compare_request"}
    made = [
        Case("embed, JSON", protocol.request_to_json(small), mutate_json, "/v1/embed", protocol.JSON),
        Case("embed, Arrow", protocol.request_to_arrow(small), mutate_arrow, "/v1/embed", protocol.ARROW),
        Case("stream, Arrow", found["stream"]["request-arrow"], mutate_bytes, "/v1/embed/stream", protocol.ARROW),
        Case("infer, JSON", found["kserve"]["json"], mutate_json, "/v2/models/tiny/infer", protocol.JSON),
        Case("columns, h5ad", h5ad(cells), mutate_bytes, "/v1/columns", protocol.HDF5),
        Case("embed, h5ad", h5ad(cells), mutate_bytes, "/v1/embed", protocol.HDF5),
        Case(
            "score, form",
            form(h5ad(cells), **dict(labelled)),
            mutate_bytes,
            "/v1/score",
            f"multipart/form-data; boundary={BOUNDARY}",
        ),
        Case("score, h5ad", h5ad(cells), mutate_bytes, "/v1/score", protocol.HDF5, labelled),
        Case(
            "Embed",
            protocol.request_to_proto(small).SerializeToString(),
            mutate_proto(pb.EmbedRequest),
            rpc="perturbscope.v1.PerturbScope/Embed",
        ),
        Case(
            "infer",
            found["kserve"]["proto"],
            mutate_proto(ModelInferRequest),
            rpc="inference.GRPCInferenceService/ModelInfer",
        ),
        Case(
            "infer, raw",
            found["kserve"]["proto-raw"],
            mutate_proto(ModelInferRequest),
            rpc="inference.GRPCInferenceService/ModelInfer",
        ),
    ]
    for route, name in routes.items():
        if route != "embed":
            made.append(Case(f"{route}, JSON", found["json"][name], mutate_json, f"/v1/{route}", protocol.JSON))
            made.append(Case(f"{route}, Arrow", found["arrow"][name], mutate_arrow, f"/v1/{route}", protocol.ARROW))
            kind = {"score": pb.ScoreRequest, "compare": pb.CompareRequest}[route]
            rpc = f"perturbscope.v1.PerturbScope/{route.capitalize()}"
            made.append(Case(route.capitalize(), found["proto"][name], mutate_proto(kind), rpc=rpc))
    made.append(Case("report, JSON", found["json"]["score_request"], mutate_json, "/v1/report", protocol.JSON))
    return made


@fault("fuzzed", "Ten thousand fuzzed requests")
def fuzzed(trial: Trial) -> None:
    """Valid requests of every route and form (JSON, Arrow, .h5ad, forms, protobuf, streams, Open Inference), mutated as
    hypothesis chooses: fields replaced, removed, repeated and exchanged, columns cut and cast, bytes changed. HTTP and
    gRPC, 25 at a time, on a tiny bundle. Afterwards a right answer is asked for."""
    n = trial.plan.times(10_000, 300)
    bundle = write_tiny_bundle(trial.folder / "tiny")
    known = cases()
    bad: Counter[str] = Counter()
    by_transport: Counter[str] = Counter()
    examples: list[str] = []
    batches = st.lists(
        st.tuples(st.sampled_from(known), st.integers(0, 2**32 - 1)), min_size=AT_A_TIME, max_size=AT_A_TIME
    )
    with trial.service(bundle=bundle, file_timeout=3, max_permutations=1000) as server, asyncio.Runner() as runner:
        http = httpx.AsyncClient(base_url=server.url, timeout=60)
        channel: Any = None

        async def one(case: Case, number: int) -> None:
            body = case.mutate(case.body, Random(number))
            if case.rpc:
                code, wrong = await _over_grpc(channel, case, body)
            else:
                code, wrong = await _over_http(http, case, body)
            by_transport["gRPC" if case.rpc else "HTTP"] += 1
            trial.saw(code)
            if wrong:
                bad[f"{case.name}: {code}"] += 1
                examples.append(f"{case.name} {number}")

        async def batch(chosen: list[tuple[Case, int]]) -> None:
            await asyncio.gather(*(one(case, number) for case, number in chosen))

        async def begin() -> None:
            nonlocal channel
            channel = grpc.aio.insecure_channel(server.target)
            async with Asker(server) as asker:
                await asker.warm(seed_cells(40))
            await batch([(case, number) for case in known for number in range(2)])

        async def end() -> bool:
            await http.aclose()
            await channel.close()
            async with Asker(server) as asker:
                found = [await way(seed_cells(40)) for way in asker.ways.values()]
            expected = right_vectors_of(seed_cells(40), bundle)
            return all(is_right(values, expected) for values in found)

        runner.run(begin())
        before = trial.before(server)

        @seed(0)
        @settings(max_examples=n // AT_A_TIME, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(batches)
        def many(chosen: list[tuple[Case, int]]) -> None:
            runner.run(batch(chosen))

        many()
        sent = ", ".join(f"{count:,} over {transport}" for transport, count in by_transport.items())
        trial.check(
            f"{sent}: none was answered with 500, INTERNAL or UNKNOWN, or without a typed error "
            f"({dict(bad.most_common(5)) or 'no exception'}; {examples[:5]})",
            not bad,
        )
        trial.check(
            f"{sum(by_transport.values()):,} requests were sent (at least {n:,})", sum(by_transport.values()) >= n
        )
        trial.check("the next answers over every interface are right", runner.run(end()))
        trial.after(server, before, rss_mib=128)


async def _over_http(http: httpx.AsyncClient, case: Case, body: bytes) -> tuple[str, bool]:
    headers = {"content-type": case.kind}
    reply = await http.post(case.path, content=body, headers=headers, params=dict(case.query) or None)
    if reply.status_code == 200:
        return "ok", False
    try:
        inner = json.loads(reply.content)["error"]
    except (ValueError, KeyError, TypeError):
        return f"HTTP {reply.status_code}", True
    code = str(inner["code"]) if isinstance(inner, dict) else f"HTTP {reply.status_code}"
    return code, reply.status_code >= 500 or code == "internal"


async def _over_grpc(channel: Any, case: Case, body: bytes) -> tuple[str, bool]:
    call = channel.unary_unary(f"/{case.rpc}", request_serializer=None, response_deserializer=None)
    try:
        await call(body, timeout=60)
    except grpc.aio.AioRpcError as error:
        sent = dict(error.trailing_metadata() or ()).get("perturbscope-code", error.code().name)
        return str(sent), error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    return "ok", False


@fault("schemathesis", "Requests made from the OpenAPI document")
def schemathesis(trial: Trial) -> None:
    """schemathesis reads /v1/openapi.json and sends what it allows and what it does not, to every operation, with all
    of its checks (`python -m tests.integration.openapi`; in little a test, tests/integration/test_openapi.py): the
    routes in a server of their own over a tiny bundle, with keys."""
    command = [sys.executable, "-m", "tests.integration.openapi", "--seed", "1"]
    command += ["--max-examples", str(trial.plan.times(20, 2)), "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, cwd=ROOT)
    told = [line.strip() for line in done.stdout.splitlines() if re.search(r"\bcases\b|generated|Tested:", line)]
    for line in told[-4:]:
        trial.note(line)
    counted = re.search(r"([\d,]+) (?:generated|cases)", done.stdout)
    if counted:
        trial.saw("as the document says", int(counted.group(1).replace(",", "")))
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:])
    trial.check(f"schemathesis found nothing (exit code {done.returncode})", done.returncode == 0)
    trial.row.service.append("in a process of its own, without BentoML")


@fault("decoders", "Fuzzed decoders (atheris)")
def decoders(trial: Trial) -> None:
    """atheris runs every decoder of tests/fuzz/targets.py, guided by coverage, with mutations that know the formats:
    requests and answers as JSON, Arrow and protobuf, streams, the Open Inference Protocol. What is accepted is
    tokenized, encoded and read again. A committed corpus is replayed by tests/fuzz/test_corpus.py."""
    python = _fuzz_python()
    corpora = trial.folder / "corpora"
    subprocess.run([sys.executable, "-m", "tests.fuzz.seeds", str(corpora)], cwd=ROOT, check=True)
    seconds = trial.plan.times(25, 5)
    runs = 0
    for target in ("json", "arrow", "proto", "stream", "kserve"):
        found = trial.folder / "found" / target
        found.mkdir(parents=True)
        command = [str(python), "-m", f"tests.fuzz.fuzz_{target}", str(corpora / target), f"-max_total_time={seconds}"]
        command += ["-max_len=32768", "-timeout=20", "-rss_limit_mb=3000", f"-artifact_prefix={found}/", "-seed=1"]
        command += [f"-dict={corpora / 'words.dict'}", "-print_final_stats=1"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 120, check=False)
        match = re.search(r"Done (\d+) runs", done.stderr)
        count = int(match.group(1)) if match else 0
        findings = sorted(path.name for path in found.iterdir())
        runs += count
        if findings or done.returncode:
            print(done.stderr[-3000:])
        trial.check(
            f"{target}: {count:,} executions in {seconds} s, {len(findings)} findings",
            done.returncode == 0 and count > 0 and not findings,
        )
    trial.row.service.append(f"{runs:,} executions, in a process without the service")


def _fuzz_python() -> Path:
    """Return an interpreter with atheris and all packages of this one; it is made on first use."""
    python = FUZZ_ENVIRONMENT / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(FUZZ_ENVIRONMENT)], check=True)
        site = next((FUZZ_ENVIRONMENT / "lib").glob("python*/site-packages"))
        own = next(path for path in sys.path if path.endswith("site-packages"))
        (site / "project.pth").write_text(own + "\n")
        pins = ROOT / "requirements" / "fuzz.txt"
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(pins)], check=True)
    return python
