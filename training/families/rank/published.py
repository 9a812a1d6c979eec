"""Weights in a Hugging Face directory, as Geneformer is published: configuration and tensors of three BERT classes.

Nothing in the directory is run: safetensors hold numbers only, and a ``.bin`` file is read by torch's restricted
unpickler.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import InvalidParameterError, UnreadableFileError
from training.data.published import refuse_pointer
from training.families.rank.model import RankModelConfig, build_model

HEADS = {
    "BertForMaskedLM": "masked_lm",
    "BertForSequenceClassification": "cell_classes",
    "BertForTokenClassification": "gene_classes",
}
"""Head of :class:`RankModelConfig` by the name of the class in transformers."""
CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "feed_forward": "intermediate_size",
    "activation": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "init_sd": "initializer_range",
    "layer_norm_eps": "layer_norm_eps",
    "max_length": "max_position_embeddings",
    "token_types": "type_vocab_size",
}
"""Key of ``config.json`` behind each option of the model's configuration."""
_DEFAULTS = {
    "hidden_act": "gelu",
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
} | dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.1)
"""Values of keys that old versions of transformers left out."""
_ONLY: Mapping[str, Sequence[Any]] = {
    "model_type": ("bert",),
    "position_embedding_type": (None, "absolute"),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "pruned_heads": (None, {}),
    "problem_type": (None, "single_label_classification"),
    "pad_token_id": (None, 0),
}
"""Values that keys of ``config.json`` may have: with any other, the network is another one than ours."""
_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class PublishedConfig:
    """What ``config.json`` says of the weights beside it."""

    path: Path
    """The file."""
    architecture: str
    """Name of the class in transformers."""
    vocab_size: int
    """Number of token ids."""
    options: Mapping[str, Any]
    """Options of :class:`RankModelConfig` but the head and its classes."""
    classes: tuple[str, ...] | None
    """Names of the classes of a classifier, in order; None: the file names none."""
    transformers_version: str | None
    """Version of transformers that wrote it."""

    @property
    def head(self) -> str:
        """Head of the network."""
        return HEADS[self.architecture]


def read_config(directory: Path) -> PublishedConfig:
    """Read the ``config.json`` of a directory.

    Raises
    ------
    UnreadableFileError
        The directory or the file is missing, or it is not such a file.
    InvalidParameterError
        The weights are of another architecture; the message names it.
    """
    if not directory.is_dir():
        raise UnreadableFileError(
            f"{directory} is not a directory. Give the directory that holds {CONFIG} and the weights.",
            field="directory",
        )
    path = directory / CONFIG
    values = _read_json(path)
    named_there = values.get("architectures")
    architecture = str(named_there[0]) if isinstance(named_there, list) and named_there else None
    if architecture not in HEADS:
        raise InvalidParameterError(
            f"{path} is of a {architecture or str(values.get('model_type')) + ' model without a head'}; "
            f"a {' or a '.join(HEADS)} is needed.",
            field="directory",
        )
    for name, allowed in _ONLY.items():
        if values.get(name) not in allowed:
            raise InvalidParameterError(
                f"{path}: {name} is {values[name]!r}; only {' or '.join(repr(item) for item in allowed if item)} is "
                "supported.",
                field="directory",
            )
    missing = [key for key in (*_FIELDS.values(), "vocab_size") if key not in values and key not in _DEFAULTS]
    if missing:
        raise UnreadableFileError(f"{path} has no {missing[0]}; it is not the file of a BERT.", field="directory")
    if type(values["vocab_size"]) is not int:
        raise UnreadableFileError(
            f"{path}: vocab_size is {values['vocab_size']!r}; a whole number is needed.", field="directory"
        )
    return PublishedConfig(
        path=path,
        architecture=architecture,
        vocab_size=values["vocab_size"],
        options={name: values.get(key, _DEFAULTS.get(key)) for name, key in _FIELDS.items()},
        classes=_classes(path, values) if architecture != "BertForMaskedLM" else None,
        transformers_version=values.get("transformers_version"),
    )


