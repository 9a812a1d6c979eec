"""Division of perturbed genes and controls into training, validation and test, kept in ``splits.json``.

The division is by perturbed gene: all cells of a gene, whatever the guide and the data set, are in one part. Controls
are divided by cell.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.analysis.degs import count_degs, target_columns
from perturbscope.analysis.rank_test import RankTester
from perturbscope.cells.files import write_json
from perturbscope.cells.genes import GeneResolver
from perturbscope.errors import (
    ControlLabelMissingError,
    CorruptBundleError,
    InvalidParameterError,
    TooFewCellsError,
)
from perturbscope.scoring.cleaning import looks_missing
from training.config.stages import DegConfig, SourceConfig, SplitConfig
from training.data.copies import MAX_COPIES, in_both, shared_sources, without_copies
from training.data.shards import Corpus
from training.data.sources import Progress, expression_of, name_of, open_source
from training.data.targets import genes_of_guides, separated

PARTS = ("train", "validation", "test")
INELIGIBLE = "ineligible"
_FORMAT_VERSION = 1
_VALUES_AT_ONCE = 2**28
"""Most non-zero values in memory while genes are tested; a larger data set is read in several passes."""
_FEWEST = 2
"""Fewest cells of a target that is trained or validated on: one makes no pair."""
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
    say: Callable[[str], None] = lambda _: None,
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
    say
        Called with a sentence about labels that look like a mistake.

    Raises
    ------
    ControlLabelMissingError
        A data set has no cell with the control label.
    InvalidParameterError
        A listed target does not exist, a target to validate on is not eligible, or held-out cells are trained on.
    TooFewCellsError
        No target is left to train on.
    """
    named = [_names(corpus, number, source, say) for number, source in enumerate(sources)]
    genes = genes_of_guides(sorted({name for sizes in named for name in sizes}))
    counts: list[dict[str, int]] = [
        {}
        if source.unlabelled
        else count_source(
            corpus, number, source, degs, names=sorted(sizes), genes=genes if config.by_gene else {}, progress=progress
        )
        for number, (source, sizes) in enumerate(zip(sources, named, strict=True))
    ]
    # One cell makes no pair, so a target of one is not among those that are trained on.
    eligible = sorted(
        {
            name
            for found, sizes in zip(counts, named, strict=True)
            for name, n in found.items()
            if n >= degs.min_degs and sizes[name] >= _FEWEST
        }
    )
    known = {name for found in counts for name in found}
    parts = divide(eligible, known, config, genes=genes if config.by_gene else {})
    apart = separated(genes, {part: names for part, names in parts.items() if names})
    if apart:
        gene, labels = next(iter(apart.items()))
        say(
            f"Guides of {len(apart)} gene{'s' * (len(apart) > 1)} are both trained on and held out, such as "
            f"{', '.join(labels)} of {gene}. Set split.by_gene to keep the guides of a gene together."
        )
    if not parts["train"]:
        raise TooFewCellsError(
            f"No perturbation with at least {degs.min_degs} differentially expressed genes is left to train on "
            f"({len(eligible)} have as many). Lower degs.min_degs, or hold out fewer.",
            field="degs.min_degs",
        )
    splits = []
    for number, (source, found, sizes) in enumerate(zip(sources, counts, named, strict=True)):
        cells = np.zeros(0, dtype=np.int64) if source.unlabelled else _controls(corpus, number, source)
        controls = divide_controls(
            corpus.per_cell("row")[without_copies(corpus.digests, cells)],
            number,
            source.control_fractions or config.control_fractions,
            config.seed,
        )
        targets = {
            part: sorted(
                name
                for name in names
                if found.get(name, -1) >= (0 if part == "test" else degs.min_degs)
                and (part == "test" or sizes[name] >= _FEWEST)
            )
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
    _require_independent(corpus, sources, splits)
    return splits


def divide(
    eligible: Sequence[str], known: set[str], config: SplitConfig, *, genes: Mapping[str, str] | None = None
) -> dict[str, set[str]]:
    """Return the targets of each part: as listed, or a seeded choice with at least one in each part that has a share.

    Parameters
    ----------
    eligible
        Targets that can be trained on.
    known
        All targets.
    config
        Listed targets, shares and seed.
    genes
        Gene of each label that is a guide; those of one gene are in one part, and a listed gene stands for them all.

    Raises
    ------
    InvalidParameterError
        A listed target does not exist, or a target to validate on is not eligible.
    """
    if genes:
        together: dict[str, set[str]] = {}
        for name in known:
            together.setdefault(genes.get(name, name), set()).add(name)
        by_gene = [
            None if names is None else tuple(dict.fromkeys(genes.get(name, name) for name in names))
            for names in (config.validation, config.test)
        ]
        parts = divide(
            sorted({genes.get(name, name) for name in eligible}),
            set(together),
            replace(config, validation=by_gene[0], test=by_gene[1]),
        )
        usable = {"test": known, "train": set(eligible), "validation": set(eligible)}
        return {
            part: usable[part] & {name for gene in chosen for name in together[gene]} for part, chosen in parts.items()
        }
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
    corpus: Corpus,
    number: int,
    source: SourceConfig,
    config: DegConfig,
    *,
    names: Sequence[str],
    genes: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Count the differentially expressed genes of every perturbation of one data set.

    Parameters
    ----------
    corpus, number, source
        The data set.
    config
        Thresholds.
    names
        Perturbations, ascending.
    genes
        Gene of each label that is a guide, whose own expression is left out.
    progress
        See :func:`make_splits`.

    Raises
    ------
    ControlLabelMissingError
        No cell has the control label.
    """
    labels = corpus.labels(source.perturbation_key)
    inside = corpus.per_cell("source") == number
    rows, weights = corpus.per_cell("row"), corpus.per_cell("n_detected")
    digests = corpus.digests
    control_rows = rows[without_copies(digests, _controls(corpus, number, source))]
    rng = np.random.default_rng([_DEGS, number])
    if len(control_rows) > config.max_controls:
        control_rows = np.sort(rng.choice(control_rows, config.max_controls, replace=False))
    found: dict[str, int] = {}
    with open_source(source) as cells:
        tester = RankTester(expression_of(cells, control_rows))
        own = target_columns(cells.gene_ids, [(genes or {}).get(name, name) for name in names])
        columns = {name: own[gene] for name in names if (gene := (genes or {}).get(name, name)) in own}
        cells_of = {name: without_copies(digests, np.flatnonzero(inside & (labels == name))) for name in names}
        for group in _passes(names, {name: int(weights[cells_of[name]].sum()) for name in names}):
            wanted = np.sort(np.concatenate([rows[cells_of[name]] for name in group]))
            values = expression_of(cells, wanted)
            for name in group:
                perturbed = values[np.searchsorted(wanted, np.sort(rows[cells_of[name]]))]
                found[name] = count_degs(tester, perturbed, config, target=columns.get(name)).n_degs
                if progress:
                    progress(f"{name_of(source)}: genes", len(found), len(names))
    return found


def _names(corpus: Corpus, number: int, source: SourceConfig, say: Callable[[str], None]) -> dict[str, int]:
    """Return the perturbations of a data set, without text that stands for a missing value, and their cells."""
    if source.unlabelled:
        return {}
    labels = corpus.labels(source.perturbation_key)[corpus.per_cell("source") == number]
    names, sizes = np.unique(
        [name for name in labels if name is not None and name not in source.controls], return_counts=True
    )
    found = dict(zip(names.tolist(), sizes.tolist(), strict=True))
    missing = sorted(name for name in found if looks_missing(name))
    if missing:
        n_cells = sum(found.pop(name) for name in missing)
        say(
            f"{name_of(source)}: {n_cells:,} cells have {', '.join(map(repr, missing))} for a perturbation, which "
            "stands for a missing value. They are neither trained on nor held out."
        )
    resolver = GeneResolver.default()
    guides = genes_of_guides(found)
    strange = sorted(name for name in found if name not in guides and resolver.resolve(name)[0] is None)
    if strange and len(strange) < len(found):
        say(
            f"{name_of(source)}: {len(strange)} of {len(found)} perturbations have the name of no gene: "
            f"{', '.join(strange[:5])}{', ...' * (len(strange) > 5)}."
        )
    return found


def _require_independent(corpus: Corpus, sources: Sequence[SourceConfig], splits: Sequence[DataSplit]) -> None:
    """Refuse splits in which many held-out cells equal cells that are trained on.

    Raises
    ------
    InvalidParameterError
        They do: data sets, or perturbations of one, hold the same cells.
    """
    parts: dict[str, list[NDArray[np.int64]]] = {part: [] for part in PARTS}
    of_source, rows = corpus.per_cell("source"), corpus.per_cell("row")
    for number, (source, split) in enumerate(zip(sources, splits, strict=True)):
        inside = of_source == number
        if source.unlabelled:
            continue  # they teach the expression geometry alone, without labels
        labels = corpus.labels(source.perturbation_key)
        for part in PARTS:
            chosen = np.isin(labels, split.targets[part])
            controls = np.isin(labels, source.controls) & np.isin(rows, split.controls[part])
            parts[part].append(np.flatnonzero(inside & (chosen | controls)))
    trained, *held = (np.concatenate(cells) if cells else np.zeros(0, dtype=np.int64) for cells in parts.values())
    for part, cells in zip(PARTS[1:], held, strict=True):
        shared = in_both(corpus.digests, cells, trained)
        if shared.sum() > MAX_COPIES * max(len(cells), 1):
            names = [split.name for split in splits]
            first, second = shared_sources(corpus.digests, of_source, cells, trained, names)
            where = f"{first} holds them twice" if first == second else f"{first} and {second} hold the same cells"
            raise InvalidParameterError(
                f"{int(shared.sum()):,} of {len(cells):,} cells of the part {part} are trained on too (equal tokens in "
                f"equal order): {where}. Leave one out.",
                field="corpus.sources",
            )


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


def _controls(corpus: Corpus, number: int, source: SourceConfig) -> NDArray[np.int64]:
    """Return the numbers, in the corpus, of the controls of a data set."""
    inside = corpus.per_cell("source") == number
    labels = corpus.labels(source.perturbation_key)
    for label in source.controls:
        _require_control(label, labels[inside], source)
    return np.flatnonzero(inside & np.isin(labels, source.controls))


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
