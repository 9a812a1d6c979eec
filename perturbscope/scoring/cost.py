"""The cost of a score before it is made: seconds of one core, and bytes of memory, from sizes and options alone.

The operations of the code are counted: distances, products of labels with distances, sorted random keys, transport
problems. Each kind has a price, the seconds of one operation, measured on one core of an AMD EPYC (Zen 4, OpenBLAS).
The estimate is for limits and warnings: it is within a factor of three of what such a core takes, and on another
machine it is off by that machine's speed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from perturbscope.scoring import statistics
from perturbscope.scoring.calibration import CALIBRATION_PERMUTATIONS, MAX_CALIBRATION_CELLS
from perturbscope.scoring.distances import TILE_VALUES
from perturbscope.scoring.energy import batch_permutations, exchanges, permutations, tail
from perturbscope.scoring.optimal_transport import MAX_TRANSPORT_CELLS
from perturbscope.scoring.results import Metric, ScoreOptions
from perturbscope.scoring.scorers import NULL_REPEATS, OMNIBUS_DRAWS
from perturbscope.threads import usable_cores

PRODUCT, SPARSE_PRODUCT = 26e-12, 200e-12
"""One float32 multiplication of a dense and of a sparse matrix product; float64 takes twice as long."""
DISTANCE = 1.5e-9
"""One distance between two cells, beside its products."""
KEY = 20e-9
"""One random key of an exchange of labels: drawn, sorted, marked."""
MARK = 10e-9
"""One cell that an exchange marks, when its sums are looked up."""
VALUE = 4e-9
"""One value of a vector that is checked, scaled or summed."""
LABEL, CELL, ROW = 5e-6, 2e-6, 5e-6
"""A label, the label of a cell, and a row of the table."""
GROUP = 500e-6
"""A group, or a pair of groups, that is scored, whatever its size."""
ASSIGN_SQUARE, ASSIGN_CUBE, PROBLEM = 40e-9, 0.1e-9, 30e-6
"""An assignment of n cells: its square, its cube, and the problem itself (scipy)."""
TRANSPORT, TRANSPORT_PROBLEM = 150e-9, 200e-6
"""A transport problem between n and m cells, for each of n m, and the problem itself (POT)."""
SQUARE, BLOCK = 1e-9, 4e-9
"""One distance that is squared and summed, over all cells and by batches."""
EXCHANGES = 500
"""Exchanges of a perturbation where their number is not given: 250 if no labels differ, 1,000 if all do."""
EIGENVALUES, EIGENVECTORS = 0.1e-9, 250e-9
"""Eigenvalues of m cells: all of them by the cube, and the largest by the square."""
GROWING = 9e-9
"""One distance among the first controls of a random order, when sums over growing subsets are kept."""

ROW_BYTES = 2_000
"""Bytes of a row of the table, from its parts to its encoded form (JSON takes the most)."""
LABEL_BYTES = 1_000
"""Bytes of what is known of a label."""
DEG_SECONDS, DEG_CONTROLS, DEG_BYTES, DEG_CONTROL_BYTES = 300e-9, 5_000, 90, 45
"""Differential expression: seconds for a stored count; most controls; bytes for a count of the largest perturbation,
and of a control."""
DEG_GENE, DEG_EXCHANGES, DEG_BATCH = 1e-6, 3e-6, 3e-6
"""A gene of a perturbation: tested; with p of rare ones from exchanges; and these over one batch more."""
MEMBER = 50e-9
"""A gene of a set, looked up once and summed for each perturbation."""
DEG_GENE_BYTES, DEG_ROW_BYTES = 400, 900
"""Bytes of a gene of the perturbations that are tested at a time, and of a row of genes."""
MAP_SECONDS = 10.0
"""The map of the cells, of which it shows at most five thousand."""
PAIR_MAP_GROUPS, PAIR_MAP_CELLS = 61, 300
"""Groups, and cells of each, of the report's distances between perturbations."""
SPLITS = 200
"""Splits of the controls, of each kind, that a report scores."""

Numbers = NDArray[np.float64]


