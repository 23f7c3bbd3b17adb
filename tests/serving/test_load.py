"""Many clients at once: every answer is that of a single user, and nothing is left behind."""

from __future__ import annotations

import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from .serving import NAME, POSITIONS, Alone, command_running, save, until

METHOD = "quest:k=64,page=8,dense_layers=0"
REQUESTS, PARALLEL, WARM = 200, 8, 60
BEGINNINGS = [chr(97 + i) * 7 + " is the letter of this text. " * (4 + 3 * i) for i in range(5)]


class Asked:
    """One request, drawn by its number, and what must come of it."""

    def __init__(self, number: int, model: str, alone: Alone) -> None:
        self.model = model
        draw = random.Random(number)
        self.kind = draw.choices(["whole", "stream", "leaves", "long"], [5, 4, 1, 1])[0]
        self.chat = draw.random() < 0.5
        self.text = draw.choice(BEGINNINGS) + f"Question {draw.randrange(40)}?"
        self.new = draw.randrange(2, 24)
        self.sampling = {"temperature": 1.0, "seed": number} if draw.random() < 0.3 else {"temperature": 0}
        if self.kind == "long":
            self.text *= POSITIONS // len(self.text) + 1
        elif self.kind == "leaves":
            self.new = 300
        else:
            sampled = {"do_sample": True, "temperature": 1.0} if "seed" in self.sampling else {}
            prompt = [{"role": "user", "content": self.text}] if self.chat else self.text
            self.expected = alone.text(prompt, self.new, seed=number, **sampled)

    def send(self, client: OpenAI) -> str:
        """Send it, check what comes, and say what it was."""
        asked: dict[str, Any] = {"model": self.model, "max_tokens": self.new, **self.sampling}
        stream = self.kind in ("stream", "leaves")
        if self.chat:
            asked["messages"] = [{"role": "user", "content": self.text}]
            call: Any = client.chat.completions
        else:
            asked["prompt"], call = self.text, client.completions
        if self.kind == "long":
            with pytest.raises(openai.BadRequestError, match="shorten the prompt"):
                call.create(**asked)
            return self.kind
        got = call.create(**asked, stream=stream)
        if self.kind == "leaves":
            for _, _ in zip(range(3), got, strict=False):
                pass
            got.close()
            return self.kind
        parts = got if stream else [got]
        assert "".join(self._part(x, stream) for x in parts) == self.expected
        return self.kind

    def _part(self, got: Any, stream: bool) -> str:
        [choice] = got.choices
        if not self.chat:
            return str(choice.text)
        return str((choice.delta if stream else choice.message).content or "")


def metrics(url: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(httpx.get(url.replace("/v1", "/metrics")).text):
        for name, labels, value, *_ in family.samples:
            found[" ".join([name, *labels.values()])] += value
    return found


@pytest.mark.slow
def test_two_hundred_requests_at_eight_in_parallel(tmp_path: Path, capsys: Any) -> None:
    folder = save(tmp_path / NAME)
    alone = Alone(folder, METHOD)
    asked = [Asked(i, str(folder), alone) for i in range(REQUESTS)]
    options = ["--model", str(folder), "--method", METHOD, "--port", "0", "--prefix-memory", "16M"]
    with command_running(tmp_path / "log", "serve", *options) as (process, url):
        client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda one: one.send(client), asked[:WARM]))
            until(lambda: metrics(url)["farspan_running"] == 0)
            before, began = metrics(url), time.monotonic()
            kinds = Counter(pool.map(lambda one: one.send(client), asked))
            seconds = time.monotonic() - began
        until(lambda: metrics(url)["farspan_running"] == 0)
        after = metrics(url)
        assert process.poll() is None and httpx.get(url.replace("/v1", "/health")).status_code == 200
    memory = [x["process_resident_memory_bytes"] for x in (before, after)]
    gained = {
        x: after[f"farspan_{x}_tokens_total"] - before[f"farspan_{x}_tokens_total"]
        for x in ("reused", "prompt")
    }
    with capsys.disabled():
        print(
            f"\n{REQUESTS} requests at {PARALLEL} in parallel in {seconds:.1f} s: {dict(kinds)}; resident "
            f"memory {memory[0] / 2**20:.1f} -> {memory[1] / 2**20:.1f} MiB "
            f"({memory[1] / memory[0] - 1:+.2%}); "
            f"{gained['reused']:.0f} of {gained['prompt']:.0f} tokens reused"
        )
    assert set(kinds) == {"whole", "stream", "leaves", "long"}
    assert abs(memory[1] / memory[0] - 1) < 0.05
    assert after["farspan_queue_length"] == 0 and after["farspan_prefix_hits_total"] > 100
