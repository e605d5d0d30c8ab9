"""Train a classifier in a loop of accelerate, with gradients accumulated over micro-batches.

python -m examples.integrations.accelerate_loop
accelerate launch --num_processes 2 -m examples.integrations.accelerate_loop --processes 2
"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchcurv import SecondOrderOptimizer


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1, help="how many were started, which is looked at")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x @ torch.randn(8, 3)).argmax(1)
    model, loss_fn = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3)), nn.CrossEntropyLoss()
    accelerator = Accelerator(gradient_accumulation_steps=2)
    assert accelerator.num_processes == args.processes
    optimizer = SecondOrderOptimizer(model, loss_fn=loss_fn)  # before prepare(), on the model itself
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(TensorDataset(x, y), 32, shuffle=True))
    losses = []
    for epoch in range(args.epochs):
        total = 0.0
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                loss = loss_fn(model(inputs), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item()
        losses.append(total / len(loader))
        accelerator.print(f"epoch {epoch}: {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