@dataclass
class Cost:
    """The cost of one request.

    Attributes
    ----------
    parts
        Seconds of one core by the option that lowers them: ``permutations``, ``max_cells`` ...; ``cells``: what depends
        on cells and labels alone, ``report``: maps and tables of a report.
    n_bytes
        Most bytes of memory held at a time, beside the vectors themselves.
    n_rows
        Rows of the table.
    """

    parts: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    n_bytes: int = 0
    n_rows: int = 0

    @property
    def seconds(self) -> float:
        """Seconds of one core."""
        return float(sum(self.parts.values()))

    def options(self) -> str:
        """Name the options that lower most of the cost, with the time that each stands for."""
        ordered = sorted(self.parts.items(), key=lambda part: -part[1])
        largest = [(name, seconds) for name, seconds in ordered if seconds > 0.1 * self.seconds]
        return ", ".join(f"{name} ({duration(seconds)})" for name, seconds in largest)


def duration(seconds: float) -> str:
    """Return seconds in words: ``12 seconds``, ``3 minutes``, ``5.9 hours``."""
    for name, size in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {name}"
    return f"{seconds:.{0 if seconds >= 10 else 1}f} seconds"


def score_cost(
    sizes: Mapping[str, int],
    control: str,
    options: ScoreOptions,
    *,
    width: int,
    batches: int = 0,
    cores: int | None = None,
) -> Cost:
    """Estimate the cost of :func:`perturbscope.score_perturbations`.

    Parameters
    ----------
    sizes
        Number of cells of each label.
    control
        Label of the control cells.
    options
        Options of the score.
    width
        Dimensions of a vector.
    batches
        Number of batches within which labels are exchanged; 0: there are none.
    cores
        Number of threads that score, which counts for the bytes; default: the cores that this process may use.
    """
    used = _used(sizes, control, options)
    controls = min(sizes.get(control, 0), options.max_cells)
    large = used[used >= options.min_cells]
    cost = _basis(sizes, options, width=width, n_rows=(len(used)) * len(options.metrics))
    cost.n_bytes += _score_bytes(used, controls, options, width, batches, sum(sizes.values()), cores or usable_cores())
    n, counts = (values.astype(np.float64) for values in np.unique(large, return_counts=True))
    for metric in options.metrics:
        if metric == "wasserstein":
            _transport_scores(cost, n, counts, controls, options, width)
        else:
            _energy_scores(cost, n, counts, controls, options, width, batches, _is_dense(metric, options))
    return cost


def compare_cost(
    sizes: Mapping[str, int],
    control: str | None,
    options: ScoreOptions,
    *,
    width: int,
    pairs: Sequence[tuple[str, str]] | None = None,
    batches: int = 0,
) -> Cost:
    """Estimate the cost of :func:`perturbscope.compare_perturbations`; parameters as :func:`score_cost`.

    `pairs` are the pairs to compare, or None for all; labels that no cell has count as empty.
    """
    used = _used(sizes, control, options)
    if pairs is None:
        n_pairs = len(used) * (len(used) - 1) // 2
        compared, n, m, counts = used, *_pairs_of_sizes(used[used >= options.min_cells])
    else:
        n_pairs = len(pairs)
        size_of = {name: min(size, options.max_cells) for name, size in sizes.items()}
        both = np.array([(size_of.get(a, 0), size_of.get(b, 0)) for a, b in pairs], dtype=np.float64).reshape(-1, 2)
        both = both[(both >= options.min_cells).all(axis=1)]
        ends, repeated = np.unique(both, axis=0, return_counts=True)
        n, m, counts = ends[:, 0], ends[:, 1], repeated.astype(np.float64)
        compared = np.array([size_of.get(name, 0) for name in {name for pair in pairs for name in pair}], dtype=int)
    cost = _basis(sizes, options, width=width, n_rows=n_pairs * len(options.metrics))
    cost.n_bytes += _compare_bytes(compared, options, width, sum(sizes.values()))
    large = compared[compared >= options.min_cells].astype(np.float64)
    for metric in options.metrics:
        cost.parts["pairs"] += float((counts * (GROUP + 4 * VALUE * width * (n + m))).sum())
        if metric == "wasserstein":
            n_used, m_used = (np.minimum(values, MAX_TRANSPORT_CELLS) for values in (n, m))
            distances = (n_used + m_used) ** 2 * (2 * PRODUCT * width + 2 * DISTANCE)
            problem = np.where(n_used == m_used, _assignment(n_used), TRANSPORT_PROBLEM + TRANSPORT * n_used * m_used)
            draw = problem + KEY * (n_used + m_used)
            cost.parts["max_cells"] += float((counts * (distances + problem)).sum())
            cost.parts["wasserstein_permutations"] += options.wasserstein_permutations * float((counts * draw).sum())
            continue
        dense = _is_dense(metric, options)
        cost.parts["max_cells"] += _group_seconds(large, width, dense)
        draw = 2 * KEY * (n + m)
        taken = n * m / np.maximum(n + m, 1)
        if dense:
            cost.parts["max_cells"] += float((counts * _distances(n, m, width)).sum())
            draw += _product(taken, m, m) + _product(n - taken, n, n) + _product(taken, m, n) + 2 * MARK * (n + m)
        else:
            draw += 2 * _product(taken, m, width) + 2 * _product(n - taken, n, width) + VALUE * width
        cost.parts["permutations"] += _exchanges(options) * float((counts * draw).sum())
    return cost


