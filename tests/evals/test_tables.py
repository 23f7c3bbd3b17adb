"""The tables of the commands: at every width each cell is there whole, broken between words at most."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from farspan.cli import main, output
from farspan.runtime.table import Table

WIDTHS = range(40, 201)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama, smollm2_tokenizer) -> Path:
    """A random model of two layers and a prompt."""
    folder = tmp_path_factory.mktemp("tables")
    model = tiny_llama(vocab_size=49152, max_position_embeddings=512)
    model.save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    (folder / "prompt.txt").write_text("It rained in the morning and the river rose. " * 15)
    return folder


COMMANDS = {
    "methods": "methods",
    "models": "models",
    "plan": "plan --model FOLDER --length 512 --gpus 8",
    "simulate": "plan --model FOLDER --length 1M --gpus 8 --simulate",
    "doctor": "doctor",
    "tune": "tune --model FOLDER --methods recycled:k=16,stride=4,pool=3 --lengths 64,128 --repeats 1",
    "inspect": "inspect --model FOLDER --method pbs:mass=0.7,segment=128 --layers 0 --out FOLDER/out "
    "--prompt-file FOLDER/prompt.txt",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_cell_is_whole_at_every_width(command, folder, monkeypatch, capsys):
    shown: list[Table] = []
    monkeypatch.setattr(output, "show", shown.append)
    with pytest.raises(SystemExit) as ended:
        main([part.replace("FOLDER", str(folder)) for part in COMMANDS[command].split()])
    assert not ended.value.code and shown, capsys.readouterr().err
    for table in shown:
        for width in WIDTHS:
            head, *rows = table.lines(width)
            parts = [cell.split() for cells in (table.columns, *table.rows) for cell in cells]
            longest = max(len(part) for cell in parts for part in cell)
            assert max(len(line) for lines in (head, *rows) for line in lines) <= max(width, longest + 2)
            for cells, lines in zip((table.columns, *table.rows), (head, *rows), strict=True):
                words = " ".join(lines).split()
                for cell in cells:
                    for part in cell.split():  # a method's name may be in two, after a comma or a colon
                        tight = [p for p in re.split(r"(?<=[,:])(?=[a-z])", part) if p not in words]
                        assert part in words or not tight, (width, part)


def test_a_piped_table_has_80_columns(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "farspan", "methods"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert 60 < max(map(len, done.stdout.splitlines())) <= 80
