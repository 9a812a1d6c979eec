"""Every decoder of what callers send, at n and at 4 n items: none takes more than six times as long, or as much memory.

The table follows from the operations and the kinds of their fields, so a new operation, or a new field, is in it by
itself. Time is that of the processor, the least of a few tries, so that others on the machine do not matter; a list
that is searched for each of its items takes sixteen times as long.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
from google.protobuf.descriptor import FieldDescriptor

from perturbscope import protocol
from perturbscope.analysis.gene_sets import read_gmt
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneCoverage, GeneLists, GeneResolver
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import PerturbScopeError
from perturbscope.families.outputs import OutputSpec
from perturbscope.inference.embeddings import OutputValues
from perturbscope.operations import OPERATIONS
from perturbscope.protocol import checks
from perturbscope.protocol.arrow_ipc import KEY
from perturbscope.protocol.arrow_streams import StreamRequestReader
from perturbscope.protocol.fields import Field, Form, Meta
from perturbscope.protocol.proto.open_inference_pb2 import ModelInferRequest
from perturbscope.protocol.protobuf import message_class
from perturbscope.protocol.protobuf_streams import (
    stream_cells_from_proto,
    stream_cells_to_proto,
    stream_start_from_proto,
    stream_start_to_proto,
)
from perturbscope.protocol.streams import StreamStart
from perturbscope.protocol.tables import form_of
from perturbscope.scoring.labels import Groups
from perturbscope.scoring.results import ScoreOptions
from serving.access.limits import decoded_bytes
from serving.grpc.weight import weigh
from serving.openinference.json_codec import request_from_body
from serving.openinference.proto_codec import request_from_proto as infer_from_proto
from serving.settings import Settings
from serving.uploads.requests import read_upload
from tests.arrow_client import stream_request_to_arrow
from tests.fuzz.seeds import h5ad
from tests.operations.count_tokens import OPERATION as COUNT_TOKENS

N, TIMES, MOST = 400, 4, 6.0
SECONDS, BYTES = 0.02, 2**20
"""What is less at 4 n is small, and its growth is chance."""
Case = Callable[[int], Callable[[], object]]
"""Makes the input of a decoder with n items, and returns the decoding of it."""
_fresh = itertools.count()


def names(n: int, stem: str = "g") -> list[str]:
    """Names that no list before had: what was seen before is looked up."""
    number = next(_fresh)
    return [f"{stem}{number}_{i}" for i in range(n)]


def cells(n: int) -> CountMatrix:
    """One count in each of n cells, in a gene of its own."""
    return CountMatrix.from_csr(np.ones(n, int), np.arange(n), np.arange(n + 1), names(n))


def case(decode: Callable[..., object], make: Callable[[int], Any]) -> Case:
    def made(n: int) -> Callable[[], object]:
        value = make(n)
        return lambda: decode(value)

    return made


def value_of(item: Field, n: int) -> Any:
    """Return a value with n items for a field of any kind."""
    match item.kind:
        case "cells":
            return cells(n)
        case "vectors":
            return np.ones((n, 2), np.float32)
        case "numbers":
            return np.ones(n, item.dtype)
        case "labels" | "texts" | "names":
            return tuple(names(n))
        case "pairs":
            return tuple(itertools.pairwise(names(n + 1)))
        case "options":
            return ScoreOptions()
        case "meta":
            coverage = GeneCoverage(
                n, n, unmatched=tuple(names(n)), ambiguous=tuple(zip(names(n), names(n), strict=True))
            )
            seconds = dict.fromkeys(names(n), 1.0)
            facts: dict[str, Any] = dict.fromkeys(names(n), 1)
            return Meta(
                model_id="m",
                vocabulary_hash="v",
                coverage=coverage,
                timings=seconds,
                warnings=tuple(names(n)),
                provenance=facts,
            )
        case "table":
            import pandas as pd

            of_kind = {"text": names(n), "integer": list(range(n)), "number": [0.5] * n}
            return pd.DataFrame({name: of_kind[kind] for name, kind in item.columns.items()})
        case "records":
            few = {each.name: value_of(each, 3) for each in form_of(item.record).fields if each.kind != "texts"}
            many = {each.name: value_of(each, n) for each in form_of(item.record).fields if each.kind == "texts"}
            make = form_of(item.record).make
            return (*(make(**few) for _ in range(n // 10)), make(**{**few, **many}))
        case "outputs":
            spec = OutputSpec(name="value", per="token", width=1, meaning="value")
            rows = np.ones((n, 1), np.float32)
            return {"value": OutputValues(spec, rows, np.arange(n + 1), np.arange(n, dtype=np.int32), tuple(names(n)))}
        case "text":
            return "control"
        case "integer":
            return n
        case "number":
            return 0.5
        case "flag":
            return True
    raise AssertionError(f"no value for a field of kind {item.kind}: add one here")


def messages(form: Form, n: int) -> Iterator[tuple[str, Any]]:
    """Yield messages of a form: with cells, and with vectors where either may be given."""
    values = {item.name: value_of(item, n) for item in form.fields if not item.derived}
    cells_or_vectors = form.of("cells"), form.of("vectors")
    if all(cells_or_vectors):
        for which, left_out in (("cells", cells_or_vectors[1]), ("vectors", cells_or_vectors[0])):
            left = {item.name for item in left_out}
            yield which, form.make(**{name: value for name, value in values.items() if name not in left})
    else:
        yield "all", form.make(**values)


def lists_in(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of the lists and objects in JSON; of the items of a list, only those of the last."""
    inside = data.items() if isinstance(data, dict) else list(enumerate(data))[-1:] if isinstance(data, list) else ()
    if isinstance(data, (dict, list)):
        yield path
    for key, value in inside if len(inside) < 100 else ():
        yield from lists_in(value, (*path, key))


