"""A trial puts this on PYTHONPATH, so that files in the folder PERTURBSCOPE_TRIAL decide what the provider does.

``raise``: every forward pass fails. ``hang``: every forward pass waits until the file is gone.
"""

from __future__ import annotations

import os
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_MODULE = "perturbscope.inference.encoder"


class _Hook(MetaPathFinder):
    """Patches the encoder once it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch(module: Any) -> None:
    run, folder = module.OnnxEncoder.run, Path(os.environ["PERTURBSCOPE_TRIAL"])

    def troubled(self: Any, inputs: Any, outputs: Any) -> Any:
        while (folder / "hang").exists():
            time.sleep(0.05)
        if (folder / "raise").exists():
            raise RuntimeError("CUDA failure 999: unknown error; GPU=0 (simulated)")
        return run(self, inputs, outputs)

    module.OnnxEncoder.run = troubled


if "PERTURBSCOPE_TRIAL" in os.environ:
    sys.meta_path.insert(0, _Hook())
