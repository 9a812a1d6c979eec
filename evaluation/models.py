"""Models that are compared: ways to turn the cells of a screen into vectors, which are computed once and cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from evaluation.baselines import hvg_expression, pca
from evaluation.screens import TRAINED, EvaluationScreen
from evaluation.scvi import ScviOptions, scvi_embedding
from perturbscope.cells.files import atomic
from perturbscope.errors import InvalidParameterError
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder

Kind = Literal["hvg", "pca", "scvi", "bundle", "obsm"]
Progress = Callable[[str, int, int], None]
CACHE_VERSION = 1
"""Version that is raised when a baseline's definition changes, so that older vectors are not used again."""


@dataclass(frozen=True)
class Model:
    """A way to embed cells.

    Attributes
    ----------
    name
        Name in tables.
    kind
        ``hvg``, ``pca``, ``scvi``, ``bundle`` (a directory) or ``obsm`` (a matrix of the file).
    options
        Options of the kind (JSON-able): ``n_genes``; ``n_components``; ``architecture`` and those of
        :class:`evaluation.scvi.ScviOptions`; ``path``; ``key``.
    """

    name: str
    kind: Kind
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InvalidParameterError(f"A model is one of {', '.join(get_args(Kind))}, not {self.kind!r}.")

    @property
    def fitted(self) -> bool:
        """Whether the model is fitted to the screen, so that its vectors depend on the cells of the screen."""
        return self.kind in ("hvg", "pca", "scvi")


@dataclass(frozen=True)
class Embedded:
    """Vectors of the held-out cells of a screen.

    Attributes
    ----------
    values
        Vectors, float32 [n_held_out, width].
    facts
        Record of what made the vectors (JSON-able).
    warnings
        Sentences that a reader should know before trusting a number.
    """

    values: NDArray[np.float32]
    facts: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def baselines(
    *, pca_components: Sequence[int] = (200, 50), hvg_genes: int = 300, scvi: ScviOptions | None = None
) -> list[Model]:
    """Return the models of Zhao et al. (2025) that need no pre-training; the two scVI only if options are given."""
    models = [Model(f"HVG-{hvg_genes}", "hvg", {"n_genes": hvg_genes})]
    models += [Model(f"PCA-{number}", "pca", {"n_components": number}) for number in pca_components]
    if scvi is not None:
        models += [
            Model(f"scVI-{name}", "scvi", {"architecture": architecture, **vars(scvi)})
            for name, architecture in (("Linear", "linear"), ("5L", "5L"))
        ]
    return models


def embed(
    model: Model, screen: EvaluationScreen, *, cache: Path | None = None, progress: Progress | None = None
) -> Embedded:
    """Return vectors of a screen's held-out cells, from `cache` if they were computed before.

    HVG and PCA are fitted to all cells of the screen, as Zhao et al. (2025) do: they use no label. scVI is trained on
    the training split, if there is one.

    Raises
    ------
    InvalidParameterError
        There are too few cells or genes for a baseline, a matrix of obsm is unknown, or scvi-tools is missing.
    BundleError, InvalidInputError
        The bundle cannot be opened, or cannot embed the cells.
    """
    bundle = Bundle.open(model.options["path"]) if model.kind == "bundle" else None
    if cache is None or model.kind == "obsm":
        embedded = _compute(model, screen, bundle, progress)
    else:
        embedded = _cached(cache / f"{cache_key(model, screen, bundle)}.npz", model, screen, bundle, progress)
    if bundle is not None:
        return replace(embedded, warnings=[*leaks(bundle, screen[screen.held_out]), *embedded.warnings])
    return embedded


