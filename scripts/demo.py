"""The whole pipeline on the data in data/: counts, checkpoint, bundle, service, scored screen.

Run ``make demo`` or ``python scripts/demo.py``. Every step is a command that could be typed by hand, and is printed.
After an interruption the same command continues where it stopped; after a finished run it begins again.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("runs/demo")
DONE = OUT / "done"
PRETRAINED, FINE_TUNED = OUT / "pretrain" / "checkpoint", OUT / "contrastive" / "checkpoint"
HELDOUT = OUT / "contrastive" / "heldout.h5ad"
LABELS = ["--perturbation-key", "perturbation", "--control", "control"]
START_SECONDS = 120
console = Console(stderr=True)


def main() -> int:
    os.chdir(ROOT)
    if DONE.exists():
        shutil.rmtree(OUT)
    OUT.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    times: dict[str, float] = {}

    with step("Corpus: raw counts to rank tokens", times):
        corpus = OUT / "pretrain-corpus" / "manifest.json"
        python("-m", "training", "corpus", "training/configs/demo-pretrain.yaml", unless=corpus)
    with step("Pre-training: restore masked genes", times):
        python("-m", "training", "pretrain", "training/configs/demo-pretrain.yaml", unless=PRETRAINED)
    with step("Fine-tuning: perturbed cells apart from controls", times):
        python("-m", "training", "finetune", "training/configs/demo-contrastive.yaml", unless=FINE_TUNED)
    with step("Export: checkpoints to bundles", times):
        export = ["--version", "1", "--overwrite"]
        python("-m", "export", FINE_TUNED, OUT / "bundle", "--name", "demo", "--variant", "int8", *export)
        python("-m", "export", PRETRAINED, OUT / "bundle-pretrained", "--name", "demo-pretrained", *export)
    http_port, grpc_port = free_port(), free_port()
    with step("Service and scores: the held-out screen over HTTP and over gRPC", times), service(http_port, grpc_port):
        cli = [Path(sys.executable).with_name("perturbscope"), "score", HELDOUT]
        via_http, via_grpc = OUT / "scores.parquet", OUT / "scores-grpc.parquet"
        report = ["--report", OUT / "report.html"]
        run([*cli, via_http, *LABELS, *report, "--server", f"http://127.0.0.1:{http_port}"])
        run([*cli, via_grpc, *LABELS, "--top", "0", "--grpc", f"127.0.0.1:{grpc_port}"])
    tables = pd.read_parquet(via_http), pd.read_parquet(via_grpc)
    difference, of_p = (largest_difference(*tables, names) for names in (("distance", "z"), ("p",)))
    console.print(
        f"Largest difference between the two tables: {difference:.1e} of distance and z; {of_p:.2g} of p, "
        "whose exchanges follow the last bits of the vectors"
    )
    with step("Beside PCA and the pre-trained model, on the same held-out cells", times):
        python(
            "-m", "evaluation", HELDOUT,
            "--bundle", f"pre-trained={OUT / 'bundle-pretrained'}",
            "--bundle", f"fine-tuned={OUT / 'bundle'}",
            "--total-counts-key", "total_umi_full_transcriptome",
            "--batch-key", "batch", "--guide-key", "guide",
            "--out", OUT / "evaluation", "--cache", OUT / "evaluation-cache",
        )  # fmt: skip
    DONE.touch()
    show_times(times, time.perf_counter() - started)
    console.print(f"\nRanked table: {via_http}\nReport, to open in a browser: {OUT / 'report.html'}")
    return 0


@contextmanager
def step(title: str, times: dict[str, float]) -> Iterator[None]:
    """Print the title of a step, and record its seconds."""
    console.rule(f"[bold]{title}", align="left")
    started = time.perf_counter()
    yield
    times[title] = time.perf_counter() - started


def run(command: list[str | Path]) -> None:
    """Print a command and run it; the demo ends if it fails."""
    words = [str(word) for word in command]
    console.print(f"$ {shlex.join([Path(words[0]).name, *words[1:]])}", style="cyan", highlight=False, soft_wrap=True)
    finished = subprocess.run(words, check=False)
    if finished.returncode:
        console.print(f"The step failed with exit code {finished.returncode}. Run the demo again to continue here.")
        sys.exit(finished.returncode)


def python(*words: str | Path, unless: Path | None = None) -> None:
    """Run a module, unless `unless` exists from an earlier run of the demo."""
    if unless is not None and unless.exists():
        console.print(f"{unless} is there already.")
        return
    run([sys.executable, *words])


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def service(http_port: int, grpc_port: int) -> Iterator[None]:
    """Run the service on the demo's bundle, ready for requests; it is stopped at the end."""
    given = {"BUNDLE": OUT / "bundle", "HOST": "127.0.0.1", "HTTP_PORT": http_port, "GRPC_PORT": grpc_port}
    environment = os.environ | {f"PERTURBSCOPE_{name}": str(value) for name, value in given.items()}
    log_path = OUT / "service.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving"], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_until_ready(process, f"http://127.0.0.1:{http_port}/readyz", log_path)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            console.print("Service stopped.")


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                console.print("Service ready.")
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    console.print(f"The service did not start; {log_path} says why:\n{log_path.read_text()[-2000:]}", markup=False)
    sys.exit(1)


def largest_difference(a: pd.DataFrame, b: pd.DataFrame, names: tuple[str, ...]) -> float:
    """Return the largest difference of some columns between two score tables of the same screen."""
    keys = ["perturbation", "metric"]
    both = a.merge(b, on=keys, suffixes=("_a", "_b"), validate="one_to_one")
    if len(both) != len(a) or len(a) != len(b):
        console.print("The two tables do not hold the same perturbations.")
        sys.exit(1)
    return float(max(np.nanmax(np.abs(both[f"{name}_a"] - both[f"{name}_b"])) for name in names))


def show_times(times: dict[str, float], total: float) -> None:
    table = Table("step", "seconds")
    for title, seconds in [*times.items(), ("all", total)]:
        table.add_row(title, f"{seconds:.0f}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
