"""What is reused of earlier prompts changes no answer, for any method."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import farspan
from farspan.attention.hybrid import Geometry
from farspan.runtime.hf import greedy_config
from farspan.runtime.models import load
from farspan.runtime.prefixes import PrefixStore
from farspan.runtime.serving.answers import Answers, Prompt
from farspan.runtime.serving.engine import Job
from farspan.runtime.serving.metrics import Metrics

from ..runtime.small_models import make
from ..runtime.toy_mixer import Toy
from .serving import NAME, SILENT, Alone, letters, save, serving

DOCUMENT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(300))
METHODS = [
    "dense",
    "quest:k=32,page=8,dense_layers=0",
    "recycled:k=32,stride=3",
    "window:w=40,sinks=4",
    "snapkv:k=48",
    "block_topk:k=64,block=16",
    "antidiagonal:block=16,stride=4 + quest:k=32,page=8,dense_layers=0",
    "vertical_slash",
    "h2o:k=32",
    "core_context:g=4,s=16",
    "combiner:span=8",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "letters")


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy(Geometry(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16))


class Read:
    """What a streamer of transformers is."""

    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


class Reader:
    """A patched model that answers texts one after another."""

    def __init__(self, folder: Path, method: str, prefixes: Any, **patching: Any) -> None:
        self._begin(*load(folder), prefixes, method, **patching)

    @classmethod
    def of(cls, model: Any, prefixes: Any, **patching: Any) -> Reader:
        """The same for a model in memory."""
        made = cls.__new__(cls)
        made._begin(model, letters(), prefixes, "dense", **patching)
        return made

    def _begin(self, model: Any, tokenizer: Any, prefixes: Any, method: str, **patching: Any) -> None:
        self.tokenizer, self.patched = tokenizer, farspan.patch(model, method, **patching)
        metrics = Metrics(lambda: 0, lambda: 0)
        self.answers = Answers(model, tokenizer, self.patched, metrics, prefixes)

    def __call__(self, text: str, new: int = 6) -> tuple[list[int], int]:
        """The tokens of the answer, and how many of the prompt were reused."""
        config = greedy_config(max_new_tokens=new, pad=0, eos=[2])
        config.suppress_tokens = SILENT
        ids = torch.tensor([self.tokenizer(text).input_ids])
        prompt = Prompt(ids=ids, config=config, endpoint="", began=time.monotonic())
        tokens = self.answers.answer(prompt, Job(lambda _: None, lambda *_: None), Read())
        return tokens, prompt.reused


@pytest.mark.parametrize(
    ("method", "patching"),
    [(method, {}) for method in METHODS] + [(METHODS[i], {"prefill_chunk": 64}) for i in (1, 5, 7)],
)
def test_answers_are_those_without_reuse(folder: Path, method: str, patching: dict[str, Any]) -> None:
    alone = Reader(folder, method, None, **patching)
    again = Reader(folder, method, PrefixStore(1 << 30), **patching)
    cuts = again.patched.cuts
    texts = [DOCUMENT + "?"]
    texts.append(texts[0] + alone.tokenizer.decode(alone(texts[0])[0]) + " And what then? ")  # a second turn
    texts.append(texts[1] + alone.tokenizer.decode(alone(texts[1])[0]) + "!")  # little that is new
    texts += [DOCUMENT[:200] + "Another question about the same document?", texts[0], "Something else."]
    reused = []
    for text in texts:
        tokens, count = again(text)
        assert tokens == alone(text)[0], (text, count)
        reused.append(count)
    if cuts.never:
        assert not any(reused)
    else:
        length, other = len(texts[0]), len(texts[1])
        assert reused[0] == reused[5] == 0
        assert reused[1:3] == [cuts.longest(length), min(cuts.longest(other), cuts.longest(len(texts[2])))]
        drops_keys = method.startswith(("core_context", "combiner"))  # they have no cut where others differ
        assert reused[3] == 0 if drops_keys else 200 - cuts.step < reused[3] <= 200
        assert reused[4] > 150 or method == "vertical_slash"


def test_methods_that_need_the_whole_prompt_say_so(folder: Path) -> None:
    for method, words in (
        ("h2o:k=32", "needs every query"),
        ("vertical_slash", "end of the prompt"),
        ("snapkv:k=48,evict=true", "snapkv evicts keys"),
    ):
        assert words in Reader(folder, method, None).patched.cuts.never


def test_a_second_turn_of_a_chat(folder: Path) -> None:
    alone = Alone(folder)
    with serving(folder, prefixes=PrefixStore(1 << 30)) as served:
        client, chat = served.ready().client, [{"role": "user", "content": DOCUMENT}]
        first = client.chat.completions.create(model=NAME, messages=chat, max_tokens=9, temperature=0)
        assert first.usage is not None and first.usage.prompt_tokens_details is not None
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        told = {"role": "assistant", "content": first.choices[0].message.content}
        chat = [*chat, told, {"role": "user", "content": "And what comes after that?"}]
        second = client.chat.completions.create(model=NAME, messages=chat, max_tokens=9, temperature=0)
        assert second.usage is not None and second.usage.prompt_tokens_details is not None
        assert second.usage.prompt_tokens_details.cached_tokens == len(alone.ids(chat[:1])) - 17
        assert second.choices[0].message.content == alone.text(chat, 9)


def test_a_small_limit_keeps_the_last_prompts(folder: Path) -> None:
    store = PrefixStore(1_000_000)  # bytes; a token takes 512, and buffers have spare room
    reader = Reader(folder, "dense", store)
    for number in range(5):
        reader(f"{number}{DOCUMENT}")
    assert 0 < store.nbytes <= store.limit and store.dropped > 0
    assert reader(f"4{DOCUMENT}")[1] > 0 and reader(f"0{DOCUMENT}")[1] == 0


@pytest.mark.parametrize("architecture", ["qwen3_next", "falcon_h1", "gemma3", "mistral", "toy"])
def test_layers_that_cannot_be_cropped_are_reused_at_marks(architecture: str) -> None:
    """Recurrent layers, recurrent mixers beside attention and in its place, and windows that are full."""

    def reader(store: Any) -> Reader:
        if architecture == "toy":
            return Reader.of(make("llama"), store, mixers={1: toy()})
        return Reader.of(make(architecture), store)

    alone, again = reader(None), reader(PrefixStore(1 << 30))
    document = DOCUMENT[:90]
    reused = []
    for text in (
        document,
        document + " and what then, after that?",  # a second turn
        document[:60] + " Another question about the beginning of it.",
        document[:60] + " A third one about it, which shares the same beginning.",
    ):
        tokens, count = again(text)
        assert tokens == alone(text)[0]
        reused.append(count)
    assert reused == [0, 90 - 17, 0, 60], "the third makes a mark where it leaves the others"
