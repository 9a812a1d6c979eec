from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CountType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COUNT_TYPE_UNSPECIFIED: _ClassVar[CountType]
    COUNT_TYPE_INT32: _ClassVar[CountType]
    COUNT_TYPE_FLOAT32: _ClassVar[CountType]
    COUNT_TYPE_FLOAT64: _ClassVar[CountType]
COUNT_TYPE_UNSPECIFIED: CountType
COUNT_TYPE_INT32: CountType
COUNT_TYPE_FLOAT32: CountType
COUNT_TYPE_FLOAT64: CountType

class CountMatrix(_message.Message):
    __slots__ = ("gene_ids", "indptr", "indices", "data", "data_type", "total_counts", "first_row")
    GENE_IDS_FIELD_NUMBER: _ClassVar[int]
    INDPTR_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_COUNTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    gene_ids: _containers.RepeatedScalarFieldContainer[str]
    indptr: bytes
    indices: bytes
    data: bytes
    data_type: CountType
    total_counts: bytes
    first_row: int
    def __init__(self, gene_ids: _Optional[_Iterable[str]] = ..., indptr: _Optional[bytes] = ..., indices: _Optional[bytes] = ..., data: _Optional[bytes] = ..., data_type: _Optional[_Union[CountType, str]] = ..., total_counts: _Optional[bytes] = ..., first_row: _Optional[int] = ...) -> None: ...

class EmbeddingMatrix(_message.Message):
    __slots__ = ("values", "width")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    values: bytes
    width: int
    def __init__(self, values: _Optional[bytes] = ..., width: _Optional[int] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("cells", "model", "outputs")
    CELLS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    cells: CountMatrix
    model: str
    outputs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, cells: _Optional[_Union[CountMatrix, _Mapping]] = ..., model: _Optional[str] = ..., outputs: _Optional[_Iterable[str]] = ...) -> None: ...

class NamedOutput(_message.Message):
    __slots__ = ("output", "values", "offsets", "gene_ids", "genes")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    GENE_IDS_FIELD_NUMBER: _ClassVar[int]
    GENES_FIELD_NUMBER: _ClassVar[int]
    output: Output
    values: bytes
    offsets: bytes
    gene_ids: _containers.RepeatedScalarFieldContainer[str]
    genes: bytes
    def __init__(self, output: _Optional[_Union[Output, _Mapping]] = ..., values: _Optional[bytes] = ..., offsets: _Optional[bytes] = ..., gene_ids: _Optional[_Iterable[str]] = ..., genes: _Optional[bytes] = ...) -> None: ...

class EmbedAnswer(_message.Message):
    __slots__ = ("embeddings", "lengths", "n_detected", "known_share", "meta", "outputs")
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    N_DETECTED_FIELD_NUMBER: _ClassVar[int]
    KNOWN_SHARE_FIELD_NUMBER: _ClassVar[int]
    META_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    embeddings: EmbeddingMatrix
    lengths: _containers.RepeatedScalarFieldContainer[int]
    n_detected: _containers.RepeatedScalarFieldContainer[int]
    known_share: _containers.RepeatedScalarFieldContainer[float]
    meta: Meta
    outputs: _containers.RepeatedCompositeFieldContainer[NamedOutput]
    def __init__(self, embeddings: _Optional[_Union[EmbeddingMatrix, _Mapping]] = ..., lengths: _Optional[_Iterable[int]] = ..., n_detected: _Optional[_Iterable[int]] = ..., known_share: _Optional[_Iterable[float]] = ..., meta: _Optional[_Union[Meta, _Mapping]] = ..., outputs: _Optional[_Iterable[_Union[NamedOutput, _Mapping]]] = ...) -> None: ...

