"""Train a small language model of transformers by its Trainer, which accumulates gradients and divides the loss.

python -m examples.integrations.hf_trainer
python -m examples.integrations.hf_trainer --steps 100 --bf16
"""

import argparse
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from examples.integrations.text import pieces
from torchcurv import SecondOrderOptimizer


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_embd=args.width, n_layer=2, n_head=2, n_positions=32, **special)
    )
    data = [{"input_ids": piece, "labels": piece} for piece in pieces(32, 512)]
    optimizer = SecondOrderOptimizer(model)  # the loss that the model computes itself is found
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=8, gradient_accumulation_steps=2, bf16=args.bf16,
            logging_steps=max(1, args.steps // 5), save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(), lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(model=model, args=settings, train_dataset=data, optimizers=(optimizer, None))
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
