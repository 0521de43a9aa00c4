"""What it costs that workers may come and go: a step, a lost worker, a new one; beside torchft's own fp32 all-reduce.

python -m benchmarks.elastic_vote --out benchmarks/results

Four processes over the loopback, gradients that are there before the clock starts. Steps of the fixed vote, the elastic
vote and the peer take turns in the same processes; a row is the median over the rounds of the slowest worker. The peer
is torchft's `Manager` as its `DistributedDataParallel` uses it: a quorum that is asked for in the background,
`allreduce` of buckets of 25 MB, `should_commit`, then SGD with momentum. All have two floats a parameter that a
newcomer copies. Rounds of local steps are those of one step each, so that all of them is the exchange. Then one worker
is killed in the middle of training and started anew; its imports are not counted.
The lighthouse gives a worker up after a second without a sign of life, which is most of what a kill costs.
"""

import argparse
import multiprocessing
import os
import queue
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from benchmarks.machine import machine

os.environ.setdefault("RUST_LOG", "warn")

WORKERS, TENSORS, BUCKET = 4, 10, 25 * 2**20 // 4
TIMEOUT = timedelta(seconds=20)
SIGNUM: dict[str, Any] = {"lr": 1e-3, "betas": (0.0, 0.0), "verdict_momentum": 0.8}
FIXED, ELASTIC, PEER = "fixed vote", "elastic vote", "torchft, fp32"
ROUND, ELASTIC_ROUND = "fixed round", "elastic round"


