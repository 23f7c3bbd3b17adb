"""`farspan serve` as a process, as README.md starts and asks it."""

from __future__ import annotations

import re
import shlex
import signal
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from .serving import NAME, Alone, command_running, save

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().partition("## Serve")[2].partition("\n## ")[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / NAME)


def test_the_readmes_command_and_snippet(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = next(line.strip() for line in SECTION.splitlines() if line.startswith("    farspan serve"))
    program, *arguments = shlex.split(command.replace("smollm2-135m", str(folder)).replace("8000", "0"))
    assert program == "farspan"
    monkeypatch.delenv("FARSPAN_API_KEY", raising=False)
    with command_running(tmp_path / "log", *arguments) as (process, url):
        [snippet] = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
        snippet = snippet.replace("http://127.0.0.1:8000/v1", url).replace("smollm2-135m", str(folder))
        exec(compile(snippet, "README.md", "exec"), {})
        question = [{"role": "user", "content": "What is the colour of grass?"}]
        assert capsys.readouterr().out.startswith(Alone(folder).text(question, 16))
        assert httpx.post(f"{url}/chat/completions", json={"messages": 3}).status_code == 400
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "qest"], "qest"),
        (["--storage", "no-such"], "no-such"),
        (["--host", "0.0.0.0"], "needs an API key"),
        (["--prefix-memory", "much"], "--prefix-memory takes a size"),
        (["--port", "70000"], "65535"),
        (["--model", "/no/such/folder", "--port", "0"], "no folder or file"),
    ],
)
def test_bad_options_end_in_one_sentence(
    farspan_command: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.delenv("FARSPAN_API_KEY", raising=False)
    code, out, err = farspan_command("serve", *arguments)
    [sentence] = [line for line in err.splitlines() if line.startswith("farspan: ")]
    assert code == 2 and not out and words in sentence and "Traceback" not in err