def spoiled(text: bytes, path: tuple[Any, ...], how: str, n: int) -> bytes:
    """Return JSON with n more items in the list or object at a path, the last of them a fault."""
    data = json.loads(text)
    place = functools.reduce(lambda inside, key: inside[key], path, data)
    if isinstance(place, list):
        first = place[0] if place else "a"
        place += names(n) if isinstance(first, str) else [first] * n
        place.append(first if how == "twice" else None)
        return json.dumps(data).encode()
    place |= dict.fromkeys(names(n), 0)
    if how == "twice":
        # The first name of the object stands once more at its end.
        place["\1"] = 1
        return json.dumps(data).replace('"\\u0001": 1', f'"{next(iter(place))}": 1').encode()
    return json.dumps(data).encode()


def json_cases(kind: type[Any], what: str, form: Form) -> Iterator[tuple[str, Case]]:
    write, read = getattr(protocol, f"{what}_to_json"), getattr(protocol, f"{what}_from_json")

    def make(n: int, which: str) -> Callable[[], object]:
        return functools.partial(read, kind, write(dict(messages(form, n))[which]))

    for which, small in messages(form, 3):
        yield which, functools.partial(make, which=which)
        for path in lists_in(json.loads(write(small))):
            for how in ("twice", "wrong"):
                change = functools.partial(spoiled, write(small), path, how)
                yield f"{which} {path} {how}", case(functools.partial(read, kind), change)


def arrow_body(table: pa.Table, *, rows: int = 0, deltas: bool = False) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=deltas)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, rows or None)
    body: bytes = sink.getvalue().to_pybytes()
    return body


