"""Train a LightningModule: by automatic optimization, or with step control by manual optimization.

python -m examples.integrations.lightning_module
python -m examples.integrations.lightning_module --step-control
python -m examples.integrations.lightning_module --processes 2
"""

import argparse
import logging
import warnings

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchcurv import SecondOrderOptimizer


class Classifier(L.LightningModule):
    def __init__(self, step_control: bool) -> None:
        super().__init__()
        self.net, self.loss_fn = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3)), nn.CrossEntropyLoss()
        self.automatic_optimization, self.losses = not step_control, []

    def configure_optimizers(self):
        control = {} if self.automatic_optimization else {"step_rule": "quadratic", "damping_rule": "lm"}
        return SecondOrderOptimizer(self.net, loss_fn=self.loss_fn, **control)

    def training_step(self, batch, index):
        x, y = batch
        if self.automatic_optimization:
            loss = self.loss_fn(self.net(x), y)
        else:  # a closure that returns the loss and does not call backward()
            loss = self.optimizers().optimizer.step(lambda: self.loss_fn(self.net(x), y))
        self.losses.append(loss.item())
        return loss


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--step-control", action="store_true")
    parser.add_argument("--processes", type=int, default=1, help="more than one: the strategy ddp")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    data, module = TensorDataset(x, (x @ torch.randn(8, 3)).argmax(1)), Classifier(args.step_control)
    accumulate = {} if args.step_control else {"accumulate_grad_batches": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, about loggers and workers
        trainer = L.Trainer(max_epochs=args.epochs, accelerator="auto", devices=args.processes, logger=False,
                            strategy="ddp" if args.processes > 1 else "auto",
                            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                            **accumulate)  # fmt: skip
        trainer.fit(module, DataLoader(data, 32, shuffle=True))
    print(f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}")
    return module.losses


if __name__ == "__main__":
    main()
