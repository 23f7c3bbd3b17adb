"""`farspan generate`: continue a prompt, and say what attention read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..attention.errors import FarspanError
from . import launch, options, output
from .storage import Storage

T = TypeVar("T")
_ALIKE = 200  # characters by which a prompt is known to begin with the text of a saved cache


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Options of `farspan generate`."""

    model: options.Model = options.DEFAULT_MODEL
    method: Annotated[
        str | None,
        typer.Option(
            help="What attention reads; see above and `farspan methods` [default: dense, or that of --cache]."
        ),
    ] = None
    source: options.Prompt
    cache: Annotated[
        Path | None,
        typer.Option(
            help="A folder of `farspan cache build`. The prompt follows its text, unless it begins like that."
        ),
    ] = None
    max_new_tokens: Annotated[int, options.tokens("Stop after this many tokens.")] = 256
    chat: options.Chat = None
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; above 0 samples.")] = 0.0
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Sample from the most likely tokens, up to this total probability."
        ),
    ] = 1.0
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0
    prefill_chunk: Annotated[int | None, options.tokens("Read the prompt in chunks of this many tokens.")] = (
        None
    )
    crossover: Annotated[
        str | None,
        options.crossover('Read densely below this many keys; "auto" takes what `farspan tune` measured.'),
    ] = None
    static: Annotated[
        bool, typer.Option("--static", help="Use a cache of fixed size; on CUDA, decode in a captured graph.")
    ] = False
    storage: Storage = None
    compress: Annotated[
        float | None,
        typer.Option(
            help="Leave passages out of the prompt, so that this fraction of its tokens is left: 0.3."
        ),
    ] = None
    query: Annotated[
        str | None,
        typer.Option(help="--compress: what passages are kept for [default: the prompt's last passage]."),
    ] = None
    scorer: Annotated[
        str | None,
        typer.Option(
            help='--compress: "attention", or a folder of `farspan train retriever` [default: attention].'
        ),
    ] = None
    recipe: options.Recipe = None
    rope: options.Rope = None
    beyond_positions: Annotated[
        bool,
        typer.Option("--beyond-positions", help="Only warn when the prompt passes the model's positions."),
    ] = False
    on: options.Ranks
    json: options.Json = False

    def check_compress(self) -> None:
        """Raise FarspanError for options of shorter prompts that do not fit together."""
        if self.compress is None:
            given = [f"--{name}" for name in ("query", "scorer") if getattr(self, name) is not None]
            if given:
                raise FarspanError(f"{given[0]} belongs to --compress: give both, such as --compress 0.3.")
            return
        from ..runtime.compress.spec import check_keep

        check_keep(self.compress)
        if self.cache is not None:
            raise FarspanError(
                "--compress leaves out parts of a prompt, whose tokens --cache has kept: give one of them."
            )

    def shorter(self, model: Any, tokenizer: Any, prompt: str) -> dict[str, Any] | None:
        """What `farspan.compress` returns, as plain values with the prompt; None without --compress."""
        if self.compress is None:
            return None
        from ..runtime.compress.prompt import compress
        from ..runtime.compress.spec import ATTENTION

        made = compress(
            model, tokenizer, prompt, self.query, keep=self.compress, scorer=self.scorer or ATTENTION
        )
        return {"prompt": made.prompt, "text": str(made), **made.to_dict()}

    def decoding(self) -> dict[str, Any]:
        """The settings of `model.generate` that these options decide."""
        decided: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
        }
        if self.temperature:
            decided |= {"temperature": self.temperature, "top_p": self.top_p}
        return decided


