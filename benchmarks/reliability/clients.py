"""Clients that go away, and clients that are slow."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.reliability.inputs import Asker, is_right, real_cells, right_vectors
from benchmarks.reliability.trial import MIB, Trial, fault, settled
from perturbscope import protocol
from perturbscope.protocol import EmbedRequest, ScoreRequest
from perturbscope.protocol.proto.perturbscope_v1_pb2_grpc import PerturbScopeStub
from perturbscope.scoring.results import ScoreOptions
from tests.integration.server import ROOT, RunningServer

BODY_TIMEOUT = HEAD_TIMEOUT = 5
"""Seconds that a body, and a head, may take in the trial of slow clients, in place of the defaults."""


def head(server: RunningServer, path: str, content_type: str, length: int) -> bytes:
    """Return the head of an HTTP request."""
    return (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{server.http_port}\r\ncontent-type: {content_type}\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()


def connect(port: int) -> socket.socket:
    """Open a plain connection."""
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def hang_up(connection: socket.socket) -> None:
    """Close a connection with a reset, as a client that crashed does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@fault("gone", "Client gone in the middle of its request")
async def gone(trial: Trial) -> None:
    """Clients leave in every stage of a request: within the head, within the body, while the cells are tokenized,
    queued and run, while perturbations are scored, and after the first bytes of the answer; over HTTP by a reset or a
    close, over gRPC by a cancellation or a deadline. Eight at a time."""
    big = protocol.request_to_arrow(EmbedRequest(cells=real_cells("papalexi", 2000)))
    answer = protocol.request_to_arrow(EmbedRequest(cells=real_cells("hill", 1000)))
    vectors = np.random.default_rng(0).standard_normal((1200, 32)).astype(np.float32)
    score = ScoreRequest(
        embeddings=vectors,
        perturbations=("control",) * 600 + ("KO",) * 600,
        control="control",
        options=ScoreOptions(permutations=20_000),
    )
    rng = random.Random(0)
    stages = ["head", "body", "work", "work", "scoring", "answer", "gRPC work", "gRPC scoring", "gRPC deadline"]
    with trial.service(score_workers=2) as server:
        stub_messages = {
            "gRPC work": ("Embed", protocol.request_to_proto(EmbedRequest(cells=real_cells("papalexi", 2000)))),
            "gRPC scoring": ("Score", protocol.request_to_proto(score)),
        }
        stub_messages["gRPC deadline"] = stub_messages["gRPC work"]

        def over_http(stage: str, delay: float) -> str:
            connection = connect(server.http_port)
            body, path = (protocol.request_to_arrow(score), "/v1/score") if stage == "scoring" else (big, "/v1/embed")
            body = answer if stage == "answer" else body
            start = head(server, path, protocol.ARROW, len(body))
            if stage == "head":
                connection.sendall(start[: len(start) // 2])
            else:
                connection.sendall(start + (body[: len(body) // 2] if stage == "body" else body))
            if stage == "answer":
                connection.settimeout(120)
                connection.recv(100)
            else:
                time.sleep(delay)
            if delay < 0.2:
                connection.close()
            else:
                hang_up(connection)
            return f"left: {stage}"

        async def over_grpc(channel: Any, stage: str, delay: float) -> str:
            name, message = stub_messages[stage]
            timeout = max(delay, 0.01) if stage == "gRPC deadline" else None
            call = getattr(PerturbScopeStub(channel), name)(message, timeout=timeout)
            if timeout is None:
                await asyncio.sleep(delay)
                call.cancel()
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                await call
            return f"left: {stage}"

        async def leave(n: int) -> None:
            at_a_time = asyncio.Semaphore(8)
            async with grpc.aio.insecure_channel(server.target) as channel:

                async def one(number: int) -> str:
                    stage, delay = stages[number % len(stages)], rng.uniform(0, 0.6)
                    async with at_a_time:
                        if stage.startswith("gRPC"):
                            return await over_grpc(channel, stage, delay)
                        return await asyncio.to_thread(over_http, stage, delay)

                for left in await asyncio.gather(*(one(number) for number in range(n))):
                    trial.saw(left)

        # As many as are counted: what a service once needed for the heaviest of them, it keeps.
        await leave(trial.plan.times(198, 9))
        before = trial.before(server)
        n = trial.plan.times(198, 18)
        await leave(n)
        left_at = time.monotonic()
        async with Asker(server) as asker:
            values = await asker.arrow.embed_cells(real_cells("pbmc3k", 1))
        waited = time.monotonic() - left_at
        started = time.monotonic()
        await asyncio.to_thread(settled, server)
        rested = time.monotonic() - started
        trial.check(
            f"a request of one cell after the last had left was answered in {waited:.2f} s (at most 3)", waited < 3
        )
        trial.check("and rightly", is_right(values.values, right_vectors("pbmc3k", 1)))
        trial.check(
            f"work stopped: its CPU rested {rested:.0f} s later (at most 6; what was asked for takes minutes)",
            rested <= 6,
        )
        after = trial.after(server, before)
        trial.note(f"{(after.rss - before.rss) / n / 1024:.0f} KiB of RSS a client that left, after {n} of them")
        gone_lines = sum(server.log.count(f'"code": "{code}"') for code in ("client_gone", "deadline_exceeded"))
        trial.note(f"the log has {gone_lines} lines of clients that left or whose deadline passed")


class Slow:
    """Connections that do nothing or little; :meth:`turn` is called once a second."""

    def __init__(self) -> None:
        self.groups: dict[str, list[tuple[socket.socket, bytes, float]]] = {}
        self.ended: dict[str, list[float]] = {}
        self._held: set[int] = set()

    def open(self, group: str, port: int, n: int, first: bytes = b"", trickle: bytes = b"", buffer: int = 0) -> None:
        """Open `n` connections that send `first` at once and then `trickle`, one byte a second."""
        for _ in range(n):
            connection = socket.socket()
            if buffer:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            connection.settimeout(10)
            connection.connect(("127.0.0.1", port))
            connection.sendall(first)
            connection.setblocking(False)
            self.groups.setdefault(group, []).append((connection, trickle, time.monotonic()))
            self.ended.setdefault(group, [])

    def turn(self, second: int) -> None:
        """Let all connections do what they do in one second: send a byte, read a byte."""
        self._held = _held_ends()
        for name, group in self.groups.items():
            for item in list(group):
                connection, trickle, opened = item
                try:
                    if second < len(trickle):
                        connection.send(trickle[second : second + 1])
                    over = self._over(name, connection)
                except BlockingIOError:
                    over = False
                except OSError:
                    over = True
                if over:
                    self.ended[name].append(time.monotonic() - opened)
                    connection.close()
                    group.remove(item)

    def _over(self, name: str, connection: socket.socket) -> bool:
        """Return whether a connection has ended; a body that is refused has got an answer."""
        if name.startswith("read"):
            # What the kernel has taken can be read for hours after the service has closed its end.
            return connection.recv(1) == b"" or connection.getsockname()[1] not in self._held
        got = connection.recv(65536)
        return got == b"" or name.startswith("body")

    def close(self) -> None:
        """Close all connections."""
        for group in self.groups.values():
            for connection, _, _ in group:
                connection.close()


def ask_and_say(target: str) -> None:
    """Ask for the vectors of 2,000 cells over gRPC, and print a line once they are asked for."""
    message = protocol.request_to_proto(EmbedRequest(cells=real_cells("hill", 2000)))
    with grpc.insecure_channel(target, options=[("grpc.max_receive_message_length", -1)]) as channel:
        call: Any = PerturbScopeStub(channel).Embed
        answer = call.future(message)
        print("sent", flush=True)
        answer.result()


FROZEN = "import sys; from benchmarks.reliability.clients import ask_and_say; ask_and_say(sys.argv[1])"
"""Program of a client that is frozen before its answer comes."""


def _held_ends() -> set[int]:
    """Return the remote ports of all connections of this machine whose local end a process still holds."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(line[2].rpartition(":")[2], 16) for line in lines if line[9] != "0"}


@fault("slow", "Slow clients")
async def slow(trial: Trial) -> None:
    """At once: 300 connections to each port that send nothing, 50 that never finish their head, 50 that send one byte
    of their body a second, 20 that read their answer of some megabytes one byte a second, and 3 gRPC clients that are
    frozen (SIGSTOP) before their answer comes. Heads and bodies may take 5 s in place of the defaults. Beside them,
    requests of one cell."""
    times = trial.plan.times
    seconds = times(80, 12)
    body = protocol.request_to_json(EmbedRequest(cells=real_cells("hill", 2000)))
    with trial.service(body_timeout=BODY_TIMEOUT, head_timeout=HEAD_TIMEOUT) as server:
        async with Asker(server) as asker:
            quiet = await _latencies(asker, 60 if seconds > 30 else 15)
            before = trial.before(server)
            attack, frozen = Slow(), []
            try:
                for port, name in ((server.http_port, "HTTP"), (server.grpc_port, "gRPC")):
                    attack.open(f"idle {name}", port, times(300, 30))
                start = head(server, "/v1/embed", protocol.JSON, 1_000_000)
                attack.open("head never finished", server.http_port, times(50, 5), start[:20], start[20:60] * 10)
                attack.open("body a byte a second", server.http_port, times(50, 5), start, b"[" * 1000)
                request = head(server, "/v1/embed", protocol.JSON, len(body)) + body
                attack.open("read a byte a second", server.http_port, times(20, 3), request, buffer=4096)
                command = [sys.executable, "-c", FROZEN, server.target]
                for _ in range(times(3, 1)):
                    child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
                    assert child.stdout is not None
                    await asyncio.to_thread(child.stdout.readline)
                    child.send_signal(signal.SIGSTOP)
                    frozen.append(child)
                most, ends = 0, time.monotonic() + seconds
                task = asyncio.ensure_future(_latencies(asker, 10_000, until=ends))
                for second in range(seconds):
                    await asyncio.sleep(1)
                    attack.turn(second)
                    most = max(most, server.usage().rss)
                busy = await task
                held = server.usage()
            finally:
                attack.close()
                for child in frozen:
                    child.kill()
                    child.wait()
            _tell(trial, attack, seconds)
            trial.row.service.append(f"RSS at most {most / MIB:.0f} MiB, {held.files} files at the end of the attack")
            trial.check(
                f"RSS during the attack at most {(most - before.rss) / MIB:.0f} MiB above that before (at most 512)",
                most - before.rss <= 512 * MIB,
            )
            p99 = float(np.quantile(busy, 0.99)), float(np.quantile(quiet, 0.99))
            # The frozen and slow readers' own requests are computed in the first seconds; the rest must not notice.
            calm = busy[len(busy) // 2 :]
            trial.note(f"one cell, p99: {1000 * p99[1]:.0f} ms before, {1000 * p99[0]:.0f} ms in the whole attack")
            late, usual = float(np.quantile(calm, 0.99)), p99[1]
            trial.check(
                f"one cell, p99 once the slow clients' own requests are computed: {1000 * late:.0f} ms "
                f"(at most 2 x {1000 * usual:.0f} ms + 50 ms)",
                late <= 2 * usual + 0.05,
            )
            trial.saw("ok", len(busy))
            trial.check(f"all of {len(busy)} requests beside were answered rightly", len(busy) > 0)
            trial.all_typed()
        trial.after(server, before)


async def _latencies(asker: Asker, n: int, until: float | None = None) -> list[float]:
    cell, expected = real_cells("pbmc3k", 1), right_vectors("pbmc3k", 1)
    found = []
    for number in range(n):
        if until is not None and time.monotonic() > until:
            break
        started = time.monotonic()
        values = await asker.ways[("HTTP JSON", "gRPC")[number % 2]](cell)
        found.append(time.monotonic() - started)
        if not is_right(values, expected):
            raise AssertionError("wrong vectors")
        await asyncio.sleep(0.02)
    return found


def _tell(trial: Trial, attack: Slow, seconds: int) -> None:
    for name, left in attack.groups.items():
        ended = attack.ended[name]
        longest = f", the last after {max(ended):.0f} s" if ended else ""
        text = f"{name}: {len(ended)} of {len(ended) + len(left)} were ended by the service{longest}"
        if name.startswith("read") and trial.plan.quick:
            trial.note(text)
        else:
            trial.check(f"{text}, within {seconds} s", not left)
