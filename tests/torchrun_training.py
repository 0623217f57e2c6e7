"""Multistage training as users write it, under torchrun: `torchrun ... -m tests.torchrun_training DIRECTORY`."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mcl_kernels import MultistageRunner, nt_xent


def main(directory: Path) -> None:
    dist.init_process_group("gloo")
    world = dist.group.WORLD
    dataset = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    runner = MultistageRunner(len(dataset), n_stages=2, n_clusters=4, directory=directory, group=world)
    for stage in runner:
        torch.manual_seed(stage.index)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for epoch in range(3):
            for index in stage.batch_sampler(16, clusters_per_batch=2, epoch=epoch):
                a, b = (dataset[index] + 0.1 * torch.randn(16, 16) for _ in range(2))
                za, zb = model(torch.cat((a, b))).chunk(2)
                loss = nt_xent(za, zb, stage.labels[index], temperature=0.2, group=world)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        here = stage.shard
        with torch.no_grad():
            stage.finish(model.module(dataset[here.start : here.stop]), state=model.module.state_dict())
    state = torch.cat([x.flatten() for x in model.module.state_dict().values()])
    print("parameters", hashlib.sha256(state.numpy().tobytes()).hexdigest(), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