def arrow_cases(kind: type[Any], what: str, form: Form) -> Iterator[tuple[str, Case]]:
    write, read = getattr(protocol, f"{what}_to_arrow"), getattr(protocol, f"{what}_from_arrow")

    def make(n: int, which: str, change: Callable[[pa.Table, int], bytes]) -> Callable[[], object]:
        with pa.ipc.open_stream(write(dict(messages(form, n))[which])) as reader:
            return functools.partial(read, kind, change(reader.read_all(), n))

    def metadata(n: int, table: pa.Table, path: tuple[Any, ...], how: str) -> bytes:
        text = spoiled(table.schema.metadata[KEY], path, how, n)
        return arrow_body(table.replace_schema_metadata({KEY: text}))

    def strangers(table: pa.Table, n: int) -> bytes:
        for name in names(n // 10):
            column = table.column(0) if table.num_columns else pa.array([], pa.int64())
            table = table.append_column(name, column)
        return arrow_body(table)

    def encoded(table: pa.Table, _: int) -> bytes:
        columns = {
            name: table[name].combine_chunks().dictionary_encode()
            if pa.types.is_string(table[name].type)
            else table[name]
            for name in table.column_names
        }
        return arrow_body(pa.table(columns).replace_schema_metadata(table.schema.metadata))

    def growing(table: pa.Table, _: int) -> bytes:
        """Dictionaries that grow with each batch."""
        texts = [name for name in table.column_names if pa.types.is_string(table[name].type)]
        found = []
        for at in range(0, len(table), 10):
            part = table.slice(at, 10)
            for name in texts:
                words = table[name].combine_chunks().slice(0, at + 10)
                codes = pa.array(np.arange(at, len(words), dtype=np.int32))
                column = pa.DictionaryArray.from_arrays(codes, words)
                part = part.set_column(part.column_names.index(name), name, column)
            found.append(part)
        return arrow_body(pa.concat_tables(found), deltas=True)

    for which, small in messages(form, 3):
        with pa.ipc.open_stream(write(small)) as reader:
            table = reader.read_all()
        yield which, functools.partial(make, which=which, change=lambda table, _: arrow_body(table))
        yield f"{which} strangers", functools.partial(make, which=which, change=strangers)
        yield (
            f"{which} many batches",
            functools.partial(make, which=which, change=lambda table, _: arrow_body(table, rows=4)),
        )
        if any(pa.types.is_string(kind) for kind in table.schema.types):
            yield f"{which} encoded", functools.partial(make, which=which, change=encoded)
            yield f"{which} growing", functools.partial(make, which=which, change=growing)
        for path in lists_in(json.loads(table.schema.metadata[KEY])):
            for how in ("twice", "wrong"):
                change = functools.partial(metadata, table=table, path=path, how=how)
                yield f"{which} {path} {how}", case(functools.partial(read, kind), change)


def repeat_a_name(message: Any) -> None:
    """Make the last of each list of strings equal to the first."""
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_STRING and field.is_repeated:
            value[-1] = value[0]
        elif field.message_type is not None and not field.is_repeated:
            repeat_a_name(value)


def proto_cases(kind: type[Any], what: str, form: Form) -> Iterator[tuple[str, Case]]:
    write, read = getattr(protocol, f"{what}_to_proto"), getattr(protocol, f"{what}_from_proto")
    parse = message_class(form).FromString

    def make(n: int, which: str, twice: bool) -> Callable[[], object]:
        message = write(dict(messages(form, n))[which])
        if twice:
            repeat_a_name(message)
        data = message.SerializeToString()
        return lambda: (weigh(data, message.DESCRIPTOR, 2**40), read(kind, parse(data)))

    for which, _ in messages(form, 3):
        for twice in (False, True):
            yield f"{which} {'twice' if twice else ''}", functools.partial(make, which=which, twice=twice)


def last_twice(found: list[str]) -> list[str]:
    return [*found[:-1], found[0]]


def stream_cases() -> Iterator[tuple[str, Case]]:
    """Streams: their start, and a chunk of cells."""

    def start(n: int, twice: bool) -> StreamStart:
        found = names(n)
        return StreamStart(gene_ids=np.array(last_twice(found) if twice else found), outputs=tuple(names(n)))

    def read(parts: list[bytes]) -> object:
        reader = StreamRequestReader()
        begun = reader.start(parts[0])
        return begun.every_gene(), [reader.cells(part, begun.gene_ids, 0) for part in parts[1:-1]]

    for twice in (False, True):
        made = functools.partial(start, twice=twice)
        yield f"arrow {twice}", case(read, lambda n, made=made: [*stream_request_to_arrow(made(n), [cells(n)])])
        yield (
            f"proto {twice}",
            case(
                lambda found: stream_start_from_proto(found).every_gene(),
                lambda n, made=made: stream_start_to_proto(made(n)),
            ),
        )
    yield (
        "cells proto",
        case(
            lambda found: stream_cells_from_proto(found[0], found[1], 0),
            lambda n: (stream_cells_to_proto(cells(n)), cells(n).gene_ids),
        ),
    )


def tensor_cases() -> Iterator[tuple[str, Case]]:
    """Requests of the Open Inference Protocol."""

    def body(n: int, **more: Any) -> bytes:
        rows = [[1, 2]] * n
        inputs = [{"name": name, "datatype": "INT64", "shape": [n, 2], "data": rows} for name in ("input_ids", "mask")]
        return json.dumps({"inputs": inputs, **more}).encode()

    def message(n: int) -> ModelInferRequest:
        found = ModelInferRequest()
        tensor = found.inputs.add(name="input_ids", datatype="INT64", shape=[n])
        tensor.contents.int64_contents.extend(range(n))
        for name in names(n):
            found.outputs.add(name=name)
            found.parameters[name].bool_param = True
        return found

    yield "json", case(lambda text: request_from_body(text, None), body)
    yield (
        "json strangers",
        case(lambda text: request_from_body(text, None), lambda n: body(n, parameters=dict.fromkeys(names(n), 1))),
    )
    yield (
        "json outputs",
        case(
            lambda text: request_from_body(text, None), lambda n: body(n, outputs=[{"name": name} for name in names(n)])
        ),
    )
    yield (
        "json shape",
        case(
            lambda text: request_from_body(text, None),
            lambda n: json.dumps(
                {"inputs": [{"name": "a", "datatype": "INT64", "shape": [1] * n, "data": [1]}]}
            ).encode(),
        ),
    )
    yield "proto", case(infer_from_proto, message)


def other_cases() -> Iterator[tuple[str, Case]]:
    """What is done with names after they are decoded, and estimates before."""
    vocabulary, resolver = GeneVocabulary.geneformer_gc30m(), GeneResolver.default()

    def table(n: int) -> str:
        rows = [f"{i + 2}\tG{i}\t1.0" for i in range(n)]
        return "\n".join(["# source: x", "token\tgene_id\tmedian", "0\t<pad>\t", "1\t<mask>\t", *rows, ""])

    def grouped(labels: list[str]) -> object:
        return Groups.of(np.ones((len(labels), 2)), labels, labels, ScoreOptions(min_cells=2), control="controll")

    yield "resolver", case(lambda found: resolver.map(found, vocabulary), names)
    yield (
        "resolver, Ensembl ids with versions",
        case(
            lambda found: resolver.map(found, vocabulary), lambda n: [f"ENSG{i:011d}.{next(_fresh)}" for i in range(n)]
        ),
    )
    yield "resolver, one gene", case(lambda found: resolver.map(found, vocabulary), lambda n: ["STAT1"] * n)
    yield "vocabulary", case(GeneVocabulary.from_tsv, table)
    yield "labels", case(grouped, names)
    yield "labels in pairs", case(grouped, lambda n: names(n // 2) * 2)
    for media_type in (protocol.JSON, protocol.ARROW):
        yield f"estimate {media_type}", case(functools.partial(decoded_bytes, media_type), lambda n: b'{"a":[' * n)
    yield "text of genes that never ends", case(checks.parse_request, lambda n: b'"gene_ids" : [' * n)
    yield "blanks after genes", case(checks.parse_request, lambda n: b'"gene_ids"' + b" " * 20 * n)


def gmt_cases(folder: Path) -> Iterator[tuple[str, Case]]:
    """Gene sets."""

    def write(n: int, twice: bool) -> Path:
        sets = names(n, "s")
        lines = ["\t".join([name, "", *names(3)]) for name in (last_twice(sets) if twice else sets)]
        lines.insert(0, "\t".join(["long", "", *names(n)]))
        path = folder / f"{n}{twice}.gmt"
        path.write_text("\n".join(lines))
        return path

    for twice in (False, True):
        yield f"{twice}", case(read_gmt, functools.partial(write, twice=twice))


def file_cases(folder: Path) -> Iterator[tuple[str, Case]]:
    """Uploaded files: many columns, labels, categories and genes, and long names."""

    def with_columns(file: h5py.File, n: int) -> None:
        order = names(n // 5, "c")
        for name in order:
            file["obs"].create_dataset(name, data=np.arange(len(file["obs/_index"])) % 3)
        _order(file["obs"], ["perturbation", *order])

    def with_strange_order(file: h5py.File, n: int) -> None:
        _order(file["obs"], names(n))

    def with_categories(file: h5py.File, n: int) -> None:
        group = file["obs"].create_group("guide")
        group.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
        group.create_dataset("codes", data=np.arange(len(file["obs/_index"])) // 2)
        group.create_dataset("categories", data=np.array(names(n), object), dtype=h5py.string_dtype())
        _order(file["obs"], ["perturbation", "guide"])

    def with_long_label(file: h5py.File, n: int) -> None:
        file["obs/perturbation"][0] = "x" * 10 * n

    def with_long_gene(file: h5py.File, n: int) -> None:
        file["var/_index"][0] = "x" * 10 * n

    def with_unlike_labels(file: h5py.File, n: int) -> None:
        file["obs/perturbation"][...] = np.array(names(n // 2) * 2, object)

    def with_one_gene_twice(file: h5py.File, n: int) -> None:
        file["var/_index"][n - 1] = file["var/_index"][0]

    def write(n: int, change: Callable[[h5py.File, int], None]) -> Path:
        path = folder / f"{n}.h5ad"
        # A file of columns has few cells.
        path.write_bytes(h5ad(cells(20 if change is with_columns else n)))
        with h5py.File(path, "r+") as file:
            change(file, n)
        return path

    asked: dict[str, dict[str, str]] = {
        "columns": {},
        "embed": {},
        "score": {"perturbation_key": "perturbation", "control": "control"},
        "compare": {"perturbation_key": "perturbation", "batch_key": "guide"},
    }
    settings = Settings()
    for change, routes in {
        with_columns: ("columns", "score"),
        with_strange_order: ("columns",),
        with_categories: ("columns", "compare"),
        with_long_label: ("columns", "score"),
        with_long_gene: ("embed",),
        with_unlike_labels: ("columns", "score"),
        with_one_gene_twice: ("embed",),
    }.items():
        for route in routes:
            decode = functools.partial(_read, route=route, parameters=asked[route], settings=settings)
            yield f"{change.__name__} {route}", case(decode, functools.partial(write, change=change))


def _order(frame: h5py.Group, order: list[str]) -> None:
    del frame.attrs["column-order"]
    frame.attrs.create("column-order", np.array(order, object), dtype=h5py.string_dtype())


def _read(path: Path, *, route: str, parameters: Mapping[str, str], settings: Settings) -> object:
    return read_upload(route, path, parameters, settings)


def cpu_seconds(made: Callable[[], object]) -> float:
    """Return the processor time of one decoding, which may refuse its input."""
    started = time.process_time()
    with contextlib.suppress(PerturbScopeError):
        made()
    return time.process_time() - started


def peak_bytes(made: Callable[[], object]) -> int:
    """Return the most memory that one decoding takes, in objects of Python and numpy."""
    tracemalloc.start()
    try:
        cpu_seconds(made)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def faults(found: Iterator[tuple[str, Case]]) -> list[str]:
    """Return the cases that take more than six times as long, or as much memory, for four times the items."""
    wrong = []
    gc.collect()
    gc.freeze()  # what is there before is not looked through again
    try:
        for name, make in found:
            small, large = make(N), make(TIMES * N)
            ratio = float("inf")
            for _ in range(4):
                seconds = cpu_seconds(large)
                ratio = min(ratio, seconds / max(cpu_seconds(small), 1e-6)) if seconds > SECONDS else 0.0
                if ratio <= MOST:
                    break
            else:
                wrong.append(f"{name}: {ratio:.1f} times as long, {seconds:.2f} s")
            # What takes no time fills no memory.
            most = peak_bytes(large) if seconds > 0.002 else 0
            if most > BYTES and most > MOST * peak_bytes(small):
                wrong.append(f"{name}: {most / peak_bytes(small):.1f} times the memory, {most / 2**20:.0f} MiB")
    finally:
        gc.unfreeze()
    return wrong


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "RECENT", GeneLists(max_lists=0))


WIRES = {"json": json_cases, "arrow": arrow_cases, "proto": proto_cases}
TABLE = [
    (f"{operation.name} {what} {wire}", wire, kind, what, form)
    for operation in (*OPERATIONS.values(), COUNT_TOKENS)
    for what, kind, form in (
        ("request", operation.request, operation.takes),
        ("answer", operation.answer, operation.gives),
    )
    for wire in WIRES
    if form.fields and not (wire == "arrow" and form.of("records"))
]


@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_messages_of_every_operation(row: tuple[str, str, type[Any], str, Form]) -> None:
    _, wire, kind, what, form = row
    if kind in (COUNT_TOKENS.request, COUNT_TOKENS.answer):
        with OPERATIONS.added(COUNT_TOKENS):
            assert faults(WIRES[wire](kind, what, form)) == []
    else:
        assert faults(WIRES[wire](kind, what, form)) == []


@pytest.mark.parametrize("cases", [stream_cases, tensor_cases, other_cases], ids=lambda each: each.__name__)
def test_streams_tensors_and_names(cases: Callable[[], Iterator[tuple[str, Case]]]) -> None:
    assert faults(cases()) == []


@pytest.mark.parametrize("cases", [gmt_cases, file_cases], ids=lambda each: each.__name__)
def test_files(cases: Callable[[Path], Iterator[tuple[str, Case]]], tmp_path: Path) -> None:
    assert faults(cases(tmp_path)) == []


def test_a_search_for_each_item_is_found() -> None:
    quadratic = case(lambda found: [found.count(name) for name in found], names)
    assert len(faults(iter([("quadratic", quadratic)]))) == 1
    copies = case(lambda found: np.zeros((len(found), len(found))) + 1, names)
    assert any("memory" in fault for fault in faults(iter([("copies", copies)])))
