"""The bundle proves itself: whatever was changed, opening says so; whatever failed, writing leaves nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import (
    BundleError,
    CorruptBundleError,
    UnsupportedBundleError,
    VocabularyMismatchError,
)
from perturbscope.families.outputs import OutputSpec, cell_embedding
from perturbscope.inference import bundle as bundle_module
from perturbscope.inference.bundle import MANIFEST, Bundle, Manifest, Variant, capabilities_of, sha256
from perturbscope.inference.external_data import external_files
from tests.bundles import CLASSES, TINY_OUTPUTS, TINY_WIDTH, tiny_files, tiny_manifest, write_tiny_bundle


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copied"))


def edit_manifest(path: Path, **changes) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | changes))


def contents(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Opening


def test_an_intact_bundle_opens(tiny_bundle):
    bundle = Bundle.open(str(tiny_bundle))
    assert bundle.vocabulary.hash == GeneVocabulary.geneformer_gc30m().hash
    assert bundle.family().name == "rank"
    assert bundle.graph() == tiny_bundle / "model.onnx"
    assert set(bundle.manifest.files) == {"model.onnx", "vocabulary.tsv", "MODEL_CARD.md"}


def test_the_model_id_changes_with_the_weights(tiny_bundle, tmp_path):
    same = Bundle.open(write_tiny_bundle(tmp_path / "same"))
    other = Bundle.open(write_tiny_bundle(tmp_path / "other", seed=1))
    assert Bundle.open(tiny_bundle).model_id == same.model_id != other.model_id
    assert same.model_id == f"tiny-0.1-{sha256(tiny_bundle / 'model.onnx')[:12]}"


def test_bundles_of_one_vocabulary_share_it(tiny_bundle, tmp_path):
    other = Bundle.open(write_tiny_bundle(tmp_path / "other", seed=1))
    assert other.vocabulary is Bundle.open(tiny_bundle).vocabulary


def test_an_unknown_variant(tiny_bundle):
    with pytest.raises(BundleError, match="has no variant 'int8'; it has fp32"):
        Bundle.open(tiny_bundle).graph("int8")


@pytest.mark.parametrize("name", ["model.onnx", "vocabulary.tsv", "MODEL_CARD.md"])
def test_a_changed_byte_is_found(copied, name):
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(CorruptBundleError, match=rf"{name} has the SHA-256 .* the manifest says"):
        Bundle.open(copied)


@pytest.mark.parametrize("name", ["model.onnx", "vocabulary.tsv", "MODEL_CARD.md"])
def test_a_truncated_file_is_found(copied, name):
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[:-1])
    with pytest.raises(CorruptBundleError, match=name):
        Bundle.open(copied)


@pytest.mark.parametrize("name", ["model.onnx", "vocabulary.tsv", "MODEL_CARD.md"])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(CorruptBundleError, match=rf"{name} cannot be read"):
        Bundle.open(copied)


@pytest.mark.parametrize("name", ["model.onnx", "vocabulary.tsv"])
def test_a_file_that_counts_must_be_listed(copied, name):
    files = json.loads((copied / MANIFEST).read_text())["files"]
    edit_manifest(copied, files={other: digest for other, digest in files.items() if other != name})
    with pytest.raises(CorruptBundleError, match=f"lists no {name}"):
        Bundle.open(copied)


def test_fp32_is_always_there(copied):
    edit_manifest(copied, variants={"int8": {"file": "model.onnx", "cosine": 0.99}})
    with pytest.raises(CorruptBundleError, match="lists no fp32 variant"):
        Bundle.open(copied)


def test_a_foreign_vocabulary(tmp_path):
    files = tiny_files()
    ours = GeneVocabulary.geneformer_gc30m()
    foreign = GeneVocabulary(ours.gene_ids, ours.tokens, ours.medians * 1.001, ours.special_tokens, "elsewhere")
    files["vocabulary.tsv"] = foreign.to_tsv().encode()
    with pytest.raises(VocabularyMismatchError, match=f"{foreign.hash[:12]}.*{ours.hash[:12]}"):
        Bundle.write(tmp_path / "foreign", tiny_manifest(), files)
    assert contents(tmp_path) == []


def test_a_newer_format(copied):
    edit_manifest(copied, format_version=3)
    with pytest.raises(UnsupportedBundleError, match=r"has format 3; .* reads up to 2\. Upgrade perturbscope"):
        Bundle.open(copied)


def test_a_newer_format_is_named_before_its_unknown_fields(copied):
    edit_manifest(copied, format_version=3, adapters=[])
    with pytest.raises(UnsupportedBundleError):
        Bundle.open(copied)


def test_an_unknown_family(copied):
    edit_manifest(copied, family="graph_compass")
    with pytest.raises(UnsupportedBundleError, match=r"'graph_compass' is not installed; this version has .*rank"):
        Bundle.open(copied)


def test_an_unknown_option_of_the_family(copied):
    edit_manifest(copied, family_config={"max_length": 2048, "rope": True})
    with pytest.raises(UnsupportedBundleError, match="no option 'rope'"):
        Bundle.open(copied)


@pytest.mark.parametrize("length", [0, -5, "2048", None])
def test_a_maximum_length_that_cannot_be(copied, length):
    edit_manifest(copied, family_config={"max_length": length})
    with pytest.raises(CorruptBundleError, match="max_length"):
        Bundle.open(copied)


@pytest.mark.parametrize(
    "changes",
    [
        {"width": "wide"},
        {"width": 0},
        {"family_config": ["max_length"]},
        {"variants": {"fp32": "model.onnx"}},
        {"variants": {"fp32": {"file": "model.onnx"}}},
        {"variants": {"fp32": {"file": "model.onnx", "cosine": "high"}}},
        {"variants": []},
        {"files": {"model.onnx": 5}},
        {"files": ["model.onnx"]},
        {"vocabulary_hash": None},
    ],
    ids=str,
)
def test_a_field_of_the_wrong_form(copied, changes):
    edit_manifest(copied, **changes)
    with pytest.raises(CorruptBundleError, match="a field has the wrong form"):
        Bundle.open(copied)


def test_fields_missing_and_unknown(copied):
    manifest = json.loads((copied / MANIFEST).read_text())
    del manifest["width"]
    (copied / MANIFEST).write_text(json.dumps(manifest | {"colour": "red"}))
    with pytest.raises(CorruptBundleError, match=r"missing fields \['width'\], unknown fields \['colour'\]"):
        Bundle.open(copied)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "sub/model.onnx", "..", ".", "", "..\\model.onnx"])
@pytest.mark.parametrize("place", ["files", "variants"])
def test_a_file_name_cannot_leave_the_bundle(copied, name, place):
    manifest = json.loads((copied / MANIFEST).read_text())
    if place == "files":
        manifest["files"][name] = "0" * 64
    else:
        manifest["variants"]["fp16"] = {"file": name, "cosine": 0.999}
    (copied / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CorruptBundleError, match="not a plain file name"):
        Bundle.open(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "{}", '{"format_version": "1"}'])
def test_a_manifest_that_is_none(copied, text):
    (copied / MANIFEST).write_text(text)
    with pytest.raises(CorruptBundleError, match=r"manifest\.json"):
        Bundle.open(copied)


def test_a_manifest_in_another_encoding(copied):
    (copied / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CorruptBundleError, match="cannot be read"):
        Bundle.open(copied)


@pytest.mark.parametrize("name", ["nothing here", "."])
def test_a_place_that_holds_no_bundle(tmp_path, name):
    with pytest.raises(CorruptBundleError, match=r"is not a bundle: it has no manifest\.json"):
        Bundle.open(tmp_path / name)


def test_a_file_is_not_a_bundle(tiny_bundle):
    with pytest.raises(CorruptBundleError, match=r"cannot be read"):
        Bundle.open(tiny_bundle / "model.onnx")


def test_the_manifest_survives_text():
    manifest = tiny_manifest(
        variants={"fp32": Variant(file="model.onnx"), "int8": Variant(file="model.int8.onnx", cosine=0.998)},
        files={"model.onnx": "0" * 64},
    )
    assert Manifest.from_json(manifest.to_json(), where="here") == manifest


# Outputs


def test_outputs_survive_text_and_say_what_the_model_can_do():
    manifest = tiny_manifest(outputs=TINY_OUTPUTS, task="cell_classification", gene_panel=("ENSG1", "ENSG2"))
    assert Manifest.from_json(manifest.to_json(), where="here") == manifest
    assert json.loads(manifest.to_json())["format_version"] == 2
    assert manifest.capabilities == ("classify_cells", "embed", "gene_embedding")
    assert manifest.classes == CLASSES
    assert capabilities_of(manifest.outputs[:1], edits=True) == ("edit_tokens", "embed")
    of_genes = OutputSpec(name="gene_logits", per="token", width=1, meaning="logits")
    assert capabilities_of([of_genes]) == ("classify_genes", "embed")


def test_a_manifest_of_version_1_has_the_cell_embedding(copied):
    data = json.loads((copied / MANIFEST).read_text())
    for name in ("outputs", "task", "capabilities", "gene_panel"):
        del data[name]
    (copied / MANIFEST).write_text(json.dumps(data | {"format_version": 1}))
    manifest = Bundle.open(copied).manifest
    assert manifest.outputs == (cell_embedding(TINY_WIDTH),)
    assert (manifest.capabilities, manifest.task, manifest.classes) == (("edit_tokens", "embed"), "embedding", None)
    assert json.loads(manifest.to_json())["format_version"] == 2
    edit_manifest(copied, task="embedding")
    with pytest.raises(CorruptBundleError, match=r"unknown fields \['task'\]"):
        Bundle.open(copied)


def output(**changes) -> dict:
    return {"name": "x", "per": "cell", "width": 2, "meaning": "logits", "names": ["a", "b"]} | changes


CELL = output(name="cell_embedding", width=TINY_WIDTH, meaning="embedding", names=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": [CELL, output(), output(width=1, names=None)]}, "two outputs have one name"),
        ({"outputs": [output()]}, "hold no cell_embedding of width 8"),
        ({"outputs": []}, "there are no outputs"),
        ({"outputs": [CELL | {"width": 9}]}, "hold no cell_embedding of width 8"),
        ({"outputs": [CELL | {"per": "token"}]}, "hold no cell_embedding of width 8"),
        ({"outputs": [CELL, output(names=["a"])]}, "'x' has 2 columns and 1 names"),
        ({"outputs": [CELL, output(names="ab")]}, "'ab' is no list of strings"),
        ({"outputs": [CELL, output(width=0, names=[])]}, "'x' has the width 0"),
        ({"outputs": [CELL, output(width="2")]}, "'x' has the width '2'"),
        ({"outputs": [CELL, output(width=2.0)]}, "'x' has the width 2.0"),
        ({"outputs": [CELL, output(width=True, names=["a"])]}, "'x' has the width True"),
        ({"outputs": [CELL, output(name=7)]}, "an output has the name 7"),
        ({"outputs": [CELL, output(name="")]}, "an output has the name ''"),
        ({"outputs": [CELL, output(name="../x")]}, "an output has the name '../x'"),
        ({"outputs": [CELL, output(per="gene")]}, "is per 'gene'"),
        ({"outputs": [CELL, output(per=["cell"])]}, "per"),
        ({"outputs": [CELL, output(meaning="score")]}, "means 'score'"),
        ({"outputs": [CELL, {"name": "x"}]}, "names"),
        ({"outputs": [CELL, output(units="mV")]}, "units"),
        ({"outputs": [CELL, "x"]}, "string indices"),
        ({"outputs": {"x": CELL}}, "string indices"),
        ({"outputs": None}, "there are no outputs"),
        ({"task": "chat"}, "task is 'chat'"),
        ({"task": None}, "task"),
        ({"capabilities": "embed"}, "'embed' is no list of strings"),
        ({"gene_panel": [1]}, r"\[1\] is no list of strings"),
    ],
    ids=str,
)
def test_outputs_that_cannot_be(copied, changes, message):
    edit_manifest(copied, **changes)
    with pytest.raises(CorruptBundleError, match=f"a field has the wrong form .*({message})"):
        Bundle.open(copied)


# Writing


def test_writing_copies_files_and_leaves_the_sources(tmp_path):
    source = tmp_path / "weights"
    files = tiny_files()
    source.write_bytes(files["model.onnx"])
    bundle = Bundle.write(tmp_path / "deep" / "down" / "bundle", tiny_manifest(), files | {"model.onnx": source})
    assert bundle.path == tmp_path / "deep" / "down" / "bundle"
    assert contents(bundle.path) == ["MODEL_CARD.md", "manifest.json", "model.onnx", "vocabulary.tsv"]
    assert source.exists()
    assert bundle.manifest.files["model.onnx"] == sha256(source)


def test_writing_the_same_twice_gives_the_same_bytes(tmp_path):
    first, second = write_tiny_bundle(tmp_path / "a"), write_tiny_bundle(tmp_path / "b")
    for name in contents(first):
        assert sha256(first / name) == sha256(second / name)


def test_an_existing_bundle_is_not_replaced_by_accident(tmp_path):
    path = write_tiny_bundle(tmp_path / "bundle")
    before = Bundle.open(path).model_id
    with pytest.raises(BundleError, match="exists already"):
        write_tiny_bundle(path, seed=1)
    assert Bundle.open(path).model_id == before
    assert contents(tmp_path) == ["bundle"]


def test_overwriting_swaps_the_whole_directory(tmp_path):
    path = Bundle.write(tmp_path / "bundle", tiny_manifest(), tiny_files() | {"controls.npz": b"old"}).path
    before = Bundle.open(path).model_id
    write_tiny_bundle(path, seed=1, overwrite=True)
    assert Bundle.open(path).model_id != before
    assert "controls.npz" not in contents(path)
    assert contents(tmp_path) == ["bundle"]


def test_a_file_name_that_would_leave_the_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match="not a plain file name"):
        Bundle.write(tmp_path / "in" / "bundle", tiny_manifest(), tiny_files() | {"../evil": b"x"})
    assert contents(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "interrupted"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch, error, overwrite):
    path = tmp_path / "bundle"
    if overwrite:
        write_tiny_bundle(path)
    files = tiny_files(seed=1)
    monkeypatch.setattr(bundle_module, "sha256", lambda file: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        Bundle.write(path, tiny_manifest(), files, overwrite=overwrite)
    monkeypatch.undo()
    assert contents(tmp_path) == (["bundle"] if overwrite else [])
    if overwrite:
        assert Bundle.open(path).manifest.files["model.onnx"] != sha256_of(files["model.onnx"], tmp_path)


def test_a_swap_that_fails_puts_the_old_bundle_back(tmp_path, monkeypatch):
    path = write_tiny_bundle(tmp_path / "bundle")
    before = Bundle.open(path).model_id
    rename = Path.rename

    def fail_on_the_new_one(self, target):
        if self.name.startswith(".bundle."):
            raise OSError("no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_the_new_one)
    with pytest.raises(OSError, match="no space"):
        write_tiny_bundle(path, seed=1, overwrite=True)
    monkeypatch.undo()
    assert Bundle.open(path).model_id == before
    assert contents(tmp_path) == ["bundle"]


def test_a_bundle_that_would_not_open_is_not_written(tmp_path):
    with pytest.raises(UnsupportedBundleError):
        Bundle.write(tmp_path / "bundle", tiny_manifest(family="unheard_of"), tiny_files())
    assert contents(tmp_path) == []


def sha256_of(content: bytes, folder: Path) -> str:
    file = folder / "scratch"
    file.write_bytes(content)
    digest = sha256(file)
    file.unlink()
    return digest


# Weights outside a graph


def graph_with_weights_in(location: str, *, in_attribute: bool = False) -> bytes:
    """A graph with one tensor in a file, as an initializer or as the value of a constant in a branch."""
    tensor = onnx.TensorProto(name="w", dims=[4], data_type=onnx.TensorProto.FLOAT)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    model = onnx.ModelProto()
    if in_attribute:
        branch = onnx.GraphProto(node=[onnx.helper.make_node("Constant", [], ["w"], value=tensor)])
        model.graph.node.append(onnx.helper.make_node("If", ["c"], ["o"], then_branch=branch))
    else:
        model.graph.initializer.append(tensor)
    return model.SerializeToString()


def with_weights(path: Path, location: str, *, listed: bool = True, in_attribute: bool = False) -> Path:
    """Write a bundle whose graph keeps a tensor in a file."""
    manifest = tiny_manifest(
        variants={"fp32": Variant(file="model.onnx", data=("model.onnx.data",) if listed else ())},
    )
    graph = graph_with_weights_in(location, in_attribute=in_attribute)
    return Bundle.write(path, manifest, tiny_files() | {"model.onnx": graph, "model.onnx.data": bytes(16)}).path


@pytest.mark.parametrize("in_attribute", [False, True], ids=["initializer", "constant in a branch"])
def test_weights_in_a_listed_file(tmp_path, in_attribute):
    bundle = Bundle.open(with_weights(tmp_path / "b", "model.onnx.data", in_attribute=in_attribute))
    assert bundle.size() == bundle.graph().stat().st_size + 16
    assert Manifest.from_json(bundle.manifest.to_json(), where="here") == bundle.manifest


@pytest.mark.parametrize(
    "location",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "sub/model.onnx.data",
        "..",
        ".",
        "",
        "..\\x",
        "*/_ORT_MEM_ADDR_/*",
        "./model.onnx.data",
    ],
)
@pytest.mark.parametrize("in_attribute", [False, True], ids=["initializer", "constant in a branch"])
def test_weights_elsewhere_are_refused(tmp_path, location, in_attribute):
    with pytest.raises(CorruptBundleError, match="not a plain file name") as caught:
        with_weights(tmp_path / "b", location, in_attribute=in_attribute)
    assert f"keeps weights in {location!r}" in caught.value.message
    assert contents(tmp_path) == []


@pytest.mark.parametrize(("location", "listed"), [("vocabulary.tsv", True), ("model.onnx.data", False)])
def test_weights_in_a_file_that_is_no_data_of_the_graph(tmp_path, location, listed):
    with pytest.raises(CorruptBundleError, match=f"weights in '{location}', which manifest.json does not list"):
        with_weights(tmp_path / "b", location, listed=listed)


def test_weights_that_are_changed_missing_or_unlisted(tmp_path):
    path = with_weights(tmp_path / "b", "model.onnx.data")
    (path / "model.onnx.data").write_bytes(bytes(15) + b"x")
    with pytest.raises(CorruptBundleError, match=r"model\.onnx\.data has the SHA-256"):
        Bundle.open(path)
    (path / "model.onnx.data").unlink()
    with pytest.raises(CorruptBundleError, match=r"model\.onnx\.data cannot be read"):
        Bundle.open(path)
    files = json.loads((path / MANIFEST).read_text())["files"]
    edit_manifest(path, files={name: digest for name, digest in files.items() if name != "model.onnx.data"})
    with pytest.raises(CorruptBundleError, match=r"lists no model\.onnx\.data"):
        Bundle.open(path)


def test_weights_behind_a_link_out_of_the_bundle(tmp_path):
    """The link leads to the very bytes that the manifest promises; what lies elsewhere can be changed elsewhere."""
    path = with_weights(tmp_path / "b", "model.onnx.data")
    (path / "model.onnx.data").rename(tmp_path / "outside")
    (path / "model.onnx.data").symlink_to(tmp_path / "outside")
    with pytest.raises(CorruptBundleError, match=rf"is a link to {tmp_path / 'outside'}, outside the bundle"):
        Bundle.open(path)


def test_a_bundle_behind_a_link_is_one(tmp_path):
    (tmp_path / "link").symlink_to(with_weights(tmp_path / "b", "model.onnx.data"))
    assert Bundle.open(tmp_path / "link").path == tmp_path / "link"


def test_every_place_of_a_tensor_is_searched(tmp_path):
    """Each place that ONNX has for a tensor, found in its own descriptors, is filled once."""
    for number, model in enumerate(tensors_everywhere()):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(model.SerializeToString())
        assert external_files(path) == {"here"}, model
    assert number > 10


def tensors_everywhere() -> Iterator[onnx.ModelProto]:
    """Models with one external tensor each, at every path of fields from the model to a tensor, without repetition."""

    def walk(descriptor: Any, fields: tuple[str, ...], seen: frozenset[str]) -> Iterator[tuple[str, ...]]:
        if descriptor.name == "TensorProto":
            yield fields
        elif descriptor.name not in seen:
            for item in descriptor.fields:
                if item.message_type is not None:
                    yield from walk(item.message_type, (*fields, item.name), seen | {descriptor.name})

    for fields in walk(onnx.ModelProto.DESCRIPTOR, (), frozenset()):
        model = onnx.ModelProto()
        place: Any = model
        for name in fields:
            value = getattr(place, name)
            place = value.add() if hasattr(value, "add") else value
        place.data_location = onnx.TensorProto.EXTERNAL
        place.external_data.add(key="location", value="here")
        yield model


def test_a_file_that_names_files_and_is_no_graph(tmp_path):
    (tmp_path / "x").write_bytes(b"\xffnot a graph, but a location")
    with pytest.raises(CorruptBundleError, match="is not an ONNX graph"):
        external_files(tmp_path / "x")
    (tmp_path / "y").write_bytes(b"")
    assert external_files(tmp_path / "y") == set()
