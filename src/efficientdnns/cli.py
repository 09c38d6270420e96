"""The `efficientdnns` command: one subcommand a verb, each a few lines over the API."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState
from rich.console import Console
from rich.table import Table

import efficientdnns as ed
from efficientdnns import method as registry
from efficientdnns.deployment.saved import export_saved
from efficientdnns.errors import ConfigurationError, EfficientDNNsError
from efficientdnns.from_scratch import from_scratch_table, of_result
from efficientdnns.recipe import Recipe, parse_method_text
from efficientdnns.reporting import compare, compare_page, compare_table, read, report_page, write_page
from efficientdnns.reproduce import recorded, reproduce_all
from efficientdnns.run import make_model, make_task, run
from efficientdnns.side_by_side import listed, numbers, side_by_side

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Published methods that make neural networks smaller and faster, behind one interface.",
)
console = Console()

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help="built-in name, torchvision:NAME, timm:NAME, hf:NAME, path/to/file.py:factory, or a saved result",
    ),
]
WeightsOption = Annotated[str | None, typer.Option(help="safetensors file or weights-only checkpoint")]
TaskOption = Annotated[str, typer.Option("--task", help="data set name, folder, parquet file, or file.py:factory")]
OutOption = Annotated[Path, typer.Option("--out", help="folder for the result")]
SeedOption = Annotated[int | None, typer.Option(help="seed of the run")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, mps or auto")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="no progress")]
RuntimesOption = Annotated[
    str, typer.Option("--runtimes", help="where latency is measured: of eager, compile, onnxruntime")
]
RUNTIMES = "eager,onnxruntime"
JsonOption = Annotated[bool, typer.Option("--json", help="machine-readable output")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="go on with a run that was interrupted in the same folder")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--training", help="training setting NAME=VALUE, e.g. learning_rate=0.01 (repeatable)"),
]


@app.command("methods")
def methods_command(
    kind: Annotated[str | None, typer.Option(help="only methods of this kind")] = None,
    json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="a Markdown table by kind, as in the README")] = False,
) -> None:
    """List the published methods."""
    cards = [registry.card(m) for m in registry.methods(kind)]
    if json:
        print_json(cards)
        return
    if markdown:
        typer.echo(methods_markdown(cards))
        return
    table = Table("id", "kind", "title", "venue", "needs")
    for card in cards:
        table.add_row(
            card["id"], card["kind"], card["title"], f"{card['venue']} {card['year']}", ", ".join(card["needs"])
        )
    console.print(table)


@app.command()
def show(name: Annotated[str, typer.Argument(metavar="METHOD")], json: JsonOption = False) -> None:
    """Show the paper card of a method: what it does, formula, fields, recorded results."""
    found = registry.get(name)
    if found.paper is None:
        raise ConfigurationError(f"'{name}' is a built-in step without a paper; see efficientdnns methods")
    card = registry.card(found)
    results = recorded(name)
    if json:
        print_json({**card, "recorded": results})
        return
    console.print(
        f"[bold]{card['title']}[/bold]\n{card['authors']}, {card['venue']} {card['year']}\n{card['url']}\n",
        highlight=False,
    )
    console.print(card["doc"], markup=False, highlight=False, soft_wrap=True)
    table = Table("field", "type", "range", "default", "meaning", title="Fields", title_justify="left")
    for field in card["fields"]:
        table.add_row(field["name"], field["type"], field["range"], str(field["default"]), field["description"])
    console.print(table)
    if results:
        lines = Table("run", "seed", "paper", "ours", "note", title="Recorded results", title_justify="left")
        for result in results:
            lines.add_row(result["run"], str(result["seed"]), result["paper_text"], result["ours_text"], result["note"])
        console.print(lines)


@app.command()
def fit(
    model: ModelOption,
    task: TaskOption,
    out: OutOption,
    epochs: Annotated[int, typer.Option(min=0)] = 10,
    weights: WeightsOption = None,
    training: SetOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    resume: ResumeOption = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Train a network."""
    method = ed.Fit(epochs=epochs)
    execute(_recipe(model, task, weights, [method], None, training), out, resume, seed, device, threads, quiet, json)


