"""DeepSpeed's ways to shard: ZeRO-3 is refused, under ZeRO-1 and 2 the sequences are spread over the ranks.

    LAUNCHER script_weights.py

Rank 0 prints what is said of models that ZeRO-3 has sharded, and how far the weights of ZeRO-2 are from those
that farspan has not spread.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import farspan

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


def make() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).train()


def config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def trained(stage: int, parallel: Any) -> list[torch.Tensor]:
    import deepspeed

    model = make()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config(stage)
    )
    ids = torch.randint(3, 128, (2, 93), generator=torch.Generator().manual_seed(1))
    with farspan.patch(engine.module, parallel=parallel):
        for _ in range(2):
            engine.backward(engine(ids, labels=ids).loss)
            engine.step()
    return [p.detach() for p in model.parameters()]


def main() -> None:
    import deepspeed

    dist.init_process_group("gloo")
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        sharded = make()
    whole = make()
    initialised, *_ = deepspeed.initialize(
        model=whole, optimizer=torch.optim.SGD(whole.parameters(), lr=0.1), config=config(3)
    )
    for model in (sharded, initialised.module):
        try:
            farspan.patch(model, parallel="auto")
        except farspan.FarspanError as error:
            say(f"refused: {error}")
    apart = [(a - b).abs().max().item() for a, b in zip(trained(2, "auto"), trained(2, None), strict=True)]
    moved = [(a - b).abs().max().item() for a, b in zip(trained(2, "auto"), make().parameters(), strict=True)]
    say(f"apart {max(apart)} of {max(moved)}")
    dist.destroy_process_group()


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
