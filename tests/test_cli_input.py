"""What the command line understands of numbers, texts and names, and what it writes on other terminals."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import farspan
from farspan.cli import amounts, evaluate, options, output


@pytest.mark.parametrize(
    ("text", "number"),
    [("4096", 4096), ("128K", 131072), ("1.5k", 1536), ("1M", 1 << 20), (" 2m ", 1 << 21), ("1T", 1 << 40)],
)
def test_whole_numbers_as_people_type_them(text, number):
    assert amounts.whole(text, "--x") == number


@pytest.mark.parametrize(
    "text", ["", "-1", "0", "many", "1Q", "1.3K", "1e3", "0.5", "2T", "4KB", "٤", "9" * 400]
)
def test_what_is_no_whole_number(text):
    with pytest.raises(farspan.FarspanError, match=r"--x takes a whole number from 1 to 1T .* got"):
        amounts.whole(text, "--x")


def test_sizes_as_people_type_them():
    texts = ("4096", "128K", "80G", "80GiB", "80gb", "1.5k", "2TB")
    gib = 1 << 30
    assert [amounts.size(text, "--x") for text in texts] == [
        4096, 131072, 80 * gib, 80 * gib, 80 * gib, 1536, 2 << 40,
    ]  # fmt: skip
    for text in ("", "-1", "0", "many", "1Q", "0.1", "9" * 400, "80 giraffes", "B"):
        with pytest.raises(farspan.FarspanError, match="--x takes a size from 1 byte on"):
            amounts.size(text, "--x")


def test_every_command_takes_the_same_numbers_and_dtypes(farspan_command, tiny_folder, tmp_path):
    """1K is 1,024 for each option that takes tokens, and bf16 is bfloat16: seen in what they write."""
    text = tmp_path / "prose.txt"
    text.write_text("It rained in the morning and the river rose. " * 400)
    tiny, prose = ["--model", str(tiny_folder)], ["--text", str(text)]
    plan = ["plan", *tiny, "--length", "4K", "--prefill-chunk", "0.5K", "--gpus", "2", "--json"]
    sizes = [
        json.loads(farspan_command(*plan, "--dtype", name)[1])["memory"]["weights"]
        for name in ("bf16", "FP16", "half", "float16", "fp32", "float32")
    ]
    assert sizes[0] == sizes[1] == sizes[2] == sizes[3] and sizes[4] == sizes[5] == 2 * sizes[0]
    assert json.loads(farspan_command(*plan)[1])["prefill_chunk"] == 512
    made = ["calibrate", *tiny, *prose, "--tokens", "0.25K", "--window", "0.125K", "--dtype", "fp32"]
    assert farspan_command(*made, "--out", str(tmp_path / "recipe"))[0] == 0
    settings = farspan.Recipe.load(tmp_path / "recipe").settings
    assert (settings["tokens"], settings["window"]) == (256, 128)
    needle = ["eval", "needle", *tiny, *prose, "--lengths", "0.25K", "--depths", "0", "--samples", "1"]
    code, _, err = farspan_command(
        *needle, "--dtype", "fp32", "--rope", "yarn:4K", "--out", str(tmp_path / "needle")
    )
    assert code == 0, err
    config = json.loads((tmp_path / "needle" / "config.json").read_text())
    assert config["lengths"] == [256] and config["rope"] == "yarn:4096"
    generate = ["generate", *tiny, "--no-chat", "--json", "-p", "one two three " * 100]
    generate += ["--method", "quest:k=16,dense_layers=0"]
    how = ["--max-new-tokens", "0.0078125K", "--prefill-chunk", "0.0625K", "--crossover", "1M"]
    found = json.loads(farspan_command(*generate, *how)[1])
    assert found["new_tokens"] == 8
    assert "below the crossover of 1048576 keys" in found["report"]["summary"]["fallbacks"]


def test_a_prompt_is_the_same_from_a_file_and_from_stdin(farspan_command, tiny_folder, tmp_path):
    data = b"\xef\xbb\xbfone\r\ntwo\rthree\n"
    (tmp_path / "prompt.txt").write_bytes(data)
    plain = ["generate", "--model", str(tiny_folder), "--no-chat", "--json", "--max-new-tokens", "1"]
    assert options.read_text(tmp_path / "prompt.txt") == "one\ntwo\nthree\n"
    of_file = json.loads(farspan_command(*plain, "--prompt-file", str(tmp_path / "prompt.txt"))[1])
    of_stdin = [json.loads(farspan_command(*plain, *how, stdin=data)[1]) for how in ([], ["-p", "-"])]
    typed = json.loads(farspan_command(*plain, "-p", "one\ntwo\nthree\n")[1])
    for found in (*of_stdin, of_file):
        assert (found["text"], found["prompt_tokens"]) == (typed["text"], typed["prompt_tokens"])
    code, out, err = farspan_command(*plain, stdin=b"caf\xe9 ")
    assert (code, out) == (2, "") and "farspan: stdin is not UTF-8 text" in err


def test_a_cache_of_fixed_size_writes_the_same(farspan_command, tiny_folder):
    how = ["-m", str(tiny_folder), "-p", "one two three four", "--method", "quest:k=2,page=2", "--json"]
    plain, static = (
        json.loads(farspan_command("generate", *how, "--max-new-tokens", "6", "--no-chat", *more)[1])
        for more in ([], ["--static"])
    )
    assert static["text"] == plain["text"] and static["new_tokens"] == plain["new_tokens"]
    assert "append" in static["report"]["layers"][0]["decode"]["implementations"]


@pytest.mark.parametrize(("encoding", "dash"), [("latin-1", b"-"), ("ascii", b"-"), ("cp1252", b"\x96")])
def test_a_terminal_that_is_not_utf8(farspan_command, small_needle, tmp_path, monkeypatch, encoding, dash):
    def shown(*arguments: str) -> bytes:
        raw = io.BytesIO()
        terminal = io.TextIOWrapper(raw, encoding=encoding)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", terminal)
            code, _, err = farspan_command(*arguments)
        assert code == 0, err
        terminal.flush()
        return raw.getvalue()

    table = shown("methods")
    assert b"dense" in table and b"?" not in table and b" " + dash + b" " in table
    out = ["--out", str(tmp_path / "run")]
    table = shown(*small_needle, *out)
    assert b"window:w=64" in table and b"?" not in table and b"NLL" in table
    printed = json.loads(shown(*small_needle, *out, "--json").decode("ascii"))
    assert printed == json.loads((tmp_path / "run" / "summary.json").read_text())


def test_what_an_encoding_has_not_is_written_plainly(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    output.prepare()
    print("Δ ± 3 × 2 – 日本…", flush=True)
    assert raw.getvalue() == b"d +- 3 x 2 - ??...\n"


def test_an_ascii_terminal_in_a_process_of_its_own():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "farspan", "methods"], capture_output=True, env=environment)
    assert done.returncode == 0 and b"dense" in done.stdout, done.stderr
    done.stdout.decode("ascii")


@pytest.mark.parametrize(
    ("model", "name"),
    [(".", "chat"), ("..", "models"), ("chat/", "chat"), ("./chat", "chat"), ("a/b", "b"), ("/", "model")],
)
def test_an_output_folder_has_the_models_name(tmp_path, monkeypatch, model, name):
    (tmp_path / "models" / "chat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "models" / "chat")
    assert evaluate._folder(None, "needle", model) == Path(f"out/needle-{name}")