@app.command("compress")
def compress_command(
    model: ModelOption,
    task: TaskOption,
    method: Annotated[
        list[str], typer.Option("--method", help="ID[:field=value,...]; A+B share one training run (repeatable)")
    ],
    out: OutOption,
    budget: Annotated[str | None, typer.Option(help="limits such as macs=0.5,bytes=100kB")] = None,
    weights: WeightsOption = None,
    training: SetOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    resume: ResumeOption = False,
    runtimes: RuntimesOption = RUNTIMES,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Compress a trained network with one method or a chain."""
    methods = [parse_method_text(text) for text in method]
    execute(
        _recipe(model, task, weights, methods, budget, training),
        out,
        resume,
        seed,
        device,
        threads,
        quiet,
        json,
        runtimes,
    )


@app.command("run")
def run_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    out: OutOption,
    resume: ResumeOption = False,
    seed: SeedOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    runtimes: RuntimesOption = RUNTIMES,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Run a recipe."""
    execute(Recipe.load(recipe), out, resume, seed, device, threads, quiet, json, runtimes)


@app.command("measure")
def measure_command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL [OTHER]...")],
    task: TaskOption,
    weights: WeightsOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    runtime: Annotated[str | None, typer.Option(help="of eager, compile, onnxruntime; e.g. eager,onnxruntime")] = None,
    threads: Annotated[str | None, typer.Option(help="CPU threads, e.g. 1,2")] = None,
    batch: Annotated[str | None, typer.Option(help="batch sizes, e.g. 1,32")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="also the time of every layer")] = False,
    json: JsonOption = False,
) -> None:
    """Measure networks: metric, parameters, MACs, bytes, latency, memory; latencies side by side, also by layer.

    Several networks are compared with the first, interleaved in one run. With --runtime or --batch a saved result is
    compared with the network it was made from.
    """
    counts, sizes = numbers(threads, "threads"), numbers(batch, "batch")
    torch.manual_seed(seed or 0)
    measured = side_by_side(
        models,
        make_task({"name": task}),
        weights=weights,
        device=device,
        runtimes=listed(runtime),
        threads=counts,
        batches=sizes,
        layers=layers,
    )
    if json:
        print_json(measured.data())
        return
    for table in measured.tables():
        console.print(table)


@app.command("export")
def export_command(
    result: Annotated[Path, typer.Argument(metavar="DIR")],
    format: Annotated[str, typer.Option("--format", help="onnx, pt2, torchao, openvino or executorch")] = "onnx",
    out: Annotated[Path | None, typer.Option("--out", help="file to write, by default one in DIR")] = None,
    batch: Annotated[int | None, typer.Option(help="fix the batch to this size")] = None,
    task: Annotated[str | None, typer.Option("--task", help="data to compare on; by default the result's")] = None,
    model: Annotated[str | None, typer.Option("--model", help="the network before, where it was one of yours")] = None,
    json: JsonOption = False,
) -> None:
    """Write a saved result as a file for another runtime, open it again and compare."""
    the_task = None if task is None else make_task({"name": task})
    network = None if model is None else make_model({"name": model}, the_task)
    exported = export_saved(result, format, file=out, batch=batch, task=the_task, model=network)
    if json:
        print_json({"path": str(exported.path), **exported.model_dump()})
        return
    console.print(f"written to {exported.path}: {exported}", markup=False, highlight=False, soft_wrap=True)


@app.command("report")
def report_command(
    result: Annotated[Path, typer.Argument(metavar="DIR")],
    out: Annotated[Path | None, typer.Option("--out", help="file to write, by default report.html in DIR")] = None,
) -> None:
    """Write the page of a saved result: one file that works offline."""
    path = write_page(out or result / "report.html", report_page(read(result)))
    console.print(f"written to {path}", markup=False, highlight=False, soft_wrap=True)


