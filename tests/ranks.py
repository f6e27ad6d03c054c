"""Several real gloo processes for one test, forked from the process that runs it: importing costs them nothing."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import megatron.core.parallel_state  # noqa: F401 (seconds, which every rank would spend on its own)
import torch
import torch.distributed as dist

#: Seconds for all ranks together.
TIMEOUT = 600.0


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
    """`function(*args)` on every rank of a gloo world; what each returns, in the order of the ranks.

    A rank that fails fails the test with its traceback, and ends the others, which would wait for it.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
        ranks = [
            context.Process(target=_rank, args=(rank, num_ranks, f"{folder}/store", send, function, args))
            for rank, (_, send) in enumerate(pipes)
        ]
        for process, (_, send) in zip(ranks, pipes, strict=True):
            process.start()
            send.close()
        try:
            return _collect([receive for receive, _ in pipes])
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(pipes: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], TIMEOUT)
        assert ready, f"ranks {sorted(set(range(len(pipes))) - results.keys())} have not finished in {TIMEOUT:.0f} s"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            result, error = pickle.loads(pipe.recv_bytes())
            assert error is None, f"rank {rank}:\n{error}"
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    rank: int, num_ranks: int, store: str, send: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
        result = function(*args)
        dist.barrier()
        send.send_bytes(pickle.dumps((result, None)))  # `send` would share tensors' memory with a rank that ends
        dist.destroy_process_group()
    except BaseException:
        send.send_bytes(pickle.dumps((None, traceback.format_exc())))
        os._exit(1)
