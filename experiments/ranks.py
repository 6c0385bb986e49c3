"""Several processes of one run, as `torchrun` starts them: the rank of this one, and the tasks of the first."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

LOST = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
)  # in gloo's errors when another rank has ended


class Ranks:
    """One process among those of its run; the only one, unless `torchrun` started it.

    Only the first rank prints and keeps the run's folder. The others do the same work in temporary folders, so that
    the rest of the code needs no case for them.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.first = self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ``process_group`` of a rule."""
        return dist.group.WORLD if self.count > 1 else None

    @contextlib.contextmanager
    def joined(self, device: str, options: Mapping[str, Any]) -> Iterator[torch.device]:
        """Join the others, by NCCL with a GPU each, or on CPUs by gloo; yields the device of this process.

        Raises:
            ValueError: the ranks' options differ, or there are too few GPUs.
            RuntimeError: another rank has ended.
        """
        if self.count == 1:
            yield torch.device(device)
            return
        local = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
        if local.type == "cuda":
            if (have := torch.cuda.device_count()) <= (local.index or 0):
                raise ValueError(
                    f"device={device}: {os.environ.get('LOCAL_WORLD_SIZE')} ranks on this machine need a GPU each, and "
                    f"it has {have}; start as many ranks, or use device=cpu"
                )
            torch.cuda.set_device(local)
        store, rank, count = next(rendezvous("env://"))
        self._compare(store, options)
        dist.init_process_group("nccl" if local.type == "cuda" else "gloo", store=store, rank=rank, world_size=count)
        quiet = contextlib.nullcontext() if self.first else contextlib.redirect_stdout(io.StringIO())
        try:
            with quiet:
                yield local
        except RuntimeError as error:
            if any(words in str(error) for words in LOST) or isinstance(error, dist.DistError):
                raise RuntimeError(
                    "another rank has ended: its error is above, or it was killed (is there enough memory?)"
                ) from error
            raise
        finally:
            dist.destroy_process_group()

    def _compare(self, store: Store, options: Mapping[str, Any]) -> None:
        """Refuse, on every rank, options that differ from the first rank's, before they determine a backend."""
        store.set(f"options/{self.rank}", json.dumps(options))
        given = [json.loads(store.get(f"options/{rank}")) for rank in range(self.count)]
        # The first rank may host the store, so it waits until all have read it.
        store.set(f"read/{self.rank}", "")
        if self.first:
            store.wait([f"read/{rank}" for rank in range(self.count)])
        for rank, others in enumerate(given):
            for key in sorted(given[0].keys() | others.keys(), key=lambda key: (key.count("."), key)):
                if others.get(key) != given[0].get(key):
                    raise ValueError(
                        f"rank {rank} has {key}={others.get(key)}, and the first {key}={given[0].get(key)}: start all "
                        "ranks with the same options"
                    )

    def from_first(self, value: Any) -> Any:
        """The value that the first rank has."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first rank executes this block before the others do."""
        if not self.first:
            self.from_first(None)
        yield
        if self.first:
            self.from_first(None)

    @contextlib.contextmanager
    def folder(self, folder: Path | None) -> Iterator[Path]:
        """The folder to write to: the run's, or a temporary one on other ranks than the first."""
        if self.first and folder is not None:
            yield folder
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """The share of a batch that this rank processes."""
        return batch[self.rank :: self.count]
