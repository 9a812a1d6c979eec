"""Directories as Geneformer is published, with small networks. Import only in tests that need torch.

::

    geneformer/                          the package, with the dictionaries of V2
        token_dictionary_gc104M.pkl, gene_median_dictionary_gc104M.pkl, ensembl_mapping_dict_gc104M.pkl
        gene_dictionaries_30m/           those of V1
    Geneformer-V1-10M/, Geneformer-V2-104M/   config.json, model.safetensors
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import BertConfig, PreTrainedModel

from perturbscope.cells.vocabulary import GeneVocabulary

transformers.utils.logging.disable_progress_bar()  # of save_pretrained, on standard error

FOLDERS = {"V1": "geneformer/gene_dictionaries_30m", "V2": "geneformer"}
ENDINGS = {"V1": "gc30M", "V2": "gc104M"}
NAMES = {"V1": "Geneformer-V1-10M", "V2": "Geneformer-V2-104M"}
RETIRED = "ENSG00000999999"
"""Id that is retired in :func:`genes` of V2: it became the first gene."""


def genes(version: str, n_genes: int = 60) -> GeneVocabulary:
    """Make a vocabulary of made-up genes with the special tokens of a version, and with different medians."""
    special = ["<pad>", "<mask>", "<cls>", "<eos>"][: 2 if version == "V1" else 4]
    names = tuple(f"ENSG{number:011d}" for number in range(n_genes))
    return GeneVocabulary(
        names,
        np.arange(len(special), n_genes + len(special), dtype=np.int32),
        np.linspace(0.5, 3, n_genes),
        {name: token for token, name in enumerate(special)},
        "made up for tests",
        {} if version == "V1" else {RETIRED: names[0]},
    )


def write_dictionaries(root: Path, version: str, vocabulary: GeneVocabulary) -> Path:
    """Write the pickles of a version; the published ones hold plain text and numbers, too. Returns their folder."""
    folder = root / FOLDERS[version]
    folder.mkdir(parents=True, exist_ok=True)
    names, medians = vocabulary.gene_ids, vocabulary.medians.tolist()
    contents: dict[str, dict[str, Any]] = {
        "token_dictionary": {**vocabulary.special_tokens, **dict(zip(names, vocabulary.tokens.tolist(), strict=True))},
        # Medians of genes without a token are in the published dictionary, too.
        "gene_median_dictionary": {"ENSG00000777777": 1.5, **dict(zip(names, medians, strict=True))},
        "ensembl_mapping_dict": {"A1BG": names[0], **{name: name for name in names}, **vocabulary.retired},
    }
    for name, content in contents.items():
        (folder / f"{name}_{ENDINGS[version]}.pkl").write_bytes(pickle.dumps(content, protocol=4))
    return folder


def write_published(
    root: Path,
    version: str,
    *,
    architecture: str = "BertForMaskedLM",
    vocabulary: GeneVocabulary | None = None,
    layers: int = 3,
    width: int = 32,
    heads: int = 4,
    positions: int = 40,
    init_sd: float = 0.2,
    seed: int = 0,
    **options: Any,
) -> tuple[Path, PreTrainedModel]:
    """Write dictionaries and an untrained network as transformers saves it.

    Parameters
    ----------
    root
        Top of the layout.
    version
        ``V1`` or ``V2``.
    architecture
        Class of transformers.
    vocabulary
        Genes; by default :func:`genes`.
    layers, width, heads, positions, init_sd, seed
        The network; its weights are ten times as large as usual by default, so that all of them matter.
    **options
        Further options of BertConfig.

    Returns
    -------
    Directory of the network, and the network, in evaluation mode.
    """
    vocabulary = vocabulary or genes(version)
    write_dictionaries(root, version, vocabulary)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=positions,
        initializer_range=init_sd,
        hidden_act="relu",
        hidden_dropout_prob=0.02,
        attention_probs_dropout_prob=0.02,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, architecture)(config).eval()
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(tensor, std=0.1)
    directory = root / NAMES[version]
    model.save_pretrained(directory)
    return directory, model
