"""The same graph behind a plain BentoML endpoint: `batchable`, with BentoML's own batching and its default limits."""

from __future__ import annotations

import os

import bentoml
import numpy as np
import onnxruntime as ort


@bentoml.service(workers=1, traffic={"timeout": 600}, logging={"access": {"enabled": False}})
class Plain:
    """Vectors of cells that their caller has tokenized and padded to the model's longest length."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(os.environ["PLAIN_THREADS"])
        self._session = ort.InferenceSession(os.environ["PLAIN_GRAPH"], options, providers=["CPUExecutionProvider"])
        self._pad = int(os.environ["PLAIN_PAD"])

    @bentoml.api(batchable=True)  # type: ignore[untyped-decorator]
    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """Embed a batch; columns of padding alone are cut off, as any service would do."""
        mask = tokens != self._pad
        longest = int(mask.sum(axis=1).max())
        feed = {"input_ids": tokens[:, :longest].astype(np.int64), "attention_mask": mask[:, :longest].astype(np.int64)}
        (values,) = self._session.run(["cell_embedding"], feed)
        return np.asarray(values)
