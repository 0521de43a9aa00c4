"""Digits by majority vote in plain PyTorch: torchrun --nproc-per-node 3 tutorials/plain_ddp.py"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_core.network.traffic import ring_all_reduce, sent_since, socket_bytes
from signsgd_lightning import Signum, enable_majority_vote

dist.init_process_group("gloo")
rank, workers, steps = dist.get_rank(), dist.get_world_size(), 150
x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
x, order = x.float() / 16, torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
test, mine = order[:450], order[450 + rank :: workers]
torch.manual_seed(rank)  # each rank draws batches of its own; DDP hands out rank 0's weights
net = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 10))
optimizer = Signum(net.parameters(), lr=2e-3, betas=(0, 0), verdict_momentum=0.8)
model = DistributedDataParallel(net, gradient_as_bucket_view=True)
enable_majority_vote(model, optimizer)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
before = socket_bytes()
for _ in range(steps):
    batch = mine[torch.randint(len(mine), (32,))]
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()
    schedule.step()
sent = sent_since(before) / steps
flat = nn.utils.parameters_to_vector(model.parameters()).detach()
everyone = [torch.empty_like(flat) for _ in range(workers)]
dist.all_gather(everyone, flat)
if rank == 0:
    print(f"test accuracy {(model.module(x[test]).argmax(1) == y[test]).float().mean():.3f} after {steps} steps")
    print(f"{sent:,.0f} bytes sent per step; DDP in fp32 sends {ring_all_reduce(len(flat), workers, 32):,}")
    print(f"parameters bit-identical on all {workers} ranks: {all(torch.equal(flat, other) for other in everyone)}")
del model, optimizer, schedule  # or they keep the group and its threads alive while Python shuts down (pytorch#190489)
dist.destroy_process_group()
