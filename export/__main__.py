"""``python -m export CHECKPOINT BUNDLE_DIR --name NAME --version V``: a checkpoint becomes a bundle."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from training import console

if TYPE_CHECKING:
    from perturbscope.cells.counts import CountMatrix
    from perturbscope.inference.bundle import Bundle

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class LayerOption(StrEnum):
    """Layers whose states make the cell embedding."""

    PENULTIMATE = "penultimate"
    LAST = "last"


class PoolingOption(StrEnum):
    """Ways from the states of tokens to a cell embedding."""

    MEAN = "mean"
    CLS = "cls"


class VariantOption(StrEnum):
    """Names of the smaller graphs."""

    FP16 = "fp16"
    FP16_FLASH = "fp16-flash"
    INT8 = "int8"


@app.command()
def main(
    checkpoint: Annotated[Path, typer.Argument(help="Directory that training wrote.")],
    bundle_dir: Annotated[Path, typer.Argument(help="Bundle to create.")],
    name: Annotated[str, typer.Option(help="Name under which a server offers the model.")],
    version: Annotated[str, typer.Option(help="Version of the model.")],
    layer: Annotated[
        LayerOption | None, typer.Option(help="Layer that makes the cell embedding; default: the checkpoint's.")
    ] = None,
    pooling: Annotated[
        PoolingOption | None,
        typer.Option(help="Cell embedding: mean over genes, or state of the start token; default: the checkpoint's."),
    ] = None,
    variant: Annotated[
        list[VariantOption] | None, typer.Option(help="Write this smaller graph, too; may be repeated.")
    ] = None,
    cells: Annotated[
        Path | None, typer.Option(help="Raw counts (.h5ad, ...) to compare the variants on; default: random genes.")
    ] = None,
    card: Annotated[Path | None, typer.Option(help="Model card in Markdown; default: made from the facts.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the weights; default: the checkpoint's.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference between torch and ONNX Runtime.")] = 1e-4,
    min_cosine: Annotated[float, typer.Option(help="Least cosine of a variant's cell to float32.")] = 0.99,
    seed: Annotated[int, typer.Option(help="Seed of the cells that are compared.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
) -> None:
    """Export a checkpoint as a bundle; a bundle that misses its tolerance is not written.

    Exit code 0 if written, 2 for bad usage or input, 1 for the rest, 130 if interrupted.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())

    def body() -> None:
        with Progress(*columns, console=console.stderr()) as bars:
            task = bars.add_task("loading", total=None)
            # Imports of torch and transformers take seconds; --help should not.
            from export.pipeline import export_checkpoint

            bundle = export_checkpoint(
                checkpoint,
                bundle_dir,
                name=name,
                version=version,
                layer=layer and layer.value,
                pooling=pooling and pooling.value,
                variants=[item.value for item in variant or []],
                cells=_read_cells(cells),
                card=_read_card(card),
                licence=licence,
                tolerance=tolerance,
                min_cosine=min_cosine,
                seed=seed,
                overwrite=overwrite,
                progress=lambda stage, done, total: bars.update(task, description=stage, completed=done, total=total),
            )
        _summary(bundle)

    raise typer.Exit(console.run(body, resumes=False))


def _read_card(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"The model card {path} cannot be read: {error}.") from error


def _read_cells(path: Path | None) -> CountMatrix | None:
    """Return the file's first chunk; a comparison needs no more."""
    if path is None:
        return None
    from perturbscope.cells.readers import open_cells

    with open_cells(path) as source:
        return next(iter(source))


def _summary(bundle: Bundle) -> None:
    """Print the written bundle as a table on standard output."""
    manifest = bundle.manifest
    table = Table(title=escape(f"{bundle.model_id} in {bundle.path}"), title_justify="left")
    for heading in ("graph", "MB", "largest difference", "lowest cosine", "mean cosine"):
        table.add_column(heading, justify="left" if heading == "graph" else "right")
    for name in sorted(manifest.variants, key=lambda name: name != "fp32"):
        measured = manifest.parity if name == "fp32" else manifest.parity["variants"][name]
        mean = measured.get("mean_cosine")
        table.add_row(
            f"{name} (to torch)" if name == "fp32" else f"{name} (to fp32)",
            f"{bundle.size(name) / 1e6:.2f}",
            f"{measured['max_abs_difference']:.1e}",
            f"{measured['lowest_cosine']:.6f}",
            "" if mean is None else f"{mean:.6f}",
        )
    Console().print(table)


if __name__ == "__main__":
    app()
