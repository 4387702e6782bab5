"""Fine-tune a model with PEFT's DoRA adapters, run by doratune: one line more than without.

    python examples/finetune.py                          a tiny model, on a CPU in less than a minute
    python examples/finetune.py --config path/to/llama   the shape of any causal language model, on a GPU
    python examples/finetune.py --stock                  the same training by PEFT alone

Nothing is downloaded: the weights are random, tokens are the bytes of the text beside this file. To fine-tune a real
model, load it with ``from_pretrained`` and tokenise with its own tokeniser; the lines that matter here stay the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

TEXT = Path(__file__).with_name("american_texts.txt")

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "initializer_range": 0.15,
}
"""A tiny model whose tokens are bytes; its frozen output weights are large enough for sure predictions."""


class Bytes(Dataset[dict[str, torch.Tensor]]):
    """A text in blocks of ``block`` bytes, each byte a token; what is over at the end is left out."""

    def __init__(self, text: str, block: int) -> None:
        tokens = torch.tensor(list(text.encode("utf-8")))
        self.blocks = tokens[: len(tokens) // block * block].view(-1, block)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def make_model(config: Path | None, rank: int, seed: int) -> torch.nn.Module:
    """A model of the config's shape (the tiny one for None) with random frozen weights and DoRA adapters on them."""
    set_seed(seed)
    shape = AutoConfig.for_model(**TINY) if config is None else AutoConfig.from_pretrained(config)
    if shape.vocab_size < 256:
        raise SystemExit(
            f"{config}: a vocabulary of {shape.vocab_size} has no room for the 256 bytes that are the tokens"
        )
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        base = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16 if on_gpu else torch.float32)
        adapters = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"
        )
        model: torch.nn.Module = get_peft_model(base, adapters)
    return model


def train(
    model: torch.nn.Module,
    data: Dataset[dict[str, torch.Tensor]],
    *,
    steps: int,
    batch: int,
    seed: int,
    output: Path,
    log_every: int = 1,
    collate: Callable[[Sequence[dict[str, torch.Tensor]]], dict[str, Any]] | None = None,
) -> list[float]:
    """Train the adapters for ``steps`` batches with transformers' Trainer; returns the losses that it logged."""
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        bf16=torch.cuda.is_available(),
        logging_steps=log_every,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a Hugging Face config.json or its folder")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="blocks in a batch")
    parser.add_argument("--block", type=int, default=64, help="bytes in a block")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock", action="store_true", help="let PEFT run the adapters itself")
    parser.add_argument("--output", type=Path, default=Path("finetuned"), help="folder for the adapters")
    options = parser.parse_args()

    model = make_model(options.config, options.rank, options.seed)
    if not options.stock:
        import doratune

        doratune.accelerate(model)  # the one line
    data = Bytes(TEXT.read_text(encoding="utf-8"), options.block)
    losses = train(
        model,
        data,
        steps=options.steps,
        batch=options.batch,
        seed=options.seed,
        output=options.output,
        log_every=max(1, options.steps // 20),
    )
    model.save_pretrained(options.output)  # PEFT's own format: nothing of doratune is in it
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {options.steps} steps; adapters in {options.output}")


if __name__ == "__main__":
    main()
