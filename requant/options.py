"""The options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from requant.errors import RequantError

if TYPE_CHECKING:
    from requant.convert.plan import Plan

Source = Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint folder, or `demo`.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:N; default: cuda if there is one, else cpu."),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, max=256, help="Tiles computed at a time; default: the cores, at most 16."),
]
Ram = Annotated[
    str | None, typer.Option(help="Memory to use at most, e.g. 600MB; default: as it comes.")
]
To = Annotated[
    str | None, typer.Option("--to", help="A format's default recipe, e.g. int4[group_size=32].")
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="A preset's name, or a recipe file (.toml).")
]
RequireLossless = Annotated[
    bool, typer.Option("--require-lossless", help="Refuse where a value would change.")
]
MaxKl = Annotated[
    float | None,
    typer.Option(min=0.0, help="Largest mean KL in nats per token; default: by format."),
]

Ranks = Annotated[
    int | None, typer.Option(min=1, help="Cut for so many GPUs; --tp, --ep, --pp say how.")
]
Tp = Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks; default: all.")]
Ep = Annotated[
    int | None, typer.Option(min=1, help="Groups of routed experts; default: all ranks.")
]
Pp = Annotated[int | None, typer.Option("--pp", "--pipeline", min=1, help="Pipeline stages.")]
Placement = Annotated[
    Path | None,
    typer.Option("--expert-placement", help="Balance experts by the counts in this file (JSON)."),
]
Redundant = Annotated[
    int, typer.Option("--redundant-experts", min=0, help="Put the hottest K on two ranks.")
]
Replicate = Annotated[
    list[str] | None,
    typer.Option(metavar="ROLE", help="Keep a role, e.g. attention, whole on every rank."),
]
LayoutOption = Annotated[
    str, typer.Option("--layout", help="hf: a folder a rank; deepseek: for its own generate.py.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Remove an earlier result in OUT, start over.")
]


@dataclass(frozen=True)
class Cutting:
    """The options that say how to cut a checkpoint for several GPUs."""

    ranks: int | None
    tp: int | None
    ep: int | None
    pp: int | None
    placement: Path | None
    redundant: int
    replicate: list[str] | None
    layout: str

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
