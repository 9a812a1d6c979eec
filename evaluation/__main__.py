"""The command ``python -m evaluation``: compares a model with baselines over screens.

``python -m evaluation screen.h5ad --bundle default=bundles/default --out results`` compares a bundle with highly
variable genes and principal components (``--scvi``: and scVI) over one screen or more;
``--config evaluation/configs/quality.yaml`` takes screens, models and options from a file. A run that was stopped
continues with the model at which it stopped.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from evaluation.config import EvaluationConfig, ModelsConfig, ScreenConfig, read_config
from evaluation.figures import write_figures
from evaluation.run import RunOptions, ScreenResult, by_target, evaluate, overview, separation_table
from evaluation.scvi import ScviOptions
from evaluation.tables import markdown, screen_page
from perturbscope.analysis.gene_sets import read_gmt
from perturbscope.cells.files import atomic, atomic_directory
from perturbscope.errors import InvalidParameterError, PerturbScopeError

PLACE = "<!-- results -->"
"""Line of a page's template that the tables replace."""
MARKER = "evaluation.json"
"""File that marks a folder of results."""
DEFAULT_CACHE = Path("runs/evaluation-cache")


def main(
    screens: Annotated[
        list[Path] | None, typer.Argument(help="Raw counts with labels; .h5ad or another format.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of screens, models and options.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for tables and figures; an existing one is replaced.")] = Path(
        "runs/evaluation"
    ),
    bundle: Annotated[list[str] | None, typer.Option(help="NAME=DIRECTORY of a bundle; repeat for more.")] = None,
    obsm: Annotated[list[str] | None, typer.Option(help="NAME=KEY of a matrix in obsm; repeat for more.")] = None,
    pca: Annotated[list[int] | None, typer.Option(help="Principal components; repeat for more.")] = None,
    hvg: Annotated[int | None, typer.Option(help="Highly variable genes; 0: leave them out.")] = None,
    scvi: Annotated[bool | None, typer.Option(help="Train the two scVI baselines.")] = None,
    scvi_epochs: Annotated[int | None, typer.Option(help="Most epochs of scVI (500 in the paper).")] = None,
    perturbation_key: str = "perturbation",
    control: Annotated[list[str] | None, typer.Option(help="Label of control cells; repeat for more.")] = None,
    batch_key: str | None = None,
    guide_key: str | None = None,
    context_key: str | None = None,
    split_key: str | None = None,
    held_out: Annotated[list[Path] | None, typer.Option(help="File of the held-out cells of each screen.")] = None,
    total_counts_key: str | None = None,
    keep: Annotated[list[str] | None, typer.Option(help="COLUMN=VALUE: restrict to these cells.")] = None,
    relations: Annotated[Path | None, typer.Option(help="Gene sets (.gmt) whose genes should look alike.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write one Markdown page; figures go beside it.")] = None,
    template: Annotated[Path | None, typer.Option(help=f"Text of the page, with a line {PLACE}.")] = None,
    cache: Annotated[Path, typer.Option(help="Folder of embeddings and results to use again.")] = DEFAULT_CACHE,
    seed: int | None = None,
) -> None:
    """Embed, score and compare, and write tables and figures."""
    console = Console(stderr=True)
    try:
        evaluation = _config(config, screens or [], locals())
        _check_out(out)
        results = _run(evaluation, cache, console)
        _write(results, out, page, template)
    except PerturbScopeError as error:
        console.print(f"[red]{error.message}[/]", highlight=False)
        raise typer.Exit(2) from error
    for result, settings in results:
        console.print(f"\n{settings.title or result.screen.name}")
        sys.stdout.write(markdown(overview(result).iloc[:, :10]))
    failed = [(result.screen.name, *item) for result, _ in results for item in result.failed.items()]
    for screen, model, message in failed:
        console.print(f"[red]{screen}, {model}: {message}[/]", highlight=False)
    console.print(f"Written: {page or out}")
    if failed:
        raise typer.Exit(1)