def _cached(
    path: Path, model: Model, screen: EvaluationScreen, bundle: Bundle | None, progress: Progress | None
) -> Embedded:
    """Read vectors from `path`, or compute and write them if it does not exist."""
    if path.is_file():
        with np.load(path) as stored:
            facts = json.loads(str(stored["facts"]))
            return Embedded(stored["values"], facts["facts"], facts["warnings"])
    embedded = _compute(model, screen, bundle, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as staging, staging.open("wb") as file:
        text = json.dumps({"facts": embedded.facts, "warnings": embedded.warnings})
        np.savez(file, values=embedded.values, facts=np.asarray(text))
    return embedded


def cache_key(model: Model, screen: EvaluationScreen, bundle: Bundle | None = None) -> str:
    """Return the name of the stored vectors, from the model (a bundle by its checksum) and the cells."""
    identity: dict[str, Any] = {"kind": model.kind, "version": CACHE_VERSION}
    identity |= {"bundle": bundle.model_id} if bundle else {"options": model.options}
    held_out = screen.held_out
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    digest.update(screen.key().encode() if model.fitted else screen[held_out].key().encode())
    if model.fitted:
        digest.update(held_out.tobytes())
    return f"{model.kind}-{digest.hexdigest()[:20]}"


def _compute(model: Model, screen: EvaluationScreen, bundle: Bundle | None, progress: Progress | None) -> Embedded:
    held_out, options = screen.held_out, model.options
    if bundle is not None:
        return _from_bundle(bundle, screen[held_out], progress)
    if model.kind == "obsm":
        if options["key"] not in screen.obsm:
            raise InvalidParameterError(
                f"The screen {screen.name} was opened without obsm[{options['key']!r}].", field="obsm"
            )
        values = screen.obsm[options["key"]][held_out]
        return Embedded(values, {"width": values.shape[1], "obsm": options["key"]})
    warnings: list[str] = []
    facts: dict[str, Any]
    if model.kind == "hvg":
        values, n_silent = hvg_expression(screen.cells, n_genes=options["n_genes"])
        facts = {"fitted_on": "all cells", "cells_without_a_gene": n_silent}
        if n_silent:
            warnings.append(
                f"{n_silent} of {len(screen)} cells express none of the {values.shape[1]} most variable genes; they "
                "got the mean vector."
            )
        if values.shape[1] < options["n_genes"]:
            warnings.append(f"The screen has {values.shape[1]} genes; all of them were taken.")
    elif model.kind == "pca":
        values = pca(screen.cells, n_components=options["n_components"])
        facts = {"fitted_on": "all cells"}
        if values.shape[1] < options["n_components"]:
            warnings.append(f"The data allow {values.shape[1]} components.")
    else:
        rest = {key: value for key, value in options.items() if key != "architecture"}
        train = None if held_out.all() else np.asarray(screen.split) == TRAINED
        embedding = scvi_embedding(screen.cells, options["architecture"], train=train, options=ScviOptions(**rest))
        values, facts = embedding.values, embedding.facts
        facts = {**facts, "fitted_on": "all cells" if train is None else "the training split"}
        if facts["epochs_run"] >= facts["max_epochs"]:
            warnings.append(f"Training was cut off at {facts['max_epochs']} epochs, before early stopping ended it.")
        if facts["n_latent"] < options["n_latent"]:
            warnings.append(f"{facts['n_latent']} dimensions: half of the genes.")
    return Embedded(values[held_out], {"width": values.shape[1], **facts}, warnings)


def _from_bundle(bundle: Bundle, screen: EvaluationScreen, progress: Progress | None) -> Embedded:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("embed", done, len(screen))

    embeddings = Embedder.from_bundle(bundle).embed(screen.cells, progress=advance)
    coverage = embeddings.coverage.to_dict()
    facts = {
        "width": embeddings.values.shape[1],
        "model_id": embeddings.model_id,
        "vocabulary_hash": embeddings.vocabulary_hash,
        "n_genes": coverage["n_genes"],
        "n_genes_matched": coverage["n_matched"],
        "median_tokens": float(np.median(embeddings.lengths)),
    }
    return Embedded(embeddings.values, facts, embeddings.warnings())


def leaks(bundle: Bundle, screen: EvaluationScreen) -> list[str]:
    """Return a warning if the bundle was fine-tuned on perturbations of this file that are scored.

    Files are matched by name. Pre-training on the same cells is no leak, since it used no label.
    """
    # Bundles made elsewhere may hold anything here, or nothing.
    data, splits = (bundle.manifest.training.get(key) for key in ("data", "split"))
    if not isinstance(data, dict) or not isinstance(splits, dict):
        return []
    file = screen.provenance.get("file")
    for source in data.get("sources") or []:
        if Path(str(source.get("path", ""))).name != file or source.get("name") not in splits:
            continue
        targets = splits[source["name"]].get("targets") or {}
        seen = {name for part in (TRAINED, "validation") for name in targets.get(part, ())}
        scored = sorted(seen & set(screen.perturbations))
        if scored:
            return [
                f"Fine-tuned on this file, on {', '.join(scored)} and on some of the controls: what it shows of these "
                "is no evidence. Name the held-out cells (held_out)."
            ]
    return []
