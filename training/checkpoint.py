"""Checkpoints: directories that hold a trained model and all that is needed to use it.

::

    weights.safetensors   float32 tensors; tied tensors are stored once
    config.json           family, its options, the model's configuration, provenance, hashes
    vocabulary.tsv        genes, tokens, medians

Like a bundle, a checkpoint holds no pickle, is checked by hashes, and appears under its name only when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perturbscope import __version__
from perturbscope.cells.files import atomic_directory
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import BundleError, CorruptBundleError, UnsupportedBundleError, VocabularyMismatchError
from perturbscope.inference.bundle import VOCABULARY, sha256
from training import families
from training.config.strict import plain
from training.errors import NotWrittenError

FORMAT_VERSION = 1
WEIGHTS = "weights.safetensors"
CONFIG = "config.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """A checkpoint in memory. Use :func:`load_checkpoint`."""

    path: Path
    """Directory that it was read from."""
    family: str
    """Family of the model; see :mod:`training.families`."""
    family_config: dict[str, Any]
    """Options of the family's tokenizer."""
    model_config: dict[str, Any]
    """Configuration of the network, as plain values."""
    provenance: dict[str, Any]
    """Record of its making: data, hyper-parameters, code version, losses."""
    perturbscope_version: str
    """Version of PerturbScope that wrote it."""
    vocabulary: GeneVocabulary
    """Genes, tokens and medians."""
    weights: Mapping[str, Tensor]
    """Tensors by name, on the CPU; tied tensors once."""

    def model(self, **overrides: Any) -> nn.Module:
        """Build the network and load the weights; in evaluation mode, on the CPU.

        Parameters
        ----------
        **overrides
            Options of the model's configuration to change, such as ``attention="eager"``.

        Raises
        ------
        CorruptBundleError
            The weights do not fit the configured network.
        """
        family = families.load(self.family)
        config = family.parse_config({**self.model_config, **overrides})
        model = family.build_model(config, self.vocabulary)
        load_weights(model, self.weights, where=str(self.path / WEIGHTS))
        return model.eval()


