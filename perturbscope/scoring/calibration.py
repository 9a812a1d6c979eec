"""Calibration of p and z: controls scored against controls.

Nothing was done to these cells, so their p-values must be uniform and their z must have mean 0 and sd 1. There are two
kinds of split:

``cell``
    Random cells of the controls against the others. Uniform p-values show that the test holds its level.
``batch``
    The controls of some batches (wells, donors, runs) against those of the others. p-values that pile up at 0 show
    that batches differ by themselves; then a perturbation confined to a few batches gets a small p for that alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perturbscope.errors import InvalidParameterError
from perturbscope.scoring.cleaning import cleaned_for
from perturbscope.scoring.labels import MIN_CONTROLS, Groups
from perturbscope.scoring.results import FLAGS, Metric, ScoreOptions, provenance
from perturbscope.scoring.scorers import GroupMaker, Scored, make_scorer
from perturbscope.scoring.statistics import Uniformity, generator, uniformity
from perturbscope.threads import checkpoint

MOST_CELLS = 50_000
"""Most controls of which whole batches are chosen."""
MAX_CALIBRATION_CELLS = 1000
"""Most controls used, since each of many splits is scored in full."""
WHOLE_BATCH_CELLS = 2000
"""Controls at which no further whole batch is taken for splits by batch; at least six are. A sample of each batch would
not do: fewer cells of a batch show less of what batches differ by."""
CALIBRATION_PERMUTATIONS = 199
"""Most permutations of a split: p in steps of 0.005, finer than a Kolmogorov-Smirnov test of 200 values resolves."""
_UNDOING = ("constant_embeddings", "null_sd_zero", "batch_confounded")
"""Flags of a split without p or z."""


@dataclass(frozen=True)
class CalibrationSet:
    """Control-against-control splits of one kind by one metric.

    Attributes
    ----------
    kind, metric
        Unit of the splits, and metric of their scores.
    p, z
        One value a split.
    n_cells
        Number of cells of the pretended perturbation, mean over the splits.
    uniform
        Kolmogorov-Smirnov test of `p` against the uniform distribution.
    """

    kind: Literal["cell", "batch"]
    metric: Metric
    p: tuple[float, ...]
    z: tuple[float, ...]
    n_cells: float
    uniform: Uniformity

    @property
    def z_mean(self) -> float:
        """Mean z; 0 for a sound score."""
        return float(np.mean(self.z))

    @property
    def z_sd(self) -> float:
        """Standard deviation of z; 1 for a sound score."""
        return float(np.std(self.z))


@dataclass(frozen=True)
class Calibration:
    """All sets of splits, with provenance and warnings."""

    sets: tuple[CalibrationSet, ...]
    provenance: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the calibration as JSON-able values."""
        return {
            "sets": [{**asdict(item), "z_mean": item.z_mean, "z_sd": item.z_sd} for item in self.sets],
            "provenance": self.provenance,
            "warnings": self.warnings,
        }


