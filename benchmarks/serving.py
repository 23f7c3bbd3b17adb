"""The second question about a document, through a server: how much sooner its answer begins.

    python -m benchmarks.serving [--model smollm2-135m] [--tokens 7900] [--methods "dense; antidiagonal +
    quest:k=1024"]

For each method, `farspan serve` runs as a process and a client asks two questions about one document in the
turns of one chat: once with reused prefixes, and once (the second turn alone) without. Seconds to the first
token are those of the client. The answers are compared.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from openai import OpenAI

from farspan.evals.text import load_prose
from farspan.runtime.models import load, prompt_ids

from .record import save, specs_of, table

QUESTIONS = ("Summarise this speech in one sentence.", "Which year is it about?")


@contextmanager
def serving(model: str, method: str, memory: str) -> Iterator[OpenAI]:
    """A client of a server on a free port."""
    options = [
        "--model",
        model,
        "--method",
        method,
        "--prefix-memory",
        memory,
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-m", "farspan", "serve", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = next(found[1] for line in process.stderr if (found := re.match(r"Ready at (\S+)", line)))
        yield OpenAI(base_url=url, api_key="none", timeout=3600, max_retries=0)
    finally:
        process.terminate()
        process.wait()


def ask(client: OpenAI, model: str, chat: list[Any], new: int) -> tuple[float, str, Any]:
    """Seconds to the first token, the answer, and its usage."""
    began, first, parts, usage = time.perf_counter(), None, [], None
    asked = {"model": model, "messages": chat, "max_tokens": new, "temperature": 0}
    for chunk in client.chat.completions.create(**asked, stream=True):
        if text := chunk.choices[0].delta.content:
            first = first or time.perf_counter() - began
            parts.append(text)
        usage = chunk.usage or usage
    assert first is not None
    return first, "".join(parts), usage


def document(model: str, tokens: int) -> str:
    """Prose of which a chat with the first question has about so many tokens."""
    _, tokenizer = load(model)
    text = "\n\n".join(load_prose().documents)
    over = len(prompt_ids(tokenizer, QUESTIONS[0]))
    ids = tokenizer(text[: tokens * 8], verbose=False).input_ids[: tokens - over]
    return str(tokenizer.decode(ids))


def measured(model: str, method: str, text: str, new: int) -> dict[str, Any]:
    """One row of the table."""
    chat: list[Any] = [{"role": "user", "content": f"{text}\n\n{QUESTIONS[0]}"}]
    with serving(model, method, "4G") as client:
        ask(client, model, [{"role": "user", "content": "Hello"}], 2)  # kernels are chosen at the first call
        first, answer, usage = ask(client, model, chat, new)
        chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": QUESTIONS[1]}]
        second, reused_answer, reused = ask(client, model, chat, new)
    with serving(model, method, "0") as client:
        ask(client, model, [{"role": "user", "content": "Hello"}], 2)
        whole, whole_answer, _ = ask(client, model, chat, new)
    return {
        "method": method,
        "tokens": usage.prompt_tokens,
        "first turn s": first,
        "second turn s": second,
        "sooner x": first / second,
        "without reuse s": whole,
        "tokens of turn 2": reused.prompt_tokens,
        "reused": reused.prompt_tokens_details.cached_tokens,
        "same answer": reused_answer == whole_answer,
        "answer": reused_answer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--methods", default="dense; antidiagonal + quest:k=1024", help='specs with ";" between'
    )
    parser.add_argument("--tokens", type=int, default=7900, help="of the first turn")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    args = parser.parse_args()
    text = document(args.model, args.tokens)
    rows = []
    for method in specs_of(args.methods):
        rows.append(measured(args.model, method, text, args.new))
        print(table([{k: v for k, v in row.items() if k != "answer"} for row in rows]), flush=True)
    print("written to", save("serving", rows, arguments=vars(args)))


if __name__ == "__main__":
    main()
