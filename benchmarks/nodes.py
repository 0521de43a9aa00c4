"""A vote between nodes beside one between ranks and beside DDP: step time, and bytes between the nodes.

python -m benchmarks.nodes

Nodes are network namespaces on one switch, each with ranks that talk through its loopback; a token bucket limits each
node's cable in both directions. All ranks share the machine's cores. All ways run in the same processes, in turn. Bytes
are what a node's interface counted, headers included; those of its loopback are not among them. It takes root and
iproute2.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.machine import machine
from benchmarks.network import Network, available
from benchmarks.wire_worker import LIMIT, NONE, TakeStep, averaging, measure, square_layers, voting
from signsgd_core.network.traffic import majority_vote

ROOT = Path(__file__).parents[1]
WARMUP = 2
BETWEEN_NODES = "vote between nodes"


def schemes(parameters: int) -> dict[str, TakeStep]:
    """Every way to exchange gradients, each with a model of its own."""
    return {
        NONE: averaging(square_layers(parameters), exchange=False),
        "DDP fp32": averaging(square_layers(parameters)),
        "vote between ranks": voting(square_layers(parameters)),
        BETWEEN_NODES: voting(square_layers(parameters), vote_between="nodes"),
    }


def work(options: argparse.Namespace) -> None:
    """Be one rank; rank 0 writes the table: medians of the slowest rank's seconds and of a node's bytes."""
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", "env://", LIMIT)
    of = schemes(options.parameters)
    x = torch.randn(options.batch_size, 1000, generator=torch.Generator().manual_seed(rank))
    seconds: dict[str, list[float]] = {name: [] for name in of}
    sent: dict[str, list[float]] = {name: [] for name in of}
    for take_step in of.values():
        for _ in range(WARMUP):
            take_step(x)
    idle = median(measure(lambda _: None, x)[1] for _ in range(9))  # the barriers' own
    for _ in range(options.rounds):
        for name, take_step in of.items():
            took, count = measure(take_step, x)
            slowest, total = torch.tensor(took, dtype=torch.float64), torch.tensor(count - idle, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            dist.all_reduce(total)
            seconds[name].append(float(slowest))
            sent[name].append(float(total) / ranks)  # all ranks of a node read the same counter
    if rank == 0:
        lines = [f"{'':<22}{'ms':>9}{'/alone':>9}{'MB sent by a node':>20}"]
        for name in of:
            took = median(seconds[name])
            alone = took / median(seconds[NONE])
            lines.append(f"{name:<22}{1e3 * took:>9.0f}{alone:>9.2f}{median(sent[name]) / 1e6:>20.3f}")
        count = sum(p.numel() for p in square_layers(options.parameters).parameters())
        formula = majority_vote(count, ranks // options.ranks)
        share = median(sent[BETWEEN_NODES]) / formula
        lines.append(f"between nodes {share:.4f} of the formula's {formula:,} bytes of one worker a node")
        Path(options.found).write_text("\n".join(lines))
    dist.barrier()
    dist.destroy_process_group()


def launch(options: argparse.Namespace, mbits: float) -> str:
    """Run all ranks of all nodes over cables of so many Mbit/s, and return the table."""
    size = options.nodes * options.ranks
    with Network(options.nodes, mbits * 1e6) as network, tempfile.TemporaryDirectory() as folder:
        found, running = Path(folder) / "found.txt", list[subprocess.Popen[bytes]]()
        command = [sys.executable, "-m", "benchmarks.nodes", *sys.argv[1:], "--found", str(found)]
        try:
            for rank in range(size):
                node, place = divmod(rank, options.ranks)
                environment = {
                    "GLOO_SOCKET_IFNAME": network.interface,
                    "MASTER_ADDR": network.address(0),
                    "MASTER_PORT": "29500",
                    "RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "LOCAL_RANK": str(place),
                    "LOCAL_WORLD_SIZE": str(options.ranks),
                }
                line = network.command(node, *command)
                running.append(subprocess.Popen(line, cwd=ROOT, env=os.environ | environment))
            while any(one.poll() is None for one in running) and not any(one.poll() for one in running):
                time.sleep(0.1)
        finally:
            for one in running:
                one.kill()
                one.wait()
        if not found.exists():
            raise RuntimeError(f"a rank failed, exit codes {[one.returncode for one in running]}; see above")
        return found.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mbits", nargs="+", type=float, default=[100, 1_000], help="Mbit/s of a node's cable")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="of a node")
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--found", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.found:
        work(options)
        return
    if not available():
        sys.exit("benchmarks/nodes.py makes network namespaces: run it as root, with iproute2 installed")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces go, too
    print(f"{machine()}, {options.nodes} nodes of {options.ranks} ranks")
    print(f"{' '.join(['python', '-m', 'benchmarks.nodes', *sys.argv[1:]])}: median of {options.rounds} rounds of the")
    print("slowest rank's step, one thread a rank")
    for mbits in options.mbits:
        print(f"\n{mbits:,.0f} Mbit/s between nodes, {options.parameters:,} parameters")
        print(launch(options, mbits), flush=True)


if __name__ == "__main__":
    main()
