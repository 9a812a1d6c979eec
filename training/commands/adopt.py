"""``python -m training adopt geneformer DIR OUT``: published weights become a checkpoint.

DIR is a Hugging Face directory of a ``BertForMaskedLM``, ``BertForSequenceClassification`` or
``BertForTokenClassification``. OUT is a checkpoint as training writes it: fine-tune it, or export it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbscope.errors import InvalidParameterError
from perturbscope.inference.bundle import sha256
from training import console
from training.data.published import PublishedGenes, read_dictionary, read_genes

if TYPE_CHECKING:
    from training.families.rank.published import PublishedConfig


def adopt(
    directory: Path,
    output: Path,
    *,
    name: str | None = None,
    licence: str | None = None,
    tokens: Path | None = None,
    medians: Path | None = None,
    mapping: Path | None = None,
    classes: Path | None = None,
    options: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint of published Geneformer weights.

    Parameters
    ----------
    directory
        Hugging Face directory of the weights.
    output
        Checkpoint to write.
    name
        Name of the model in the provenance; by default that of the directory.
    licence
        Licence of the weights.
    tokens, medians, mapping
        Dictionaries. See :func:`training.data.published.read_genes`.
    classes
        Names of a classifier's classes by number, in place of those in ``config.json``.
    options
        Further options of :class:`training.families.rank.model.RankModelConfig`.
    overwrite
        Whether to replace an existing checkpoint.

    Raises
    ------
    InvalidInputError
        The files do not belong together, are damaged, or are of another architecture; or `output` exists. Nothing is
        written.
    """
    # Imports of torch and transformers take seconds; --help should not.
    from training.checkpoint import CONFIG, save_checkpoint
    from training.config.strict import plain
    from training.families.rank import published
    from training.families.rank.model import RankModelConfig
    from training.loop import provenance

    if output.exists() and not overwrite:
        raise InvalidParameterError(f"{output} exists already. Give another directory, or --overwrite.", field="output")
    if output.exists() and not (output / CONFIG).is_file():
        raise InvalidParameterError(f"{output} is not a checkpoint, so it is not replaced.", field="output")
    config = published.read_config(directory)
    genes = read_genes(directory, config.vocab_size, tokens=tokens, medians=medians, mapping=mapping)
    if (options or {}).get("pooling") == "cls" and genes.version == "V1":
        raise InvalidParameterError(
            "Geneformer V1 has no <cls>, so its cells have no state of it. Use the mean.", field="pooling"
        )
    names = _class_names(config, classes)
    network = RankModelConfig(**{**config.options, "head": config.head, "classes": names, **(options or {})})
    weights, unused = published.read_weights(directory, network, genes.vocabulary)
    path = save_checkpoint(
        output,
        model=weights,
        family="rank",
        family_config={"max_length": network.max_length, **genes.family_config},
        model_config=plain(network),
        vocabulary=genes.vocabulary,
        provenance={
            "name": name or directory.resolve().name,
            "licence": licence or "not stated",
            "objective": "published weights, adopted as they are",
            "task": config.head,
            "classes": list(names),
            "published": _facts(config, genes, published.weight_files(directory), unused),
            "code": provenance.code(),
        },
        overwrite=overwrite,
    )
    _report(path, config, genes, names, unused)
    return path


def _class_names(config: PublishedConfig, path: Path | None) -> tuple[str, ...]:
    from training.families.rank.published import named

    if config.architecture == "BertForMaskedLM":
        if path is not None:
            raise InvalidParameterError("A BertForMaskedLM has no classes. Leave out --classes.", field="classes")
        return ()
    if path is None:
        return config.classes or ("LABEL_0", "LABEL_1")
    try:
        names = named(read_dictionary(path))
    except ValueError as error:
        raise InvalidParameterError(f"{path} {error}.", field="classes") from error
    if config.classes is not None and len(names) != len(config.classes):
        raise InvalidParameterError(
            f"{path} names {len(names)} classes, but {config.path} has {len(config.classes)}.", field="classes"
        )
    return names


def _facts(
    config: PublishedConfig, genes: PublishedGenes, weights: Sequence[Path], unused: Sequence[str]
) -> dict[str, Any]:
    """Return where the weights come from, for the provenance and the model card."""
    files = [config.path, *weights, *genes.files.values()]
    return {
        "model": f"Geneformer {genes.version}",
        "architecture": config.architecture,
        "transformers_version": config.transformers_version,
        "files": {file.name: sha256(file) for file in files},
        "unused_tensors": list(unused),
        "retired_ids": len(genes.vocabulary.retired),
    }


def _report(
    path: Path, config: PublishedConfig, genes: PublishedGenes, names: Sequence[str], unused: Sequence[str]
) -> None:
    out = console.stderr()
    ends = genes.family_config
    size = config.options
    out.print(
        f"{path}: {config.architecture} of Geneformer {genes.version}, {size['layers']} layers of {size['hidden']}, "
        f"{config.vocab_size:,} token ids, {size['max_length']:,} positions, "
        + (f"{ends['start']} and {ends['end']} around each cell" if ends else "no special tokens around a cell"),
        markup=False,
        soft_wrap=True,
    )
    for kind, file in genes.files.items():
        out.print(f"  {kind}: {file}", markup=False, soft_wrap=True)
    if genes.version == "V2" and not genes.vocabulary.retired:
        out.print(
            "  mapping: none was found, so counts of retired Ensembl ids are not added to their successors",
            soft_wrap=True,
        )
    if unused:
        out.print(f"  not used: {', '.join(unused)}", markup=False, soft_wrap=True)
    if names and all(name.startswith("LABEL_") for name in names):
        out.print(f"  classes: {len(names)} without names; --classes gives them", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit code."""
    parser = argparse.ArgumentParser(description="Turn published weights into a checkpoint.")
    parser.add_argument("kind", choices=["geneformer"], help="kind of the published weights")
    parser.add_argument("directory", metavar="DIR", type=Path, help="directory with config.json and the weights")
    parser.add_argument("output", metavar="OUT", type=Path, help="checkpoint to write")
    parser.add_argument("--name", help="name of the model in its provenance; default: that of DIR")
    parser.add_argument("--licence", help="licence of the weights, such as Apache-2.0; default: not stated")
    for kind, text in (
        ("tokens", "token dictionary"),
        ("medians", "dictionary of gene medians"),
        ("mapping", "dictionary of retired Ensembl ids"),
    ):
        parser.add_argument(
            f"--{kind}", metavar="FILE", type=Path, help=f"{text} (.pkl, .json, .tsv); default: searched around DIR"
        )
    parser.add_argument("--classes", metavar="FILE", type=Path, help="names of a classifier's classes by number")
    parser.add_argument("--layer", choices=["penultimate", "last"], help="layer whose states make the cell embedding")
    parser.add_argument("--pooling", choices=["mean", "cls"], help="mean over the genes, or the state of <cls>")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    options = parser.parse_args(arguments)
    pooled = {name: getattr(options, name) for name in ("layer", "pooling") if getattr(options, name) is not None}

    def body() -> None:
        adopt(
            options.directory,
            options.output,
            name=options.name,
            licence=options.licence,
            tokens=options.tokens,
            medians=options.medians,
            mapping=options.mapping,
            classes=options.classes,
            options=pooled,
            overwrite=options.overwrite,
        )

    return console.run(body, resumes=False)
