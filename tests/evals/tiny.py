"""What the runner's tests share: a character tokenizer, samples made by hand, and a script to interrupt."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from farspan.evals.sample import Sample

PAD, BOS, EOS = 0, 1, 2
METHODS = ["dense", "recycled:k=16,stride=4", "quest:k=16,dense_layers=0", "window:w=16,sinks=2"]


class CharTokenizer:
    """ASCII as token ids, with what the evaluations use of a transformers tokenizer."""

    chat_template = None
    pad_token_id, bos_token_id, eos_token_id = PAD, BOS, EOS
    all_special_tokens = ("<pad>", "<s>", "</s>")
    pause = 0.0

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[BOS] * add_special_tokens + [ord(c) % 128 for c in text])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        time.sleep(self.pause)
        return "".join(chr(i) for i in ids if i > EOS)


def sample(task: str, index: int, *, length: int = 128, new: int = 12, **extra: Any) -> Sample:
    """A prompt whose length depends on its index, so that batches are ragged."""
    text = f"{task} number {index}: " + "the grass is green. " * (1 + index % 3)
    return Sample(
        suite="ruler",
        task=task,
        length=length,
        index=index,
        seed=1,
        context=text,
        question="What is it?",
        answer_prefix=" It is",
        references=("a", "e"),
        gold=" " + "green grass"[: 5 + index % 4],
        max_new_tokens=new,
        recipe={"task": task, "index": index},
        extra=extra,
    )


def samples(count: int = 4) -> list[Sample]:
    return [sample(task, index) for task in ("vt", "cwe") for index in range(count)]


def tiny_model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # wide enough that attention is not flat and methods differ
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config).eval()


def setup(model: Any, methods: Sequence[str], out: Any, **changes: Any) -> Any:
    """A Setup that shows no progress."""
    from farspan.evals.setup import Setup

    given = {"tokenizer": CharTokenizer(), "name": "tiny", "config": {}, "progress": False} | changes
    return Setup(model=model, methods=methods, out=out, **given)


def evaluated(suite: Any, given: Any, *, batch_size: int | str = "auto") -> Any:
    """The summary of a suite under a Setup."""
    return suite.run(given, suite.draw(given.tokenizer), batch_size=batch_size)


def prose(text: str) -> Any:
    """A text that stands nowhere as a file."""
    from farspan.evals.text import Prose

    return Prose("text", [text])


def main(out: str) -> None:
    """`python tiny.py OUT`: a run slow enough to be stopped in the middle."""
    import torch

    from farspan.evals.run import run

    torch.set_num_threads(1)
    tokenizer = CharTokenizer()
    tokenizer.pause = 0.05
    config = {"suite": "ruler", "seed": 1, "samples": 4}
    given = {"tokenizer": tokenizer, "config": config}
    run(setup(tiny_model(), METHODS[:2], out, **given), samples(), batch_size=2)


if __name__ == "__main__":
    main(sys.argv[1])
