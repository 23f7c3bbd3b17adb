"""What each bad command line ends in: a table with a row a case, of command, exit code and sentence.

A new case is a new row. The command is split as a shell splits it; {tiny} is a model's folder (2,048
positions), {config} one without weights (4,096), {text} a text file, {binary} a file that is not text, {out}
a folder that is not there. Of the sentence, " ... " stands for anything.
"""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from farspan.cli.sentences import as_options

GENERATE = "generate -p x --model {tiny}"
NEEDLE = "eval needle --model {tiny} --text {text} --out {out}"
RULER = "eval ruler --model {tiny} --out {out}"
PPL = "eval ppl --model {tiny} --text {text} --out {out}"
SPEED = "eval speed --model {tiny} --text {text} --out {out}"
PLAN = "plan --model {config} --length 4K --gpus 2"
CALIBRATE = "calibrate --model {tiny} --text {text} --out {out}"
TRAIN = "train {method} --model {{tiny}} --text {{text}} --out {{out}}".format
NUMBER = "takes a whole number from 1 to 1T such as 4096, 128K or 1M; got"
EMPTY = "give a value, or leave both out."

TABLE = [
    # --- typer's own: wrong usage
    ("nothing", 2, "No such command 'nothing' ... see farspan --help."),
    ("generate --nope", 2, "No such option: --nope ... see farspan generate --help."),
    ("eval ruler --nope", 2, "No such option: --nope ... see farspan eval ruler --help."),
    ("eval ruler --samples many", 2, "Invalid value for '--samples': ... valid integer"),
    ("eval ruler --samples 0", 2, "Invalid value for '--samples': ... greater than or equal to 1"),
    ("calibrate --text x", 2, "Missing option '--out'"),
    # --- storage
    (f"{GENERATE} --storage dusk", 2, "There is no storage 'dusk' (did you mean 'disk'?)"),
    (f"{RULER} --storage disk:path=x", 2, "disk has no parameter 'path'"),
    # --- methods
    (f"{GENERATE} --method recicled", 2, "no method 'recicled' (did you mean 'recycled'?)"),
    (f"{GENERATE} --method quest:pagge=3", 2, "no parameter 'pagge' (did you mean 'page'?)"),
    (f"{GENERATE} --method recycled:k=0", 2, "k a whole number, at least 1; got 0"),
    (f"{GENERATE} --method recycled:k=-5", 2, "k a whole number, at least 1; got -5"),
    (f"{GENERATE} --method recycled:k=many", 2, "a whole number for k; got 'many'"),
    (f"{GENERATE} --method 'quest + block_topk'", 2, "quest has no prefill"),
    (
        f"{GENERATE} --method 'dense; window:w=32'",
        2,
        '--method takes one method, or "A + B" ... got \'dense; win',
    ),
    (f"{GENERATE} --method dense,window:w=32", 2, "--method takes one method ... got 'dense,window:w=32'"),
    (f"{GENERATE} --method window:w=32,nothing", 2, "window has no parameter 'nothing'"),
    ("eval ruler --methods dense --methods windo", 2, "did you mean 'window'"),
    ("eval ruler --methods ' ; '", 2, "No method was given; name at least one"),
    (
        f"{RULER} --methods dense,window:w=32",
        2,
        'by ";": write "dense; window:w=32"; got \'dense,window:w=32\'',
    ),
    (f"{NEEDLE} --methods window:w=32,dense", 2, 'write "window:w=32; dense"'),
    (f"{PPL} --methods quest:k=64,page=16,windo:w=32", 2, 'write "quest:k=64,page=16; windo:w=32"'),
    (f"{SPEED} --methods 'dense, quest'", 2, 'write "dense; quest"'),
    ("tune --methods quest,dense", 2, '--methods separates methods by ";"'),
    # --- models
    ("generate -p x --model ./nowhere", 2, "no folder or file './nowhere'"),
    ("generate -p x --model smollm-135m", 2, "did you mean the alias 'smollm2-135m'"),
    ("doctor --model ./nowhere", 2, "no folder or file './nowhere'"),
    # --- prompts and texts
    ("generate -p ' '", 2, "The prompt is empty"),
    ("generate -p x --prompt-file y", 2, "Both --prompt and --prompt-file were given; give one."),
    ("generate --prompt-file /no/such.txt", 2, "/no/such.txt cannot be read: No such file"),
    ("generate --prompt-file {binary}", 2, "is not UTF-8 text"),
    ("calibrate --text /no/text --out {out}", 2, "no text at /no/text"),
    ("eval needle --text /no/text", 2, "no text at /no/text"),
    # --- nothing, and what is no text
    (f"{RULER} --tasks ''", 2, f"An empty value follows --tasks: {EMPTY}"),
    (f"{RULER} --tasks ' , '", 2, "no ruler task was given; give 'all', 'synthetic' or some of "),
    ("eval needle --out ''", 2, f"An empty value follows --out: {EMPTY}"),
    ("eval needle --out=", 2, f"An empty value follows --out: {EMPTY}"),
    ("generate -p x --model ''", 2, f"An empty value follows --model: {EMPTY}"),
    ("eval ppl --text ''", 2, f"An empty value follows --text: {EMPTY}"),
    (f"{PLAN} --gpu-memory ''", 2, f"An empty value follows --gpu-memory: {EMPTY}"),
    ("generate -p ''", 2, f"An empty value follows -p: {EMPTY}"),
    ("generate -p caf\udce9", 2, "The argument 'caf\\xe9' is not UTF-8 text: give it in UTF-8"),
    ("eval ruler --out /tmp/\udcff", 2, "The argument '/tmp/\\xff' is not UTF-8 text"),
    # --- numbers of tokens
    (f"{GENERATE} --max-new-tokens x", 2, f"--max-new-tokens {NUMBER} 'x'"),
    (f"{GENERATE} --max-new-tokens 0", 2, f"--max-new-tokens {NUMBER} '0'"),
    (f"{GENERATE} --prefill-chunk 1.3K", 2, f"--prefill-chunk {NUMBER} '1.3K'"),
    (f"{GENERATE} --crossover soon", 2, f"--crossover, if not \"auto\", {NUMBER} 'soon'"),
    (f"{GENERATE} --crossover 1,2", 2, f"--crossover, if not \"auto\", {NUMBER} '1,2'"),
    ("inspect -p x --method pbs --block 4KB", 2, f"--block {NUMBER} '4KB'"),
    (f"{CALIBRATE} --tokens 1Q", 2, f"--tokens {NUMBER} '1Q'"),
    (f"{CALIBRATE} --window -1", 2, f"--window {NUMBER} '-1'"),
    ("tune --methods quest --lengths 1K,x", 2, f"--lengths {NUMBER} 'x'"),
    (f"{RULER} --lengths 4Q", 2, f"--lengths {NUMBER} '4Q'"),
    (
        f"{RULER} --lengths ' '",
        2,
        "--lengths was given no number; give at least one, such as --lengths 4096.",
    ),
    (f"{RULER} --lengths 9000", 2, "9000 tokens, but tiny has 2048 positions ... --rope yarn:5"),
    (f"{RULER} --lengths 1M", 2, "1048576 tokens, but tiny has 2048 positions"),
    (f"{RULER} --lengths 64 --tasks niah_single_1", 2, "64 ... length"),
    (f"{PPL} --lengths 9000", 2, "tiny has 2048 positions"),
    (f"{PPL} --context 9000", 2, "--context is not an option of this command; give --lengths"),
    (f"{SPEED} --lengths 9K", 2, "tiny has 2048 positions"),
    (f"{SPEED} --new-tokens none", 2, f"--new-tokens {NUMBER} 'none'"),
    # --- other options
    ("generate -p x --rope yarn", 2, 'no number after the colon: write "yarn:4"'),
    ("generate -p x --rope yarn:100000:1", 2, 'write "yarn:4"'),
    ("generate -p x --rope yarn:1Q", 2, 'write "yarn:4"'),
    (f"{GENERATE} --rope yarn:1K", 2, "--rope yarn:1024 means 1024 positions ... already has 2048"),
    (
        f"{GENERATE} --dtype int3",
        2,
        "Unknown --dtype 'int3'; it is one of auto, bfloat16 or bf16, float16 or fp16, ",
    ),
    (f"{GENERATE} --device gpu", 2, "Unknown --device 'gpu'"),
    (f"{GENERATE} --parallel magic", 2, "Unknown --parallel 'magic'"),
    ("eval ruler --batch-size 0", 2, "--batch-size is 'auto' or a positive whole number; got '0'"),
    ("eval ruler --tasks niah_sngle_1", 2, "no ruler task 'niah_sngle_1' ... niah_single_1"),
    (f"{NEEDLE} --depths 2", 2, "depth 2.0"),
    (f"{NEEDLE} --depths deep", 2, "--depths takes numbers from 0 to 1"),
    # --- recipes, and errors that name a Python argument to others
    (f"{GENERATE} --method double_sparsity", 2, "pass --recipe PATH, or 'double_sparsity:recipe=PATH'."),
    (f"{GENERATE} --method double_sparsity --recipe /no/recipe", 2, "no recipe at /no/recipe"),
    (
        f"{GENERATE} --method 'sale + double_sparsity' --recipe /no/recipe",
        2,
        "--recipe names one recipe, but ... 'sale:recipe=PATH + double_sparsity:recipe=PATH'",
    ),
    (f"{CALIBRATE} --tokens 10", 2, "windows of at least 64 tokens; got --tokens 10, --window 2048."),
    (f"{CALIBRATE} --method sale --by qk", 2, "has no option --by; it takes --start, --error."),
    (f"{CALIBRATE} --method act --sure -1", 2, "got --sure -1.0."),
    (f"{CALIBRATE} --method quest", 2, "quest is not calibrated"),
    # --- training
    ("train --text x --out {out}", 2, "Missing argument"),
    (TRAIN(method="sear"), 2, "no method 'sear' (did you mean 'seer'?)"),
    (TRAIN(method="quest"), 2, "quest has no gate that learns by distillation: give --tune lora"),
    (TRAIN(method="seer"), 2, "A window of 4096 tokens is longer than the model's 2048 positions"),
    (
        f"{TRAIN(method='seer')} --window 1024",
        2,
        "which are 4 windows of 1024; ... needs 5 at least. Give more text",
    ),
    (f"{TRAIN(method='seer')} --window 1K --lr 0", 2, "lr is a finite number above 0; got 0.0"),
    (f"{TRAIN(method='seer')} --window 1K --precision int8", 2, "precision is no, bf16 or fp16; got 'int8'"),
    (
        f"{TRAIN(method='seer')} --tune all",
        2,
        "tune is 'lora' or 'attention', or left out for gates; got 'all'",
    ),
    (f"{TRAIN(method='seer')} --rank 4", 2, "rank belongs to --tune lora or 'attention'"),
    (f"{TRAIN(method='quest')} --tune lora --window 64", 2, "quest selects nothing in prefill"),
    (f"{TRAIN(method='seer')} --window 64 --start /no/recipe", 2, "no recipe at /no/recipe"),
    # --- what cannot be written is found before a model is
    (
        "calibrate --text sotu --model ./nowhere --out {text}/recipe",
        2,
        "recipe cannot be written ... is a file",
    ),
    (
        "calibrate --text sotu --model ./nowhere --out /proc/none/recipe",
        2,
        "/proc/none/recipe cannot be written",
    ),
    (f"{PLAN} --simulate --out {{text}}", 2, "cannot be written ... give another --out."),
    # --- plan
    ("plan --model {config} --gpus 2 --length 0", 2, f"--length {NUMBER} '0'"),
    (
        "plan --model {config} --gpus 2 --length 1T --prefill-chunk 4K",
        2,
        "up to 16384 chunks ... 67108864 or more",
    ),
    ("plan --model {config} --length 4K --gpus 1000000", 2, "up to 4096 ranks ... 1000000: give fewer GPUs."),
    ("plan --model {config} --length 4K --gpus 0", 2, f"--gpus {NUMBER} '0'"),
    ("plan --model ./nowhere --length 4K --gpus 2", 2, "no folder or file './nowhere'"),
    (f"{PLAN} --gpu abacus", 2, "Unknown --gpu 'abacus'"),
    (
        f"{PLAN} --gpu-memory lots",
        2,
        "--gpu-memory takes a size from 1 byte on such as 80G or 1.5T; got 'lots'",
    ),
    (f"{PLAN} --weights {'9' * 400}", 2, "--weights takes a size"),
    (f"{PLAN} --batch-size {'9' * 400}", 2, f"--batch-size {NUMBER}"),
    (f"{PLAN} --flops -1", 2, "--flops takes a positive number; got -1."),
    (f"{PLAN} --utilisation 5", 2, "--utilisation takes a positive number, at most 1; got 5."),
    (f"{PLAN} --latency nan", 2, "--latency takes a positive number; got nan."),
    (f"{PLAN} --dtype int3", 2, "Unknown --dtype 'int3'"),
    (f"{PLAN} --method quset", 2, "no method 'quset'"),
    (f"{PLAN} --mechanism magic", 2, "no mechanism 'magic'"),
    ("plan --model {config} --length 4K --gpus 3 --tensor-parallel 2", 2, "cannot be cut into groups of 2"),
    (f"{PLAN} --ranks 1,2", 2, "belong to --simulate"),
    (f"{PLAN} --simulate --ranks 9000", 2, "--ranks takes numbers up to 4096; got 9000."),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_llama: Any) -> dict[str, Path]:
    """What a row's names in braces stand for."""
    folder = tmp_path_factory.mktemp("bad")
    tiny_llama().config.save_pretrained(folder / "config")
    (folder / "text.txt").write_text("It rained in the morning and the river rose. " * 400)
    (folder / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    names = {"config": "config", "text": "text.txt", "binary": "image.png", "out": "out"}
    return {"tiny": tiny_folder} | {name: folder / file for name, file in names.items()}


@pytest.mark.parametrize(("command", "code", "sentence"), TABLE, ids=lambda x: ascii(x)[1:60])
def test_a_bad_command_ends_in_one_sentence(
    farspan_command, places, tmp_path, monkeypatch, command, code, sentence
):
    monkeypatch.chdir(tmp_path)
    words = [word.format(**places) for word in shlex.split(command)]
    ended, out, err = farspan_command(*words, stdin="a prompt")
    assert (ended, out) == (code, ""), err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("farspan: "), err
    rest = lines[0]
    for part in sentence.split(" ... "):
        assert part in rest, f"{part!r} is not, or not in this order, in {lines[0]!r}"
        rest = rest.partition(part)[2]
    assert not places["out"].exists() and not list(tmp_path.iterdir()), "nothing is begun on bad input"


def test_tune_finds_out_first_that_it_cannot_keep_its_figures(farspan_command, places, monkeypatch):
    tune = ["tune", "--methods", "quest", "--model", "./nowhere"]
    monkeypatch.setenv("FARSPAN_CACHE", str(places["text"] / "cache"))
    code, out, err = farspan_command(*tune)
    assert (code, out) == (2, "") and "cannot be written" in err and "set FARSPAN_CACHE" in err
    monkeypatch.setenv("FARSPAN_CACHE", str(places["text"].parent))
    (places["text"].parent / "crossover.json").write_text("[]")
    code, out, err = farspan_command(*tune)
    assert (code, out) == (2, "") and "crossover.json holds no crossovers: delete it" in err


def test_a_full_disk_is_found_before_the_work(farspan_command, places, monkeypatch):
    def full(**_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    command = ["calibrate", "--text", "sotu", "--model", "./nowhere", "--out", str(places["out"])]
    code, out, err = farspan_command(*command)
    assert (code, out) == (2, "") and "out cannot be written (No space left on device)" in err


def test_the_help_of_an_empty_command_line(farspan_command):
    code, out, err = farspan_command()
    assert code == 2 and "Usage: farspan" in out and err == ""


def test_arguments_that_are_not_utf8_in_a_process_of_their_own():
    command = [os.fsencode(sys.executable), b"-m", b"farspan", b"generate", b"-p", b"caf\xe9"]
    done = subprocess.run(command, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith("farspan: The argument 'caf\\xe9' is not UTF-8 text")


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        ("Pass recipe=PATH.", "Pass --recipe PATH."),
        ("rope='yarn:4' asks for more.", "--rope yarn:4 asks for more."),
        ("got new_tokens=10, recipe=None.", "got --new-tokens 10, --recipe None."),
        ("It takes rope= and recipe=.", "It takes --rope and --recipe."),
        ("with recipe='a b'; see", "with --recipe 'a b'; see"),
        ("'act:recipe=PATH' (recipe=x) /data/rope=2 k=3 strict=True", None),
    ],
)
def test_a_python_argument_is_shown_as_its_option(sentence, shown):
    options = {"recipe": "--recipe", "rope": "--rope", "new_tokens": "--new-tokens"}
    assert as_options(sentence, options) == (shown or sentence)
