# ruff: noqa: N806 - tensor names carry their shape
"""Engines without a model: real scheduler halves and worker halves, KV memory of real tensors, real sockets between.

Axes: B blocks, H KV heads, N tokens of a block, D head dimension.
"""

import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from kv_transfer.connector.settings import ConnectorSettings
from tests.kv_transfer.rank_peers import until
from tests.kv_transfer.with_vllm import (
    BLOCK_SIZE,
    Engine,
    Load,
    Request,
    cache_config,
    connector_metrics,
    connector_worker,
    new_request,
    settings,
    vllm_config_standin,
)

B, D = 32, 8
NUM_HEADS, NUM_LAYERS = 4, 3  # of the model


class Worker:
    """One rank, with its KV caches full of noise."""

    def __init__(
        self, worker_settings: ConnectorSettings, rank: int, seed: int, windows: Sequence[int | None], num_heads: int
    ) -> None:
        heads_here = num_heads // worker_settings.tp_size
        config = cache_config(B, windows, num_heads=heads_here, head_size=D, layers_per_group=NUM_LAYERS)
        self.names = [name for group in config.kv_cache_groups for name in group.layer_names]
        generator = torch.manual_seed(seed)
        self.caches_BHNC = {
            name: torch.rand(B, heads_here, BLOCK_SIZE, 2 * D, generator=generator) for name in self.names
        }
        standin = vllm_config_standin(rank=rank, tp_size=worker_settings.tp_size, num_heads=num_heads)
        self.side: Any = connector_worker.WorkerSide(worker_settings, standin, config)
        self.side.register_kv_caches(self.caches_BHNC)

    def keys_and_values(self, name: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [H, D, N] and [H, N, D], as vLLM's CPU kernel "vec" has them."""
        slabs = self.caches_BHNC[name][block].flatten(1)
        middle = slabs.shape[1] // 2
        return slabs[:, :middle].unflatten(1, (D, BLOCK_SIZE)), slabs[:, middle:].unflatten(1, (BLOCK_SIZE, D))

    def write(self, name: str, table: Sequence[int], tokens: Iterable[int]) -> None:
        """A layer's keys and values of some tokens: noise."""
        for token in tokens:
            keys_HDN, values_HND = self.keys_and_values(name, table[token // BLOCK_SIZE])
            keys_HDN[..., token % BLOCK_SIZE] = torch.rand(keys_HDN.shape[:2])
            values_HND[:, token % BLOCK_SIZE] = torch.rand(keys_HDN.shape[:2])


class WholeEngine:
    """A scheduler half and a worker half for each rank."""

    def __init__(
        self,
        role: str,
        *,
        seed: int = 1,
        windows: Sequence[int | None] = (None,),
        num_heads: int = NUM_HEADS,
        **changes: Any,
    ) -> None:
        own = settings(role, **changes)
        self.windows = windows
        self.workers = [Worker(own, rank, seed + rank, windows, num_heads) for rank in range(own.num_ranks)]
        handshakes = [worker.side.handshake() for worker in self.workers]
        self.engine = Engine(role, config=cache_config(B, windows), handshakes=handshakes, **changes)
        self.ended: set[str] = set()
        self.failed: set[str] = set()

    def keys_and_values(self, group: int, table: Sequence[int], token: int) -> torch.Tensor:
        """Of all layers of the group and all heads of the model: what D must have of P."""
        block, place = table[token // BLOCK_SIZE], token % BLOCK_SIZE
        parts = []
        for name in self.workers[0].names[group * NUM_LAYERS : (group + 1) * NUM_LAYERS]:
            for worker in self.workers:
                keys_HDN, values_HND = worker.keys_and_values(name, block)
                parts += [torch.stack([keys_HDN[..., place], values_HND[:, place]], dim=1)]
        return torch.cat(parts)

    # --- P

    def compute(self, request: Request, num_tokens: int) -> Iterator[str]:
        """A step of the forward pass; yields after each layer that is done."""
        first_token = request.num_computed_tokens
        metadata = self.engine.compute(request, num_tokens)
        tables = self.engine.block_ids(request)
        for worker in self.workers:
            worker.side.begin_step(metadata)
        for index, name in enumerate(self.workers[0].names):
            for worker in self.workers:
                worker.write(name, tables[index // NUM_LAYERS], range(first_token, request.num_computed_tokens))
                worker.side.layer_done(name)
            yield name
        for worker in self.workers:
            worker.side.step_done()

    # --- D

    def admit(self, prompt: list[int], params: dict[str, Any] | None) -> tuple[Request, Load]:
        """A request arrives and gets blocks; its load is not begun."""
        request = new_request(prompt, params)
        self.engine.side.on_new_request(request)
        (load,) = self.engine.admit(request)
        return request, load

    def start(self, *loads: Load) -> None:
        for worker in self.workers:
            worker.side.begin_step(connector_worker.StepMetadata(loads, (), (), ()))
            worker.side.start_loads(loads)

    def step(self) -> None:
        """An empty step: tells the workers what the scheduler has for them."""
        metadata = self.engine.step()
        for worker in self.workers:
            worker.side.begin_step(metadata)
            worker.side.start_loads(metadata.loads)

    def wait_for(self, *loads: Load) -> None:
        """Step until these have ended, as vLLM does: on every worker."""
        waiting = [{load.request_id for load in loads} for _ in self.workers]

        def all_ended() -> bool:
            for worker, left in zip(self.workers, waiting, strict=True):
                ended, failed = worker.side.take_ended()
                assert failed <= ended <= left, "an end was reported twice, or was not waited for"
                left -= ended
                self.failed |= failed
            return not any(waiting)

        until(all_ended, f"loads did not end: {waiting}")
        self.ended |= {load.request_id for load in loads}
        self.engine.side.loads_ended([load.request_id for load in loads])

    def run(self, *loads: Load) -> None:
        self.start(*loads)
        self.wait_for(*loads)

    def failures(self) -> dict[str, int]:
        """Of the workers, since the last call."""
        total = connector_metrics.TransferStats()
        for worker in self.workers:
            if (stats := worker.side.take_stats()) is not None:
                total.aggregate(stats)
        failures: dict[str, int] = total.data["failures"]
        return failures

    def close(self) -> None:
        for worker in self.workers:
            worker.side.close()
        self.engine.close()


def check_arrived(
    prefill: WholeEngine, decode: WholeEngine, load: Load, remote_tables: Sequence[Sequence[int]]
) -> None:
    """Every token that D asked for is byte-equal; D has the null block where it needs none."""
    num_checked = 0
    for group, (remote, local) in enumerate(zip(remote_tables, load.local_block_ids, strict=True)):
        for token in range(load.first_token, load.end_token):
            if local[token // BLOCK_SIZE]:
                ours = decode.keys_and_values(group, local, token)
                assert torch.equal(ours, prefill.keys_and_values(group, remote, token)), f"token {token}"
                num_checked += 1
    assert num_checked


def stand_in_config() -> Any:
    return types.SimpleNamespace(num_blocks=B, kv_cache_groups=[])