def save_checkpoint(
    path: str | Path,
    *,
    model: nn.Module | Mapping[str, Tensor],
    family: str,
    family_config: Mapping[str, Any],
    model_config: Any,
    vocabulary: GeneVocabulary,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint under a temporary name and rename it into place.

    Parameters
    ----------
    path
        Directory to create.
    model
        The network, or its state dict (as DeepSpeed consolidates it). Tied tensors are stored once.
    family, family_config
        The family and the options of its tokenizer.
    model_config
        The family's model configuration: the dataclass, or its plain values.
    vocabulary
        The vocabulary that the token embeddings were trained with.
    provenance
        Record of the model's making; anything that JSON can hold.
    overwrite
        Whether to replace an existing checkpoint.

    Returns
    -------
    `path` as a :class:`~pathlib.Path`.

    Raises
    ------
    BundleError
        `path` exists and `overwrite` is false, or `path` holds something other than a checkpoint.
    NotWrittenError
        The disk is full.
    """
    path = Path(path)
    if path.exists():
        if not overwrite:
            raise BundleError(f"{path} exists already. Give another directory, or allow overwriting.")
        if not (path / CONFIG).is_file():
            raise BundleError(f"{path} is not a checkpoint, so it is not overwritten. Give another directory.")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    with atomic_directory(path) as staging:
        try:
            save_file(_stored(state), staging / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise NotWrittenError(
                f"The checkpoint {path} could not be written: {error}. Make room there and run the same command again; "
                "the last state of the run is kept."
            ) from error
        (staging / WEIGHTS).chmod(0o644)
        (staging / VOCABULARY).write_text(vocabulary.to_tsv(), encoding="utf-8")
        config = {
            "format_version": FORMAT_VERSION,
            "perturbscope_version": __version__,
            "family": family,
            "family_config": dict(family_config),
            "model_config": plain(model_config),
            "provenance": dict(provenance),
            "vocabulary_hash": vocabulary.hash,
            "weights_sha256": sha256(staging / WEIGHTS),
        }
        (staging / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check a checkpoint.

    Parameters
    ----------
    path
        Directory that :func:`save_checkpoint` wrote.

    Raises
    ------
    CorruptBundleError
        `path` is not a checkpoint, or a file is missing or damaged.
    UnsupportedBundleError
        A newer version wrote it.
    VocabularyMismatchError
        The vocabulary is not the one that the weights were trained with.
    """
    path = Path(path)
    config = _read_config(path / CONFIG)
    vocabulary = _read_vocabulary(path / VOCABULARY)
    if vocabulary.hash != config["vocabulary_hash"]:
        raise VocabularyMismatchError(
            f"{path}: {VOCABULARY} has the hash {vocabulary.hash[:12]}, but the weights were trained with "
            f"{config['vocabulary_hash'][:12]}. Put the original vocabulary back.",
            field="vocabulary",
        )
    try:
        damaged = sha256(path / WEIGHTS) != config["weights_sha256"]
        weights = {} if damaged else load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CorruptBundleError(f"{path / WEIGHTS} cannot be read: {error}.") from error
    if damaged:
        raise CorruptBundleError(f"{path / WEIGHTS} is not the file that {CONFIG} names; it was changed or damaged.")
    names = ("family", "family_config", "model_config", "provenance", "perturbscope_version")
    return Checkpoint(path=path, vocabulary=vocabulary, weights=weights, **{name: config[name] for name in names})


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Copy stored weights into a model; a tensor that is tied to a stored one needs no entry of its own.

    Raises
    ------
    CorruptBundleError
        Names or shapes do not fit; the message names `where`.
    """
    state = model.state_dict()
    known = {_storage(state[name]) for name in weights if name in state}
    missing = [name for name, tensor in state.items() if name not in weights and _storage(tensor) not in known]
    unknown = sorted(set(weights) - set(state))
    shapes = [name for name in weights if name in state and weights[name].shape != state[name].shape]
    if missing or unknown or shapes:
        raise CorruptBundleError(
            f"{where} does not fit the model: missing {missing[:3]}, unknown {unknown[:3]}, of another shape "
            f"{shapes[:3]}. The checkpoint's configuration and weights do not belong together."
        )
    model.load_state_dict(dict(weights), strict=False)


def _stored(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors to write: each storage once, floating point as float32, contiguous, on the CPU."""
    stored: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in state.items():
        key = _storage(tensor)
        if key in seen:
            continue
        seen.add(key)
        plain = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        stored[name] = plain.contiguous()
    return stored


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for two names of one tensor."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CorruptBundleError(
            f"{path.parent} is not a checkpoint: it has no {CONFIG}. Give the directory that training wrote."
        ) from error
    except (OSError, ValueError) as error:
        raise CorruptBundleError(f"{path} cannot be read: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("format_version"), int):
        raise CorruptBundleError(f"{path} has no format_version; it is not a checkpoint's configuration.")
    if config["format_version"] > FORMAT_VERSION:
        raise UnsupportedBundleError(
            f"{path} has format {config['format_version']}; this version reads up to {FORMAT_VERSION}. Upgrade.",
            field="format_version",
        )
    kinds = {
        "family": str,
        "family_config": dict,
        "model_config": dict,
        "provenance": dict,
        "perturbscope_version": str,
        "vocabulary_hash": str,
        "weights_sha256": str,
    }
    for name, kind in kinds.items():
        if not isinstance(config.get(name), kind):
            raise CorruptBundleError(f"{path}: the field {name!r} is missing or not of the kind {kind.__name__}.")
    return config


def _read_vocabulary(path: Path) -> GeneVocabulary:
    try:
        return GeneVocabulary.read(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptBundleError(f"{path} cannot be read: {error}.") from error
