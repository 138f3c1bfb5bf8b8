"""Ranks that run a model together give what one process gives: here threads stand for processes.

Real processes are in tests/verify/test_verify_ranks.py; here are the models with biases, tied
embeddings and without query latents, and cuts where some roles stay whole.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from runner_references import Reference, distance

from requant.convert.parallel import Parallel
from requant.convert.plan import make_plan
from requant.convert.processes import Team
from requant.convert.rank_folders import open_rank, read_layout
from requant.convert.ranks import split
from requant.convert.recipe import KEEP
from requant.convert.run import Runtime, convert
from requant.convert.shard import as_written, shard
from requant.convert.source import Checkpoint
from requant.errors import RequantError
from requant.runner.groups import Group
from requant.runner.model import Model
from requant.runner.ranks import Rank

#: Of the largest logit; partial sums are added in another order.
SAME = 1e-5
#: 97 tokens and 50 inner columns do not divide by 3, the number of heads.
WHOLE_ROLES = ("embedding", "lm_head", "dense_mlp")


Post = queue.Queue[torch.Tensor]


class Meeting:
    """Where threads exchange what they have: every one puts, all wait, every one looks."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: dict[int, torch.Tensor] = {}

    def exchange(self, number: int, x: torch.Tensor) -> dict[int, torch.Tensor]:
        self.slots[number] = x
        self.barrier.wait()
        found = dict(self.slots)
        self.barrier.wait()
        return found


class Threads(Group):
    """A group of threads; each has a queue for what is handed to it."""

    def __init__(
        self, members: Sequence[int], number: int, meeting: Meeting, post: Sequence[Post] = ()
    ) -> None:
        super().__init__(members, members.index(number))
        self.meeting, self.post = meeting, post

    def _all(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = self.meeting.exchange(self.place, x)
        return [found[place] for place in range(self.size)]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._all(x)).sum(0)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._all(x), dim=-1)

    def hand(self, x: torch.Tensor, steps: int) -> None:
        self.post[self.place + steps].put(x)

    def take(self, like: torch.Tensor, steps: int) -> torch.Tensor:
        taken = self.post[self.place].get(timeout=60)
        assert (taken.shape, taken.dtype) == (like.shape, like.dtype)
        return taken


def cut(source: Path, out: Path, parallel: Parallel, **options: Any) -> Path:
    plan = make_plan(Checkpoint.open(source), KEEP)
    made = shard(plan, split(as_written(plan), parallel, **options))
    convert(made, out, Runtime(torch.device("cpu"), 1))
    return out