def report_cost(
    sizes: Mapping[str, int],
    control: str,
    options: ScoreOptions,
    *,
    width: int,
    batches: int = 0,
    n_counts: int = 0,
    n_genes: int = 0,
    cores: int | None = None,
) -> Cost:
    """Estimate the cost of a score and its report page; parameters as :func:`score_cost`.

    `n_counts` and `n_genes` are the stored counts and the genes of cells whose genes are tested, 0 if there are none.
    """
    cost = score_cost(sizes, control, options, width=width, batches=batches, cores=cores)
    cells = np.sort(np.fromiter(sizes.values(), dtype=np.int64))[::-1][:PAIR_MAP_GROUPS].astype(np.float64)
    mapped = float(np.minimum(cells, max(min(options.max_cells, PAIR_MAP_CELLS), options.min_cells)).sum())
    dense = _is_dense(options.metrics[0], options) or options.metrics[0] == "wasserstein"
    tests = DEG_SECONDS * n_counts + (DEG_GENE + DEG_EXCHANGES) * n_genes * len(sizes)
    cost.parts["report"] += MAP_SECONDS + tests + mapped**2 / 2 * (PRODUCT * width + DISTANCE) * dense
    controls = min(sizes.get(control, 0), options.max_cells, max(MAX_CALIBRATION_CELLS, options.min_cells))
    half = np.array([controls / 2])
    for metric in options.metrics:
        if metric == "wasserstein":
            continue
        few = Cost()
        is_dense = _is_dense(metric, options)
        _energy_scores(few, half, np.ones(1), controls // 2, _calibration(options), width, batches, is_dense)
        cost.parts["report"] += SPLITS * (2 if batches else 1) * few.seconds
    largest = max((size for name, size in sizes.items() if name != control), default=0)
    tested = DEG_BYTES * largest + DEG_CONTROL_BYTES * min(sizes.get(control, 0), DEG_CONTROLS)
    cost.n_bytes += tested * n_counts // max(1, sum(sizes.values())) + 16 * controls**2
    return cost


def deg_cost(
    sizes: Mapping[str, int],
    control: str | Sequence[str],
    *,
    n_counts: int,
    n_genes: int,
    batches: int = 0,
    max_controls: int = DEG_CONTROLS,
    exchanges: bool = True,
    passes: int = 1,
    top: int | None = None,
    n_members: int = 0,
    cores: int | None = None,
) -> Cost:
    """Estimate the cost of :func:`perturbscope.analysis.degs.differential_genes`.

    Parameters
    ----------
    sizes
        Number of cells of each label.
    control
        Label of the control cells, or several.
    n_counts, n_genes
        Stored counts of all cells, and genes.
    batches
        Number of batches; 0: there are none.
    max_controls, exchanges, top
        As of the tests.
    passes
        How often each perturbation is tested: twice if q is over the screen.
    n_members
        Genes of all sets, if sets of genes are tested as well; `top` is then the number of sets.
    cores
        Number of threads that test, which counts for the bytes; default: the cores that this process may use.
    """
    controls = {control} if isinstance(control, str) else set(control)
    others = [size for name, size in sizes.items() if name not in controls]
    used = min(sum(sizes.values()) - sum(others), max_controls)
    of_cell = n_counts / max(1, sum(sizes.values()))
    of_gene = DEG_GENE + (DEG_EXCHANGES + DEG_BATCH * max(0, batches - 1) if exchanges else 0)
    rows = len(others) * min(top or n_genes, n_genes)
    cost = Cost(n_rows=rows)
    cost.parts["cells"] = CELL * sum(sizes.values()) + passes * DEG_SECONDS * of_cell * (sum(others) + used)
    cost.parts["perturbations"] = passes * len(others) * (GROUP + of_gene * n_genes)
    cost.parts["gene_sets" if n_members else "top"] = ROW * rows + MEMBER * n_members * (1 + len(others))
    held = DEG_BYTES * max(others, default=0) * of_cell + DEG_GENE_BYTES * n_genes * (1 + max(1, batches))
    cost.n_bytes = int(
        DEG_CONTROL_BYTES * used * of_cell + 2 * (cores or usable_cores()) * held + DEG_ROW_BYTES * rows
    ) + LABEL_BYTES * len(sizes)
    return cost


def _calibration(options: ScoreOptions) -> ScoreOptions:
    return ScoreOptions(
        permutations=min(options.permutations or CALIBRATION_PERMUTATIONS, CALIBRATION_PERMUTATIONS), min_cells=2
    )


def _exchanges(options: ScoreOptions) -> int:
    """Return the exchanges of each perturbation; those of a number that was asked for may all be needed."""
    return EXCHANGES if options.permutations is None else options.permutations


def _used(sizes: Mapping[str, int], control: str | None, options: ScoreOptions) -> NDArray[np.int64]:
    """Return the numbers of cells that are used of each perturbation."""
    others = [size for name, size in sizes.items() if name != control]
    return np.minimum(np.array(others, dtype=np.int64), options.max_cells)


def _basis(sizes: Mapping[str, int], options: ScoreOptions, *, width: int, n_rows: int) -> Cost:
    cells = sum(sizes.values())
    seconds = CELL * cells + LABEL * len(sizes) + VALUE * cells * width * (1 + len(options.metrics)) + ROW * n_rows
    return Cost(defaultdict(float, cells=seconds), LABEL_BYTES * len(sizes) + ROW_BYTES * n_rows, n_rows)


def _is_dense(metric: Metric, options: ScoreOptions) -> bool:
    """Whether the distances between all cells are formed."""
    return metric == "e_distance" and options.ground == "euclidean"


def _pairs_of_sizes(used: NDArray[np.int64]) -> tuple[Numbers, Numbers, Numbers]:
    """Return the sizes of all pairs of groups, and how many pairs have them; there are few different sizes."""
    sizes, counts = (values.astype(np.float64) for values in np.unique(used, return_counts=True))
    i, j = np.triu_indices(len(sizes))
    pairs = np.where(i == j, counts[i] * (counts[i] - 1) / 2, counts[i] * counts[j])
    return sizes[i], sizes[j], pairs


def _distances(n: Numbers, m: Numbers | float, width: int) -> Numbers:
    seconds: Numbers = n * m * (PRODUCT * width + DISTANCE)
    return seconds


def _product(marked: Numbers, cells: Numbers | float, columns: Numbers | float) -> Numbers:
    """Return the seconds of a product of one exchange's marks with a matrix [cells, columns]."""
    seconds: Numbers = np.minimum(SPARSE_PRODUCT * marked, PRODUCT * cells) * columns
    return seconds


def _assignment(n: Numbers) -> Numbers:
    seconds: Numbers = PROBLEM + ASSIGN_SQUARE * n**2 + ASSIGN_CUBE * n**3
    return seconds


def _group_seconds(n: Numbers, width: int, dense: bool) -> float:
    """Return the seconds to make groups of n cells."""
    return float((_distances(n, n, width) if dense else VALUE * n * width).sum())


def _moments_seconds(controls: int, width: int, dense: bool) -> float:
    """Return the seconds to make the group of the controls, and its moments."""
    own = np.array([float(controls)])
    squares = DISTANCE / 2 * controls**2 if dense else PRODUCT * controls * width**2
    return _group_seconds(own, width, dense) + squares


def _energy_scores(
    cost: Cost,
    n: Numbers,
    counts: Numbers,
    controls: int,
    options: ScoreOptions,
    width: int,
    batches: int,
    dense: bool,
) -> None:
    """Add the cost of scores of `counts` groups of `n` cells by an energy distance."""
    parts, m, draws = cost.parts, float(controls), _exchanges(options)
    parts["max_cells"] += _moments_seconds(controls, width, dense)
    parts["cells"] += float((counts * (GROUP + VALUE * width * (n + m))).sum())
    made = _distances(n, n + m, width) if dense else VALUE * n * width
    if dense:
        made = made + (BLOCK if batches else SQUARE) * n * (n + m)
    else:
        made = made + (2 * PRODUCT * width + BLOCK) * n * (n + m) if batches else made + 4 * PRODUCT * n * width**2
    parts["max_cells"] += float((counts * made).sum())
    # With the fixed null, samples of as many controls, where there are more.
    size = np.minimum(n, m)
    if dense:
        few = _product(size, m, m) if m <= 512 else _distances(size, size, width) + VALUE * size * width
    else:
        few = VALUE * size * width / 2
    sample = np.where(n < m, few + KEY * m, 0.0)
    if options.null == "fixed":
        parts["repeats"] += options.repeats * float((counts * sample).sum())
    # Exchanges. Those of one size are drawn once, but within batches.
    taken = n * m / np.maximum(n + m, 1)
    shared = not batches
    drawn = np.where(shared, 1.0, counts) if n.size else counts
    if batches:
        # Draws of a batch are kept by its number of cells, of which there are a few.
        keys = 3 * MARK * (n + taken) + 4 * KEY * n * np.minimum(1.0, 4 / np.maximum(counts, 1))
    else:
        keys = KEY * n + MARK * taken + (0.0 if shared else KEY * m)
    within = _product(taken, m, m) if dense else _product(2 * taken, 2 * m, width)
    among = float((drawn * within).sum())
    if dense and n.size and (shared or batches):
        # What growing subsets, or a table of all groups, would cost.
        depth = min(m, float((n if batches else 2 * taken).max()) * (batches or 1))
        few_batches = min(batches, 64) if batches else 0
        kept = GROWING * depth**2 + SPARSE_PRODUCT * depth * few_batches * float(counts.sum())
        if batches or depth <= 2 * permutations.MAX_DEPTH:
            among = min(among, kept + float(within.max()))
    if dense:
        other = _product(n - taken, n, n) + _product(taken, m, n) + MARK * (n + taken)
    else:
        other = _product(2 * (n - taken), 2 * n, width) + VALUE * width + MARK * n
    if n.size and (options.permutations is None or options.permutations >= exchanges.BASE):
        # Tails of those that no exchange reaches: eigenvalues, and a comparison for each doubling of the cells.
        sizes, compared = int(np.log2(n.max() / n.min())) + 1, min(m, tail.COMPARED_CONTROLS)
        parts["permutations"] += EIGENVALUES * min(m, tail.WHOLE) ** 3 + (EIGENVECTORS * m**2 if m > tail.WHOLE else 0)
        columns = compared if dense else 2 * width
        group = np.array([min(float(n.max()), tail.LARGEST_GROUP)])
        parts["permutations"] += sizes * tail.DRAWS * float((KEY * compared + _product(group, compared, columns)).sum())
    if options.omnibus:
        # Two more matrices of distances, and two more products of each exchange.
        exchanged = 2 * (_product(n - taken, n, n) + _product(taken, m, n)) + 4 * _product(n, m, width)
        omnibus = 2 * _distances(n, n + m, width) + min(options.permutations or exchanges.BASE, OMNIBUS_DRAWS) * (
            exchanged + 2 * _product(taken, m, m) + 2 * MARK * (n + taken)
        )
        parts["omnibus"] += float((counts * omnibus).sum()) + 2 * _moments_seconds(controls, width, True)
    once = KEY * m * (batches or 1) if shared or batches else 0.0
    total = float((drawn * keys).sum()) + among + float((counts * other).sum()) + once
    parts["permutations"] += draws * total


def _transport_scores(
    cost: Cost, n: Numbers, counts: Numbers, controls: int, options: ScoreOptions, width: int
) -> None:
    """Add the cost of Wasserstein scores of `counts` groups of `n` cells."""
    parts, m = cost.parts, float(controls)
    fixed = options.null == "fixed"
    size = np.minimum(n, min(controls, MAX_TRANSPORT_CELLS))
    few = min(options.repeats, NULL_REPEATS)
    solved = _assignment(size)
    a_distance = 2 * PRODUCT * width + 2 * DISTANCE
    parts["max_cells"] += (m * m + float((counts * n * (n + m)).sum())) * a_distance
    parts["cells"] += float((counts * (GROUP + VALUE * width * (n + m))).sum())
    sampled = solved + 4 * VALUE * size**2 + KEY * (n + m)
    parts["repeats"] += options.repeats * float((counts * sampled).sum())
    parts["wasserstein_permutations"] += options.wasserstein_permutations * float(
        (counts * (few * sampled + 2 * KEY * (n + m))).sum()
    )
    if fixed:
        of_null = float(_assignment(np.array([options.null_size], dtype=np.float64))[0])
        parts["null_draws"] += options.null_draws * (few * of_null + (1 + few) * KEY * m)


def _score_bytes(
    used: NDArray[np.int64],
    controls: int,
    options: ScoreOptions,
    width: int,
    batches: int,
    cells: int,
    cores: int,
) -> int:
    """Return the peak bytes of a score.

    The distances grow: float32, between the controls, and between one perturbation a core and itself and the controls.
    Exchanged labels are evaluated some hundreds at a time; those within batches are summed up beforehand, for all
    perturbations, in one table a core.
    """
    largest = int(used.max(initial=0))
    pool = controls + largest
    draws = min(_exchanges(options), exchanges.BASE)
    held = _held_bytes(pool, max(pool, controls), controls**2 + largest**2, draws, width, cells)
    held += (min(cores, len(used)) - 1) * (4 * largest * (largest + controls) + 16 * (draws + width) * largest)
    # Those that exchanges are drawn for side by side, and distances after exchanges of all.
    held += min(exchanges.HELD, int((used * (4 * (used + controls) + 24 * width)).sum()))
    held += 4 * min(options.permutations or exchanges.BASE, exchanges.KEPT) * len(used)
    if options.omnibus:
        held += 12 * controls**2 + cores * (16 * largest * (largest + controls) + 16 * width * pool) + 16 * width**2
    if batches:
        sums, kept = 8 * draws * len(used), draws * int(used.sum())
        held += cores * 8 * controls**2 + min(sums, 8 * batch_permutations.TABLE) + min(kept, batch_permutations.KEPT)
        held += 24 * batches * pool
    return held


def _compare_bytes(used: NDArray[np.int64], options: ScoreOptions, width: int, cells: int) -> int:
    """Return the peak bytes of a comparison, which holds the distances among the cells of every group."""
    pool = int(np.sort(used)[-2:].sum())
    draws = min(options.permutations or exchanges.BASE, statistics.CHUNK)
    return _held_bytes(pool, pool, int((used**2).sum()), draws, width, cells)


def _held_bytes(pool: int, side: int, squares: int, draws: int, width: int, cells: int) -> int:
    # Beside the distances: tiles of them in float64; random keys, their order and the labels that they become; vectors.
    tiles = 3 * 8 * min(TILE_VALUES, side**2)
    return tiles + 4 * (squares + pool**2 // 2) + 32 * draws * pool + 16 * width * (pool + cells)
