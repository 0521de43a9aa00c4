"""A tiny GPT-2 by majority vote with Accelerate: torchrun --nproc-per-node 3 tutorials/accelerate_gpt2.py"""

import argparse
import tempfile

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from signsgd_core.network.traffic import ring_all_reduce, sent_since, socket_bytes
from signsgd_lightning import Signum, WorkerStates, enable_majority_vote

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output", default=tempfile.gettempdir() + "/accelerate_gpt2", help="folder of the state")
parser.add_argument("--resume", action="store_true", help="go on from the state")
options = parser.parse_args()

with open(argparse.__file__, "rb") as file:  # Python's own source, byte by byte
    text = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()
torch.manual_seed(0)
accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
optimizer = Signum(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
batches = DataLoader(text[: len(text) // 64 * 64].view(-1, 64), batch_size=4, shuffle=True, drop_last=True)
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
enable_majority_vote(model, optimizer)
accelerator.register_for_checkpointing(WorkerStates(optimizer))  # every worker's momentum in save_state
if options.resume:
    accelerator.load_state(options.output)

before, step, losses = socket_bytes(), 0, []
while step < options.steps:
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                losses.append(loss.item())
                step += 1
            optimizer.step()
            optimizer.zero_grad()
        if step == options.steps:
            break
sent = sent_since(before) / options.steps
accelerator.save_state(options.output)
flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
everyone = accelerator.gather(flat[None])
accelerator.print(f"loss {losses[0]:.3f}, in the end {losses[-1]:.3f} after {step} steps")
fp32 = ring_all_reduce(len(flat), accelerator.num_processes, 32)
accelerator.print(f"{sent:,.0f} bytes sent per step; DDP in fp32 sends {fp32:,}")
accelerator.print(f"parameters bit-identical on all ranks: {all(torch.equal(flat, other) for other in everyone)}")
accelerator.end_training()
