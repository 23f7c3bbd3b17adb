"""`farspan cache build` and `farspan generate --cache`, and what the README says of them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import farspan
from farspan.attention.errors import FarspanError
from farspan.cli import main
from farspan.cli.generate import _saved
from farspan.runtime.models import encode_prefix, encode_prompt, followed_by

README = (Path(__file__).parents[1] / "README.md").read_text()
SECTION = README.partition("## Reuse a long prompt")[2].partition("\n## ")[0]
BOOK = "The captain of the ship was Mara. " + "The sea was calm and they mended the sails. " * 30
METHOD = "quest:k=64,page=8,dense_layers=0"


@pytest.fixture(scope="module")
def built(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    (folder / "book.txt").write_text(BOOK)
    how = ["--model", str(tiny_folder), "--method", METHOD, "--prompt-file", str(folder / "book.txt")]
    with pytest.raises(SystemExit) as ended:
        main(["cache", "build", *how, "--out", str(folder / "cache")])
    assert not ended.value.code
    return folder / "cache"


def asked(farspan_command: Any, model: Path, *more: str) -> dict[str, Any]:
    how = ["generate", "--model", str(model), "--max-new-tokens", "3", "--json", *more]
    code, out, err = farspan_command(*how)
    assert code == 0, err
    return {**json.loads(out), "stderr": err}


def test_a_question_and_a_whole_prompt(farspan_command: Any, tiny_folder: Path, built: Path) -> None:
    """Both give the answer of a cache that is filled by hand, in the same two calls."""
    question = "Who was the captain of the ship, and of which sea did the sailors speak that year in Bergen?"
    one = asked(farspan_command, tiny_folder, "--cache", str(built), "-p", question)
    whole = asked(farspan_command, tiny_folder, "--cache", str(built), "-p", followed_by(BOOK, question))
    model, tokenizer = farspan.load(tiny_folder)
    prefix = encode_prefix(tokenizer, BOOK)
    ids = encode_prompt(tokenizer, followed_by(BOOK, question), clock=False)
    assert torch.equal(ids[:, : prefix.shape[1]], prefix) and 16 < ids.shape[1] - prefix.shape[1] < 60
    with farspan.patch(model, METHOD), torch.no_grad():
        cache = model(prefix, use_cache=True).past_key_values
        how = {"attention_mask": torch.ones_like(ids), "past_key_values": cache, "do_sample": False}
        said = model.generate(ids, max_new_tokens=3, **how)[0, ids.shape[1] :]
    for found in (one, whole):
        assert found["method"].endswith(METHOD) and found["text"] == tokenizer.decode(said, True)
        assert (found["prompt_tokens"], found["cached_tokens"]) == (ids.shape[1], prefix.shape[1])
        n = prefix.shape[1]
        assert f"{n} of the {n} tokens in {built} are used." in found["stderr"]


def test_an_edited_book_uses_what_is_alike(farspan_command: Any, tiny_folder: Path, built: Path) -> None:
    edited = BOOK[:600] + "A storm came. " + BOOK[600:]
    found = asked(farspan_command, tiny_folder, "--cache", str(built), "-p", edited)
    saved = int(re.search(r"of the (\d+) tokens", found["stderr"])[1])
    assert 100 < found["cached_tokens"] < saved
    other = asked(farspan_command, tiny_folder, "-p", "x", "--method", METHOD)
    assert other["cached_tokens"] == 0


def test_a_cache_and_another_method_or_folder(farspan_command: Any, tiny_folder: Path, built: Path) -> None:
    how = ["generate", "--model", str(tiny_folder), "-p", "x"]
    code, _, err = farspan_command(*how, "--cache", str(built), "--method", "dense")
    assert code == 2 and "saved for another method: its method is dense + quest:k=64" in err
    code, _, err = farspan_command(*how, "--cache", str(built.parent / "none"))
    assert code == 2 and "There is no saved cache in" in err and err.count("\n") == 1


@pytest.mark.parametrize("storage", ["int8:group=16,window=32", "int4:group=16,window=32+disk:folder=here"])
def test_the_storage_of_the_cache_is_taken(
    farspan_command: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    """The same answer whether --storage is given again or not; another format is refused."""
    monkeypatch.chdir(tmp_path)
    how = ["--model", str(tiny_folder), "-p", BOOK, "--storage", storage, "--out", "saved", "--json"]
    assert farspan_command("cache", "build", *how)[0] == 0
    question = ["--cache", "saved", "-p", "Who was the captain of the ship that year in Bergen?"]
    taken = asked(farspan_command, tiny_folder, *question)
    again = asked(farspan_command, tiny_folder, *question, "--storage", storage)
    assert taken["text"] == again["text"] and taken["cached_tokens"] == again["cached_tokens"] > 300
    tiers = [x["report"]["summary"]["kv_bytes_stored_by_tier"] for x in (taken, again)]
    assert tiers[0] == tiers[1] and ("disk" in tiers[0]) is ("disk" in storage)
    code, _, err = farspan_command("generate", "--model", str(tiny_folder), *question, "--storage", "int8")
    assert code == 2 and f"saved for another storage: its storage is {storage.split('+')[0]}, and here" in err


def test_neither_command_runs_under_a_launcher(farspan_command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, _, err = farspan_command("cache", "build", "--out", "x", "-p", "x")
    assert code == 2 and "a launcher has started 2 ranks" in err
    with pytest.raises(FarspanError, match="a launcher has started 2 ranks: leave --cache out"):
        _saved(Path("x"))


def test_the_commands_of_the_readme(
    farspan_command: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(BOOK)
    commands = re.findall(r"^    farspan (.*)$", SECTION, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        words = [str(tiny_folder) if word == "smollm2-135m" else word for word in shlex.split(command)]
        code, _, err = farspan_command(*words, *(["--max-new-tokens", "4"] if words[0] == "generate" else []))
        assert code == 0, err
        if words[0] == "cache":
            assert re.search(r"\d+ tokens read in .* MB are in book-cache", err)
    assert re.search(r"(\d+) of the \1 tokens in book-cache are used", err)


def test_the_snippet_of_the_readme(
    smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(farspan, "load", lambda _: smollm2)
    [snippet] = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    reused, answer = capsys.readouterr().out.split(" ", 1)
    assert int(reused) > 600 and "Mara" in answer


def test_todays_date_is_left_out(smollm2: Any) -> None:
    """A cache of yesterday serves a prompt of today, where the chat format writes the date."""
    tokenizer = smollm2[1]
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    kept = tokenizer.chat_template
    tokenizer.chat_template = template + "<|im_end|>"
    try:
        assert "26 Jul 2024" in tokenizer.decode(encode_prefix(tokenizer, "A book.").flatten())
    finally:
        tokenizer.chat_template = kept
