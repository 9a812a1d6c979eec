"""The bundle: a directory with everything that is needed to serve a model, and with checksums that prove it.

::

    manifest.json    what the model is, how it was made, and the SHA-256 of every other file
    model.onnx       graph: tokens -> outputs by name; variants beside it (model.fp16.onnx, ...)
    model.onnx.data  weights of a graph that is too large to hold them; the manifest lists it like every file
    vocabulary.tsv   genes, tokens, medians
    MODEL_CARD.md    data, licence, cost, numbers
    golden.json      a few cells and their vectors, to test a server with (optional; see perturbscope.inference.golden)
    manifest.sigstore.json   who vouches for the manifest (optional; see perturbscope.inference.signatures)

Every file but the last is listed and hashed, and a folder that holds anything else is refused. No file is a pickle, and
nothing in a bundle is executed but the ONNX graph.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from perturbscope.cells.files import atomic_directory
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import (
    BundleError,
    CorruptBundleError,
    UnsupportedBundleError,
    VocabularyMismatchError,
)
from perturbscope.families import Family, load_family
from perturbscope.families.outputs import CELL_EMBEDDING, GENE_EMBEDDING, OutputSpec, cell_embedding
from perturbscope.inference.external_data import external_files

FORMAT_VERSION = 2
_SINCE_2 = frozenset({"outputs", "task", "capabilities", "gene_panel"})
"""Fields of the manifest that format 1 does not have: its model has one output, the cell embedding."""
TASKS = ("embedding", "cell_classification", "gene_classification")
"""What models are made for."""
MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.tsv"
MODEL_CARD = "MODEL_CARD.md"
GOLDEN = "golden.json"
SIGNATURE = "manifest.sigstore.json"
"""The only file that the manifest cannot list, since it signs the manifest."""
_VOCABULARIES: weakref.WeakValueDictionary[tuple[str, str], GeneVocabulary] = weakref.WeakValueDictionary()
"""Vocabularies in use; bundles of one vocabulary share it, and everything that is cached for it."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One graph of a bundle.

    Attributes
    ----------
    file
        Name of the file inside the bundle.
    cosine
        Lowest cosine to the fp32 embedding over the parity cells; 1.0 for fp32 itself.
    data
        Names of the files inside the bundle that the graph keeps weights in.
    """

    file: str
    cosine: float = 1.0
    data: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The file of the graph, and those of its weights."""
        return (self.file, *self.data)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a bundle: what the model is, how it was made, and the checksums of its files."""

    name: str
    """Name under which a server offers the model."""
    version: str
    """Version of the model."""
    family: str
    """Family of the tokenizer; see :mod:`perturbscope.families`."""
    family_config: dict[str, Any]
    """Options of the family."""
    width: int
    """Dimensions of the cell embedding."""
    layer: str
    """Hidden state that is pooled."""
    pooling: str
    """Method that turns the states of tokens into one vector."""
    vocabulary_hash: str
    """Hash of vocabulary.tsv's content; see :attr:`GeneVocabulary.hash`."""
    variants: dict[str, Variant]
    """Graphs by name; ``fp32`` always."""
    parity: dict[str, Any]
    """Torch against ONNX Runtime: lengths, batch sizes, largest difference, tolerance."""
    training: dict[str, Any]
    """Making of the weights: data, configuration, cost, loss."""
    licence: str
    """SPDX identifier or sentence."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every file but the manifest."""
    outputs: tuple[OutputSpec, ...] = ()
    """Outputs of the graphs, the cell embedding among them; by default that alone."""
    task: str = "embedding"
    """What the model was made for, one of :data:`TASKS`."""
    capabilities: tuple[str, ...] = ()
    """What the model can be asked for; by default what its outputs allow, see :func:`capabilities_of`."""
    gene_panel: tuple[str, ...] | None = None
    """Ensembl ids of the only genes that the model was made for; None: those of the vocabulary."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not self.outputs:
            object.__setattr__(self, "outputs", (cell_embedding(self.width),))
        if not self.capabilities:
            object.__setattr__(self, "capabilities", capabilities_of(self.outputs))

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes between which the model decides; None if it is no classifier."""
        return next((spec.names for spec in self.outputs if spec.meaning == "logits"), None)

    def to_json(self) -> str:
        """Return the manifest as JSON text, in the newest format."""
        return json.dumps(asdict(self) | {"format_version": FORMAT_VERSION}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str) -> Manifest:
        """Read the text of :meth:`to_json`; errors name the file as `where`.

        Raises
        ------
        CorruptBundleError
            The text is not JSON, or a field is missing or of the wrong type.
        UnsupportedBundleError
            The manifest has a newer format.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise CorruptBundleError(f"{where} is not JSON: {error}.") from error
        if not isinstance(data, dict) or not isinstance(data.get("format_version"), int):
            raise CorruptBundleError(f"{where} has no format_version; it is not a bundle's manifest.")
        if data["format_version"] > FORMAT_VERSION:
            raise UnsupportedBundleError(
                f"{where} has format {data['format_version']}; this perturbscope reads up to {FORMAT_VERSION}. "
                "Upgrade perturbscope, or export the model again with this version.",
                field="format_version",
            )
        names = {item.name for item in fields(cls)} - (_SINCE_2 if data["format_version"] == 1 else frozenset())
        missing, unknown = names - set(data), set(data) - names
        if missing or unknown:
            raise CorruptBundleError(f"{where}: missing fields {sorted(missing)}, unknown fields {sorted(unknown)}.")
        try:
            data["variants"] = {
                name: Variant(file=str(item["file"]), cosine=float(item["cosine"]), data=_texts(item.get("data", [])))
                for name, item in data["variants"].items()
            }
            if data["format_version"] > 1:
                data["outputs"] = _outputs(data["outputs"])
                data["capabilities"] = _texts(data["capabilities"])
                data["gene_panel"] = None if data["gene_panel"] is None else _texts(data["gene_panel"])
            manifest = cls(**data)
            manifest._check_types()
            names_inside = [*manifest.files, *(file for item in manifest.variants.values() for file in item.files)]
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CorruptBundleError(f"{where}: a field has the wrong form ({error}).") from error
        for name in names_inside:
            if not _is_plain(name):
                raise CorruptBundleError(f"{where} names the file {name!r}, which is not a plain file name.")
        return manifest

    def _check_types(self) -> None:
        kinds: dict[Any, type] = {"str": str, "int": int}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in _SINCE_2 - {"task"} and not isinstance(value, kinds.get(item.type, dict)):
                raise TypeError(f"{item.name} is {value!r}")
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}")
        if len({spec.name for spec in self.outputs}) < len(self.outputs):
            raise ValueError("two outputs have one name")
        if cell_embedding(self.width) not in self.outputs:
            raise ValueError(f"outputs hold no {CELL_EMBEDDING} of width {self.width}")
        if not all(isinstance(digest, str) for digest in self.files.values()):
            raise TypeError("a checksum is not a string")


def capabilities_of(outputs: Sequence[OutputSpec], *, edits: bool = False) -> tuple[str, ...]:
    """Return what a model with these outputs can be asked for.

    ``embed`` (on which scores, comparisons and reports rest), ``gene_embedding``, ``classify_cells``,
    ``classify_genes``; and ``edit_tokens`` if its family has `edits`.
    """
    found = {"embed"}
    for spec in outputs:
        if spec.meaning == "logits":
            found.add("classify_cells" if spec.per == "cell" else "classify_genes")
        elif spec.name == GENE_EMBEDDING:
            found.add("gene_embedding")
    return tuple(sorted(found | ({"edit_tokens"} if edits else set())))


@dataclass(frozen=True, eq=False)
class Bundle:
    """An opened bundle, from :meth:`open` or :meth:`write`."""

    path: Path
    manifest: Manifest
    vocabulary: GeneVocabulary
    manifest_bytes: bytes = field(default=b"", repr=False)
    """The manifest as it was read: what a signature is of."""

    @property
    def model_id(self) -> str:
        """Name, version and the first digits of the fp32 graph's hash; it changes whenever the weights do."""
        digest, *of_data = (self.manifest.files[name] for name in self.manifest.variants["fp32"].files)
        if of_data:
            digest = hashlib.sha256("\n".join([digest, *of_data]).encode()).hexdigest()
        return f"{self.manifest.name}-{self.manifest.version}-{digest[:12]}"

    def family(self) -> Family:
        """Build the tokenizer."""
        return load_family(self.manifest.family, self.manifest.family_config, self.vocabulary)

    def graph(self, variant: str = "fp32") -> Path:
        """Return the path of a variant's graph.

        Raises
        ------
        BundleError
            The bundle has no such variant.
        """
        if variant not in self.manifest.variants:
            raise BundleError(
                f"The bundle {self.path} has no variant {variant!r}; it has "
                f"{', '.join(sorted(self.manifest.variants))}.",
                field="variant",
            )
        return self.path / self.manifest.variants[variant].file

    def size(self, variant: str = "fp32") -> int:
        """Return the bytes of a variant's graph and of its weights. Raises as :meth:`graph`."""
        self.graph(variant)
        return sum((self.path / name).stat().st_size for name in self.manifest.variants[variant].files)

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle after checking every file.

        Raises
        ------
        CorruptBundleError
            The directory is not a bundle, a file is missing, unlisted or changed, or a graph keeps weights in a file
            that is not one of the bundle.
        UnsupportedBundleError
            The bundle has a newer format, or a family that is not installed.
        VocabularyMismatchError
            The vocabulary is not the one that the manifest names.
        """
        path = Path(path)
        manifest_path = path / MANIFEST
        try:
            if manifest_path.exists() and not manifest_path.is_file():
                raise CorruptBundleError(f"{manifest_path} is no regular file.")
            content = manifest_path.read_bytes()
            text = content.decode("utf-8")
        except FileNotFoundError as error:
            raise CorruptBundleError(
                f"{path} is not a bundle: it has no {MANIFEST}. Give the directory that export wrote."
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptBundleError(f"{manifest_path} cannot be read: {error}.") from error
        manifest = Manifest.from_json(text, where=str(manifest_path))
        _verify_files(path, manifest)
        vocabulary = GeneVocabulary.read(path / VOCABULARY)
        vocabulary = _VOCABULARIES.setdefault((vocabulary.hash, vocabulary.source), vocabulary)
        if vocabulary.hash != manifest.vocabulary_hash:
            raise VocabularyMismatchError(
                f"{path}: {VOCABULARY} has the hash {vocabulary.hash[:12]}, but the weights were made with "
                f"{manifest.vocabulary_hash[:12]}. Put the original vocabulary back, or export again.",
                field="vocabulary",
            )
        bundle = cls(path, manifest, vocabulary, content)
        family = bundle.family()
        if manifest.format_version == 1 and family.edits:
            # Format 1 does not tell what a model can do; its family does.
            able = capabilities_of(manifest.outputs, edits=True)
            bundle = cls(path, replace(manifest, capabilities=able), vocabulary, content)
        return bundle

    @staticmethod
    def write(
        path: str | Path,
        manifest: Manifest,
        files: Mapping[str, Path | bytes],
        *,
        overwrite: bool = False,
    ) -> Bundle:
        """Write a bundle under a temporary name, check it, and rename it into place.

        Parameters
        ----------
        path
            Directory to create.
        manifest
            Manifest of the bundle; its `files` are filled in here.
        files
            Content of each file, as bytes or as a file to copy.
        overwrite
            Replace an existing bundle; without it an existing `path` is an error.

        Returns
        -------
        The bundle, opened from its final place.

        Raises
        ------
        BundleError
            `path` exists and `overwrite` is false, or the files do not make a bundle.
        """
        path = Path(path)
        not_plain = [name for name in files if not _is_plain(name)]
        if not_plain:
            raise BundleError(f"{not_plain[0]!r} is not a plain file name; a bundle has no folders.")
        if path.exists() and not overwrite:
            raise BundleError(f"{path} exists already. Give another directory, or allow overwriting.")
        with atomic_directory(path) as staging:
            for name, content in files.items():
                if isinstance(content, bytes):
                    (staging / name).write_bytes(content)
                else:
                    shutil.copyfile(content, staging / name)
            digests = {name: sha256(staging / name) for name in sorted(files)}
            complete = replace(manifest, files=digests)
            (staging / MANIFEST).write_text(complete.to_json(), encoding="utf-8")
            Bundle.open(staging)
        return Bundle.open(path)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _outputs(items: Sequence[Mapping[str, Any]]) -> tuple[OutputSpec, ...]:
    """Read the descriptions of outputs. Raises TypeError, ValueError or KeyError."""
    if not items:
        raise ValueError("there are no outputs")
    found = []
    for item in items:
        names = item["names"]
        found.append(OutputSpec(**{**item, "names": None if names is None else _texts(names)}))
    return tuple(found)


def _texts(items: Any) -> tuple[str, ...]:
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise TypeError(f"{items!r} is no list of strings")
    return tuple(items)


def _is_plain(name: str) -> bool:
    """Return whether a name is that of a file directly inside a directory."""
    return Path(name).name == name and name not in {"", ".", ".."} and "\\" not in name


def _verify_files(path: Path, manifest: Manifest) -> None:
    needed = {VOCABULARY, *(name for variant in manifest.variants.values() for name in variant.files)}
    unlisted = needed - set(manifest.files)
    if unlisted or "fp32" not in manifest.variants:
        raise CorruptBundleError(f"{path / MANIFEST} lists no {min(unlisted) if unlisted else 'fp32 variant'}.")
    _verify_listing(path, manifest)
    for name, digest in manifest.files.items():
        try:
            # Opening a pipe would wait for ever, and reading some devices never ends.
            if (path / name).exists() and not (path / name).is_file():
                raise CorruptBundleError(f"{path / name} is no regular file. Fetch the bundle again.")
            actual = sha256(path / name)
        except OSError as error:
            raise CorruptBundleError(f"{path / name} cannot be read: {error}. Fetch the bundle again.") from error
        if actual != digest:
            raise CorruptBundleError(
                f"{path / name} has the SHA-256 {actual[:12]}..., the manifest says {digest[:12]}.... "
                "The file was changed or damaged; fetch the bundle again."
            )
    for variant in manifest.variants.values():
        _verify_external(path, variant)


def _verify_listing(path: Path, manifest: Manifest) -> None:
    """Refuse a folder with anything in it that the manifest does not list: it would be in no hash."""
    listed = {*manifest.files, MANIFEST, SIGNATURE}
    try:
        others = sorted(entry.name for entry in path.iterdir() if entry.name not in listed)
    except OSError as error:
        raise CorruptBundleError(f"{path} cannot be read: {error}.") from error
    if others:
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        raise CorruptBundleError(
            f"{path / others[0]}{more} is not listed in {MANIFEST}, so nothing proves what it is. Move it out of the "
            "folder, or export the bundle again."
        )


def _verify_external(path: Path, variant: Variant) -> None:
    """Check that a graph keeps its weights in files of the bundle: no runtime shall read another one for it."""
    for name in sorted(external_files(path / variant.file)):
        where = f"{path / variant.file} keeps weights in {name!r}"
        if not _is_plain(name):
            raise CorruptBundleError(f"{where}, which is not a plain file name; they must lie beside the graph.")
        if name not in variant.data:
            raise CorruptBundleError(f"{where}, which {MANIFEST} does not list as data of this graph.")
        if (path / name).resolve().parent != path.resolve():
            raise CorruptBundleError(
                f"{where}, which is a link to {(path / name).resolve()}, outside the bundle. Put the file itself there."
            )
