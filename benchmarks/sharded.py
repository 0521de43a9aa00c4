"""Copies of a sharded model: what a rank sends in a step where they vote, beside HSDP, which averages in fp32.

torchrun --standalone --nproc-per-node 4 -m benchmarks.sharded

Every way shards a perceptron among the ranks of a copy and trains it on the same batches, one way after the other. On
the CPU bytes are what the kernel counted at the rank's TCP sockets; what "no exchange" sends stays inside of a copy.
NCCL's bytes pass the kernel by, so on GPUs there are none. Then the Trainer's and Fabric's strategies train and verify
after each step that copies, or ranks, hold the same bits.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.machine import machine
from signsgd_core.network.traffic import majority_vote, sent_since, socket_bytes
from signsgd_lightning import (
    FabricMajorityVoteStrategy,
    ShardedMajorityVoteStrategy,
    Signum,
    enable_majority_vote,
)

Take = Callable[[int], None]
WARMUP = 2
LR = 1e-3


def perceptron(width: int, layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width), nn.Tanh())))


def shard(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def batch(width: int, t: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * t + dist.get_rank())
    return torch.randn(16, width, generator=generator).to(device)


def training(model: nn.Sequential, optimizer: torch.optim.Optimizer, width: int, device: torch.device) -> Take:
    """Return what takes a step: the model learns to repeat what it is given."""

    def take(t: int) -> None:
        optimizer.zero_grad()
        x = batch(width, t, device)
        (model(x) - x).square().mean().backward()
        optimizer.step()

    return take


def ways(options: argparse.Namespace, mesh: DeviceMesh, device: torch.device) -> dict[str, Take]:
    """Return every way to train copies, each with a model of its own."""

    def made(name: str, inside: DeviceMesh) -> Take:
        model = shard(perceptron(options.width, options.layers).to(device), inside)
        optimizer: Any = (
            torch.optim.AdamW(model.parameters(), lr=LR) if "HSDP" in name else Signum(model.parameters(), lr=LR)
        )
        if name == "vote":
            enable_majority_vote(model, optimizer, mesh=mesh["replicate"], verify_every_n_steps=WARMUP)
        return training(model, optimizer, options.width, device)

    inside = {"no exchange": mesh["shard"], "HSDP, AdamW": mesh, "vote": mesh["shard"]}
    return {name: made(name, one) for name, one in inside.items()}


def measure(take: Take, rounds: int, device: torch.device) -> tuple[float, int]:
    """Return a step's median seconds and bytes on this rank."""
    seconds, sent = list[float](), list[int]()
    for t in range(WARMUP + rounds):
        dist.barrier()
        before, begin = socket_bytes(), time.perf_counter()
        take(t)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if t >= WARMUP:
            seconds.append(time.perf_counter() - begin)
            sent.append(sent_since(before))
    return median(seconds), int(median(sent))


def table(options: argparse.Namespace, mesh: DeviceMesh, device: torch.device) -> list[str]:
    found = {name: measure(take, options.rounds, device) for name, take in ways(options, mesh, device).items()}
    count = sum(p.numel() for p in perceptron(options.width, options.layers).parameters())
    inside = found["no exchange"][1]
    lines = [f"{count:,} parameters; rank 0", f"{'':<14}{'ms':>8}{'bytes a step':>16}{'between copies':>16}"]
    for name, (seconds, sent) in found.items():
        figures = f"{sent:>16,}{sent - inside:>16,}" if device.type == "cpu" else f"{'-':>16}{'-':>16}"
        lines.append(f"{name:<14}{1e3 * seconds:>8.1f}{figures}")
    formula = majority_vote(count // mesh["shard"].size(), mesh["replicate"].size())
    return [*lines, f"the vote's formula for a rank's shards: {formula:,} bytes between copies"]


class Repeats(LightningModule):
    """The perceptron for Lightning, sharded inside of a copy."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.width, self.net, self.losses = width, perceptron(width, layers), list[float]()

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        shard(self.net, self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, index: int) -> Tensor:
        (x,) = batch
        loss: Tensor = (self.net(x) - x).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Signum:
        return Signum(self.parameters(), lr=LR)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(16 * 20 * dist.get_world_size(), self.width)), batch_size=16)


def by_trainer(options: argparse.Namespace, device: torch.device) -> str:
    strategy = ShardedMajorityVoteStrategy(replicate_size=options.replicas, verify_every_n_steps=1)
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    module = Repeats(options.width, options.layers)
    Trainer(accelerator=accelerator, devices=dist.get_world_size(), strategy=strategy, max_epochs=1, **quiet).fit(
        module
    )
    return f"Trainer, {len(module.losses)} verified votes: loss {module.losses[0]:.3f} to {module.losses[-1]:.3f}"


def by_fabric(options: argparse.Namespace, device: torch.device) -> str:
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    strategy = FabricMajorityVoteStrategy(verify_every_n_steps=1)
    fabric = lightning.Fabric(accelerator=accelerator, devices=dist.get_world_size(), strategy=strategy)
    fabric.launch()
    net = perceptron(options.width, options.layers)
    model, optimizer = fabric.setup(net, Signum(net.parameters(), lr=LR))
    losses = list[float]()
    for t in range(20):
        optimizer.zero_grad()
        x = batch(options.width, t, device)
        loss = (model(x) - x).square().mean()
        fabric.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    return f"Fabric, {len(losses)} verified votes of all ranks: loss {losses[0]:.3f} to {losses[-1]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.sharded", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replicas", type=int, default=2, help="copies (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the table (default: save nothing)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device, int(os.environ["LOCAL_RANK"]) if options.device == "cuda" else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    ranks = dist.get_world_size()
    if ranks % options.replicas:
        sys.exit(f"--replicas must divide the {ranks} ranks, got {options.replicas}")
    shape = options.replicas, ranks // options.replicas
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    lines = [
        f"{torch.cuda.get_device_name() + ', ' if device.type == 'cuda' else ''}{machine()}, "
        f"torch {torch.__version__}, {shape[0]} copies of {shape[1]} ranks",
        f"torchrun --nproc-per-node {ranks} -m benchmarks.sharded {' '.join(sys.argv[1:])}".rstrip(),
        *table(options, mesh, device),
        by_trainer(options, device),
        by_fabric(options, device),
    ]
    if dist.get_rank() == 0:
        print("\n".join(lines))
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "sharded.txt").write_text("\n".join(lines) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
