"""``perturbscope bundle info``, ``verify``, ``sign`` and ``golden``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perturbscope.cli import console

if TYPE_CHECKING:
    from perturbscope.families.outputs import OutputSpec

app = typer.Typer(name="bundle", help="Inspect a model bundle.", no_args_is_help=True)
Signers = Annotated[
    list[Path],
    typer.Option("--signer", metavar="FILE", help="Public key (PEM) that is trusted to sign bundles; may be repeated."),
]


@app.command("info")
def bundle_info(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the bundle.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
    signer: Signers = [],  # noqa: B006  typer copies it
) -> None:
    """Check the files of a bundle and describe it."""
    from perturbscope.inference.bundle import Bundle
    from perturbscope.inference.golden import read_golden
    from perturbscope.inference.memory import CPU_BATCH_TOKENS, estimate_bytes
    from perturbscope.inference.signatures import read_signers, signature_of

    signers = read_signers(signer)
    opened = Bundle.open(path)
    manifest, golden = opened.manifest, read_golden(opened)
    if as_json:
        typer.echo(manifest.to_json(), nl=False)
        return
    variants = ", ".join(
        f"{name} ({opened.size(name) / 2**20:.1f} MiB, cosine {item.cosine:.6g})"
        for name, item in sorted(manifest.variants.items())
    )
    memory = ", ".join(f"{name} {estimate_bytes(path, name) / 2**20:,.0f} MiB" for name in sorted(manifest.variants))
    console.show_facts(
        opened.model_id,
        [
            ("family", f"{manifest.family} {json.dumps(manifest.family_config)}"),
            ("embedding", f"{manifest.width} dimensions: {manifest.pooling}, {manifest.layer}"),
            ("outputs", "; ".join(map(_output, manifest.outputs))),
            ("task", manifest.task),
            ("capabilities", ", ".join(manifest.capabilities)),
            *([("classes", _several(manifest.classes))] if manifest.classes else []),
            ("longest cell", f"{opened.family().max_length} tokens"),
            ("vocabulary", f"{len(opened.vocabulary.gene_ids)} genes, {manifest.vocabulary_hash[:12]}"),
            ("gene panel", f"{len(manifest.gene_panel)} genes" if manifest.gene_panel else "all of the vocabulary"),
            ("medians", opened.vocabulary.source),
            ("variants", variants),
            ("memory", f"{memory}, estimated for batches of {CPU_BATCH_TOKENS:,} tokens"),
            ("parity", _scalars(manifest.parity)),
            ("golden", f"{len(golden.cells)} cells: {golden.source}" if golden else "none"),
            ("training", _scalars(manifest.training)),
            ("licence", manifest.licence),
            ("signature", str(signature_of(opened, signers))),
            ("format", manifest.format_version),
        ],
    )


def _output(spec: OutputSpec) -> str:
    """An output in words: ``class: 3 logits per cell (a, b, c)``."""
    names = f" ({_several(spec.names)})" if spec.names else ""
    return f"{spec.name}: {spec.width} {'logits' if spec.meaning == 'logits' else 'numbers'} per {spec.per}{names}"


def _several(names: Sequence[str], shown: int = 10) -> str:
    """Names in a line, the first of them if they are many."""
    more = f", ... {len(names)} in all" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _scalars(facts: Mapping[str, Any]) -> str:
    """The text and numbers of a mapping, on one line; ``--json`` shows the rest."""
    scalars = [f"{name}: {_short(value)}" for name, value in facts.items() if isinstance(value, str | int | float)]
    return "; ".join(scalars) or "see --json"


def _short(value: str | float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@app.command("verify")
def bundle_verify(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the bundle.")],
    signer: Signers = [],  # noqa: B006  typer copies it
) -> None:
    """Check every file of a bundle against its manifest, load every graph, and embed the golden cells with it.

    With --signer, the bundle must be signed by one of these keys; what is not listed in the manifest is refused.
    """
    from perturbscope.inference.bundle import Bundle
    from perturbscope.inference.embedder import Embedder
    from perturbscope.inference.golden import check_golden, read_golden
    from perturbscope.inference.signatures import read_signers, signature_of

    signers = read_signers(signer)
    opened = Bundle.open(path)
    signature = signature_of(opened, signers)
    if signers:
        signature.require(opened)
    golden = read_golden(opened)
    for variant in opened.manifest.variants:
        embedder = Embedder.from_bundle(opened, variant=variant)
        if golden is not None:
            result = check_golden(embedder, golden)
            result.require(opened.model_id)
            console.say(str(result))
    if golden is None:
        console.warn(f"{path} has no golden vectors; perturbscope bundle golden adds them.")
    console.say(
        f"{path}: {len(opened.manifest.files)} files and {len(opened.manifest.variants)} graphs are in order "
        f"({opened.model_id}). Signature: {signature}."
    )


@app.command("sign")
def bundle_sign(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the bundle.")],
    key: Annotated[Path, typer.Option(metavar="FILE", help="Private key (PEM): ECDSA P-256 or P-384, or Ed25519.")],
) -> None:
    """Sign the manifest of a bundle, and with it every file; needs the extra signatures (cryptography).

    The signature lies beside the manifest, in the form of Sigstore: cosign verify-blob reads it too.
    """
    from perturbscope.inference.signatures import sign

    bundle = sign(path, key)
    console.say(f"{path}: signed ({bundle.model_id}).")


@app.command("golden")
def bundle_golden(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the bundle, which is rewritten.")],
    cells: Annotated[
        Path | None,
        typer.Option(help="Raw counts (.h5ad, ...) to choose cells from; default: cells of random genes."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the cells that are made.")] = 0,
) -> None:
    """Add golden vectors to a bundle: cells, and their embeddings by its float32 graph on this machine's CPU.

    A server compares its own embeddings with them before it serves the model. Weights and model id do not change.
    """
    from perturbscope.inference.golden import read_golden
    from perturbscope.inference.golden_making import add_golden, first_cells

    bundle = add_golden(path, cells=first_cells(cells) if cells else None, seed=seed)
    golden = read_golden(bundle)
    assert golden is not None  # noqa: S101  it was just written
    console.say(f"{path}: {len(golden.cells)} golden cells ({golden.source}) for {bundle.model_id}.")
