"""The second turn of a chat with and without the cache of the first, by the kinds of layers, in one run.

    python -m benchmarks.reuse [--model smollm2-135m] [--tokens 2048] [--repeats 3]

Three models read a first turn of random tokens and then a second one, which is the first, an answer and a
question: the model as it is, with a recurrent mixer in place of every second attention, and a random model of
the same sizes with sliding windows. Seconds are those to the first token of the answer. "marked" is the first
turn with a store, "first turn" without: where layers need marks, that is what these cost.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

import farspan
from farspan.attention.hybrid import parse_mixer
from farspan.runtime import hf
from farspan.runtime.prefixes import PrefixStore
from farspan.runtime.serving.reader import Call, Ending, Reader

from .record import Stamps, clock, save, table

TURN = 64  # tokens of an answer and the next question


def plain(model: Any) -> Any:
    """The model with attention in every layer."""
    return farspan.patch(model)


def recurrent(model: Any) -> Any:
    """Gated linear attention, with fresh weights, in every second layer."""
    info = hf.inspect_model(model)
    mixers = {
        i: parse_mixer("gated_linear", hf.geometry_of(info, i)).to(model.dtype)
        for i in range(1, len(info.attention), 2)
    }
    return farspan.patch(model, mixers=mixers)


def sliding(like: Any) -> Any:
    """A random Gemma 3 of the sizes of ``like``, with windows of 512 in five of six layers."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(like.config, name) for name in (*names, "num_key_value_heads")}
    head = like.config.hidden_size // like.config.num_attention_heads
    config = Gemma3TextConfig(**sizes, head_dim=head, sliding_window=512, max_position_embeddings=1 << 15)
    return Gemma3ForCausalLM(config).to(like.dtype).eval()


def first_token(reader: Reader, ids: torch.Tensor) -> tuple[float, int, list[int]]:
    """(seconds to the first token, tokens reused, the answer)."""
    stamps, began = Stamps(), clock()
    config = hf.greedy_config(max_new_tokens=4, pad=0, eos=[])
    taken = reader.taken(ids[0].tolist())
    answer = reader.answer(Call(ids, config, seed=0), taken, Ending(lambda: False, stamps))
    return stamps.times[1] - began, taken.length, answer[0, ids.shape[1] :].tolist()


def measured(name: str, model: Any, patch: Callable[[Any], Any], length: int, repeats: int) -> dict[str, Any]:
    """A row of the table."""
    seconds: dict[str, list[float]] = {"first": [], "marked": [], "reused": [], "whole": []}
    with patch(model) as patched:
        whole = Reader(model, None, patched, None)
        for seed in range(repeats + 1):
            draw = torch.Generator().manual_seed(seed)
            tokens = length if seed else 2 * TURN  # the first round warms up
            second = torch.randint(3, model.config.vocab_size, (1, tokens + TURN), generator=draw)
            store = PrefixStore(1 << 34)
            again = Reader(model, None, patched, store)
            took = {
                "first": first_token(whole, second[:, :tokens]),
                "marked": first_token(again, second[:, :tokens]),
            }
            nbytes = store.nbytes
            took["reused"] = first_token(again, second)
            took["whole"] = first_token(whole, second)
            if seed:
                for key, (count, _, _) in took.items():
                    seconds[key].append(count)
    middle = {key: statistics.median(taken) for key, taken in seconds.items()}
    return {
        "layers": name,
        "tokens": length,
        "first turn s": middle["first"],
        "marked s": middle["marked"],
        "second turn s": middle["whole"],
        "with reuse s": middle["reused"],
        "times sooner": middle["whole"] / middle["reused"],
        "reused": took["reused"][1],
        "kept MB": nbytes / 1e6,
        "same answer": took["reused"][2] == took["whole"][2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = farspan.load(args.model)[0].float()  # in bf16, other calls give other tokens where two are close
    cases = [("attention", model, plain), ("recurrent", model, recurrent), ("sliding", sliding(model), plain)]
    rows = []
    for case in cases:
        rows.append(measured(*case, args.tokens, args.repeats))
        print(table(rows), flush=True)
    print("written to", save("reuse", rows, arguments=vars(args)))


if __name__ == "__main__":
    main()
