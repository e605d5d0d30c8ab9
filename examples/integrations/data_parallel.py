"""Train a classifier in several processes, each on its part of the batch, as torchrun starts them.

torchrun --nproc-per-node 2 -m examples.integrations.data_parallel
"""

import argparse

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from torchcurv import SecondOrderOptimizer


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args(argv)
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", distributed.get_node_local_rank()) if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    data = TensorDataset(x, (x @ torch.randn(8, 3)).argmax(1))
    sampler: DistributedSampler = DistributedSampler(data)
    loader = DataLoader(data, 32, sampler=sampler)
    network, loss_fn = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3)).to(device), nn.CrossEntropyLoss()
    model = DistributedDataParallel(network)
    optimizer = SecondOrderOptimizer(network, loss_fn=loss_fn)
    losses = []
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros((), device=device)
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(inputs.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            total += loss.detach()
        distributed.all_reduce(total)
        losses.append(float(total) / len(loader) / distributed.get_world_size())
        if distributed.get_rank() == 0:
            print(f"epoch {epoch}: {losses[-1]:.3f}")
    sums = torch.stack([p.detach().double().sum() for p in network.parameters()])
    first = sums.clone()
    distributed.broadcast(first, 0)
    assert torch.equal(first, sums), "every process has the same weights"
    distributed.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
