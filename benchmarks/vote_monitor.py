"""What VoteMonitor costs: steps of a real Trainer's loop with counting on and off, in turns, in one run.

python -m benchmarks.vote_monitor
"""

import argparse
import tempfile
import time
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.machine import machine
from signsgd_lightning import Signum, enable_majority_vote
from signsgd_lightning.vote.observers import VoteStatistics

ROUNDS, STEPS = 7, 50  # of 50 steps, after which Lightning logs by default


def worker(rank: int, workers: int, batch: int, store: str, results: mp.SimpleQueue) -> None:  # type: ignore[type-arg]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
    torch.manual_seed(rank)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    )
    optimizer = Signum(model.parameters(), lr=1e-3)
    enable_majority_vote(model, optimizer)
    vote = optimizer.vote
    assert vote is not None
    seconds: dict[bool, list[float]] = {False: [], True: []}
    processor: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for counting in (False, True):
            stop = vote.observe(VoteStatistics()) if counting else lambda: None
            begin, busy = time.perf_counter(), time.process_time()
            for _ in range(STEPS):
                optimizer.zero_grad()
                model(torch.randn(batch, 64)).square().mean().backward()
                optimizer.step()
            if counting:  # what the callback gathers each time it logs
                vote.gather_counts(torch.zeros(9, dtype=torch.float64))
            stop()
            seconds[counting].append((time.perf_counter() - begin) / STEPS)
            processor[counting].append((time.process_time() - busy) / STEPS)
    if rank == 0:
        medians = [median(times[counting]) for times in (seconds, processor) for counting in (False, True)]
        results.put((*medians, sum(p.numel() for p in model.parameters())))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="examples per worker and step")
    options = parser.parse_args()
    results = mp.get_context("spawn").SimpleQueue()
    store = tempfile.mktemp()
    mp.spawn(  # type: ignore[attr-defined, no-untyped-call]
        worker, (options.workers, options.batch, store, results), nprocs=options.workers
    )
    off, on, busy_off, busy_on, parameters = results.get()
    print(f"{machine()}, torch {torch.__version__}")
    print(f"{options.workers} workers, {parameters:,} parameters, batch {options.batch}, medians of {ROUNDS} rounds")
    print(f"wall time of a step without monitor {off * 1e3:.2f} ms, with {on * 1e3:.2f} ms, ratio {on / off:.3f}")
    print(
        f"processor time without {busy_off * 1e3:.2f} ms, with {busy_on * 1e3:.2f} ms, ratio {busy_on / busy_off:.3f}"
    )


if __name__ == "__main__":
    main()
