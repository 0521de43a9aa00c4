"""A tiny GPT-2 by majority vote in Hugging Face's Trainer: torchrun --nproc-per-node 3 tutorials/hf_trainer_gpt2.py"""

import argparse
import tempfile

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from signsgd_core.network.traffic import ring_all_reduce, sent_since, socket_bytes
from signsgd_lightning import MajorityVoteCallback, Signum

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output", default=tempfile.gettempdir() + "/hf_trainer_gpt2", help="folder of checkpoints")
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
options = parser.parse_args()

with open(argparse.__file__, "rb") as file:  # Python's own source, byte by byte
    text = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()
data = [{"input_ids": x, "labels": x} for x in text[: len(text) // 64 * 64].view(-1, 64)]
torch.manual_seed(0)
config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
arguments = TrainingArguments(
    options.output,
    max_steps=options.steps,
    per_device_train_batch_size=8,
    save_steps=options.steps // 2,
    logging_steps=options.steps // 4,
    lr_scheduler_type="constant",
    use_cpu=not torch.cuda.is_available(),
    report_to="none",
    disable_tqdm=True,
)
trainer = Trainer(
    GPT2LMHeadModel(config),
    arguments,
    train_dataset=data,
    optimizer_cls_and_kwargs=(Signum, {"lr": 1e-3, "betas": (0.9, 0.99)}),
)
trainer.add_callback(MajorityVoteCallback(trainer))
before = socket_bytes()
trainer.train(resume_from_checkpoint=options.resume)
sent = sent_since(before) / options.steps

flat = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach().cpu()
everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, flat)
if dist.get_rank() == 0:
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"loss {losses[0]:.3f}, in the end {losses[-1]:.3f} after {trainer.state.global_step} steps")
    print(f"{sent:,.0f} bytes sent per step; DDP in fp32 sends {ring_all_reduce(len(flat), len(everyone), 32):,}")
    print(f"parameters bit-identical on all ranks: {all(torch.equal(flat, other) for other in everyone)}")
dist.destroy_process_group()
