"""The command line: parse, call, print. DESIGN: exit 0 done, 1 the answer is no, 2 could not run,
70 a bug in requant, 130 interrupted.

torch is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import functools
import gc
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from requant import __version__
from requant.errors import RequantError, ToldError
from requant.options import (
    Cutting,
    Device,
    Ep,
    Json,
    LayoutOption,
    MaxKl,
    Overwrite,
    Placement,
    Pp,
    Quiet,
    Ram,
    Ranks,
    RecipeOption,
    Redundant,
    Replicate,
    RequireLossless,
    Source,
    To,
    Tp,
    Workers,
)
from requant.output import Output, error, parse_size

if TYPE_CHECKING:
    import torch

    from requant.convert.plan import Plan
    from requant.convert.processes import Team

app = typer.Typer(
    name="requant",
    help="Turn a published checkpoint into the artifact that runs on your hardware, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

P = ParamSpec("P")


def command(name: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Register a command and map what it raises to the exit codes of this module's docstring."""

    def register(function: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                function(*args, **kwargs)
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

        return app.command(name)(run)

    return register


@command("inspect")
def inspect_command(source: Source, json: Json = False, quiet: Quiet = False) -> None:
    """Show formats by role, sizes, parameters and KV-cache bytes of a checkpoint."""
    from requant.convert.inspect import inspect
    from requant.convert.inspect_table import render
    from requant.convert.source import Checkpoint

    facts = inspect(Checkpoint.open(_folder(source)))
    Output(json, quiet).result(facts, lambda: render(facts))


@command("formats")
def formats_command(json: Json = False, quiet: Quiet = False) -> None:
    """List the formats that requant reads and writes."""
    from requant.convert.report import formats_table
    from requant.quant import describe_formats

    formats = describe_formats()
    Output(json, quiet).result(formats, lambda: formats_table(formats))


@command("recipes")
def recipes_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this preset.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the presets, or print one to copy and edit."""
    from requant.convert.recipe import load_recipe, recipe_names, recipe_text
    from requant.convert.report import recipes_table

    output = Output(json, quiet)
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
    source: Source,
    to: To = None,
    recipe: RecipeOption = None,
    require_lossless: RequireLossless = False,
    ranks: Ranks = None,
    tp: Tp = None,
    ep: Ep = None,
    pp: Pp = None,
    placement: Placement = None,
    redundant: Redundant = 0,
    replicate: Replicate = None,
    layout: LayoutOption = "hf",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show all that convert or shard would do, from headers, and scales where they decide."""
    from requant.convert.report import plan_table

    cutting = Cutting(ranks, tp, ep, pp, placement, redundant, replicate, layout)
    summary = cutting.of(_plan(source, to, recipe, require_lossless, cutting.given)).summary()
    Output(json, quiet).result(summary, lambda: plan_table(summary))


@command("convert")
def convert_command(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    to: To = None,
    recipe: RecipeOption = None,
    require_lossless: RequireLossless = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run source and output afterwards, and judge.")
    ] = False,
    max_kl: MaxKl = None,
    ranks: Ranks = None,
    tp: Tp = None,
    ep: Ep = None,
    pp: Pp = None,
    placement: Placement = None,
    redundant: Redundant = 0,
    replicate: Replicate = None,
    layout: LayoutOption = "hf",
    device: Device = None,
    workers: Workers = None,
    ram: Ram = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint into another format, and cut it for --ranks GPUs in the same pass.
    Repeating the command continues it."""
    from requant.convert.report import plan_table

    if max_kl is not None and not verify:
        raise RequantError("--max-kl has no effect without --verify")
    cutting = Cutting(ranks, tp, ep, pp, placement, redundant, replicate, layout)
    done = _execute(
        lambda: cutting.of(_plan(source, to, recipe, require_lossless)),
        out, "convert", device, workers, ram, overwrite, json, quiet,
    )  # fmt: skip
    if done is None:
        return
    result, output = done
    if not verify:
        output.result(result, lambda: plan_table(result))
        return
    if not json:
        output.result(result, lambda: plan_table(result))
    verdict = _verify(source, out, max_kl, device, output)
    _judge(verdict, {**result, "verify": verdict}, output)


@command("shard")
def shard_command(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    ranks: Ranks = None,
    tp: Tp = None,
    ep: Ep = None,
    pp: Pp = None,
    placement: Placement = None,
    redundant: Redundant = 0,
    replicate: Replicate = None,
    layout: LayoutOption = "hf",
    workers: Workers = None,
    ram: Ram = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cut a checkpoint for N GPUs, without changing a code. Repeating the command continues it."""
    from requant.convert.report import plan_table

    cutting = Cutting(ranks, tp, ep, pp, placement, redundant, replicate, layout)
    if not cutting.given:
        raise RequantError("give --ranks, or --tp, --ep or --pp")
    done = _execute(
        lambda: cutting.of(_plan(source, None, None, False, keep=True)),
        out, "shard", "cpu", workers, ram, overwrite, json, quiet,
    )  # fmt: skip
    if done is not None:
        result, output = done
        output.result(result, lambda: plan_table(result))


@command("merge")
def merge_command(
    ranks: Annotated[
        Path, typer.Argument(metavar="RANKS", help="What `shard`, or DeepSeek's script, wrote.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    config: Annotated[
        Path | None, typer.Option(help="The model's config.json, for DeepSeek's script's output.")
    ] = None,
    workers: Workers = None,
    ram: Ram = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put a checkpoint that was cut into ranks together again, byte for byte as it was."""
    from requant.convert.report import plan_table
    from requant.convert.shard import merge

    done = _execute(
        lambda: merge(ranks, config),
        out, "merge", "cpu", workers, ram, overwrite, json, quiet,
    )  # fmt: skip
    if done is not None:
        result, output = done
        output.result(result, lambda: plan_table(result))


@command("verify")
def verify_command(
    source: Source,
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
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run source and output over held-out text, compare them, and judge.

    An OUT that was cut into ranks is run by as many processes, each on its own rank: by those that
    torchrun or `accelerate launch` started, else by new ones on this machine.
    """
    from requant.convert.processes import team
    from requant.verify.launch import launched, ranks_in, run_processes

    output = Output(json, quiet)
    if checksums:
        if any(given is not None for given in (out, max_kl, tokens, text, device)):
            raise RequantError("--checksums takes one folder and no other option")
        _judge_checksums(_folder(source), output)
        return
    if out is None:
        raise RequantError("give SRC and OUT, or --checksums and one folder")
    if not launched() and (count := ranks_in(out)) > 1:
        options = {"--max-kl": max_kl, "--tokens": tokens, "--text": text, "--device": device}
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        given += [name for name, on in (("--json", json), ("--quiet", quiet)) if on]
        raise typer.Exit(run_processes(count, ["verify", *given, "--", source, str(out)]))
    with team() as processes:
        output = Output(json and processes.leads, quiet or not processes.leads)
        verdict = _verify(source, out, max_kl, device, output, tokens or 2048, text, processes)
        if processes.leads:
            _judge(verdict, verdict, output)


@command("run")
def run_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, or `demo`.")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Default: standard input.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling.")] = None,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
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
        _folder(model),
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed or 0,
        device=_device(device),
    )
    Output(json, quiet).result(result, lambda: _plain(prompt + str(result["text"])))