def _classes(path: Path, values: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = values.get("id2label")
    if names is None:  # transformers leaves out the names of two classes if they are LABEL_0 and LABEL_1
        return None
    if not isinstance(names, dict):
        raise UnreadableFileError(f"{path}: id2label is {names!r}; names by number are needed.", field="directory")
    try:
        return named(names)
    except ValueError as error:
        raise UnreadableFileError(f"{path}: id2label {error}.", field="directory") from error


def named(names: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of classes in the order of their numbers, from a mapping of numbers to names or back.

    Raises
    ------
    ValueError
        The numbers are not 0..n-1; the message says so.
    """
    by_number = {str(value): str(key) for key, value in names.items()}
    if all(str(key).isdigit() for key in names):
        by_number = {str(key): str(value) for key, value in names.items()}
    if set(by_number) != {str(number) for number in range(len(names))}:
        raise ValueError(f"does not number {len(names)} classes 0 to {len(names) - 1}")
    return tuple(by_number[str(number)] for number in range(len(names)))


def weight_files(directory: Path) -> list[Path]:
    """Return the files of the weights: safetensors before ``.bin``, in one file or in shards.

    Raises
    ------
    UnreadableFileError
        There are none, or one that the index names is missing.
    """
    for name in _WEIGHTS:
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise UnreadableFileError(f"{index} has no weight_map of file names.", field="directory")
            files = [directory / Path(shard).name for shard in sorted(set(shards.values()))]
            lost = next((file for file in files if not file.is_file()), None)
            if lost is not None:
                raise UnreadableFileError(
                    f"{index} names {lost.name}, which is not there. Fetch it.", field="directory"
                )
            return files
    raise UnreadableFileError(
        f"{directory} holds neither {' nor '.join(_WEIGHTS)}, nor an index of shards.", field="directory"
    )


def read_weights(
    directory: Path, config: RankModelConfig, vocabulary: GeneVocabulary
) -> tuple[dict[str, Tensor], list[str]]:
    """Read the weights of a network of `config`.

    Parameters
    ----------
    directory
        Directory of the weights.
    config, vocabulary
        Network that the tensors must fit.

    Returns
    -------
    Tensors by name, each tied tensor once, float32; and the names of tensors that the network does not use.

    Raises
    ------
    UnreadableFileError
        A file is missing, damaged, or holds code.
    InvalidParameterError
        A tensor is missing, unknown or of another shape, or the head is not tied to the embeddings.
    """
    files = weight_files(directory)
    found: dict[str, Tensor] = {}
    for file in files:
        found.update(_load(file))
    with torch.device("meta"):
        model = build_model(config, vocabulary)
    wanted = {name: tensor.shape for name, tensor in model.named_parameters()}
    found = {_renamed(name): tensor for name, tensor in found.items()}
    where = ", ".join(str(file) for file in files[:_SHOWN])
    for copy, original in _TIED.items():
        tensor = found.pop(copy, None)
        if tensor is not None and original in found and not torch.equal(tensor, found[original]):
            raise InvalidParameterError(
                f"{where}: {copy} is not {original}; a head of its own is not supported.", field="directory"
            )
    unused = sorted(name for name in found if name not in wanted and _is_left_out(name, config))
    missing = [name for name in wanted if name not in found]
    unknown = sorted(name for name in found if name not in wanted and name not in unused)
    for what, names in (("lacks", missing), ("has unknown tensors:", unknown)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise InvalidParameterError(
                f"{where} {what} {', '.join(names[:_SHOWN])}{more}; they are not the weights of the network in "
                f"{directory / CONFIG}.",
                field="directory",
            )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise InvalidParameterError(
                f"{where}: {name} has the shape {tuple(found[name].shape)}, but the network in {directory / CONFIG} "
                f"needs {tuple(shape)}.",
                field="directory",
            )
    return {name: found[name].to(torch.float32) for name in wanted}, unused


def _renamed(name: str) -> str:
    """Return the name that a tensor of a layer normalisation has since 2019."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _is_left_out(name: str, config: RankModelConfig) -> bool:
    """Return whether the network is the same without a tensor: a numbering, or a layer that leads to no output."""
    return name.endswith("embeddings.position_ids") or (
        name.startswith("bert.pooler.") and config.head != "cell_classes"
    )


def _load(path: Path) -> Mapping[str, Tensor]:
    with path.open("rb") as file:
        refuse_pointer(path, file.read(100))
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UnreadableFileError(f"{path} cannot be read: {error}.", field="directory") from error
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        named_in_it = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise UnreadableFileError(
            f"{path} names {named_in_it[1]}, so reading it could run code; it is not read. Give the weights as "
            "safetensors."
            if named_in_it
            else f"{path} cannot be read: {str(error).partition('. ')[0]}.",
            field="directory",
        ) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UnreadableFileError(f"{path} holds something other than tensors by name.", field="directory")
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnreadableFileError(
            f"{path.parent} has no {path.name}. Give the directory that holds it and the weights.", field="directory"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableFileError(f"{path} cannot be read: {error}.", field="directory") from error
    if not isinstance(values, dict):
        raise UnreadableFileError(f"{path} holds no JSON object.", field="directory")
    return values
