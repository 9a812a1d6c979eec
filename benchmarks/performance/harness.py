"""Helpers of all parts: routes that take turns, peak memory of a separate process, facts and limits of the machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from perturbscope.threads import usable_cores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = ROOT / "data"
PACKAGES = ("numpy", "scipy", "onnxruntime", "torch", "transformers", "bentoml", "grpcio")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Amount of work of a run.

    Attributes
    ----------
    quick
        Whether sizes are small and repeats few, to see that the code runs; the numbers are not for a page.
    repeats
        Number of turns of each route.
    peers
        Python of an environment with requirements/peers.txt, or None.
    """

    quick: bool = False
    repeats: int = 5
    peers: Path | None = None


@dataclass(frozen=True)
class Section:
    """Result of a part.

    Attributes
    ----------
    markdown
        Tables, and sentences that follow from the numbers alone.
    numbers
        The same as data, which goes to JSON.
    figures
        Figures by file name without suffix.
    """

    markdown: str
    numbers: dict[str, Any]
    figures: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Turns:
    """Seconds of one route's turns."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, which tables show."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest over fastest turn."""
        return max(self.seconds) / min(self.seconds)


def race(
    routes: Mapping[str, Callable[[], object]], repeats: int, *, clock: Literal["wall", "cpu"] = "wall", warm: int = 1
) -> dict[str, Turns]:
    """Time routes that take turns, so that a disturbance of the machine affects all of them.

    Parameters
    ----------
    routes
        Functions to time, by name.
    repeats
        Number of turns of each.
    clock
        ``cpu`` counts the processor time of this process, for work in one thread; ``wall`` counts elapsed time.
    warm
        Number of turns before the first that counts.
    """
    now = time.process_time if clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for turn in range(-warm, repeats):
        for name, route in routes.items():
            started = now()
            route()
            if turn >= 0:
                seconds[name].append(now() - started)
    return {name: Turns(tuple(found)) for name, found in seconds.items()}


class Watch:
    """Peak resident memory of this process while a block runs, in MiB above what it held at its start."""

    def __init__(self, interval: float = 0.02) -> None:
        self._interval = interval
        self.before = self.peak = 0.0

    def __enter__(self) -> Watch:
        self.before = self.peak = resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.peak = max(self.peak, resident())

    def _look(self) -> None:
        while not self._over.wait(self._interval):
            self.peak = max(self.peak, resident())

    @property
    def above(self) -> float:
        """MiB that the block added at its highest."""
        return self.peak - self.before


def resident() -> float:
    """Return the resident memory of this process, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Child:
    """A function in a fresh process, and a pipe to it.

    Parameters
    ----------
    work
        Function of a module, called as ``work(pipe, *args)``; arguments and messages are pickled.
    environment
        Variables that are set before Python starts, for instance ``OMP_NUM_THREADS``.
    """

    def __init__(self, work: Callable[..., None], *args: Any, environment: Mapping[str, str] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, work, args), daemon=True)
        before = {name: os.environ.get(name) for name in environment or {}}
        os.environ.update(environment or {})
        try:
            self._process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        theirs.close()

    def send(self, message: object) -> None:
        """Send a message to the function."""
        self._pipe.send(message)

    def receive(self) -> Any:
        """Wait for a message of the function; raise ChildProcessError if it failed."""
        try:
            message = self._pipe.recv()
        except EOFError:
            message = _Failure("it ended without a word; the system may have killed it for want of memory")
        if isinstance(message, _Failure):
            raise ChildProcessError(message.text)
        return message

    def close(self) -> None:
        """Close the pipe and wait for the end of the process."""
        self._pipe.close()
        self._process.join(60)


@dataclass(frozen=True)
class _Failure:
    """The last message of a function that failed."""

    text: str


def _run(pipe: Any, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    try:
        work(pipe, *args)
    except Exception as error:  # noqa: BLE001  its parent raises it
        with contextlib.suppress(OSError):  # the parent may be gone
            pipe.send(_Failure(f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def in_child(work: Callable[..., Any], *args: Any, environment: Mapping[str, str] | None = None) -> tuple[Any, float]:
    """Return the result of ``work(*args)`` in a fresh process, and that process's peak resident memory in MiB."""
    child = Child(_once, work, args, environment=environment)
    try:
        result, peak = child.receive()
    except ChildProcessError as error:
        raise ChildProcessError(f"{work.__name__} failed in its process: {error}") from None
    child.close()
    return result, peak


def _once(pipe: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    result = work(*args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    pipe.send((result, peak))


def matmul_ceiling(shape: tuple[int, int, int] = (4096, 1024, 1024), *, seconds: float = 1.0) -> float:
    """Fastest rate of float32 matrix products [m, k] x [k, n] in ONNX Runtime on all usable cores, FLOP/s."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    m, k, n = shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [m, k])],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [m, n])],
        [helper.make_tensor("b", TensorProto.FLOAT, [k, n], np.ones((k, n), np.float32).tobytes(), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    a = np.random.default_rng(0).standard_normal((m, k), dtype=np.float32)
    session.run(None, {"a": a})
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        session.run(None, {"a": a})
        best = min(best, time.perf_counter() - started)
    return 2.0 * m * k * n / best


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(value) for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def tile(values: NDArray[Any], n: int) -> NDArray[Any]:
    """Repeat `values` to n rows."""
    return np.take(values, np.arange(n) % len(values), axis=0)


def machine() -> dict[str, str]:
    """Return the processor, cores, memory, accelerator, versions and load average of the machine."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": f"{cpu}, {usable_cores()} cores, {gib:.0f} GiB",
        "accelerator": _accelerator(),
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{a} {b}" for a, b in versions.items())]),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def _accelerator() -> str:
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or "none"
    except (OSError, subprocess.CalledProcessError):
        return "none"


def commit() -> str:
    """Return the commit that is measured, with a mark if files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "no checkout"


def padding_share(lengths: Sequence[int] | NDArray[np.integer], batches: Sequence[NDArray[np.integer]]) -> float:
    """Share of the slots that hold no token, in [0, 1), if each batch is padded to its longest cell."""
    lengths = np.asarray(lengths)
    slots = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    return 1.0 - sum(int(lengths[batch].sum()) for batch in batches) / slots if slots else 0.0