class EmbedStreamStart(_message.Message):
    __slots__ = ("gene_ids", "model", "first_row", "outputs")
    GENE_IDS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    gene_ids: _containers.RepeatedScalarFieldContainer[str]
    model: str
    first_row: int
    outputs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, gene_ids: _Optional[_Iterable[str]] = ..., model: _Optional[str] = ..., first_row: _Optional[int] = ..., outputs: _Optional[_Iterable[str]] = ...) -> None: ...

class CellChunk(_message.Message):
    __slots__ = ("indptr", "indices", "data", "data_type", "total_counts")
    INDPTR_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_COUNTS_FIELD_NUMBER: _ClassVar[int]
    indptr: bytes
    indices: bytes
    data: bytes
    data_type: CountType
    total_counts: bytes
    def __init__(self, indptr: _Optional[bytes] = ..., indices: _Optional[bytes] = ..., data: _Optional[bytes] = ..., data_type: _Optional[_Union[CountType, str]] = ..., total_counts: _Optional[bytes] = ...) -> None: ...

class EmbedStreamRequest(_message.Message):
    __slots__ = ("start", "cells")
    START_FIELD_NUMBER: _ClassVar[int]
    CELLS_FIELD_NUMBER: _ClassVar[int]
    start: EmbedStreamStart
    cells: CellChunk
    def __init__(self, start: _Optional[_Union[EmbedStreamStart, _Mapping]] = ..., cells: _Optional[_Union[CellChunk, _Mapping]] = ...) -> None: ...

class EmbedStreamOpened(_message.Message):
    __slots__ = ("model_id", "vocabulary_hash", "coverage", "chunks_in_progress", "max_chunk_cells", "max_chunk_bytes", "width", "variant", "outputs")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_HASH_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_IN_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_CELLS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    vocabulary_hash: str
    coverage: GeneCoverage
    chunks_in_progress: int
    max_chunk_cells: int
    max_chunk_bytes: int
    width: int
    variant: str
    outputs: _containers.RepeatedCompositeFieldContainer[Output]
    def __init__(self, model_id: _Optional[str] = ..., vocabulary_hash: _Optional[str] = ..., coverage: _Optional[_Union[GeneCoverage, _Mapping]] = ..., chunks_in_progress: _Optional[int] = ..., max_chunk_cells: _Optional[int] = ..., max_chunk_bytes: _Optional[int] = ..., width: _Optional[int] = ..., variant: _Optional[str] = ..., outputs: _Optional[_Iterable[_Union[Output, _Mapping]]] = ...) -> None: ...

class EmbedStreamChunk(_message.Message):
    __slots__ = ("first_row", "embeddings", "lengths", "n_detected", "known_share", "timings", "outputs")
    class TimingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    N_DETECTED_FIELD_NUMBER: _ClassVar[int]
    KNOWN_SHARE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    first_row: int
    embeddings: EmbeddingMatrix
    lengths: _containers.RepeatedScalarFieldContainer[int]
    n_detected: _containers.RepeatedScalarFieldContainer[int]
    known_share: _containers.RepeatedScalarFieldContainer[float]
    timings: _containers.ScalarMap[str, float]
    outputs: _containers.RepeatedCompositeFieldContainer[NamedOutput]
    def __init__(self, first_row: _Optional[int] = ..., embeddings: _Optional[_Union[EmbeddingMatrix, _Mapping]] = ..., lengths: _Optional[_Iterable[int]] = ..., n_detected: _Optional[_Iterable[int]] = ..., known_share: _Optional[_Iterable[float]] = ..., timings: _Optional[_Mapping[str, float]] = ..., outputs: _Optional[_Iterable[_Union[NamedOutput, _Mapping]]] = ...) -> None: ...

class EmbedStreamEnd(_message.Message):
    __slots__ = ("n_cells", "meta")
    N_CELLS_FIELD_NUMBER: _ClassVar[int]
    META_FIELD_NUMBER: _ClassVar[int]
    n_cells: int
    meta: Meta
    def __init__(self, n_cells: _Optional[int] = ..., meta: _Optional[_Union[Meta, _Mapping]] = ...) -> None: ...

