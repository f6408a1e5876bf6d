"""The usual Hugging Face training loop, its sequence split over the ranks of torchrun. One line is autoseq's.

    torchrun --nproc-per-node 2 examples/train_llama.py --steps 10
"""

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--seq-len", type=int, default=512)
parser.add_argument("--inner", default="inductor", help="aot_eager needs no C++ compiler")
args = parser.parse_args()

# As in any torchrun program. The ranks must agree on the weights, so they draw them from one seed.
use_gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if use_gpu else "gloo")
device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if use_gpu else torch.device("cpu")
torch.manual_seed(0)

config = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
    max_position_embeddings=args.seq_len, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
model = LlamaForCausalLM(config).to(device).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

model.compile(backend="autoseq", options={"inner": args.inner})  # the one line: everything else is one device's program

text = torch.frombuffer(bytearray(Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()), dtype=torch.uint8)
for step in range(args.steps):
    start = step * 97 % (len(text) - args.seq_len)
    ids = text[start : start + args.seq_len].long()[None].to(device)  # the whole sequence, on every rank
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()  # gradients come out whole and equal on all ranks
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)

dist.destroy_process_group()
