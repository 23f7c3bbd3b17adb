"""The report of a conversion, and the model card in words. Both hold what was measured and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...attention.hybrid.mixer import Mixer
from ..mixers import state_growth

REPORT = "conversion.json"

_CARD = """\
---
library_name: farspan
base_model: {base}
tags: [farspan, hybrid, linear-attention]
---

# {base}, converted by farspan

**This folder needs farspan to be loaded.** transformers alone refuses it.

    pip install farspan

    import farspan
    model, tokenizer = farspan.load("this folder")
    model.generate(...)                                         # as any model of transformers
    farspan.patch(model, "antidiagonal + quest:k=1024")         # on the layers with attention

{replaced} of {layers} layers have the mixer `{mixer}` in place of attention: {numbers}. Attention stays in
layers {kept}, {how}.

## What was measured

{table}

{caution}

## Memory of a sequence

| | original | converted |
|---|---:|---:|
| KV cache, bytes a token | {kv_before} | {kv_after} |
| state, bytes a sequence | 0 | {state} |

{even}

## How it was made

{stages}

Text: {text} (sha256 {sha}), {windows} windows of {window} tokens, {held_out} held out. Seed {seed}, precision
{precision}, torch {torch}, transformers {transformers}, farspan {farspan}.
{choice}"""

_CAUTION = """\
The text is held out from the training text and of the same kind. The values are numbers that stand once
before in a short synthetic text. Nothing else was measured here: `farspan eval ruler --model DIR` and
`farspan eval needle --model DIR` measure more, beside the original."""


def memory(kv_bytes: Mapping[int, int], mixers: Mapping[int, Mixer]) -> dict[str, int | None]:
    """Bytes of a sequence. kv_bytes: of one token in each layer of the original. mixers: by layer.
    break_even_tokens: from how many tokens the converted model takes less; None: never."""
    saved = sum(kv_bytes[i] for i in mixers) - math.ceil(sum(map(state_growth, mixers.values())))
    states = sum(mixer.state_bytes for mixer in mixers.values())
    return {
        "kv_bytes_per_token_before": sum(kv_bytes.values()),
        "kv_bytes_per_token_after": sum(kv_bytes.values()) - saved,
        "state_bytes": states,
        "break_even_tokens": -(-states // saved) if saved > 0 else None,
    }


def break_even(size: Mapping[str, int | None]) -> str:
    """From how many tokens conversion saves memory, as a sentence."""
    tokens = size["break_even_tokens"]
    if tokens is None:
        return "The states take more memory than the KV cache that they replace, at any length."
    return f"Below {tokens:,} tokens the states take more memory than the KV cache that they replace."


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write README.md, and conversion.json last: a folder that has it holds a whole model."""
    (folder / "README.md").write_text(card(report), encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def card(report: Mapping[str, Any]) -> str:
    """The model card of a report."""
    align, heal, choice = (report["stages"].get(name) for name in ("align", "heal", "choose"))
    size = report["memory"]
    return _CARD.format(
        base=report["base"],
        mixer=report["mixer"],
        replaced=len(report["replaced"]),
        layers=report["layers"],
        numbers=", ".join(map(str, report["replaced"])),
        kept=", ".join(map(str, report["attention_layers"])),
        how=report["how_chosen"],
        table=_measures(report),
        caution=_CAUTION,
        kv_before=f"{size['kv_bytes_per_token_before']:,}",
        kv_after=f"{size['kv_bytes_per_token_after']:,}",
        state=f"{size['state_bytes']:,}",
        even=break_even(size),
        stages="\n".join(
            [_stage("Stage 1, layers to attention", align), _stage("Stage 2, end to end", heal)]
        ),
        text=report["text"],
        sha=heal["text_sha256"],
        windows=heal["windows"],
        window=heal["window"],
        held_out=heal["held_out_windows"],
        seed=heal["seed"],
        precision=heal["precision"],
        torch=report["versions"]["torch"],
        transformers=report["versions"]["transformers"],
        farspan=report["versions"]["farspan"],
        choice="" if choice is None else f"\n## How layers were chosen\n\n{_choice(choice)}\n",
    )


def measures(report: Mapping[str, Any]) -> list[tuple[str, float, float, float]]:
    """Name, perplexity of the held-out text, KL to the original and loss of values to look up, in nats a
    token: of the original, of the model before stage 2, and of the result."""
    before, after = report["stages"]["heal"]["held_out"][0], report["after"]
    looked_up = report["retrieval"]
    rows = [
        ("original", before["nll_dense"], 0.0, looked_up["original"]),
        ("mixers aligned (stage 1)", before["nll"], before["kl"], looked_up["aligned"]),
        ("converted, as saved", after["nll"], after["kl"], looked_up["converted"]),
    ]
    return [(name, math.exp(min(nll, 80.0)), kl, found) for name, nll, kl, found in rows]


def _measures(report: Mapping[str, Any]) -> str:
    head = "| | perplexity of held-out text | KL to the original, nats | loss of values to look up, nats |"
    body = [f"| {name} | {p:.2f} | {kl:.4f} | {found:.3f} |" for name, p, kl, found in measures(report)]
    return "\n".join([head, "|---|---:|---:|---:|", *body])


def _stage(name: str, about: Mapping[str, Any]) -> str:
    first, last = about["held_out"][0]["loss"], about["held_out"][-1]["loss"]
    return (
        f"- {name}: {about['steps']} steps of {about['batch']} x {about['window']} tokens, learning rate "
        f"{about['lr']:g}, {about['minutes']:g} minutes; held-out loss {first:.4f} to {last:.4f}."
    )


def _choice(measured: Sequence[Mapping[str, Any]]) -> str:
    """What the replacement of each layer alone costs."""
    head = "| layer replaced alone | output error | change of loss | KL | change of retrieval loss | need |"
    body = [
        f"| {m['layer']} | {m['error']:.3f} | {m['nll']:+.4f} | {m['kl']:.4f} | {m['retrieval']:+.3f} | "
        f"{100 * m['need']:.1f} % |"
        for m in measured
    ]
    return "\n".join([head, "|---:|---:|---:|---:|---:|---:|", *body])
