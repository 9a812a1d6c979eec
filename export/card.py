"""Model cards made of the facts in a manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families.outputs import OutputSpec
from perturbscope.inference.bundle import Manifest


def model_card(manifest: Manifest, vocabulary: GeneVocabulary) -> str:
    """Write a model card in Markdown: the model, its training, and the differences of the graphs from it."""
    parity = manifest.parity
    lines = [
        f"# {manifest.name} {manifest.version}",
        "",
        f"Cell embeddings of width {manifest.width} from raw counts of single cells: {manifest.pooling}, of "
        f"{manifest.layer}.",
        "",
        f"- Family: `{manifest.family}`, {json.dumps(manifest.family_config, sort_keys=True)}",
        f"- Vocabulary: {len(vocabulary.gene_ids):,} genes, hash `{manifest.vocabulary_hash[:12]}`; "
        f"{vocabulary.source}",
        f"- Licence of the weights: {manifest.licence}",
        f"- Outputs: {', '.join(_named(spec) for spec in manifest.outputs)}",
        *_blocks(parity),
        f"- torch {parity['torch']} against ONNX Runtime {parity['onnxruntime']}: largest difference "
        f"{parity['max_abs_difference']:.2g} over {len(parity['cases'])} batches (tolerance {parity['tolerance']:g}).",
        "",
    ]
    if "variants" in parity:
        cells = parity["compared_cells"]
        lines += [
            f"Variants, on {cells['n']} cells ({cells['kind']}, {cells['shortest']} to {cells['longest']} tokens):",
            "",
            "| variant | lowest cosine to fp32 | mean cosine | mean cosine after centring |",
            "|---|---|---|---|",
            *(
                f"| {name} | {item['lowest_cosine']:.6f} | {item['mean_cosine']:.6f} | "
                f"{item['mean_centred_cosine']:.6f} |"
                for name, item in parity["variants"].items()
            ),
            "",
        ]
    training = json.dumps(manifest.training, indent=2, sort_keys=True)
    return "\n".join([*lines, "## Training", "", "```json", training, "```", ""])


def _named(spec: OutputSpec) -> str:
    """Describe an output."""
    columns = f" ({', '.join(spec.names)})" if spec.names else ""
    return f"`{spec.name}`, {spec.meaning} of width {spec.width} per {spec.per}{columns}"


def _blocks(parity: Mapping[str, Any]) -> list[str]:
    """Say how much of the model the graph holds, if it has blocks that can be told apart."""
    if not parity["blocks_in_graph"]:
        return []
    return [f"- The graph holds {parity['blocks_in_graph']} of the model's {parity['blocks_of_model']} blocks."]
