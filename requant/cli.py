"""The command line: parse, call, print. DESIGN: exit 0 done, 1 the answer is no, 2 could not run,
70 a bug in requant, 130 interrupted.

torch is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from requant import __version__
from requant.errors import RequantError, ToldError
from requant.judging import judge, judge_checksums, verify_sides
from requant.options import (
    Cutting,
    Device,
    MaxKl,
    Out,
    Pushing,
    Running,
    Serving,
    Source,
    Target,
    expanded,
)
from requant.output import Output, error, plain
from requant.places import compute_device, download, kept_source, open_source

if TYPE_CHECKING:
    from requant.convert.plan import Plan
    from requant.hub.delivery import Delivery

app = typer.Typer(
    name="requant",
    help="Turn a published checkpoint into the artifact that runs on your hardware, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command, with an option for every field of its groups of options, and map what it
    raises to the exit codes of this module's docstring."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        inner = expanded(function)

        @functools.wraps(inner)
        def run(**given: Any) -> None:
            try:
                inner(**given)
            except ToldError as told:
                raise typer.Exit(2) from told
            except RequantError as refused:
                error(str(refused))
                raise typer.Exit(2) from refused
            except KeyboardInterrupt as interrupted:
                error("interrupted; repeat the command to continue")
                raise typer.Exit(130) from interrupted
            except (typer.Exit, typer.Abort, typer.BadParameter):
                raise
            except Exception as bug:
                traceback.print_exc()
                error(f"this is a bug in requant {__version__}; please report it")
                raise typer.Exit(70) from bug

        app.command(name)(run)
        return function

    return register


@command("inspect")
def inspect_command(source: Source, output: Output) -> None:
    """Show formats by role, sizes, parameters and KV-cache bytes of a checkpoint."""
    from requant.convert.inspect import inspect
    from requant.convert.inspect_table import render
    from requant.convert.source import Checkpoint

    facts = inspect(Checkpoint.open(open_source(source)))
    output.result(facts, lambda: render(facts))


@command("formats")
def formats_command(output: Output) -> None:
    """List the formats that requant reads and writes."""
    from requant.convert.report import formats_table
    from requant.quant import describe_formats

    formats = describe_formats()
    output.result(formats, lambda: formats_table(formats))


@command("recipes")
def recipes_command(
    output: Output,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this preset.")] = None,
) -> None:
    """List the presets, or print one to copy and edit."""
    from requant.convert.recipe import load_recipe, recipe_names, recipe_text
    from requant.convert.report import recipes_table

    if name is not None:
        text = recipe_text(name)
        output.result({"name": name, "text": text}, lambda: text.rstrip())
        return
    recipes = [
        {"name": r.name, "format": r.format, "description": r.description}
        for r in map(load_recipe, recipe_names())
    ]
    output.result(recipes, lambda: recipes_table(recipes))


@command("plan")
def plan_command(
    source: Source, target: Target, cutting: Cutting, serving: Serving, output: Output
) -> None:
    """Show all that convert or shard would do, from headers, and scales where they decide; with
    --gpu whether the result fits, with --fit the formats that do. Exit status 1: it does not."""
    from rich.console import Group

    from requant.convert.report import plan_table

    serving.check(target)
    folder = open_source(source)
    facts: dict[str, Any] = {}
    if serving.fit is not None:
        chosen = serving.chosen(folder)
        if chosen is None:
            message = (
                f"no mixture of formats fits on {serving.fit}; take more GPUs, or a shorter context"
            )
            output.result({"fits": False, "gpus": serving.fit}, lambda: plain(message))
            raise typer.Exit(1)
        plan, text, path = chosen
        facts = {"recipe_file": str(path), "recipe_text": text}
        output.status(f"recipe written to {path}")
    else:
        plan = target.plan(folder, cutting.given or serving.given)
    plan = cutting.of(plan)
    summary = plan.summary() | facts
    if not serving.given:
        output.result(summary, lambda: plan_table(summary))
        return
    from requant.serving.tables import render

    report = serving.report(plan, cutting)
    document = {**summary, "serving": report}
    output.result(document, lambda: Group(plan_table(summary), "", render(report)))
    if not report["fits"]:
        raise typer.Exit(1)


@command("convert")
def convert_command(
    source: Source,
    out: Out,
    target: Target,
    cutting: Cutting,
    running: Running,
    pushing: Pushing,
    output: Output,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run source and output afterwards, and judge.")
    ] = False,
    max_kl: MaxKl = None,
    keep_source: Annotated[
        Path | None,
        typer.Option("--keep-source", metavar="DIR", help="Download SRC into DIR, and keep it."),
    ] = None,
    device: Device = None,
) -> None:
    """Convert a checkpoint into another format, and cut it for --ranks GPUs in the same pass.
    Repeating the command continues it."""
    from requant.convert.folder import Folder
    from requant.convert.report import plan_table

    if max_kl is not None and not verify:
        raise RequantError("--max-kl has no effect without --verify")
    pushing.check()
    folder = kept_source(source, out, keep_source, output)
    with contextlib.ExitStack() as leaving:
        delivery: Delivery | None = None

        def receive(plan: Plan) -> Delivery | None:
            nonlocal delivery
            delivery = pushing.open(plan, out, running.overwrite)
            return None if delivery is None else leaving.enter_context(delivery)

        result = running.execute(
            lambda: cutting.of(target.plan(folder)), out, "convert", output, device, receive
        )
        if result is None:
            return
        if not output.json:
            output.result(result, lambda: plan_table(result))
        if verify:
            written = Folder(out) if delivery is None else delivery.settle()
            result["verify"] = verify_sides(folder, written, max_kl, device, output)
        if delivery is not None and (not verify or result["verify"]["ok"]):
            result["pushed"] = delivery.publish(result.get("verify"))
            output.status(f"uploaded to {result['pushed']}")
        elif delivery is not None:
            result["pushed"] = None
            output.status(f"verify says no: {pushing.push} gets no config.json and no card")
    if verify:
        judge(result["verify"], result, output)
    elif output.json:
        output.result(result)


@command("shard")
def shard_command(
    source: Source, out: Out, cutting: Cutting, running: Running, output: Output
) -> None:
    """Cut a checkpoint for N GPUs, without changing a code. Repeating the command continues it."""
    from requant.convert.report import plan_table

    if not cutting.given:
        raise RequantError("give --ranks, or --tp, --ep or --pp")
    result = running.execute(
        lambda: cutting.of(Target().plan(open_source(source, out), keep=True)), out, "shard", output
    )
    if result is not None:
        output.result(result, lambda: plan_table(result))


@command("merge")
def merge_command(
    ranks: Annotated[
        str, typer.Argument(metavar="RANKS", help="What `shard`, or DeepSeek's script, wrote.")
    ],
    out: Out,
    running: Running,
    output: Output,
    config: Annotated[
        Path | None, typer.Option(help="The model's config.json, for DeepSeek's script's output.")
    ] = None,
) -> None:
    """Put a checkpoint that was cut into ranks together again, byte for byte as it was."""
    from requant.convert.report import plan_table
    from requant.convert.shard import merge

    result = running.execute(lambda: merge(open_source(ranks, out), config), out, "merge", output)
    if result is not None:
        output.result(result, lambda: plan_table(result))


@command("verify")
def verify_command(
    source: Source,
    output: Output,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The converted checkpoint.")
    ] = None,
    max_kl: MaxKl = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2, help="Run at least this many tokens of held-out text.  [default: 2048]"
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text file to run instead of the built-in text.")
    ] = None,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Only hash the files of one folder, OUT.")
    ] = False,
    device: Device = None,
) -> None:
    """Run source and output over held-out text, compare them, and judge.

    An OUT that was cut into ranks is run by as many processes, each on its own rank: by those that
    torchrun or `accelerate launch` started, else by new ones on this machine.
    """
    from requant.convert.processes import launched, team
    from requant.verify.launch import ranks_in, run_processes

    if checksums:
        if any(given is not None for given in (out, max_kl, tokens, text, device)):
            raise RequantError("--checksums takes one folder and no other option")
        folder = open_source(source)
        if folder.disk_bytes(None):
            raise RequantError(f"--checksums hashes files on this disk; download {source} first")
        judge_checksums(folder.path, output)
        return
    if out is None:
        raise RequantError("give SRC and OUT, or --checksums and one folder")
    if not launched() and (count := ranks_in(out)) > 1:
        options = {"--max-kl": max_kl, "--tokens": tokens, "--text": text, "--device": device}
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        given += [name for name, on in (("--json", output.json), ("--quiet", output.quiet)) if on]
        raise typer.Exit(run_processes(count, ["verify", *given, "--", source, str(out)]))
    with team() as processes:
        output = output.of(processes.leads)
        verdict = verify_sides(
            open_source(source), out, max_kl, device, output, tokens or 2048, text, processes
        )
        if processes.leads:
            judge(verdict, verdict, output)


@command("run")
def run_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A checkpoint folder, org/name on the Hub, or `demo`."
        ),
    ],
    output: Output,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Default: standard input.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling.")] = None,
    device: Device = None,
) -> None:
    """Generate text."""
    from requant.runner.complete import complete

    if seed is not None and temperature == 0:
        raise RequantError("--seed has no effect with --temperature 0")
    if prompt is None:
        if sys.stdin.isatty():
            raise RequantError("give a prompt, or text on standard input")
        prompt = sys.stdin.buffer.read().decode(errors="surrogateescape")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise RequantError("the prompt is not UTF-8 text")
    result = complete(
        open_source(model),
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed or 0,
        device=compute_device(device),
    )
    output.result(result, lambda: plain(prompt + str(result["text"])))


@command("download")
def download_command(
    repo: Annotated[
        str,
        typer.Argument(metavar="REPO", help="org/name[@revision], or `demo`, the built-in model."),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    output: Output,
) -> None:
    """Copy a repository from the Hub, checked. Repeating the command continues it."""
    result = download(repo, folder, output)
    output.result(result, lambda: plain(f"{result['files']} files written to {folder}"))


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Turn a published checkpoint into the artifact that runs on your hardware, and prove it."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the `requant` command."""
    # Opening a large checkpoint makes a million objects that stay: looking through them for garbage
    # every 700 new ones takes a third of the time.
    gc.set_threshold(100_000, 50, 50)
    app()