class EmbedStreamAnswer(_message.Message):
    __slots__ = ("opened", "chunk", "end")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    opened: EmbedStreamOpened
    chunk: EmbedStreamChunk
    end: EmbedStreamEnd
    def __init__(self, opened: _Optional[_Union[EmbedStreamOpened, _Mapping]] = ..., chunk: _Optional[_Union[EmbedStreamChunk, _Mapping]] = ..., end: _Optional[_Union[EmbedStreamEnd, _Mapping]] = ...) -> None: ...

class ScoreOptions(_message.Message):
    __slots__ = ("metrics", "ground", "estimator", "null", "null_size", "null_draws", "permutations", "wasserstein_permutations", "correction", "min_cells", "max_cells", "repeats", "normalize", "seed", "exceedances", "centre", "omnibus", "missing_labels", "normalize_combinations", "nearest")
    METRICS_FIELD_NUMBER: _ClassVar[int]
    GROUND_FIELD_NUMBER: _ClassVar[int]
    ESTIMATOR_FIELD_NUMBER: _ClassVar[int]
    NULL_FIELD_NUMBER: _ClassVar[int]
    NULL_SIZE_FIELD_NUMBER: _ClassVar[int]
    NULL_DRAWS_FIELD_NUMBER: _ClassVar[int]
    PERMUTATIONS_FIELD_NUMBER: _ClassVar[int]
    WASSERSTEIN_PERMUTATIONS_FIELD_NUMBER: _ClassVar[int]
    CORRECTION_FIELD_NUMBER: _ClassVar[int]
    MIN_CELLS_FIELD_NUMBER: _ClassVar[int]
    MAX_CELLS_FIELD_NUMBER: _ClassVar[int]
    REPEATS_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    EXCEEDANCES_FIELD_NUMBER: _ClassVar[int]
    CENTRE_FIELD_NUMBER: _ClassVar[int]
    OMNIBUS_FIELD_NUMBER: _ClassVar[int]
    MISSING_LABELS_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_COMBINATIONS_FIELD_NUMBER: _ClassVar[int]
    NEAREST_FIELD_NUMBER: _ClassVar[int]
    metrics: _containers.RepeatedScalarFieldContainer[str]
    ground: str
    estimator: str
    null: str
    null_size: int
    null_draws: int
    permutations: int
    wasserstein_permutations: int
    correction: str
    min_cells: int
    max_cells: int
    repeats: int
    normalize: bool
    seed: int
    exceedances: int
    centre: bool
    omnibus: bool
    missing_labels: _containers.RepeatedScalarFieldContainer[str]
    normalize_combinations: bool
    nearest: int
    def __init__(self, metrics: _Optional[_Iterable[str]] = ..., ground: _Optional[str] = ..., estimator: _Optional[str] = ..., null: _Optional[str] = ..., null_size: _Optional[int] = ..., null_draws: _Optional[int] = ..., permutations: _Optional[int] = ..., wasserstein_permutations: _Optional[int] = ..., correction: _Optional[str] = ..., min_cells: _Optional[int] = ..., max_cells: _Optional[int] = ..., repeats: _Optional[int] = ..., normalize: _Optional[bool] = ..., seed: _Optional[int] = ..., exceedances: _Optional[int] = ..., centre: _Optional[bool] = ..., omnibus: _Optional[bool] = ..., missing_labels: _Optional[_Iterable[str]] = ..., normalize_combinations: _Optional[bool] = ..., nearest: _Optional[int] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("cells", "embeddings", "perturbations", "control", "batches", "options", "model", "controls")
    CELLS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    PERTURBATIONS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    cells: CountMatrix
    embeddings: EmbeddingMatrix
    perturbations: _containers.RepeatedScalarFieldContainer[str]
    control: str
    batches: _containers.RepeatedScalarFieldContainer[str]
    options: ScoreOptions
    model: str
    controls: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, cells: _Optional[_Union[CountMatrix, _Mapping]] = ..., embeddings: _Optional[_Union[EmbeddingMatrix, _Mapping]] = ..., perturbations: _Optional[_Iterable[str]] = ..., control: _Optional[str] = ..., batches: _Optional[_Iterable[str]] = ..., options: _Optional[_Union[ScoreOptions, _Mapping]] = ..., model: _Optional[str] = ..., controls: _Optional[_Iterable[str]] = ...) -> None: ...

