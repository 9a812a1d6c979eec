"""``perturbscope bundle info`` and ``perturbscope bundle verify``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from perturbscope.cli import console

app = typer.Typer(name="bundle", help="Look at a model bundle.", no_args_is_help=True)


@app.command("info")
def bundle_info(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle.")],
    as_json: Annotated[bool, typer.Option("--json", help="The manifest as JSON.")] = False,
) -> None:
    """Say what a bundle is, after checking its files."""
    from perturbscope.bundle import Bundle

    opened = Bundle.open(path)
    manifest = opened.manifest
    if as_json:
        typer.echo(manifest.to_json(), nl=False)
        return
    variants = ", ".join(
        f"{name} ({(path / item.file).stat().st_size / 2**20:.1f} MiB, cosine {item.cosine:.6g})"
        for name, item in sorted(manifest.variants.items())
    )
    console.show_facts(
        opened.model_id,
        [
            ("family", f"{manifest.family} {json.dumps(manifest.family_config)}"),
            ("embedding", f"{manifest.width} dimensions: {manifest.pooling}, {manifest.layer}"),
            ("vocabulary", f"{len(opened.vocabulary.gene_ids)} genes, {manifest.vocabulary_hash[:12]}"),
            ("medians", opened.vocabulary.source),
            ("variants", variants),
            ("parity", _scalars(manifest.parity)),
            ("training", _scalars(manifest.training)),
            ("licence", manifest.licence),
            ("format", manifest.format_version),
        ],
    )


def _scalars(facts: Mapping[str, Any]) -> str:
    """What fits a line of a mapping: its text and numbers; ``--json`` shows the rest."""
    kept = [f"{name}: {_short(value)}" for name, value in facts.items() if isinstance(value, str | int | float)]
    return "; ".join(kept) or "see --json"


def _short(value: str | float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@app.command("verify")
def bundle_verify(path: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle.")]) -> None:
    """Check every file of a bundle against its manifest, and load every graph."""
    from perturbscope.bundle import Bundle
    from perturbscope.encoder import OnnxEncoder

    opened = Bundle.open(path)
    for variant in opened.manifest.variants:
        OnnxEncoder(opened, variant=variant)
    console.say(
        f"{path}: {len(opened.manifest.files)} files and {len(opened.manifest.variants)} graphs are in order "
        f"({opened.model_id})."
    )