def make_model(size: int) -> nn.ParameterList:
    """Return parameters that have gradients."""
    model = nn.ParameterList([torch.zeros(size // TENSORS) for _ in range(TENSORS)])
    for p in model:
        p.grad = torch.randn_like(p)
    return model


class Peer:
    """torchft's all-reduce of fp32 gradients."""

    def __init__(self, size: int, lighthouse: str, min_workers: int = 2) -> None:
        from torchft import Manager, ProcessGroupGloo

        self.model = make_model(size)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9)
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.manager = Manager(
            pg=ProcessGroupGloo(TIMEOUT),
            load_state_dict=self._load,
            state_dict=lambda: {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()},
            min_replica_size=min_workers,
            timeout=TIMEOUT,
            rank=0,
            world_size=1,
            store_addr="127.0.0.1",
            store_port=self.store.port,
            lighthouse_addr=lighthouse,
            hostname="127.0.0.1",
            replica_id=f"peer-{os.getpid()}",
        )

    def _load(self, state: Any) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def step(self) -> None:
        """Take a step, as often as it fails."""
        done = False
        while not done:
            self.manager.start_quorum()
            gradients = [p.grad for p in self.model if p.grad is not None]
            for bucket in _buckets(gradients):
                flat = torch.cat([g.view(-1) for g in bucket])
                self.manager.allreduce(flat).wait()
                for g, mean in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                    g.copy_(mean.view_as(g))
            done = self.manager.should_commit()
        self.optimizer.step()


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Return them in buckets of at most `BUCKET` floats."""
    each = max(BUCKET // gradients[0].numel(), 1)
    return [gradients[k : k + each] for k in range(0, len(gradients), each)]


def elastic_step(size: int, lighthouse: str, min_workers: int = 2) -> Callable[[], Any]:
    """Return what takes a step of the elastic vote."""
    from signsgd_lightning import Signum, enable_elastic_vote

    model = make_model(size)
    optimizer = Signum(model.parameters(), **SIGNUM)
    settings: dict[str, Any] = {"min_workers": min_workers, "timeout": TIMEOUT, "hostname": "127.0.0.1"}
    enable_elastic_vote(model, optimizer, lighthouse=lighthouse, **settings)
    return lambda: optimizer.step(lambda: None)  # a closure, so that a newcomer votes with its gradients


def elastic_round(size: int, lighthouse: str) -> Callable[[], Any]:
    """Return what takes a round of one local step with an elastic quorum."""
    from signsgd_lightning import enable_elastic_local_steps

    model = make_model(size)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    settings: dict[str, Any] = {"min_workers": WORKERS, "timeout": TIMEOUT, "hostname": "127.0.0.1"}
    local = enable_elastic_local_steps(model, optimizer, sync_every=1, lighthouse=lighthouse, **settings)
    return lambda: (local, optimizer.step(lambda: None))


def fixed_round(size: int) -> Callable[[], Any]:
    """Return what takes a round of one local step, after `fixed_step`."""
    from signsgd_lightning import enable_local_steps

    model = make_model(size)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    local = enable_local_steps(model, optimizer, sync_every=1)
    return lambda: (local, optimizer.step())


def fixed_step(size: int, rank: int, port: int) -> Callable[[], Any]:
    """Return what takes a step of the fixed vote."""
    from signsgd_lightning import Signum, enable_majority_vote

    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORKERS, timeout=timedelta(seconds=120)
    )
    model = make_model(size)
    optimizer = Signum(model.parameters(), **SIGNUM)
    enable_majority_vote(model, optimizer)

    def take() -> None:
        optimizer.step()
        assert model is not None  # a vote ends with its model

    return take


def in_turn(rank: int, size: int, rounds: int, port: int, lighthouses: list[str], results: Any) -> None:
    """Take steps of all schemes in turn; report the milliseconds of each."""
    quiet()
    takers: dict[str, Callable[[], Any]] = {
        FIXED: fixed_step(size, rank, port),
        ELASTIC: elastic_step(size, lighthouses[0], WORKERS),
        PEER: Peer(size, lighthouses[1], WORKERS).step,
        ROUND: fixed_round(size),
        ELASTIC_ROUND: elastic_round(size, lighthouses[2]),
    }
    times: dict[str, list[float]] = {name: [] for name in takers}
    for name, take in takers.items():
        for _ in range(5):
            take()
        del times[name][:]
    for _ in range(rounds):
        for name, take in takers.items():
            dist.barrier()
            begin = time.perf_counter()
            take()
            times[name].append(1000 * (time.perf_counter() - begin))
    results.put((rank, times))
    time.sleep(3)  # the others are not through yet


def go_on(scheme: str, size: int, lighthouse: str, results: Any) -> None:
    """Train until it is killed; report when each step was taken."""
    quiet()
    begin = time.time()
    take = elastic_step(size, lighthouse) if scheme == ELASTIC else Peer(size, lighthouse).step
    while True:
        take()
        results.put((os.getpid(), begin, time.time()))


def quiet() -> None:
    """Take one thread, the loopback, and no standard error."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # torchft's server names every copy


class Lighthouse:
    """A process with torchft's lighthouse."""

    def __init__(self, context: Any) -> None:
        end, other = context.Pipe()
        self._process = context.Process(target=_shine, args=(other,), daemon=True)
        self._process.start()
        if not end.poll(60):
            raise TimeoutError("the lighthouse does not start")
        self.address = f"http://127.0.0.1:{end.recv()}"

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()


def _shine(end: Any) -> None:
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(
        "127.0.0.1:0", 1, quorum_tick_ms=20, heartbeat_timeout_ms=1000, join_timeout_ms=10_000
    )
    end.send(int(lighthouse.address().rpartition(":")[2]))
    signal.pause()


def measure_steps(context: Any, size: int, rounds: int) -> dict[str, float]:
    """Return the median milliseconds a step of every scheme."""
    lighthouses = [Lighthouse(context) for _ in range(3)]
    results, store = context.Queue(), TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    arguments = (size, rounds, port, [one.address for one in lighthouses], results)
    workers = [context.Process(target=in_turn, args=(k, *arguments), daemon=True) for k in range(WORKERS)]
    try:
        for worker in workers:
            worker.start()
        times = dict(results.get(timeout=280) for _ in workers)
    finally:
        end_all(workers, lighthouses)
    return {name: median(map(max, zip(*(t[name] for t in times.values()), strict=True))) for name in times[0]}


def measure_changes(context: Any, scheme: str, size: int, kills: int) -> tuple[list[float], list[float]]:
    """Return the seconds from each kill to the others' next step, and from each start to the newcomer's first."""
    lighthouse, results = Lighthouse(context), context.Queue()
    workers: list[Any] = []

    def start() -> None:
        workers.append(context.Process(target=go_on, args=(scheme, size, lighthouse.address, results), daemon=True))
        workers[-1].start()

    def next_steps(wanted: set[int], after: float, seconds: float = 90) -> dict[int, tuple[float, float]]:
        """Wait until all of some processes have taken a step that ended after a time."""
        found: dict[int, tuple[float, float]] = {}
        deadline = time.monotonic() + seconds
        while set(found) != wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{scheme}: {wanted - set(found)} took no step within {seconds} s")
            try:
                pid, begin, end = results.get(timeout=1)
            except queue.Empty:
                continue
            if pid in wanted and pid not in found and end > after:
                found[pid] = begin, end
        return found

    lost, new = [], []
    try:
        for _ in range(WORKERS):
            start()
        next_steps({worker.pid for worker in workers}, 0)
        for k in range(kills):
            time.sleep(0.5 + 0.13 * k)
            victim = workers.pop(0)
            victim.kill()
            killed = time.time()
            victim.join()
            steps = next_steps({worker.pid for worker in workers}, killed + 0.2)  # not of the step that ended with it
            lost.append(max(end for _, end in steps.values()) - killed)
            start()
            ((begin, end),) = next_steps({workers[-1].pid}, 0).values()
            new.append(end - begin)
    finally:
        end_all(workers, [lighthouse])
    return lost, new


def end_all(workers: list[Any], lighthouses: list[Lighthouse]) -> None:
    """Kill workers, and end lighthouses."""
    for worker in workers:
        worker.kill()
        worker.join()
    for lighthouse in lighthouses:
        lighthouse.stop()


def table(size: int, steps: dict[str, float], changes: dict[str, tuple[list[float], list[float]]]) -> list[str]:
    """Return the lines of one size; without steps those of changes."""
    (lost, new), (peer_lost, peer_new) = changes[ELASTIC], changes[PEER]
    lines = ["", f"{f'{size:,} parameters, medians':<36}{FIXED:>14}{ELASTIC:>14}{PEER:>15}"]
    if steps:
        more, more_a_round = steps[ELASTIC] - steps[FIXED], steps[ELASTIC_ROUND] - steps[ROUND]
        lines += [
            f"{'a step, ms':<36}{steps[FIXED]:>14.1f}{steps[ELASTIC]:>14.1f}{steps[PEER]:>15.1f}",
            f"{'  more than the fixed vote, ms':<36}{'':>14}{more:>14.1f}",
            f"{'a round of local steps, ms':<36}{steps[ROUND]:>14.1f}{steps[ELASTIC_ROUND]:>14.1f}",
            f"{'  more, ms a step of 16':<36}{'':>14}{more_a_round / 16:>14.2f}",
        ]
    return [
        *lines,
        f"{'a kill to the next step, s':<36}{'':>14}{median(lost):>14.2f}{median(peer_lost):>15.2f}",
        f"{f'  least and most of {len(lost)}':<36}{'':>14}{span(lost):>14}{span(peer_lost):>15}",
        f"{'a start to the first step, s':<36}{'':>14}{median(new):>14.2f}{median(peer_new):>15.2f}",
    ]


def span(seconds: list[float]) -> str:
    """Return the least and the most."""
    return f"{min(seconds):.2f} {max(seconds):.2f}"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 10_000_000], help="parameters")
    parser.add_argument(
        "--changes", type=int, nargs="*", default=[100_000_000], help="parameters, for lost and new workers alone"
    )
    parser.add_argument("--rounds", type=int, default=15, help="of steps")
    parser.add_argument("--kills", type=int, default=9, help="of a worker, for each scheme")
    parser.add_argument("--out", type=Path, help="folder for the table (default: save nothing)")
    options = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "signsgd_lightning.elastic"])
    command = f"python -m benchmarks.elastic_vote {' '.join(sys.argv[1:])}".strip()
    lines = [f"{machine()}, torch {torch.__version__}, {WORKERS} workers; {command}"]
    print(*lines)
    for size in [*options.sizes, *options.changes]:
        steps = measure_steps(context, size, options.rounds) if size in options.sizes else {}
        changes = {name: measure_changes(context, name, size, options.kills) for name in (ELASTIC, PEER)}
        found = table(size, steps, changes)
        lines += found
        print("\n".join(found), flush=True)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "elastic_vote.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
