"""A run that outlives killed workers.

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # or restarted workers find the addresses of dead ones in torchrun's store
torchrun --standalone --nproc-per-node 2 --max-restarts 3 tutorials/torchrun_restarts.py
"""

from datetime import timedelta

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from signsgd_lightning import MajorityVoteStrategy, Signum

EPOCHS, BATCH = 30, 64  # epochs of ten steps


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = Signum(self.parameters(), lr=1e-3)  # each rank's momentum is its own, and in the checkpoint
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, EPOCHS)]


pl.seed_everything(0)
x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
data, test = TensorDataset(x[450:].float() / 16, y[450:]), x[:450].float() / 16
# At the ends of epochs: from the middle of one Lightning goes on in order only with a dataloader that has a state_dict.
save = ModelCheckpoint("checkpoints", save_last=True)
# The timeout bounds how long a rank waits for one that hangs; one that died is noticed at once.
strategy = MajorityVoteStrategy(timeout=timedelta(seconds=30))
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=EPOCHS, callbacks=[save], logger=False)
model = Digits()
trainer.fit(model, DataLoader(data, BATCH, shuffle=True, drop_last=True), ckpt_path="last")  # whole ones have the name
if trainer.is_global_zero:
    print(
        f"test accuracy {(model.net(test).argmax(1) == y[:450]).float().mean():.3f} after {trainer.global_step} steps"
    )
