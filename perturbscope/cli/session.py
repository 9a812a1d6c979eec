"""Opening what a command works with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbscope.cli import console
from perturbscope.cli.options import BUNDLE_VARIABLE, CA_VARIABLE
from perturbscope.errors import InvalidParameterError

if TYPE_CHECKING:
    from perturbscope.cells.readers import CellSource
    from perturbscope.tasks.backends import Backend, StageProgress


@contextmanager
def open_backend(
    bundle: Path | None, server: str | None, grpc: str | None, model: str | None, device: Any, variant: str
) -> Iterator[Backend]:
    """The one source of a model that was chosen."""
    from perturbscope.model import load

    chosen = [name for name, value in (("--bundle", bundle), ("--server", server), ("--grpc", grpc)) if value]
    if len(chosen) > 1:
        raise InvalidParameterError(f"{' and '.join(chosen)} exclude each other; give one.", field=chosen[1].strip("-"))
    default = os.environ.get(BUNDLE_VARIABLE)
    if grpc and "://" not in grpc:
        # Who names authorities to trust does not want to go without them.
        grpc = f"{'grpcs' if os.environ.get(CA_VARIABLE) else 'grpc'}://{grpc}"
    where = server or grpc or bundle or default
    if not where:
        raise InvalidParameterError(
            f"No model was chosen. Give --bundle DIR, --server URL or --grpc HOST:PORT, or set {BUNDLE_VARIABLE} to a "
            "bundle's directory.",
            field="bundle",
        )
    if server and "://" not in server:
        raise InvalidParameterError(f"--server {server} is not a URL; did you mean http://{server}?", field="server")
    with load(where, device=device, variant=variant, model=model) as opened:
        yield opened.backend


@contextmanager
def open_work(
    cells: Path, where: dict[str, str | None], use_rep: str | None, *chosen: Any
) -> Iterator[tuple[CellSource, Backend | None, StageProgress]]:
    """The cells, the model (None where a representation is scored in this process), and progress bars."""
    from perturbscope.cells.readers import open_cells

    with open_cells(cells, **where) as source, console.progress_bars() as progress:  # type: ignore[arg-type]
        if use_rep is not None and not any(chosen[1:3]):
            yield source, None, progress
            return
        with open_backend(*chosen) as backend:
            yield source, backend, progress
