"""`farspan serve` under torchrun: rank 0 serves, the others follow, and answers are those of one process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
from openai import OpenAI

from .serving import NAME, POSITIONS, Alone, command_running, save, until

METHOD = "quest:k=64,page=8,dense_layers=0"
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
LAUNCHER += ["--rdzv-endpoint", "127.0.0.1:0", "-m", "farspan"]


@pytest.mark.slow
def test_rank_0_serves_and_the_others_follow(tmp_path: Path) -> None:
    folder = save(tmp_path / NAME)
    alone = Alone(folder, METHOD)
    options = ["--model", str(folder), "--method", METHOD, "--port", "0", "--api-key", "a secret"]
    log = tmp_path / "log"
    with command_running(log, "serve", *options, program=LAUNCHER) as (process, url):
        client = OpenAI(base_url=url, api_key="a secret", max_retries=0, timeout=120)
        text = "The river rose and fell. " * 12
        asked = {"model": str(folder), "prompt": text, "max_tokens": 9}
        for reused in (0, alone.patched.cuts.longest(len(alone.ids(text)))):
            got = client.completions.create(**asked, temperature=0)
            assert got.choices[0].text == alone.text(text, 9)
            assert got.usage is not None and got.usage.prompt_tokens_details is not None
            assert got.usage.prompt_tokens_details.cached_tokens == reused
        sampled = client.completions.create(**asked, temperature=1.0, seed=5, stream=True)
        expected = alone.text(text, 9, seed=5, do_sample=True, temperature=1.0)
        assert "".join(x.choices[0].text for x in sampled) == expected
        stream = client.completions.create(**{**asked, "max_tokens": POSITIONS - len(text)}, stream=True)
        next(iter(stream))
        stream.close()
        with pytest.raises(openai.BadRequestError, match="settings"):
            client.completions.create(
                **asked, extra_body={"generation_config": '{"top_k": "x", "do_sample": true}'}
            )
        assert client.completions.create(**asked, temperature=0).choices[0].text == alone.text(text, 9)
        page = httpx.get(url.replace("/v1", "/metrics"), headers={"Authorization": "Bearer a secret"}).text
        assert 'farspan_requests_total{endpoint="/v1/completions",status="499"} 1.0' in page
        workers = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        assert len(workers) == 2
        process.send_signal(signal.SIGINT)
        process.wait(60)
        until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    assert "a secret" not in log.read_text().replace("'--api-key', 'a secret'", "")