class Score(_message.Message):
    __slots__ = ("perturbation", "n_cells", "n_controls", "metric", "distance", "null_mean", "null_sd", "z", "p", "q", "flags", "n_used", "p_source", "exchanges", "p_tail", "p_tail_source", "p_omnibus", "q_omnibus", "fired")
    PERTURBATION_FIELD_NUMBER: _ClassVar[int]
    N_CELLS_FIELD_NUMBER: _ClassVar[int]
    N_CONTROLS_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_FIELD_NUMBER: _ClassVar[int]
    NULL_MEAN_FIELD_NUMBER: _ClassVar[int]
    NULL_SD_FIELD_NUMBER: _ClassVar[int]
    Z_FIELD_NUMBER: _ClassVar[int]
    P_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    N_USED_FIELD_NUMBER: _ClassVar[int]
    P_SOURCE_FIELD_NUMBER: _ClassVar[int]
    EXCHANGES_FIELD_NUMBER: _ClassVar[int]
    P_TAIL_FIELD_NUMBER: _ClassVar[int]
    P_TAIL_SOURCE_FIELD_NUMBER: _ClassVar[int]
    P_OMNIBUS_FIELD_NUMBER: _ClassVar[int]
    Q_OMNIBUS_FIELD_NUMBER: _ClassVar[int]
    FIRED_FIELD_NUMBER: _ClassVar[int]
    perturbation: str
    n_cells: int
    n_controls: int
    metric: str
    distance: float
    null_mean: float
    null_sd: float
    z: float
    p: float
    q: float
    flags: str
    n_used: int
    p_source: str
    exchanges: int
    p_tail: float
    p_tail_source: str
    p_omnibus: float
    q_omnibus: float
    fired: str
    def __init__(self, perturbation: _Optional[str] = ..., n_cells: _Optional[int] = ..., n_controls: _Optional[int] = ..., metric: _Optional[str] = ..., distance: _Optional[float] = ..., null_mean: _Optional[float] = ..., null_sd: _Optional[float] = ..., z: _Optional[float] = ..., p: _Optional[float] = ..., q: _Optional[float] = ..., flags: _Optional[str] = ..., n_used: _Optional[int] = ..., p_source: _Optional[str] = ..., exchanges: _Optional[int] = ..., p_tail: _Optional[float] = ..., p_tail_source: _Optional[str] = ..., p_omnibus: _Optional[float] = ..., q_omnibus: _Optional[float] = ..., fired: _Optional[str] = ...) -> None: ...

class ScoreAnswer(_message.Message):
    __slots__ = ("results", "meta")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    META_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Score]
    meta: Meta
    def __init__(self, results: _Optional[_Iterable[_Union[Score, _Mapping]]] = ..., meta: _Optional[_Union[Meta, _Mapping]] = ...) -> None: ...

class Pair(_message.Message):
    __slots__ = ("a", "b")
    A_FIELD_NUMBER: _ClassVar[int]
    B_FIELD_NUMBER: _ClassVar[int]
    a: str
    b: str
    def __init__(self, a: _Optional[str] = ..., b: _Optional[str] = ...) -> None: ...

