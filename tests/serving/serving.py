"""A tiny model of letters behind a server in a thread, and what it must answer."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from openai import OpenAI
from transformers import PreTrainedTokenizerFast

import farspan
from farspan.runtime.hf import generate_by, greedy_config
from farspan.runtime.models import load
from farspan.runtime.prefixes import PrefixStore
from farspan.runtime.serving.server import Server
from farspan.runtime.serving.where import Where

NAME = "letters"
POSITIONS = 1024
SILENT = [*range(33), 127]  # tokens that the model never writes: the end, and what parsers strip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for t in m['tool_calls'] or [] %}<tool_call>{{ t['function'] | tojson }}</tool_call>{% endfor %}"
    "{{ m['content'] or '' }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


PARSED = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": ["<|im_end|>", "</s>"], "content": "text"},
    },
}
"""How transformers finds tool calls in an answer."""


def letters() -> PreTrainedTokenizerFast:
    """ASCII as token ids, 0 padding, 1 the beginning, 2 the end, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(number): number for number in range(3, 128)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE, **named)
    made.response_template = PARSED
    return made


def save(folder: Path, **settings: Any) -> Path:
    """A random Llama of two layers that knows the letters. It never ends an answer by itself."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        **{
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.3,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            **settings,
        }
    )
    model = hf.LlamaForCausalLM(config).eval()
    model.generation_config.suppress_tokens = SILENT
    model.save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


class Served:
    """A server that runs, its model, and a client."""

    def __init__(self, server: Server, loaded: dict[str, Any]) -> None:
        self.server, self._loaded = server, loaded
        self.client = OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60)
        self.root = server.url.removesuffix("/v1")

    @property
    def model(self) -> Any:
        return self._loaded["model"]

    @property
    def tokenizer(self) -> Any:
        return self._loaded["tokenizer"]

    def ready(self) -> Served:
        """Wait until the model has been loaded."""
        until(lambda: self.server.engine.ready or self.server.engine.fault is not None)
        return self


@contextmanager
def serving(
    folder: Path,
    method: str = "dense",
    *,
    prefixes: Any = None,
    queue: int = 64,
    patching: dict[str, Any] | None = None,
    before: Callable[[], None] = lambda: None,
    **where: Any,
) -> Iterator[Served]:
    """A server in a thread, on a free port. before: called before the model is loaded."""
    loaded: dict[str, Any] = {}

    def loading() -> tuple[Any, Any, Any]:
        before()
        model, tokenizer = load(folder)
        loaded.update(model=model, tokenizer=tokenizer)
        return model, tokenizer, farspan.patch(model, method, **(patching or {}))

    server = Server(NAME, loading, Where(port=0, **where), queue=queue, prefixes=prefixes)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield Served(server, loaded)
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def command_running(
    log: Path, *arguments: str, program: Sequence[str] = (sys.executable, "-m", "farspan")
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`farspan` as a process that serves, and its URL. It must have written no traceback in the end."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [*program, *arguments], stderr=file, stdout=file, preexec_fn=_hears_interrupts
        )
    try:
        until(lambda: "Ready at" in log.read_text() or process.poll() is not None, within=120)
        [url] = re.findall(r"Ready at (\S+)", log.read_text())
        yield process, url
    finally:
        process.kill()
        process.wait()
    told = log.read_text().partition("closing signal")[0]  # torchrun writes one of its own when it is stopped
    assert "Traceback" not in told


def _hears_interrupts() -> None:
    """A shell's background job ignores Ctrl-C, and so would the processes that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def until(true: Callable[[], bool], within: float = 30) -> None:
    end = time.monotonic() + within
    while not true():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.005)


class Alone:
    """The same model in one's own hands: its answers to single prompts, without a server."""

    def __init__(self, folder: Path, method: str = "dense", **patching: Any) -> None:
        self.model, self.tokenizer = load(folder)
        self.patched = farspan.patch(self.model, method, **patching)

    def ids(self, messages: Any, **more: Any) -> list[int]:
        """The tokens of a chat, or of a text."""
        if isinstance(messages, str):
            return list(self.tokenizer(messages).input_ids)
        chat = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **more)
        return list(chat["input_ids"])

    def tokens(self, messages: Any, new: int, *, seed: int = 0, **settings: Any) -> list[int]:
        """The tokens of the greedy answer, or of the one that ``settings`` describe. seed: for sampling."""
        ids = torch.tensor([self.ids(messages)])
        config = greedy_config(max_new_tokens=new, pad=0, eos=[2])
        config.suppress_tokens = SILENT
        for name, value in settings.items():
            setattr(config, name, value)
        torch.manual_seed(seed)
        with torch.no_grad():
            answer = generate_by(self.model, config, input_ids=ids, attention_mask=torch.ones_like(ids))
        return [int(x) for x in answer[0, ids.shape[1] :]]

    def text(self, messages: Any, new: int, **settings: Any) -> str:
        return str(self.tokenizer.decode(self.tokens(messages, new, **settings), skip_special_tokens=True))


class Kept(PrefixStore):
    """A store of prefixes that is given caches of just their tokens."""

    def put(self, patch: str, tokens: Any, cache: Any, *more: Any) -> bool:
        assert cache.get_seq_length() == len(tokens)
        return super().put(patch, tokens, cache, *more)
