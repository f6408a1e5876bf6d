"""A LightningModule whose sequence is split: ModelParallelStrategy makes the mesh and gives a group one batch, autoseq takes the rest.

    torchrun --nproc-per-node 4 examples/lightning_module.py --data 2 --sequence 2 --inner aot_eager

Lightning's "tensor_parallel" dim is the one whose ranks get the same batch, so it is the sequence; over "data_parallel" parameters are
sharded, which also averages gradients over the copies.
"""

import argparse

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from plain_gpt import GPT
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import autoseq


class LitGPT(L.LightningModule):
    def __init__(self, seq_len=64, inner="inductor"):
        super().__init__()
        self.model = GPT(vocabulary=256, width=64, heads=4, layers=2, positions=seq_len)
        self.inner, self.is_split = inner, False

    def configure_model(self):
        if self.device_mesh is None or self.is_split:  # one device, or called again by validate() or test()
            return
        if self.device_mesh["data_parallel"].size() > 1:
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])
        autoseq.parallelize(self.model, mesh=self.device_mesh["tensor_parallel"], inner=self.inner)
        self.is_split = True

    def training_step(self, batch, _):
        ids, targets = batch
        _, loss = self.model(ids, targets)
        self.log("loss", loss, sync_dist=True)  # alike in a sequence, so the mean over all ranks is that over the copies
        return loss

    def validation_step(self, batch, _):
        ids, targets = batch
        _, loss = self.model(ids, targets)
        self.log("validation_loss", loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def random_text(rows, seq_len, seed):
    ids = torch.randint(0, 256, (rows, seq_len + 1), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(ids[:, :-1], ids[:, 1:])


def fit(model, *, batch, seq_len=64, data=1, sequence=1, callbacks=()):
    """Trains. Lightning gives each copy of the data a sampler of its own."""
    ranks = data * sequence
    strategy = ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=sequence) if ranks > 1 else "auto"
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_epochs=1, gradient_clip_val=1.0, callbacks=[*callbacks], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    train, valid = (random_text(rows, seq_len, seed) for rows, seed in ((12, 1), (4, 2)))
    alone = DistributedSampler(train, num_replicas=1, rank=0) if ranks == 1 else None  # the order in which Lightning's samplers shuffle
    trainer.fit(model, DataLoader(train, batch_size=batch, sampler=alone), DataLoader(valid, batch_size=batch))
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=2)
    parser.add_argument("--inner", default="inductor", help="aot_eager needs no C++ compiler")
    args = parser.parse_args()
    L.seed_everything(0)  # the same weights on all ranks
    trainer = fit(LitGPT(inner=args.inner), batch=4 // args.data, data=args.data, sequence=args.sequence)
    if trainer.is_global_zero:
        print({name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()})
    dist.destroy_process_group()