def calibrate(
    embeddings: ArrayLike,
    perturbations: Sequence[str],
    *,
    control: str | Sequence[str],
    batches: Sequence[str] | None = None,
    options: ScoreOptions | None = None,
    splits: int = 200,
    group_size: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """Score random parts of the controls against the rest.

    Parameters
    ----------
    embeddings, perturbations, control, batches, options
        See :func:`perturbscope.score_perturbations`. Splits by cell use the options' test, exchanges within batches
        included; splits by batch exchange labels freely, since batch and label coincide. Wasserstein is left out, since
        each split would need its own drawn null. At most 1,000 controls and 199 permutations are used; splits by batch
        use whole batches, up to 2,000 controls.
    splits
        Number of splits of each kind; there are fewer if the batches cannot be split in so many ways.
    group_size
        Number of cells of the pretended perturbation; default the median size of the perturbations, at most half the
        controls.
    progress
        Called as ``progress("calibrate", done, total)``.

    Raises
    ------
    InvalidParameterError
        Wasserstein is the only metric, or a size is out of range.
    InvalidEmbeddingError, MalformedMatrixError, ControlLabelMissingError, TooFewControlsError
        See :func:`perturbscope.score_perturbations`.
    """
    options = options or ScoreOptions()
    metrics = tuple(metric for metric in options.metrics if metric != "wasserstein")
    if not metrics:
        raise InvalidParameterError(
            "Calibration needs e_distance or cosine_e_distance; Wasserstein is too slow to score hundreds of times.",
            field="metrics",
        )
    if splits < 2:
        raise InvalidParameterError(f"splits must be 2 or more, not {splits}.", field="splits")
    options = replace(
        options,
        metrics=metrics,
        null="size_matched",
        permutations=min(options.permutations or CALIBRATION_PERMUTATIONS, CALIBRATION_PERMUTATIONS),
        exceedances=0,
        max_cells=max(min(options.max_cells, MAX_CALIBRATION_CELLS), options.min_cells),
    )
    cleaned = cleaned_for(options, perturbations, control, batches)
    perturbations, control, batches = cleaned.labels, str(cleaned.control), cleaned.kept(batches)
    embeddings = cleaned.kept(embeddings)
    groups = Groups.of(embeddings, perturbations, batches, options, control=control)
    controls = groups.members[control]
    others = [size for name, size in groups.sizes.items() if name != control and size >= options.min_cells]
    half = len(controls) // 2
    size = group_size if group_size is not None else min(int(np.median(others)) if others else half, half)
    if not 2 <= size <= len(controls) - MIN_CONTROLS:
        raise InvalidParameterError(
            f"group_size must be from 2 to {len(controls) - MIN_CONTROLS} (of {len(controls)} controls), not {size}.",
            field="group_size",
        )
    rng = generator(options.seed, "calibrate")
    parts = {"cell": list(_cell_parts(len(controls), size, splits, rng))}
    used = {"cell": controls, "batch": controls}
    if groups.batches is not None:
        if groups.sizes[control] > len(controls):
            every = Groups.of(
                embeddings, perturbations, batches, replace(options, max_cells=MOST_CELLS), control=control
            ).members[control]
            used["batch"] = _whole_batches(every, groups.batches, rng)
        of_batches = groups.batches[used["batch"]]
        by_batch = list(_batch_parts(of_batches, size, options.min_cells, splits, rng))
        if by_batch:
            parts["batch"] = by_batch
    done, total = 0, len(metrics) * sum(map(len, parts.values()))
    sets = []
    missing: list[str] = []
    for metric in metrics:
        for kind, splits_of_kind in parts.items():
            free = replace(groups, batches=None) if kind == "batch" else groups
            maker = GroupMaker(metric, free, options)
            controls = used[kind]
            maker.remember(controls)
            scored = []
            for i, part in enumerate(splits_of_kind):
                mask = np.zeros(len(controls), dtype=bool)
                mask[part] = True
                scorer = make_scorer(metric, free, controls[~mask], options, maker)
                scored.append(scorer.score(f"calibrate {kind} {i}", controls[mask]))
                done += 1
                if progress:
                    progress("calibrate", done, total)
            p = tuple(item.p for item in scored if not np.isnan(item.p))
            z = tuple(item.z for item in scored if not np.isnan(item.z))
            if len(p) > 1 and len(z) > 1:
                n_cells = float(np.mean([len(part) for part in splits_of_kind]))
                sets.append(
                    CalibrationSet("batch" if kind == "batch" else "cell", metric, p, z, n_cells, uniformity(p))
                )
            if len(p) < len(scored) or len(z) < len(scored):
                missing.append(_missing(metric, kind, len(p) > 1 and len(z) > 1, scored))
    warnings = [*_control_warnings(groups, control, options), *missing, *_warnings(sets)]
    if groups.has_copies(control):
        warnings.append(f"duplicated_vectors: {FLAGS['duplicated_vectors']} ({control}).")
    facts = {"control": control, "n_controls_used": len(used["cell"]), "splits": splits, "group_size": size}
    return Calibration(
        tuple(sets), provenance("calibrate", options, **groups.facts, **facts, **cleaned.facts), warnings
    )


def _control_warnings(groups: Groups, control: str, options: ScoreOptions) -> list[str]:
    """Return warnings about the controls' label and batches; no other cell is used."""
    similar = {name: other for name, other in groups.similar.items() if control in (name, other)}
    warnings = replace(groups, members={}, similar=similar).warnings([], options)
    n_used, n_all = len(groups.members[control]), groups.sizes[control]
    if n_used < n_all:
        warnings.append(f"Calibration used {n_used:,} of the {n_all:,} controls, a sample (seed {options.seed}).")
    return warnings


def _missing(metric: Metric, kind: str, calibrated: bool, scored: Sequence[Scored]) -> str:
    """Say that some splits have no p or no z, and why."""
    missing = [item for item in scored if np.isnan(item.p) or np.isnan(item.z)]
    flags = dict.fromkeys(flag for item in missing for flag in item.flags if flag in _UNDOING)
    why = "; ".join(f"{flag}: {FLAGS[flag]}" for flag in flags)
    outcome = "and are left out" if calibrated else "so that there is no such calibration"
    return f"{metric}: {len(missing)} of {len(scored)} splits by {kind} have no p or no z {outcome} ({why})."


def _cell_parts(n: int, size: int, splits: int, rng: np.random.Generator) -> Iterator[NDArray[np.intp]]:
    """Yield random subsets of `size` of n cells."""
    for _ in range(splits):
        checkpoint()
        yield rng.choice(n, size, replace=False)


def _whole_batches(controls: NDArray[np.intp], batches: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    """Return the controls of whole batches in random order, up to :data:`WHOLE_BATCH_CELLS` or six batches."""
    codes = batches[controls]
    chosen: list[int] = []
    for name in rng.permutation(np.unique(codes)):
        if len(chosen) >= 6 and np.isin(codes, [*chosen, name]).sum() > WHOLE_BATCH_CELLS:
            break
        chosen.append(int(name))
    return controls[np.isin(codes, chosen)]


def _batch_parts(
    batches: NDArray[np.intp], size: int, floor: int, splits: int, rng: np.random.Generator
) -> Iterator[NDArray[np.intp]]:
    """Yield different unions of whole batches with about `size` cells, leaving `floor` cells or more on either side."""
    names = np.unique(batches)
    seen: set[frozenset[int]] = set()
    # With few batches the same unions come up again and again, so the number of tries is limited.
    for _ in range(20 * splits):
        if len(seen) == splits:
            return
        checkpoint()
        order = rng.permutation(names)
        reach = np.cumsum([np.count_nonzero(batches == name) for name in order])
        key = frozenset(order[: int(np.searchsorted(reach, size)) + 1].tolist())
        part = np.flatnonzero(np.isin(batches, list(key)))
        if key in seen or len(part) < floor or len(batches) - len(part) < max(floor, MIN_CONTROLS):
            continue
        seen.add(key)
        yield part


def _warnings(sets: list[CalibrationSet]) -> list[str]:
    """Return warnings about p-values that are not uniform."""
    warnings = []
    for item in sets:
        small = float(np.mean(np.asarray(item.p) < 0.05))
        if item.kind == "cell" and item.uniform.p < 0.001:
            warnings.append(
                f"{item.metric}: p-values of controls against controls are not uniform "
                f"(Kolmogorov-Smirnov p = {item.uniform.p:.1g})."
            )
        if item.kind == "batch" and small > 0.1:
            warnings.append(
                f"{item.metric}: controls of different batches differ: {small:.0%} of {len(item.p)} splits by batch "
                f"have p < 0.05 (5% expected; mean z {item.z_mean:.1f}). With batches given, labels are "
                "exchanged within them, about their means, which keeps that out of z and p."
            )
    return warnings