def _config(path: Path | None, screens: list[Path], given: dict[str, Any]) -> EvaluationConfig:
    """Return the file's configuration with the command line's changes."""
    if path is not None and screens:
        raise InvalidParameterError("Give screens or --config, not both.", field="config")
    if path is None and not screens:
        raise InvalidParameterError("Give a screen (a file), or --config.", field="screens")
    models = ModelsConfig()
    if path is not None:
        evaluation = read_config(path)
        models = evaluation.models
    bundles = _pairs(given["bundle"], "bundle", "NAME=DIRECTORY")
    obsm = _pairs(given["obsm"], "obsm", "NAME=KEY")
    models = replace(
        models,
        bundles={**models.bundles, **bundles},
        obsm={**models.obsm, **obsm},
        pca=tuple(given["pca"]) if given["pca"] else models.pca,
        hvg=models.hvg if given["hvg"] is None else given["hvg"],
        scvi=_scvi(models.scvi, given["scvi"], given["scvi_epochs"]),
    )
    if path is None:
        held_out = given["held_out"] or []
        if held_out and len(held_out) != len(screens):
            raise InvalidParameterError(
                f"{len(held_out)} files of held-out cells for {len(screens)} screens; give one each.", field="held_out"
            )
        names = ("perturbation_key", "batch_key", "guide_key", "context_key", "split_key")
        common = {name: given[name] for name in (*names, "total_counts_key")}
        controls = given["control"] or ["control"]
        common["control"] = controls if len(controls) > 1 else controls[0]
        keep: dict[str, list[str]] = {}
        for item in given["keep"] or []:
            column, value = next(iter(_pairs([item], "keep", "COLUMN=VALUE").items()))
            keep.setdefault(column, []).append(value)
        evaluation = EvaluationConfig(
            screens=[
                ScreenConfig(
                    path=screen,
                    relations=given["relations"],
                    arguments={**common, "keep": keep, **({"held_out": held_out[i]} if held_out else {})},
                )
                for i, screen in enumerate(screens)
            ]
        )
    options = evaluation.options
    if given["seed"] is not None:
        options = RunOptions(
            separation=replace(options.separation, seed=given["seed"]),
            replication=None if options.replication is None else replace(options.replication, seed=given["seed"]),
            umap_cells=options.umap_cells,
            seed=given["seed"],
        )
    return replace(evaluation, models=models, options=options)


def _scvi(options: ScviOptions | None, wanted: bool | None, epochs: int | None) -> ScviOptions | None:
    if wanted is False:
        return None
    if wanted or epochs is not None:
        options = options or ScviOptions()
    return options if epochs is None or options is None else replace(options, max_epochs=epochs)