class CompareRequest(_message.Message):
    __slots__ = ("cells", "embeddings", "perturbations", "pairs", "batches", "options", "model", "control", "controls")
    CELLS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    PERTURBATIONS_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    cells: CountMatrix
    embeddings: EmbeddingMatrix
    perturbations: _containers.RepeatedScalarFieldContainer[str]
    pairs: _containers.RepeatedCompositeFieldContainer[Pair]
    batches: _containers.RepeatedScalarFieldContainer[str]
    options: ScoreOptions
    model: str
    control: str
    controls: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, cells: _Optional[_Union[CountMatrix, _Mapping]] = ..., embeddings: _Optional[_Union[EmbeddingMatrix, _Mapping]] = ..., perturbations: _Optional[_Iterable[str]] = ..., pairs: _Optional[_Iterable[_Union[Pair, _Mapping]]] = ..., batches: _Optional[_Iterable[str]] = ..., options: _Optional[_Union[ScoreOptions, _Mapping]] = ..., model: _Optional[str] = ..., control: _Optional[str] = ..., controls: _Optional[_Iterable[str]] = ...) -> None: ...

class Comparison(_message.Message):
    __slots__ = ("a", "b", "n_a", "n_b", "metric", "distance", "null_mean", "null_sd", "z", "p", "q", "flags", "n_used_a", "n_used_b", "p_source", "exchanges", "effect_similarity")
    A_FIELD_NUMBER: _ClassVar[int]
    B_FIELD_NUMBER: _ClassVar[int]
    N_A_FIELD_NUMBER: _ClassVar[int]
    N_B_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_FIELD_NUMBER: _ClassVar[int]
    NULL_MEAN_FIELD_NUMBER: _ClassVar[int]
    NULL_SD_FIELD_NUMBER: _ClassVar[int]
    Z_FIELD_NUMBER: _ClassVar[int]
    P_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    N_USED_A_FIELD_NUMBER: _ClassVar[int]
    N_USED_B_FIELD_NUMBER: _ClassVar[int]
    P_SOURCE_FIELD_NUMBER: _ClassVar[int]
    EXCHANGES_FIELD_NUMBER: _ClassVar[int]
    EFFECT_SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    a: str
    b: str
    n_a: int
    n_b: int
    metric: str
    distance: float
    null_mean: float
    null_sd: float
    z: float
    p: float
    q: float
    flags: str
    n_used_a: int
    n_used_b: int
    p_source: str
    exchanges: int
    effect_similarity: float
    def __init__(self, a: _Optional[str] = ..., b: _Optional[str] = ..., n_a: _Optional[int] = ..., n_b: _Optional[int] = ..., metric: _Optional[str] = ..., distance: _Optional[float] = ..., null_mean: _Optional[float] = ..., null_sd: _Optional[float] = ..., z: _Optional[float] = ..., p: _Optional[float] = ..., q: _Optional[float] = ..., flags: _Optional[str] = ..., n_used_a: _Optional[int] = ..., n_used_b: _Optional[int] = ..., p_source: _Optional[str] = ..., exchanges: _Optional[int] = ..., effect_similarity: _Optional[float] = ...) -> None: ...

class CompareAnswer(_message.Message):
    __slots__ = ("results", "meta")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    META_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Comparison]
    meta: Meta
    def __init__(self, results: _Optional[_Iterable[_Union[Comparison, _Mapping]]] = ..., meta: _Optional[_Union[Meta, _Mapping]] = ...) -> None: ...

