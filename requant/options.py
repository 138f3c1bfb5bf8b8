"""The options that several commands share, and what they mean.

A command takes groups of options as dataclasses: `command` in cli.py gives it an option for every
field.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from requant.errors import CheckpointError, RequantError
from requant.output import Output, parse_size

if TYPE_CHECKING:
    import torch

    from requant.convert.claim import Receiver
    from requant.convert.delivery import Delivery
    from requant.convert.folder import Folder
    from requant.convert.plan import Plan

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
        from requant.convert.source import Checkpoint

        copied = keep and self.to is None and self.recipe is None
        if not copied and (self.to is None) == (self.recipe is None):
            raise RequantError("give either --to FORMAT or --recipe NAME|FILE.toml")
        gc.freeze()  # looking for garbage in all that was imported takes as long as opening
        checkpoint = Checkpoint.open(source)
        if copied:
            return make_plan(checkpoint, KEEP)
        to, recipe = self.to, self.recipe
        chosen = default_recipe(to) if to is not None else load_recipe(recipe or "")
        return make_plan(checkpoint, chosen, self.require_lossless)


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
            if disk is not None and not plan.source.folder.disk_bytes(disk):
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
        from requant.convert.delivery import Delivery

        return Delivery(
            plan, out, self.push,
            keeps=not self.no_keep, private=self.private, overwrite=overwrite,
        )  # fmt: skip


def open_source(source: str, out: Path | None = None) -> Folder:
    """The folder or repository that SRC names. What is unfinished in `out` goes on with the commit
    that it was begun with."""
    from requant.convert.folder import REPOSITORY, Folder

    if source == "demo":
        from requant.demo import demo_path

        return Folder(demo_path())
    path = Path(source)
    try:
        local = path.exists()
    except OSError:  # a name too long
        local = True
    if local or REPOSITORY.fullmatch(source) is None:
        return Folder(path)
    from requant.convert.hub import open_repository
    from requant.convert.journal import begun_with

    try:
        return open_repository(source, None if out is None else begun_with(out))
    except CheckpointError as error:
        raise CheckpointError(f"{error} (and there is no folder {source} here)") from error


def compute_device(name: str | None) -> torch.device:
    """The device to compute on. Raises RequantError when it is not there."""
    import torch

    from requant.convert.processes import local_rank

    if name is None and torch.cuda.is_available():
        # One GPU a process, where a launcher counts them.
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
