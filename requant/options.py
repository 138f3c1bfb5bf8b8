"""The options that several commands share, and what they mean.

A command takes groups of options as dataclasses: `command` in cli.py gives it an option for every
field.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from requant.errors import RequantError
from requant.output import Output, parse_size
from requant.places import compute_device

if TYPE_CHECKING:
    from requant.convert.claim import Receiver
    from requant.convert.folder import Folder
    from requant.convert.plan import Plan
    from requant.convert.source import Checkpoint
    from requant.hub.delivery import Delivery

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="A checkpoint folder, org/name[@revision] on the Hub, or `demo`."
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:N; default: cuda if there is one, else cpu."),
]
MaxKl = Annotated[
    float | None,
    typer.Option(min=0.0, help="Largest mean KL in nats per token; default: by format."),
]


def expanded(function: Callable[..., None]) -> Callable[..., None]:
    """The function, with a parameter for every field of those of its own that are dataclasses."""
    hints = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints[name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(_parameter(name, parameter.default, kind))
            continue
        groups[name] = kind
        types = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            parameters.append(_parameter(field.name, field.default, types[field.name]))

    def run(**given: Any) -> None:
        built = {
            name: kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
            for name, kind in groups.items()
        }
        function(**built, **given)

    run.__doc__ = function.__doc__
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    given = inspect.Parameter.empty if default is dataclasses.MISSING else default
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=given, annotation=annotation
    )


@dataclass(frozen=True)
class Target:
    """The options that say what to convert into."""

    to: Annotated[
        str | None,
        typer.Option("--to", help="A format's default recipe, e.g. int4[group_size=32]."),
    ] = None
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="A preset's name, or a recipe file (.toml).")
    ] = None
    require_lossless: Annotated[
        bool, typer.Option("--require-lossless", help="Refuse where a value would change.")
    ] = False

    def plan(self, source: Folder, keep: bool = False) -> Plan:
        """The plan of a conversion, or with `keep` of a copy where no format is given."""
        from requant.convert.plan import make_plan
        from requant.convert.recipe import KEEP, default_recipe, load_recipe

        copied = keep and self.to is None and self.recipe is None
        if not copied and (self.to is None) == (self.recipe is None):
            raise RequantError("give either --to FORMAT or --recipe NAME|FILE.toml")
        checkpoint = _opened(source)
        if copied:
            return make_plan(checkpoint, KEEP)
        to, recipe = self.to, self.recipe
        chosen = default_recipe(to) if to is not None else load_recipe(recipe or "")
        return make_plan(checkpoint, chosen, self.require_lossless)


def _opened(source: Folder) -> Checkpoint:
    """The checkpoint in a folder, once all is imported that works on it."""
    from requant.convert.source import Checkpoint

    gc.freeze()  # looking for garbage in all that was imported takes as long as opening
    return Checkpoint.open(source)


@dataclass(frozen=True)
class Cutting:
    """The options that say how to cut a checkpoint for several GPUs."""

    ranks: Annotated[
        int | None, typer.Option(min=1, help="Cut for so many GPUs; --tp, --ep, --pp say how.")
    ] = None
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks; default: all.")] = (
        None
    )
    ep: Annotated[
        int | None, typer.Option(min=1, help="Groups of routed experts; default: all ranks.")
    ] = None
    pp: Annotated[
        int | None, typer.Option("--pp", "--pipeline", min=1, help="Pipeline stages.")
    ] = None
    placement: Annotated[
        Path | None,
        typer.Option(
            "--expert-placement", help="Balance experts by the counts in this file (JSON)."
        ),
    ] = None
    redundant: Annotated[
        int, typer.Option("--redundant-experts", min=0, help="Put the hottest K on two ranks.")
    ] = 0
    replicate: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE", help="Keep a role, e.g. attention, whole on every rank."),
    ] = None
    layout: Annotated[
        str,
        typer.Option("--layout", help="hf: a folder a rank; deepseek: for its own generate.py."),
    ] = "hf"

    @property
    def given(self) -> bool:
        """Whether it is to be cut at all."""
        return any(number is not None for number in (self.ranks, self.tp, self.ep, self.pp))

    def of(self, plan: Plan) -> Plan:
        """The plan, spread over ranks if that was asked for."""
        from requant.convert.deepseek import split_deepseek
        from requant.convert.parallel import usual
        from requant.convert.placement import read_loads
        from requant.convert.ranks import split
        from requant.convert.shard import as_written, shard

        if self.layout not in ("hf", "deepseek"):
            raise RequantError(f"--layout {self.layout}: expected hf or deepseek")
        finer = self.placement is not None or bool(self.redundant) or bool(self.replicate)
        if not self.given:
            if finer or self.layout != "hf":
                raise RequantError(
                    "--layout, --expert-placement, --redundant-experts and --replicate have no "
                    "effect without --ranks, --tp, --ep or --pp"
                )
            return plan
        written = as_written(plan)
        ranks = self.ranks
        if ranks is None and self.tp is None and self.ep is None:
            ranks = self.pp
        if self.layout == "deepseek":
            if finer or ranks is None or (self.tp, self.ep, self.pp) != (None, None, None):
                raise RequantError("--layout deepseek takes --ranks and nothing finer; use hf")
            return shard(plan, split_deepseek(written, ranks), self.layout)
        parallel = usual(written, ranks, self.tp, self.ep, self.pp)
        loads = None if self.placement is None else read_loads(self.placement)
        roles: Any = self.replicate or []
        return shard(plan, split(written, parallel, loads, self.redundant, roles))


@dataclass(frozen=True)
class Serving:
    """The options that say what the result is to be served on."""

    gpu: Annotated[
        str | None,
        typer.Option(metavar="GPUS", help='Does it fit? E.g. 4x24GB, 8xH100 or "RTX 4090".'),
    ] = None
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sequence.  [default: 32768]")
    ] = None
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences at a time.  [default: 1]")] = (
        None
    )
    ram: Annotated[
        str | None, typer.Option(help="That machine's memory, for experts that do not fit.")
    ] = None
    fit: Annotated[
        str | None,
        typer.Option(metavar="GPUS", help="Choose the best mixture of formats that fits."),
    ] = None
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The recipe file of --fit.  [default: fit-GPUS.toml]"),
    ] = None

    @property
    def given(self) -> bool:
        """Whether anything is to be served."""
        return self.gpu is not None or self.fit is not None

    def check(self, target: Target) -> None:
        """Raise RequantError for options that have no effect."""
        finer = (self.context, self.batch, self.ram)
        if not self.given and any(option is not None for option in finer):
            raise RequantError("--context, --batch and --ram have no effect without --gpu or --fit")
        if self.save is not None and self.fit is None:
            raise RequantError("--save has no effect without --fit")
        if self.fit is not None and (self.gpu or target.to or target.recipe):
            raise RequantError("--fit chooses the formats; it takes no --to, --recipe or --gpu")

    def chosen(self, source: Folder) -> tuple[Plan, str, Path] | None:
        """The plan that fits, its recipe's text and file; None where no mixture of formats does."""
        from requant.convert.plan import make_plan
        from requant.convert.recipe import load_recipe
        from requant.serving.choose import choose
        from requant.serving.hardware import parse_gpus
        from requant.serving.report import demand_of

        gpus = parse_gpus(self.fit or "")
        checkpoint = _opened(source)
        demand = demand_of(checkpoint.config, self.context, self.batch or 1)
        choice = choose(checkpoint, gpus, demand)
        if choice is None:
            return None
        path = self.save or Path("fit-" + re.sub(r"[^\w.]+", "-", str(gpus)) + ".toml")
        text = choice.text
        try:
            if path.exists() and path.read_text("utf-8") != text:
                raise RequantError(f"{path}: is there, and another recipe; give --save FILE")
            path.write_text(text, "utf-8")
        except OSError as error:
            raise RequantError(f"{path}: cannot write the recipe: {error.strerror}") from error
        return make_plan(checkpoint, load_recipe(str(path))), text, path

    def report(self, plan: Plan, cutting: Cutting) -> dict[str, Any]:
        """What serving the output of a plan takes."""
        from requant.convert.placement import read_loads
        from requant.serving.hardware import parse_gpus
        from requant.serving.report import serving_report

        return serving_report(
            plan,
            parse_gpus(self.gpu or self.fit or ""),
            self.context,
            self.batch or 1,
            None if self.ram is None else parse_size("--ram", self.ram),
            loads=None if cutting.placement is None else read_loads(cutting.placement),
        )