def in_ranks(path: Path, run: Callable[[Model], Any], **options: Any) -> list[Any]:
    """What every rank's model gives, in order."""
    layout = read_layout(path)
    assert layout is not None
    parallel = layout.parallel
    everyone = range(parallel.ranks)
    meetings: dict[tuple[int, ...], Meeting] = {}
    post = [Post() for _ in everyone]

    def group(width: int, number: int) -> Threads:
        members = everyone[number // width * width :][:width]
        return Threads(members, number, meetings[tuple(members)])

    for width in (parallel.tp, parallel.stage_size):
        for first in everyone[::width]:
            meetings[tuple(everyone[first : first + width])] = Meeting(width)

    def rank(number: int) -> Any:
        world = Threads(everyone, number, Meeting(1), post)
        groups = group(parallel.tp, number), group(parallel.stage_size, number), world
        own = Rank(number, parallel, layout.tables, *groups)
        return run(Model(open_rank(path, layout, number), rank=own, **options))

    with ThreadPoolExecutor(parallel.ranks) as pool:
        return list(pool.map(rank, everyone))


@pytest.mark.parametrize(
    ("case", "parallel"),
    [("v3", Parallel(3, 6)), ("v3", Parallel(3, 3, 2)), ("v3-biases-tied", Parallel(3, 1)),
     ("v3-biases-tied", Parallel(1, 1, 3)), ("v3-no-q-lora", Parallel(3, 3)),
     ("v2-grouped", Parallel(3, 1)), ("v2-grouped", Parallel(1, 3))],
    ids=str,
)  # fmt: skip
def test_ranks_give_the_logits_of_the_whole(
    case: str, parallel: Parallel, reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    whole = reference(case)
    roles = [r for r in WHOLE_ROLES if r != "lm_head" or case != "v3-biases-tied"]
    options = {"replicate": roles} if parallel.tp > 1 else {}
    path = cut(whole.path, tmp_path / "ranks", parallel, **options)
    expected = whole.model().forward(whole.ids)
    logits = in_ranks(path, lambda model: model.forward(whole.ids))
    size = parallel.stage_size
    for rank in {*range(size), *range(parallel.ranks - size, parallel.ranks)}:
        assert distance(logits[rank], expected) < SAME, rank


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_both_forms_of_attention_run_on_some_heads(
    form: Any, reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    whole = reference("v3")
    path = cut(whole.path, tmp_path / "ranks", Parallel(3, 3), replicate=WHOLE_ROLES)
    (logits, *_) = in_ranks(path, lambda model: model.forward(whole.ids), attention=form)
    assert distance(logits, whole.model().forward(whole.ids)) < SAME


def test_a_prediction_layer_gets_its_embedding_from_the_first_stage(
    reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    whole = reference("mtp")
    path = cut(whole.path, tmp_path / "ranks", Parallel(1, 1, 3))

    def predict(model: Model) -> torch.Tensor:
        (index,) = model.mtp_layers
        hidden = whole.model().final_norm(whole.model().hidden(whole.ids))
        y = model.layer(index, model.mtp_input(index, whole.next_ids, hidden))
        return model.mtp_logits(index, y)

    assert distance(in_ranks(path, predict)[0], predict(whole.model())) < SAME


def test_copies_of_an_expert_take_turns(
    reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    whole = reference("v3")
    options = {"loads": {None: list(range(12))}, "redundant": 6}
    path = cut(whole.path, tmp_path / "ranks", Parallel(1, 3), **options)
    name = "model.layers.1.mlp.experts.11.down_proj.weight"

    def run(model: Model) -> tuple[torch.Tensor, tuple[int, int] | None, int]:
        asked: list[int] = []
        partial = model.weights.partial

        def counting(module: str, x: torch.Tensor) -> torch.Tensor:
            if f"{module}.weight" == name:
                asked.append(len(x))
            return partial(module, x)

        model.weights.partial = counting  # type: ignore[method-assign]
        return model.forward(whole.ids), model.rank.turn(name), sum(asked)

    found = in_ranks(path, run)
    expected = whole.model().forward(whole.ids)
    assert all(distance(logits, expected) < SAME for logits, _, _ in found)
    turns = [turn for _, turn, _ in found if turn is not None]
    assert turns == [(0, 2), (1, 2)]
    assert all((tokens > 0) == (turn is not None) for _, turn, tokens in found)


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "ways": (lambda d: d.update(tp=2, ep=2), "tp=2 ep=2 pp=1 is for 2 ranks, it lists 3"),
    "a norm less": (
        lambda d: d["ranks"][0]["weights"].pop("model.norm.weight"), "model.norm.weight is not in"),
    "another span": (
        lambda d: d["ranks"][0]["weights"].update({
            "model.layers.0.self_attn.o_proj.weight": "cols 0:15"}),
        r"o_proj.weight: .* 15 .*\[36, 14\]"),
    "nonsense": (
        lambda d: d["ranks"][0]["weights"].update({"lm_head.weight": "some"}), "'some' is none of"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_a_rank_that_contradicts_ranks_json_is_refused(
    what: str, reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    path = cut(reference("v3").path, tmp_path / "ranks", Parallel(3, 3), replicate=WHOLE_ROLES)
    spoil, message = SPOILT[what]
    document = json.loads((path / "ranks.json").read_text())
    spoil(document)
    (path / "ranks.json").write_text(json.dumps(document))
    layout = read_layout(path)
    assert layout is not None
    with pytest.raises(RequantError, match=message):
        Rank.of(open_rank(path, layout, 0), layout, Team(), torch.device("cpu"))


def test_a_rank_that_lacks_what_its_stage_has_is_refused(
    reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    path = cut(reference("v3").path, tmp_path / "ranks", Parallel(1, 3))
    layout, second = read_layout(path), Team()
    assert layout is not None
    second.rank = 1
    held = open_rank(path, layout, 1)
    for table in (layout.tables[1], held.weights):
        assert isinstance(table, dict)
        del table["model.norm.weight"]
    with pytest.raises(RequantError, match=r"rank-001: has no model\.norm\.weight, which rank 0"):
        Rank.of(held, layout, second, torch.device("cpu"))


def test_alone_every_exchange_gives_back_what_it_is_given() -> None:
    group, x = Group(), torch.rand(2, 3)
    assert group.sum(x) is x and group.join(x) is x and group.tell(lambda: x, x) is x
    rank = Rank.alone(["a.weight"])
    assert rank.turn("a.weight") == (0, 1) and rank.moved(x, 0, 0) is x
    assert rank.turn("b.weight") is None
