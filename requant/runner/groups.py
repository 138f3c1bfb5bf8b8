"""Processes that compute a model together, and how they exchange tensors.

Over nccl where each process has a GPU of its own, else over gloo, by way of the CPU's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from requant.convert.processes import PATIENCE, Team, local_processes, noticing


class Group:
    """Some of the processes of a run, by their numbers; of one alone, each operation gives back
    what it is given. All of them call an operation with tensors of the same shape and dtype.

    Raises CheckpointError when another one is gone.
    """

    def __init__(self, members: Sequence[int] = (0,), place: int = 0) -> None:
        self.members = tuple(members)
        #: Where in `members` this process is.
        self.place = place
        self._where = torch.device("cpu")
        self._link: Any = None

    @classmethod
    def of(cls, team: Team, partition: Sequence[Sequence[int]], device: torch.device) -> Group:
        """The group of a partition of all processes that this one lies in; all call this alike."""
        own = next(members for members in partition if team.rank in members)
        group = cls(own, own.index(team.rank))
        if all(len(members) == 1 for members in partition):
            return group
        from torch import distributed

        backend = "gloo"
        if device.type == "cuda" and local_processes() <= torch.cuda.device_count():
            backend, group._where = "nccl", device
        for members in partition:
            with noticing():
                link = distributed.new_group(list(members), PATIENCE, backend)
            if members is own:
                group._link = link
        return group

    @property
    def size(self) -> int:
        """How many processes."""
        return len(self.members)

    @torch.inference_mode()
    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every process's tensor, the same bits in each."""
        if self.size == 1:
            return x
        from torch import distributed

        total = torch.empty(x.shape, dtype=x.dtype, device=self._where).copy_(x)
        with noticing():
            distributed.all_reduce(total, group=self._link)
        return total.to(x.device)

    @torch.inference_mode()
    def join(self, x: torch.Tensor) -> torch.Tensor:
        """Every process's [..., n], in order, as [..., size * n]."""
        if self.size == 1:
            return x
        from torch import distributed

        own = x.to(self._where).contiguous()
        pieces = [torch.empty_like(own) for _ in self.members]
        with noticing():
            distributed.all_gather(pieces, own, group=self._link)
        return torch.cat(pieces, dim=-1).to(x.device)

    @torch.inference_mode()
    def tell(self, work: Callable[[], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """What the first process works out, in every one; it is of `like`'s shape and dtype."""
        if self.size == 1:
            return work()
        from torch import distributed

        first = self.place == 0
        told = work() if first else torch.empty_like(like)
        buffer = told.to(self._where).contiguous()
        with noticing():
            distributed.broadcast(buffer, src=self.members[0], group=self._link)
        return told if first else buffer.to(like.device)

    @torch.inference_mode()
    def hand(self, x: torch.Tensor, steps: int) -> None:
        """Give a tensor to the member `steps` places on, which must `take` it."""
        from torch import distributed

        with noticing():
            to = self.members[self.place + steps]
            distributed.send(x.to(self._where).contiguous(), dst=to, group=self._link)

    @torch.inference_mode()
    def take(self, like: torch.Tensor, steps: int) -> torch.Tensor:
        """The tensor, of `like`'s shape and dtype, that the member `steps` places back hands on."""
        from torch import distributed

        buffer = torch.empty(like.shape, dtype=like.dtype, device=self._where)
        with noticing():
            distributed.recv(buffer, src=self.members[self.place - steps], group=self._link)
        return buffer.to(like.device)