@app.command("compare")
def compare_command(
    results: Annotated[list[Path], typer.Argument(metavar="DIR...")],
    out: Annotated[Path | None, typer.Option("--out", help="page to write, e.g. compare.html")] = None,
    scratch: Annotated[
        bool,
        typer.Option("--from-scratch", help="train each network's untrained twin: was what it inherited worth it?"),
    ] = False,
    epochs: Annotated[
        int, typer.Option(min=1, help="with --from-scratch: epochs of the dense network's training")
    ] = 20,
    fine_tune_epochs: Annotated[int, typer.Option(min=1, help="with --from-scratch: epochs of fine-tuning")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="with --from-scratch: seeds; three or more for a verdict")] = 3,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Set results beside each other: the metric against bytes, MACs and latency; runs of several seeds are one."""
    if scratch:
        lengths = {"epochs": epochs, "fine_tune_epochs": fine_tune_epochs}
        found = {str(d): of_result(d, **lengths, seeds=range(seeds), quiet=quiet or json) for d in results}
        if json:
            print_json({name: data.model_dump() for name, data in found.items()})
            return
        for name, data in found.items():
            console.print(from_scratch_table(name, data))
        return
    comparison = compare(results)
    path = write_page(out, compare_page(comparison)) if out else None
    if json:
        print_json(comparison.data())
        return
    console.print(compare_table(comparison))
    for warning in comparison.warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    if path:
        console.print(f"written to {path}", markup=False, highlight=False, soft_wrap=True)


@app.command("reproduce")
def reproduce_command(
    name: Annotated[str, typer.Argument(metavar="ID")],
    smoke: Annotated[bool, typer.Option("--smoke", help="a tiny version that only shows that it runs")] = False,
    only: Annotated[str | None, typer.Option("--run", help="only the run of this name")] = None,
    out: Annotated[Path, typer.Option("--out", help="folder for the results")] = Path("runs/reproduce"),
    record: Annotated[bool, typer.Option("--record", help="write the outcome beside the reproduction")] = False,
    resume: ResumeOption = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Run the reproduction of a paper and print its figures beside ours."""
    results = reproduce_all(
        name, out=out, smoke=smoke, only=only, record=record, resume=resume, device=device, threads=threads, quiet=quiet
    )
    if json:
        print_json(results)
        return
    table = Table(
        "run", "seed", "paper", "ours", "seconds", title=f"{name}{' (smoke)' if smoke else ''}", title_justify="left"
    )
    for result in results:
        table.add_row(
            result["run"], str(result["seed"]), result["paper_text"], result["ours_text"], f"{result['seconds']:.0f}"
        )
    console.print(table)


def _recipe(
    model: str, task: str, weights: str | None, methods: list[Any], budget: str | None, training: list[str] | None
) -> Recipe:
    settings: dict[str, Any] = {}
    for item in training or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigurationError(f"training setting '{item}' is not NAME=VALUE; write e.g. learning_rate=0.01")
        settings[key] = value
    return Recipe(
        model={"name": model, **({"weights": weights} if weights else {})},
        task={"name": task},
        methods=methods,
        training=ed.TrainingSettings(**settings),
        budget=ed.Budget.parse(budget or ""),
    )


def execute(
    recipe: Recipe,
    out: Path,
    resume: bool,
    seed: int | None,
    device: str | None,
    threads: int | None,
    quiet: bool,
    json: bool,
    runtimes: str = "eager",
) -> None:
    """Run a recipe and print its table or its report."""
    result = run(
        recipe,
        out,
        resume=resume,
        seed=seed,
        device=device,
        threads=threads,
        quiet=quiet or json,
        runtimes=listed(runtimes),
    )
    if not PartialState().is_main_process:
        return
    if json:
        print_json(result.report.model_dump())
        return
    console.print(result.table())
    for note in result.notes():
        console.print(note, markup=False, highlight=False)
    console.print(f"written to {out}; open {out / 'report.html'} in a browser", highlight=False, soft_wrap=True)


def methods_markdown(cards: list[dict[str, Any]]) -> str:
    """The table of methods by kind."""
    lines = ["| kind | method | paper |", "|---|---|---|"]
    for kind in registry.KINDS:
        for card in (c for c in cards if c["kind"] == kind):
            lines.append(
                f"| {kind} | `{card['id']}` | [{card['title']}]({card['url']}), {card['venue']} {card['year']} |"
            )
    return "\n".join(lines)


def print_json(data: Any) -> None:
    """Print data as JSON."""
    sys.stdout.write(json.dumps(data, indent=1, default=str) + "\n")


def main() -> None:
    """Entry point: a user's error is one line and exit code 2."""
    try:
        app()
    except EfficientDNNsError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from the last epoch", file=sys.stderr)
        raise SystemExit(130) from None