@command("download")
def download_command(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="`demo`, the built-in model.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An empty or new folder.")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model out as an ordinary checkpoint folder."""
    from requant.demo import write_demo

    if repo != "demo":
        raise RequantError(
            f"{repo}: only `demo` can be downloaded so far; fetch a Hub repository with its own "
            "client and give requant the folder"
        )
    result = write_demo(folder)
    Output(json, quiet).result(
        result, lambda: _plain(f"{result['files']} files written to {folder}")
    )


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


def _folder(source: str) -> Path:
    """The folder that SRC names."""
    if source == "demo":
        from requant.demo import demo_path

        return demo_path()
    return Path(source)


def _plan(
    source: str, to: str | None, recipe: str | None, require_lossless: bool, keep: bool = False
) -> Plan:
    """The plan of a conversion, or with `keep` of a copy where no format is given."""
    from requant.convert.plan import make_plan
    from requant.convert.recipe import KEEP, default_recipe, load_recipe
    from requant.convert.source import Checkpoint

    checkpoint = Checkpoint.open(_folder(source))
    if keep and to is None and recipe is None:
        return make_plan(checkpoint, KEEP)
    if (to is None) == (recipe is None):
        raise RequantError("give either --to FORMAT or --recipe NAME|FILE.toml")
    chosen = default_recipe(to) if to is not None else load_recipe(recipe or "")
    return make_plan(checkpoint, chosen, require_lossless)


def _execute(
    make: Callable[[], Plan],
    out: Path,
    what: str,
    device: str | None,
    workers: int | None,
    ram: str | None,
    overwrite: bool,
    json: bool,
    quiet: bool,
) -> tuple[dict[str, Any], Output] | None:
    """Make a plan and carry it out; what was done, and where to print it. None in the processes of
    a team that do not report."""
    from requant.convert.budget import runtime
    from requant.convert.processes import team
    from requant.convert.run import convert

    nbytes = None if ram is None else parse_size("--ram", ram)
    with team() as processes:
        # One process speaks; the others only say why they cannot go on.
        output = Output(json and processes.leads, quiet or not processes.leads)
        plan = make()
        how = runtime(plan, _device(device), workers, nbytes, processes)
        with output.progress(plan.read_bytes, what) as progress:
            result = convert(plan, out, how, progress, overwrite)
    return (result, output) if processes.leads else None


def _device(name: str | None) -> torch.device:
    """The device to compute on. Raises RequantError when it is not there."""
    import torch

    from requant.convert.processes import local_rank

    if (
        name is None and torch.cuda.is_available()
    ):  # one GPU a process, where a launcher counts them
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    if name is None:
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as unknown:
        raise RequantError(f"--device {name}: expected cpu, cuda or cuda:N") from unknown
    if device.type not in ("cpu", "cuda"):
        raise RequantError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequantError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def _verify(
    source: str,
    out: Path,
    max_kl: float | None,
    device: str | None,
    output: Output,
    tokens: int = 2048,
    text: Path | None = None,
    processes: Team | None = None,
) -> dict[str, Any]:
    from requant.convert.processes import Team
    from requant.verify.comparison import verify

    processes = processes or Team()
    words = processes.each(lambda: _read_text(text))
    folder, where = _folder(source), processes.each(lambda: _device(device))
    output.status(f"verify: running {source} and {out} side by side")
    # Close enough for a bar: headers are a few kilobytes.
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with output.progress(nbytes, "verify") as progress:
        return verify(
            folder,
            out,
            device=where,
            max_kl=max_kl,
            tokens=tokens,
            text=words,
            progress=progress,
            team=processes,
        )


def _read_text(path: Path | None) -> str | None:
    try:
        return path.read_text("utf-8") if path is not None else None
    except (OSError, UnicodeDecodeError) as unreadable:
        raise RequantError(f"{path}: cannot read the text: {unreadable}") from unreadable


def _judge(verdict: dict[str, Any], document: dict[str, Any], output: Output) -> None:
    """Print the verdict and exit 1 when it is no."""
    from requant.verify.report import render

    output.result(document, lambda: render(verdict))
    if not verdict["ok"]:
        raise typer.Exit(1)


def _judge_checksums(folder: Path, output: Output) -> None:
    """Compare files with what was recorded when they were written; exit 1 when they differ."""
    from requant.verify.checksums import check, recorded

    total = sum(facts.nbytes for facts in recorded(folder).values())
    with output.progress(total, "hash") as progress:
        found = check(folder, progress)
    count = f"{found['files']} files, {len(found['problems'])} of them changed or missing"
    output.result(found, lambda: _plain("\n".join([*found["problems"], count])))
    if not found["ok"]:
        raise typer.Exit(1)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)