class GeneCoverage(_message.Message):
    __slots__ = ("n_genes", "n_matched", "n_by_symbol", "n_merged", "n_ambiguous", "ambiguous", "unmatched")
    N_GENES_FIELD_NUMBER: _ClassVar[int]
    N_MATCHED_FIELD_NUMBER: _ClassVar[int]
    N_BY_SYMBOL_FIELD_NUMBER: _ClassVar[int]
    N_MERGED_FIELD_NUMBER: _ClassVar[int]
    N_AMBIGUOUS_FIELD_NUMBER: _ClassVar[int]
    AMBIGUOUS_FIELD_NUMBER: _ClassVar[int]
    UNMATCHED_FIELD_NUMBER: _ClassVar[int]
    n_genes: int
    n_matched: int
    n_by_symbol: int
    n_merged: int
    n_ambiguous: int
    ambiguous: _containers.RepeatedCompositeFieldContainer[Pair]
    unmatched: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, n_genes: _Optional[int] = ..., n_matched: _Optional[int] = ..., n_by_symbol: _Optional[int] = ..., n_merged: _Optional[int] = ..., n_ambiguous: _Optional[int] = ..., ambiguous: _Optional[_Iterable[_Union[Pair, _Mapping]]] = ..., unmatched: _Optional[_Iterable[str]] = ...) -> None: ...

class Meta(_message.Message):
    __slots__ = ("model_id", "vocabulary_hash", "coverage", "warnings", "timings", "provenance_json", "variant")
    class TimingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_HASH_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_JSON_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    vocabulary_hash: str
    coverage: GeneCoverage
    warnings: _containers.RepeatedScalarFieldContainer[str]
    timings: _containers.ScalarMap[str, float]
    provenance_json: str
    variant: str
    def __init__(self, model_id: _Optional[str] = ..., vocabulary_hash: _Optional[str] = ..., coverage: _Optional[_Union[GeneCoverage, _Mapping]] = ..., warnings: _Optional[_Iterable[str]] = ..., timings: _Optional[_Mapping[str, float]] = ..., provenance_json: _Optional[str] = ..., variant: _Optional[str] = ...) -> None: ...

class ModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Output(_message.Message):
    __slots__ = ("name", "per", "width", "meaning", "names")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PER_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    MEANING_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    name: str
    per: str
    width: int
    meaning: str
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., per: _Optional[str] = ..., width: _Optional[int] = ..., meaning: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "version", "model_id", "family", "width", "vocabulary_hash", "layer", "pooling", "licence", "variant", "device", "golden", "outputs", "task", "capabilities", "classes", "max_length", "vocabulary_genes", "panel_genes", "memory_bytes", "signature", "signer")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_HASH_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    GOLDEN_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_GENES_FIELD_NUMBER: _ClassVar[int]
    PANEL_GENES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    SIGNER_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    model_id: str
    family: str
    width: int
    vocabulary_hash: str
    layer: str
    pooling: str
    licence: str
    variant: str
    device: str
    golden: str
    outputs: _containers.RepeatedCompositeFieldContainer[Output]
    task: str
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    classes: _containers.RepeatedScalarFieldContainer[str]
    max_length: int
    vocabulary_genes: int
    panel_genes: int
    memory_bytes: int
    signature: str
    signer: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., model_id: _Optional[str] = ..., family: _Optional[str] = ..., width: _Optional[int] = ..., vocabulary_hash: _Optional[str] = ..., layer: _Optional[str] = ..., pooling: _Optional[str] = ..., licence: _Optional[str] = ..., variant: _Optional[str] = ..., device: _Optional[str] = ..., golden: _Optional[str] = ..., outputs: _Optional[_Iterable[_Union[Output, _Mapping]]] = ..., task: _Optional[str] = ..., capabilities: _Optional[_Iterable[str]] = ..., classes: _Optional[_Iterable[str]] = ..., max_length: _Optional[int] = ..., vocabulary_genes: _Optional[int] = ..., panel_genes: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., signature: _Optional[str] = ..., signer: _Optional[str] = ...) -> None: ...

class ModelProblem(_message.Message):
    __slots__ = ("name", "problem")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    name: str
    problem: str
    def __init__(self, name: _Optional[str] = ..., problem: _Optional[str] = ...) -> None: ...

class ModelsAnswer(_message.Message):
    __slots__ = ("models", "problems")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    problems: _containers.RepeatedCompositeFieldContainer[ModelProblem]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., problems: _Optional[_Iterable[_Union[ModelProblem, _Mapping]]] = ...) -> None: ...