@options.command
def generate(given: Generate) -> None:
    """Continue a prompt. The answer streams to stdout; a report of what was read goes to stderr at the end.

    A method is written name:par=value,par=value, as in "recycled:k=512,stride=10"; "A + B" is A in prefill
    and B in decode. Under a launcher, as in `torchrun --nproc-per-node 2 -m farspan generate ...`, the prompt
    and its cache are spread over the ranks, and the report covers all ranks.

    With --cache the tokens that the prompt has in common with a saved cache are not read again. Unless
    --storage names another memory, the cache is kept as it was when it was built.
    """
    saved = None if given.cache is None else _saved(given.cache)
    ranks = given.on.spread()
    text = _once(given.source.read, ranks)
    method = given.method or ("dense" if saved is None else saved.spec)
    options.one_method(method)  # a misspelt method ends here, before the model is loaded
    given.check_compress()
    from ..runtime.models import check_length, encode_prompt, positions, text_streamer

    causal_lm, tokenizer = given.on.load(given.model, given.rope, ranks)
    chat = given.chat
    if saved is not None:
        text = _after(saved.settings.get("text"), text)
        chat = saved.settings.get("chat") if chat is None else chat
    shorter = _once(lambda: given.shorter(causal_lm, tokenizer, text), ranks)
    if shorter is not None:
        text = shorter.pop("prompt")
        output.note(shorter.pop("text"))
    ids = encode_prompt(tokenizer, text, chat=chat, clock=saved is None).to(causal_lm.device)
    length = ids.shape[1]
    check_length(causal_lm, length, strict=not given.beyond_positions)
    if length <= (positions(causal_lm) or length):
        both = f"The prompt with its answer (--max-new-tokens {given.max_new_tokens})"
        check_length(causal_lm, length + given.max_new_tokens, what=both, strict=False)

    import torch

    from ..evals.ranks import Job
    from ..runtime.hf import answer_by, kept_config, streams
    from ..runtime.patch import patch
    from ..runtime.saved import load_cache

    torch.manual_seed(given.seed)
    config, set_aside = kept_config(causal_lm, **given.decoding())
    if set_aside:
        output.note(f"Not used of the model's generation config: {', '.join(set_aside)}.")
    how: dict[str, Any] = {
        "recipe": given.recipe,
        "prefill_chunk": given.prefill_chunk,
        "crossover": given.crossover,
        "storage": saved.storage if saved is not None and given.storage is None else given.storage,
        "static": length + given.max_new_tokens if given.static else None,
    }
    with Job(causal_lm, ranks) as job, patch(causal_lm, method, parallel=job.mesh, **how) as patched:
        inputs, reused = {"input_ids": ids}, 0
        if saved is not None:
            prefix = load_cache(causal_lm, saved, tokenizer=tokenizer)
            inputs, reused = prefix.inputs(ids, keep=False), prefix.reused
            output.note(_used(prefix, given.cache))
        streamer = text_streamer(tokenizer) if streams(config) and not given.json else None
        started = time.perf_counter()
        answer = answer_by(causal_lm, config, inputs, tokenizer, streamer)
        seconds = time.perf_counter() - started
        report = job.report(patched)
    written = tokenizer.decode(answer, skip_special_tokens=True)
    if given.json:
        return output.show_json(
            {
                "model": given.model,
                "method": method,
                "ranks": job.size,
                "prompt_tokens": length,
                "cached_tokens": reused,
                "new_tokens": len(answer),
                "seconds": seconds,
                "text": written,
                "set_aside": set_aside,
                "compressed": shorter,
                "report": report.to_dict(),
            }
        )
    if streamer is None:
        output.show_text(written)
    over = f" over {job.size} ranks" if job.size > 1 else ""
    output.note(f"\n{length - reused} tokens read, {len(answer)} written in {seconds:.1f} s{over}")
    output.note(report.text(output.width()))


def _once(make: Callable[[], T], ranks: Any) -> T:
    """What ``make`` returns on rank 0, on every rank that is left: they share stdin, and may not share a
    disk. With --parallel none, whose ``ranks`` are None, rank 0 is alone."""
    return make() if ranks is None else launch.on_rank_0(make)


def _saved(folder: Path) -> Any:
    """What the folder of --cache holds."""
    if launch.size() > 1:
        raise FarspanError(
            f"A saved cache is that of one process, and a launcher has started {launch.size()} ranks: leave "
            "--cache out, or run without a launcher."
        )
    from ..runtime.saved import read_saved

    return read_saved(folder)


def _after(text: str | None, prompt: str) -> str:
    """The whole prompt, where ``text`` is that of a saved cache."""
    from ..runtime.models import followed_by

    return prompt if text is None or prompt.startswith(text[:_ALIKE]) else followed_by(text, prompt)


def _used(prefix: Any, folder: Path | None) -> str:
    """A line about how much of a saved cache is used."""
    saved = prefix.tokens.shape[1]
    said = f"{prefix.reused} of the {saved} tokens in {folder} are used"
    return f"{said}: {prefix.left}" if prefix.left else f"{said}."
