"""Token and median dictionaries of Geneformer: where they are found, what is read, and what is refused."""

from __future__ import annotations

import collections
import gzip
import json
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import InvalidParameterError, UnreadableFileError
from training.data import published
from training.data.published import read_dictionary, read_genes

FOLDERS = {"V1": "geneformer/gene_dictionaries_30m", "V2": "geneformer"}
ENDINGS = {"V1": "gc30M", "V2": "gc104M"}


def dictionaries(vocabulary: GeneVocabulary) -> dict[str, dict[str, Any]]:
    tokens = dict(zip(vocabulary.gene_ids, vocabulary.tokens.tolist(), strict=True))
    return {
        "token_dictionary": {**vocabulary.special_tokens, **tokens},
        "gene_median_dictionary": dict(zip(vocabulary.gene_ids, vocabulary.medians.tolist(), strict=True)),
        "ensembl_mapping_dict": {name: name for name in vocabulary.gene_ids} | dict(vocabulary.retired),
    }


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of the published repository with the real dictionaries of both versions, and empty directories."""
    root = tmp_path_factory.mktemp("published")
    for version, vocabulary in (("V1", GeneVocabulary.geneformer_gc30m()), ("V2", GeneVocabulary.geneformer_gc95m())):
        (root / FOLDERS[version]).mkdir(parents=True, exist_ok=True)
        for name, content in dictionaries(vocabulary).items():
            path = root / FOLDERS[version] / f"{name}_{ENDINGS[version]}.pkl"
            path.write_bytes(pickle.dumps(content, protocol=4))
    for name in ("Geneformer-V1-10M", "Geneformer-V2-104M", "fine_tuned_models/cells"):
        (root / name).mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("directory", "size", "version"),
    [
        ("Geneformer-V1-10M", 25_426, "V1"),
        ("Geneformer-V2-104M", 20_275, "V2"),
        (".", 20_275, "V2"),
        ("fine_tuned_models/cells", 25_426, "V1"),
        ("fine_tuned_models/cells", 20_275, "V2"),
    ],
)
def test_the_number_of_tokens_tells_the_version(repository, directory, size, version):
    found = read_genes(repository / directory, size)
    shipped = GeneVocabulary.geneformer_gc30m() if version == "V1" else GeneVocabulary.geneformer_gc95m()
    assert found.version == version
    assert found.vocabulary.hash == shipped.hash
    assert found.family_config == ({"start": "<cls>", "end": "<eos>"} if version == "V2" else {})
    assert {path.parent for path in found.files.values()} == {(repository / FOLDERS[version]).resolve()}
    assert set(found.files) == {"tokens", "medians", "mapping"}


def test_published_pickles_have_the_size_that_the_hub_states(repository):
    """So they hold plain integers under plain text, in protocol 4, as these do."""
    assert (repository / "geneformer/token_dictionary_gc104M.pkl").stat().st_size == 425_590


def small(tmp_path: Path, **changes: dict[str, Any]) -> dict[str, Path]:
    """Write small dictionaries of V2, with entries replaced; None takes one out."""
    contents = {
        "tokens": {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3, "ENSG00000000001": 4, "ENSG00000000002": 5},
        "medians": {"ENSG00000000001": 1.5, "ENSG00000000002": 0.25},
    }
    paths = {}
    for name, content in contents.items():
        kept = {key: value for key, value in {**content, **changes.get(name, {})}.items() if value is not None}
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(kept))
    return paths


def test_given_files_are_read_and_nothing_else(tmp_path):
    found = read_genes(tmp_path / "weights", 6, **small(tmp_path))
    assert found.vocabulary.medians.tolist() == [1.5, 0.25]
    assert (found.version, found.vocabulary.retired) == ("V2", {})


@pytest.mark.parametrize(
    ("size", "changes", "says"),
    [
        (
            20_275,
            {},
            r"tokens.json has 6 token ids, but the weights in .* have 20,275 token ids, as Geneformer V2 .* --tokens",
        ),
        (
            6,
            {"medians": {"ENSG00000000002": None}},
            r"no median for 1 of the 2 genes .*\(first: ENSG00000000002\).*--med",
        ),
        (6, {"tokens": {"<eos>": None, "<sep>": 3}}, r"special tokens <pad> 0, <mask> 1, <cls> 2, <sep> 3; Geneformer"),
        (6, {"tokens": {"<pad>": 1, "<mask>": 0}}, r"special tokens <mask> 0, <pad> 1"),
        (
            5,
            {"tokens": {"<eos>": None, "ENSG00000000001": 3, "ENSG00000000002": 4}},
            r"special tokens <pad> 0.*<cls> 2;",
        ),
        (6, {"tokens": {"ENSG00000000002": 9}}, r"not 0\.\.n-1 without gaps"),
        (6, {"medians": {"ENSG00000000002": 0.0}}, r"median of ENSG00000000002 is 0.0"),
    ],
    ids=["size", "median", "names", "order", "one end", "gap", "zero"],
)
def test_dictionaries_that_do_not_fit(tmp_path, size, changes, says):
    with pytest.raises(InvalidParameterError, match=says):
        read_genes(tmp_path / "weights", size, **small(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": {"<pad>": 0.5}}, "the token of <pad> is 0.5"),
        ({"tokens": {"<pad>": -1}}, "the token of <pad> is -1"),
        ({"medians": {"ENSG00000000002": "low"}}, "the value of ENSG00000000002 is 'low'; a number"),
        ({"medians": {"ENSG00000000002": float("nan")}}, "the value of ENSG00000000002 is nan; a number"),
        ({"medians": {"ENSG00000000002": [1]}}, "the entry 'ENSG00000000002' is of str and list"),
        ({"medians": {"ENSG00000000002": True}}, "the entry 'ENSG00000000002' is of str and bool"),
    ],
)
def test_values_that_are_none(tmp_path, changes, says):
    with pytest.raises(UnreadableFileError, match=says):
        read_genes(tmp_path / "weights", 6, **small(tmp_path, **changes))


def test_what_is_not_there_is_asked_for(tmp_path):
    with pytest.raises(InvalidParameterError, match=r"No token dictionary was found around .* with --tokens"):
        read_genes(tmp_path, 6)
    tokens = small(tmp_path)["tokens"].rename(tmp_path / "token_dictionary.json")
    with pytest.raises(InvalidParameterError, match=f"No median dictionary was found beside {tokens}.*--medians"):
        read_genes(tmp_path, 6)
    with pytest.raises(UnreadableFileError, match=r"nowhere.pkl cannot be read: No such file"):
        read_genes(tmp_path, 6, tokens=tmp_path / "nowhere.pkl")


def test_a_choice_is_left_to_the_caller(tmp_path):
    paths = small(tmp_path)
    (tmp_path / "below").mkdir()
    other = json.loads(paths["tokens"].read_text()) | {"ENSG00000000001": 5, "ENSG00000000002": 4}
    (tmp_path / "below" / "token_dictionary_mine.json").write_text(json.dumps(other))
    paths["tokens"].rename(tmp_path / "token_dictionary.json")
    with pytest.raises(InvalidParameterError, match=r"mine.json and .* differ, and both have as many.*--tokens"):
        read_genes(tmp_path / "below", 6)
    for name in ("one", "two"):
        (tmp_path / f"gene_median_dictionary_{name}.json").write_text(paths["medians"].read_text())
    (tmp_path / "below" / "token_dictionary_mine.json").unlink()
    with pytest.raises(InvalidParameterError, match=r"_one.json, .*_two.json could belong to .*--medians"):
        read_genes(tmp_path / "below", 6)
    paths["medians"].rename(tmp_path / "gene_median_dictionary.json")
    assert read_genes(tmp_path / "below", 6).files["medians"].name == "gene_median_dictionary.json"


# Formats


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [float, np.float64, np.float32], ids=["plain", "float64", "float32"])
def test_pickles_of_all_protocols_with_numbers_of_numpy(tmp_path, protocol, kind):
    """By their size, the published medians hold scalars of numpy, or more genes than are known; both are read."""
    medians = {f"ENSG{number:011d}": kind(value) for number, value in enumerate([1 / 3, 1e-7, 255.5])}
    (tmp_path / "medians.pkl").write_bytes(pickle.dumps(medians, protocol=protocol))
    found = read_dictionary(tmp_path / "medians.pkl")
    assert found == {name: float(value) for name, value in medians.items()}
    assert {type(value) for value in found.values()} == {float}


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numbers_of_numpy_before_and_after_its_second_version(tmp_path, module):
    raw = pickle.dumps({"tokens": np.int64(7)}, protocol=2).replace(b"numpy._core.multiarray", module)
    (tmp_path / "tokens.pkl").write_bytes(raw)
    assert read_dictionary(tmp_path / "tokens.pkl") == {"tokens": 7}


def test_text_files(tmp_path):
    (tmp_path / "a.tsv").write_text("# a comment\ngene\ttoken\nENSG1\t4\nENSG2\t5\n")
    assert read_dictionary(tmp_path / "a.tsv") == {"ENSG1": 4, "ENSG2": 5}
    (tmp_path / "b.tsv").write_text("ENSG1\t0.5\nENSG2\t5\n")
    assert read_dictionary(tmp_path / "b.tsv") == {"ENSG1": 0.5, "ENSG2": 5}
    (tmp_path / "c.json").write_text('{"0": "T cell"}')
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({0: "T cell"}))
    assert read_dictionary(tmp_path / "c.json") == read_dictionary(tmp_path / "c.pkl") == {"0": "T cell"}


class Calls:
    """A pickle of it calls a function when it is read."""

    def __init__(self, function: Any, *values: Any) -> None:
        self.function, self.values = function, values

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.values


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (Calls(os.system, "touch MARK"), "posix.system"),
        ({"ENSG1": Calls(subprocess.Popen, ["touch", "MARK"])}, "subprocess.Popen"),
        ({"ENSG1": Calls(eval, "open('MARK', 'w')")}, "builtins.eval"),
        (collections.OrderedDict(ENSG1=1), "collections.OrderedDict"),
        ({"ENSG1": np.ones(2)}, "numpy._core.*_reconstruct"),
        ({"ENSG1": Path("MARK")}, "pathlib"),
    ],
    ids=["system", "Popen", "eval", "OrderedDict", "array", "Path"],
)
@pytest.mark.parametrize("protocol", [3, 4])
def test_a_pickle_that_holds_code_is_refused_by_name(tmp_path, monkeypatch, content, named, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tokens.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(UnreadableFileError, match=f"tokens.pkl is a pickle that names {named}.*could run code"):
        read_dictionary(path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokens.pkl"]


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("a.pkl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer.*git lfs pull"),
        ("a.pkl", b"\x80\x04\x95", "is not a pickle that can be read"),
        ("a.pkl", b"", "is not a pickle that can be read"),
        ("a.pkl", pickle.dumps([1, 2]), "holds no dictionary with entries"),
        ("a.pkl", pickle.dumps({}), "holds no dictionary with entries"),
        ("a.pkl", pickle.dumps({(1, 2): 3}), "of tuple and int"),
        ("a.pkl", b"P1\n.", "names an object outside the file"),
        (
            "a.pkl",
            b"cnumpy\ndtype\n(S'O8'\ntRcnumpy.core.multiarray\nscalar\n(g0\nS'1'\ntR.",
            "is not a pickle that can",
        ),
        ("a.pkl", gzip.compress(b"{}", mtime=0), "is not a pickle that can be read"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.tsv", b"a\tb\tc\n", "line 1 has 3 columns"),
        ("a.tsv", b"\xff\xfe", "is not text"),
    ],
)
def test_files_that_are_no_dictionary(tmp_path, name, raw, says):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UnreadableFileError, match=says):
        read_dictionary(tmp_path / name)


def test_a_file_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "MAX_BYTES", 10)
    (tmp_path / "a.json").write_text('{"ENSG1": 100000}')
    with pytest.raises(UnreadableFileError, match="has 17 bytes; a dictionary of at most 10 is read"):
        read_dictionary(tmp_path / "a.json")
