"""Workers that come and go: python tutorials/elastic.py

A lighthouse and four workers on the digits. Two are killed, two new ones come, nobody starts again.
"""

import multiprocessing
import os
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

STEPS = 400
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine
os.environ.setdefault("RUST_LOG", "warn")  # the lighthouse writes a lot


def work(lighthouse: str, log: str) -> None:
    """What one worker does; on several machines this alone would be the script."""
    from signsgd_lightning import ElasticBatches, Signum, enable_elastic_vote

    torch.set_num_threads(1)
    x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = Signum(net.parameters(), lr=2e-3, betas=(0, 0), verdict_momentum=0.8)  # nothing is a worker's own
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    vote = enable_elastic_vote(
        net,
        optimizer,
        lighthouse=lighthouse,
        timeout=timedelta(seconds=10),
        state={"schedule": schedule},
        hostname="127.0.0.1",
    )
    batches = ElasticBatches(1347, 32, vote)  # the other 450 are for the test

    def closure() -> torch.Tensor:
        batch = next(batches)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        loss.backward()
        return loss

    with open(log, "w", buffering=1) as lines:
        while vote.step < STEPS:
            loss = optimizer.step(closure)  # quorum, closure, ballots, verdict, commit, update
            schedule.step()
            print(vote.step, loss.item(), vote.workers, file=lines)
            time.sleep(0.02)  # a model that takes longer
        accuracy = (net(x[1347:]).argmax(1) == y[1347:]).float().mean()
        bits = nn.utils.parameters_to_vector(net.parameters()).detach().view(torch.int32).sum()
        print(f"test accuracy {accuracy:.3f}, bits sum up to {bits}", file=lines)
    vote.close()


def wait_for(step: int, log: Path, seconds: float = 120) -> None:
    """Wait until a worker has come so far."""
    deadline = time.monotonic() + seconds
    while not log.exists() or not re.search(rf"^{step} ", log.read_text(), re.MULTILINE):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{log} did not come to step {step} within {seconds} s")
        time.sleep(0.1)


def main(folder: Path) -> None:
    """Start the lighthouse and the workers, kill two, start two, and draw what happened."""
    folder.mkdir(parents=True, exist_ok=True)
    from torchft.coordination import LighthouseServer  # as `torchft_lighthouse --min_replicas 1 …` does

    lighthouse = LighthouseServer("127.0.0.1:0", 1, quorum_tick_ms=20, heartbeat_timeout_ms=1000)
    address = f"http://127.0.0.1:{lighthouse.address().rpartition(':')[2]}"
    logs = [folder / f"worker{k}.txt" for k in range(6)]
    context, workers = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload(["signsgd_lightning.elastic", "sklearn.datasets"])  # so that workers start at once

    def start(k: int) -> None:
        logs[k].unlink(missing_ok=True)
        workers.append(context.Process(target=work, args=(address, str(logs[k]))))
        workers[k].start()

    try:
        for k in range(4):
            start(k)
        wait_for(100, logs[0])
        workers[1].kill()
        workers[2].kill()
        wait_for(200, logs[0])
        start(4)
        start(5)
        for k in (0, 3, 4, 5):
            workers[k].join(180)
            print(f"worker {k}: {logs[k].read_text().splitlines()[-1]}")
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
        lighthouse.shutdown()
    draw(logs, folder / "elastic.png")


def draw(logs: list[Path], path: Path) -> None:
    """Draw who voted when, and the loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (who, what) = plt.subplots(2, sharex=True, figsize=(8, 5))
    for k, log in enumerate(logs):
        rows = [line.split() for line in log.read_text().splitlines() if re.match(r"\d+ \S+ \d+$", line)]
        steps = [int(row[0]) for row in rows]
        who.plot(steps, [k] * len(steps), "|", markersize=14)
        what.plot(steps, [float(row[1]) for row in rows], linewidth=0.5)
    who.set(ylabel="worker", yticks=range(len(logs)), title="Who voted when: two are killed, two come")
    what.set(xlabel="step", ylabel="loss of a worker's batch", yscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"drawn: {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "elastic_run"))