@dataclass(frozen=True)
class Running:
    """The options that say how to carry a plan out."""

    workers: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, help="Tiles computed at a time; default: the cores, at most 16."
        ),
    ] = None
    ram: Annotated[
        str | None, typer.Option(help="Memory to use at most, e.g. 600MB; default: as it comes.")
    ] = None
    disk: Annotated[
        str | None,
        typer.Option(help="Disk for files that come from the Hub, at most; default: 4 of them."),
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove an earlier result in OUT, start over.")
    ] = False

    def execute(
        self,
        make: Callable[[], Plan],
        out: Path,
        what: str,
        output: Output,
        device: str | None = "cpu",
        receive: Callable[[Plan], Receiver | None] = lambda plan: None,
    ) -> dict[str, Any] | None:
        """Make a plan and carry it out; what was done. None in the processes of a team that do not
        report. `receive` gives who takes the files of a plan."""
        from requant.convert.budget import runtime
        from requant.convert.processes import team
        from requant.convert.run import convert

        ram, disk = (
            None if text is None else parse_size(option, text)
            for option, text in (("--ram", self.ram), ("--disk", self.disk))
        )
        with team() as processes:
            # One process speaks; the others only say why they cannot go on.
            output = output.of(processes.leads)
            plan = make()
            if disk is not None and not plan.source.folder.disk_bytes(None):
                raise RequantError("--disk has no effect on a source that is on this disk")
            how = runtime(plan, compute_device(device), self.workers, ram, processes)
            how = dataclasses.replace(how, disk=disk, receiver=receive(plan))
            with output.progress(plan.read_bytes, what) as progress:
                result = convert(plan, out, how, progress, self.overwrite)
        return result if processes.leads else None


@dataclass(frozen=True)
class Pushing:
    """The options that say where to upload the result."""

    push: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Upload to org/name[@branch] on the Hub, with a card."),
    ] = None
    private: Annotated[
        bool, typer.Option("--private", help="Create that repository as a private one.")
    ] = False
    no_keep: Annotated[
        bool, typer.Option("--no-keep", help="Remove files of weights once they are uploaded.")
    ] = False

    def check(self) -> None:
        """Raise RequantError for options that have no effect."""
        from requant.convert.processes import launched

        if self.push is None and (self.private or self.no_keep):
            raise RequantError("--private and --no-keep have no effect without --push")
        if self.push is not None and launched():
            raise RequantError("--push takes one process; upload afterwards, by repeating it")

    def open(self, plan: Plan, out: Path, overwrite: bool) -> Delivery | None:
        """Who uploads the files of a plan, if that was asked for."""
        if self.push is None:
            return None
        from requant.hub.delivery import Delivery

        return Delivery(
            plan, out, self.push,
            keeps=not self.no_keep, private=self.private, overwrite=overwrite,
        )  # fmt: skip
