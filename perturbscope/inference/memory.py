"""The memory that a model takes, estimated from its files and its manifest before it is loaded."""

from __future__ import annotations

from pathlib import Path

from perturbscope.errors import CorruptBundleError
from perturbscope.inference.batching import BatchLimits
from perturbscope.inference.bundle import MANIFEST, VOCABULARY, Manifest

_FILE_COPIES = 2
"""Bytes of memory of a loaded graph or vocabulary per byte of its file: a second bundles/default in a process took 32.1
MiB, and its two files have 15.2."""
_SCORE_BYTES = 8
"""Bytes of each pair of tokens and attention head: the operator for padded batches holds two float32 scores."""
_NUMBER_BYTES, _STATES = 4, 5
"""Bytes of a token: so many float32 states of the hidden width, and two of the width of the feed-forward layers."""
_HEAD_WIDTH, _FEED_FORWARD, _MAX_LENGTH = 32, 4, 2048
"""Width of a head, width of the feed-forward layers in hidden widths, and tokens of the longest cell, where the
manifest does not say: the first two make the estimate rather too high."""
CPU_BATCH_TOKENS = 4096
"""Padded tokens of a batch on a CPU, in the service."""


def estimate_bytes(path: Path, variant: str = "fp32", *, batch_tokens: int = CPU_BATCH_TOKENS) -> int:
    """Estimate the bytes of memory of a bundle's model.

    The estimate is twice the size of its files, and the working memory of one full batch of the longest cells, which
    ONNX Runtime keeps: see the constants above. Measured with padded cells on a CPU beside it, in MiB:

    ========================================  ============  ========  ========
    model                                     batch tokens  estimate  measured
    ========================================  ============  ========  ========
    bundles/default, 4 heads, 512 tokens             4,096       112       172
    the same                                        16,384       358       370
    random 6 x 256, 4 heads, 2,048 tokens           16,384     1,244     1,214
    random 12 x 768, 12 heads, 2,048 tokens          4,096     1,681     1,715
    random 12 x 768, 12 heads, 4,096 tokens          8,192     4,153     3,327
    ========================================  ============  ========  ========

    The measured bytes hold some 80 MiB that all models of a process share: names of genes, and code. A batch of one
    cell, or of cells of one length, has no scores in memory on a CPU: the last model took 1,328 MiB for batches of
    4,096 tokens, where the estimate is 2,461.

    Parameters
    ----------
    path
        Folder of the bundle; only its manifest is read.
    variant
        Graph that is to run.
    batch_tokens
        Padded tokens of a batch.

    Returns
    -------
    The bytes; 0 if the bundle lacks the variant.

    Raises
    ------
    CorruptBundleError
        The manifest or a file cannot be read.
    UnsupportedBundleError
        The manifest has a newer format.
    """
    try:
        manifest = Manifest.from_json((path / MANIFEST).read_text(encoding="utf-8"), where=str(path / MANIFEST))
        if variant not in manifest.variants:
            return 0
        n_bytes = sum((path / name).stat().st_size for name in (VOCABULARY, *manifest.variants[variant].files))
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptBundleError(f"{path} cannot be read: {error}. Fetch the bundle again.") from error
    return _FILE_COPIES * n_bytes + _batch_bytes(manifest, batch_tokens)


def _batch_bytes(manifest: Manifest, batch_tokens: int) -> int:
    """Estimate the working memory of a full batch of the longest cells."""
    longest = _number(manifest, "max_length", _MAX_LENGTH)
    hidden = _number(manifest, "hidden", manifest.width)
    heads = _number(manifest, "heads", -(-hidden // _HEAD_WIDTH))
    feed_forward = _number(manifest, "feed_forward", _FEED_FORWARD * hidden)
    n_tokens = max(batch_tokens, longest)
    n_pairs = min(n_tokens * longest, max(BatchLimits.max_attention, longest**2))
    # Values per token are in the padded output, and once more without padding.
    outputs = 2 * sum(spec.width for spec in manifest.outputs if spec.per == "token")
    numbers = _STATES * hidden + 2 * feed_forward + outputs
    return n_pairs * heads * _SCORE_BYTES + n_tokens * numbers * _NUMBER_BYTES


def _number(manifest: Manifest, name: str, default: int) -> int:
    """Return an option of the family or of the network, as the manifest has it."""
    network = manifest.training.get("model_config")
    for options in (manifest.family_config, network if isinstance(network, dict) else {}):
        value = options.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return default
