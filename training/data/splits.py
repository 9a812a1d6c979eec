"""Division of perturbed genes and controls into training, validation and test, kept in ``splits.json``.

The division is by perturbed gene: all cells of a gene, whatever the guide and the data set, are in one part. Controls
are divided by cell.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.analysis.degs import count_degs, target_columns
from perturbscope.analysis.rank_test import RankTester
from perturbscope.cells.files import write_json
from perturbscope.errors import (
    ControlLabelMissingError,
    CorruptBundleError,
    InvalidParameterError,
    TooFewCellsError,
)
from training.config.stages import DegConfig, SourceConfig, SplitConfig
from training.data.shards import Corpus
from training.data.sources import Progress, expression_of, name_of, open_source

PARTS = ("train", "validation", "test")
INELIGIBLE = "ineligible"
_FORMAT_VERSION = 1
_VALUES_AT_ONCE = 2**28
"""Most non-zero values in memory while genes are tested; a larger data set is read in several passes."""
_CONTROLS, _TARGETS, _DEGS = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class DataSplit:
    """The split of one data set.

    Attributes
    ----------
    name
        Name of the data set.
    degs
        Number of differentially expressed genes of each perturbation.
    targets
        Perturbations of each part: train, validation, test; and ``ineligible``, which have too few such genes.
    controls
        Rows, in the file, of the controls of each part.
    """

    name: str
    degs: dict[str, int]
    targets: dict[str, list[str]]
    controls: dict[str, list[int]]


def make_splits(
    corpus: Corpus,
    sources: Sequence[SourceConfig],
    degs: DegConfig,
    config: SplitConfig,
    *,
    progress: Progress | None = None,
) -> list[DataSplit]:
    """Count differentially expressed genes, and divide perturbations and controls.

    Parameters
    ----------
    corpus
        Tokenized cells; no others take part.
    sources
        Data sets of the corpus, in its order.
    degs, config
        Thresholds and shares.
    progress
        Called with a data set, and its perturbations: those done, and all.

    Raises
    ------
    ControlLabelMissingError
        A data set has no cell with the control label.
    InvalidParameterError
        A listed target does not exist, or a target to validate on is not eligible.
    TooFewCellsError
        No target is left to train on.
    """
    counts: list[dict[str, int]] = [
        {} if source.unlabelled else count_source(corpus, number, source, degs, progress=progress)
        for number, source in enumerate(sources)
    ]
    eligible = sorted({name for found in counts for name, n in found.items() if n >= degs.min_degs})
    parts = divide(eligible, {name for found in counts for name in found}, config)
    if not parts["train"]:
        raise TooFewCellsError(
            f"No perturbation with at least {degs.min_degs} differentially expressed genes is left to train on "
            f"({len(eligible)} have as many). Lower degs.min_degs, or hold out fewer.",
            field="degs.min_degs",
        )
    splits = []
    for number, (source, found) in enumerate(zip(sources, counts, strict=True)):
        rows = np.zeros(0, dtype=np.int64) if source.unlabelled else _controls(corpus, number, source)[1]
        controls = divide_controls(rows, number, source.control_fractions or config.control_fractions, config.seed)
        targets = {
            part: sorted(name for name in names if found.get(name, -1) >= (0 if part == "test" else degs.min_degs))
            for part, names in parts.items()
        }
        # Weak here but trained on in another data set: neither used here nor called unseen.
        used = parts["train"] | parts["validation"] | parts["test"]
        splits.append(
            DataSplit(
                name=name_of(source),
                degs=dict(sorted(found.items())),
                targets={**targets, INELIGIBLE: sorted(set(found) - used)},
                controls={part: found.tolist() for part, found in controls.items()},
            )
        )
    return splits


def divide(eligible: Sequence[str], known: set[str], config: SplitConfig) -> dict[str, set[str]]:
    """Return the targets of each part: as listed, or a seeded choice with at least one in each part that has a share.

    Raises
    ------
    InvalidParameterError
        A listed target does not exist, or a target to validate on is not eligible.
    """
    if config.test is not None and config.validation is not None:
        for name in (*config.test, *config.validation):
            if name not in known:
                raise InvalidParameterError(f"There is no perturbation {name!r} to hold out.", field="split.test")
        weak = set(config.validation) - set(eligible)
        if weak:
            raise InvalidParameterError(
                f"{min(weak)} cannot be validated on: it has too few differentially expressed genes.",
                field="split.validation",
            )
        test, validation = set(config.test), set(config.validation)
        return {"train": set(eligible) - test - validation, "validation": validation, "test": test}
    order = np.random.default_rng([config.seed, _TARGETS]).permutation(np.asarray(eligible, dtype=object)).tolist()
    sizes = [max(1, round(share * len(order))) if share else 0 for share in config.fractions[1:]]
    n_train = max(0, len(order) - sum(sizes))
    return {
        "train": set(order[:n_train]),
        "validation": set(order[n_train : n_train + sizes[0]]),
        "test": set(order[n_train + sizes[0] :]),
    }


def divide_controls(
    rows: NDArray[np.integer[Any]], number: int, shares: Sequence[float], seed: int
) -> dict[str, NDArray[np.integer[Any]]]:
    """Return the rows of the controls of each part, ascending.

    Parameters
    ----------
    rows
        Rows of all controls of a data set.
    number
        Number of the data set in the corpus.
    shares
        Share of each part.
    seed
        Seed of the split.
    """
    order = np.random.default_rng([seed, _CONTROLS, number]).permutation(rows)
    bounds = np.rint(np.cumsum((0.0, *shares)) * len(order)).astype(int)
    return {part: np.sort(order[bounds[at] : bounds[at + 1]]) for at, part in enumerate(PARTS)}


def count_source(
    corpus: Corpus, number: int, source: SourceConfig, config: DegConfig, *, progress: Progress | None = None
) -> dict[str, int]:
    """Count the differentially expressed genes of every perturbation of one data set.

    Raises
    ------
    ControlLabelMissingError
        No cell has the control label.
    """
    labels = corpus.labels(source.perturbation_key)
    inside = corpus.per_cell("source") == number
    rows, weights = corpus.per_cell("row"), corpus.per_cell("n_detected")
    names = sorted({name for name in labels[inside] if name is not None and name not in source.controls})
    _, control_rows = _controls(corpus, number, source)
    rng = np.random.default_rng([_DEGS, number])
    if len(control_rows) > config.max_controls:
        control_rows = np.sort(rng.choice(control_rows, config.max_controls, replace=False))
    found: dict[str, int] = {}
    with open_source(source) as cells:
        tester = RankTester(expression_of(cells, control_rows))
        columns = target_columns(cells.gene_ids, names)
        cells_of = {name: np.flatnonzero(inside & (labels == name)) for name in names}
        for group in _passes(names, {name: int(weights[cells_of[name]].sum()) for name in names}):
            wanted = np.sort(np.concatenate([rows[cells_of[name]] for name in group]))
            values = expression_of(cells, wanted)
            for name in group:
                perturbed = values[np.searchsorted(wanted, np.sort(rows[cells_of[name]]))]
                found[name] = count_degs(tester, perturbed, config, target=columns.get(name)).n_degs
                if progress:
                    progress(f"{name_of(source)}: genes", len(found), len(names))
    return found


def save_splits(path: Path, splits: Sequence[DataSplit], *, fingerprint: str) -> None:
    """Write ``splits.json``."""
    values = {
        "format_version": _FORMAT_VERSION,
        "fingerprint": fingerprint,
        "data_sets": [vars(split) for split in splits],
    }
    write_json(path, values)


def load_splits(path: Path, *, fingerprint: str) -> list[DataSplit] | None:
    """Read ``splits.json``; None if it does not exist, or has another fingerprint.

    Raises
    ------
    CorruptBundleError
        The file is damaged.
    """
    if not path.exists():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] != _FORMAT_VERSION or values["fingerprint"] != fingerprint:
            return None
        return [DataSplit(**split) for split in values["data_sets"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptBundleError(f"{path} cannot be read: {error}. Remove it; it is made again.") from error


def _controls(corpus: Corpus, number: int, source: SourceConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the controls of a data set: their numbers in the corpus and their rows in the file."""
    inside = corpus.per_cell("source") == number
    labels = corpus.labels(source.perturbation_key)
    for label in source.controls:
        _require_control(label, labels[inside], source)
    controls = np.flatnonzero(inside & np.isin(labels, source.controls))
    return controls, corpus.per_cell("row")[controls]


def _require_control(label: str, labels: NDArray[Any], source: SourceConfig) -> None:
    if not (labels == label).any():
        raise ControlLabelMissingError(
            f"{source.path}: no cell has the label {label!r} in {source.perturbation_key!r}. "
            "Name the controls' label with 'control' under the source.",
            field="control",
        )


def _passes(names: Sequence[str], values: dict[str, int]) -> list[list[str]]:
    """Group perturbations so that the non-zero values of a group fit into memory together."""
    groups: list[list[str]] = []
    held = _VALUES_AT_ONCE
    for name in names:
        if held + values[name] > _VALUES_AT_ONCE:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += values[name]
    return groups