def _run(config: EvaluationConfig, cache: Path, console: Console) -> list[tuple[ScreenResult, ScreenConfig]]:
    results: list[tuple[ScreenResult, ScreenConfig]] = []
    names = [settings.name for settings in config.screens]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InvalidParameterError(f"Two screens are called {twice[0]!r}; give them names.", field="screens")
    for settings in config.screens:  # a bad model is refused before the first hour of work
        config.models.models(scvi_epochs=settings.scvi_epochs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for settings in config.screens:
        screen = settings.open(obsm=list(config.models.obsm.values()))
        relations = read_gmt(settings.relations) if settings.relations else None
        models = config.models.models(scvi_epochs=settings.scvi_epochs)
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(screen.name, total=None)
            result = evaluate(
                screen,
                models,
                options=replace(config.options, relations=relations),
                cache=cache,
                progress=_reporter(bar, task, screen.name),
                finished=_announcer(console, screen.name),
            )
        results.append((result, settings))
    return results


def _reporter(bar: Progress, task: Any, screen: str) -> Callable[[str, str, int, int], None]:
    def report(model: str, stage: str, done: int, total: int) -> None:
        bar.update(task, description=f"{screen}: {model}, {stage}", completed=done, total=total)

    return report


def _announcer(console: Console, screen: str) -> Callable[[str, float, bool], None]:
    def announce(model: str, seconds: float, kept: bool) -> None:
        console.print(f"{screen}: {model}, {'from the cache' if kept else f'{seconds:.0f} s'}", highlight=False)

    return announce


def _write(
    results: list[tuple[ScreenResult, ScreenConfig]], out: Path, page: Path | None, template: Path | None
) -> None:
    """Write everything into a temporary folder, rename it to `out` at the end, and then write the page."""
    text = PLACE if template is None else template.read_text(encoding="utf-8")
    if PLACE not in text:
        raise InvalidParameterError(f"{template} has no line {PLACE}, where the tables go.", field="template")
    figures: dict[str, dict[str, Path]] = {}
    with atomic_directory(out) as staging:
        for result, settings in results:
            folder = staging / result.screen.name
            folder.mkdir()
            figures[result.screen.name] = write_figures(result, folder)
            _write_screen(result, settings, folder, figures[result.screen.name])
        names = [result.screen.name for result, _ in results]
        (staging / MARKER).write_text(json.dumps({"screens": names}) + "\n", encoding="utf-8")
    if page is not None:
        _write_page(results, out, page, text)


def _write_screen(result: ScreenResult, settings: ScreenConfig, folder: Path, figures: dict[str, Path]) -> None:
    """Write the tables of one screen: long ones by model in parquet, summaries in JSON and Markdown."""
    import pandas as pd

    names = dict.fromkeys(name for model in result.models for name in model.tables)
    for name in names:
        parts = [model.tables[name].assign(model=model.model) for model in result.models if name in model.tables]
        pd.concat(parts, ignore_index=True).to_parquet(folder / f"{name}.parquet", index=False)
    for name, table in (
        ("overview", overview(result)),
        ("separation", separation_table(result)),
        ("targets", by_target(result)),
        ("degs", result.degs),
    ):
        table.to_parquet(folder / f"{name}.parquet", index=False)
    summary = {
        "screen": result.provenance,
        "models": {model.model: {**model.facts, "warnings": model.warnings} for model in result.models},
        "failed": result.failed,
        "overview": json.loads(overview(result).to_json(orient="records")),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    text = screen_page(
        result,
        title=settings.title,
        note=settings.note,
        figures={caption: path.name for caption, path in figures.items()},
    )
    (folder / "tables.md").write_text(text, encoding="utf-8")


def _write_page(results: list[tuple[ScreenResult, ScreenConfig]], out: Path, page: Path, text: str) -> None:
    """Write one page with all screens; its figures go into a folder of its name beside it."""
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for result, settings in results:
        figures = {}
        for path in sorted((out / result.screen.name).glob("*.png")):
            copy = folder / f"{result.screen.name}-{path.name}"
            with atomic(copy) as staging:
                shutil.copyfile(path, staging)
            figures[f"{path.stem} of {result.screen.name}"] = f"{folder.name}/{copy.name}"
        parts.append(screen_page(result, title=settings.title, note=settings.note, figures=figures))
    with atomic(page) as staging:
        staging.write_text(text.replace(PLACE, "\n".join(parts).strip()), encoding="utf-8")


def _check_out(out: Path) -> None:
    """Refuse a folder with anything but results of an earlier run, since it is replaced as a whole."""
    if out.exists() and not (out.is_dir() and ((out / MARKER).is_file() or not any(out.iterdir()))):
        raise InvalidParameterError(
            f"{out} exists and does not hold results of an earlier run; give another folder.", field="out"
        )


def _pairs(items: list[str] | None, field: str, form: str) -> dict[str, str]:
    pairs = {}
    for item in items or []:
        name, separator, value = item.partition("=")
        if not separator or not name or not value:
            raise InvalidParameterError(f"--{field} is {item!r}; {form} is needed.", field=field)
        pairs[name] = value
    return pairs


if __name__ == "__main__":
    typer.run(main)
