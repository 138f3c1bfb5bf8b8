"""Processes of a run on ranks, forked from a server that has imported torch."""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from requant.convert.processes import Team, team
from requant.convert.rank_folders import open_rank, read_layout
from requant.convert.source import Checkpoint
from requant.errors import RequantError
from requant.runner.model import Model
from requant.runner.ranks import Rank
from requant.runner.tokenizer import load_tokenizer
from requant.verify.comparison import verify
from requant.verify.text import token_sequences
from tests.convert.team import SERVER

TOKENS = 128
PATIENCE_SECONDS = 120
CPU = torch.device("cpu")


def ids_of(source: Path) -> torch.Tensor:
    from requant.demo import heldout_text

    return token_sequences(load_tokenizer(source), heldout_text(), TOKENS, 64)


def verdicts(count: int, jobs: Sequence[tuple[Path, Path]], place: Path) -> list[dict[str, Any]]:
    """The verdict on each (source, ranks) of `count` processes, with the largest difference of
    their logits from the unsharded model's as `logits`; an error as `error`."""
    place.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [
        SERVER.Process(target=_run, args=(count, rank, port, list(jobs), place))
        for rank in range(count)
    ]
    for child in children:
        child.start()
    try:
        for child in children:
            child.join(PATIENCE_SECONDS)
            said = (place / f"{children.index(child)}").read_text()
            assert child.exitcode == 0, said
    finally:
        for child in children:
            child.kill()
    return [json.loads((place / f"{number}.json").read_text()) for number in range(len(jobs))]


def _run(count: int, rank: int, port: int, jobs: list[tuple[Path, Path]], place: Path) -> None:
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    os.environ.update({key: str(value) for key, value in told.items()})
    torch.set_num_threads(1)
    with (place / f"{rank}").open("w") as said:
        try:
            with team() as processes:
                for number, (source, ranks) in enumerate(jobs):
                    verdict = _verdict(source, ranks, processes)
                    if processes.leads:
                        (place / f"{number}.json").write_text(json.dumps(verdict))
        except BaseException:
            traceback.print_exc(file=said)
            raise


def _verdict(source: Path, ranks: Path, processes: Team) -> dict[str, Any]:
    try:
        verdict = verify(source, ranks, tokens=TOKENS, team=processes)
    except RequantError as error:
        return {"error": str(error)}
    if verdict["ok"]:
        layout = read_layout(ranks)
        assert layout is not None
        held = open_rank(ranks, layout, processes.rank)
        model = Model(held, rank=Rank.of(held, layout, processes, CPU))
        ids = ids_of(source)
        logits = model.forward(ids)
        expected = Model(Checkpoint.open(source)).forward(ids)
        verdict["logits"] = processes.gather(float((logits - expected).abs().max()))[0]
    return verdict
