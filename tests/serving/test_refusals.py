"""What a server refuses, with which status, in one sentence."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

import farspan
from farspan import FarspanError
from farspan.runtime.hf.serving import internals
from farspan.runtime.serving.server import Server
from farspan.runtime.serving.where import Where

from .serving import NAME, POSITIONS, Alone, Served, save, serving, until

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "letters")


@pytest.fixture(scope="module")
def served(folder: Path) -> Any:
    with serving(folder) as running:
        yield running.ready()


def sentence(response: Any, status: int) -> str:
    """The one sentence of a refusal."""
    assert response.status_code == status, response.text
    said = response.json()["error"]["message"]
    assert said.endswith(".") and "\n" not in said and "Traceback" not in said
    return str(said)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("chat/completions", b"{bad", 400, "not a JSON object"),
        ("chat/completions", b"[1]", 400, "not a JSON object"),
        ("chat/completions", {}, 400, "no 'messages'"),
        ("chat/completions", {"messages": "Hi"}, 400, "'messages' is a list"),
        ("chat/completions", {"messages": []}, 400, "at least one message"),
        ("chat/completions", {"messages": [{"content": "Hi"}]}, 400, "with a role"),
        ("chat/completions", {"messages": [{"role": "user", "content": [3]}]}, 400, "cannot be read"),
        ("chat/completions", {**CHAT, "model": "gpt"}, 404, "no model 'gpt' here; this server has 'letters'"),
        ("chat/completions", {**CHAT, "temperature": "hot"}, 400, "'temperature' is a number from 0 to 2"),
        ("chat/completions", {**CHAT, "temperature": True}, 400, "'temperature' is a number from 0 to 2"),
        (
            "chat/completions",
            {**CHAT, "max_tokens": 0},
            400,
            "'max_tokens' is a whole number from 1 on; got 0",
        ),
        ("chat/completions", {**CHAT, "n": 2}, 400, "'n' is 1"),
        ("chat/completions", {**CHAT, "stream": "yes"}, 400, "'stream' is true or false"),
        ("chat/completions", {**CHAT, "no_such": 1}, 422, "no_such"),
        ("chat/completions", {**CHAT, "generation_config": "{"}, 400, "a text with a JSON object"),
        (
            "chat/completions",
            {**CHAT, "generation_config": '{"cache_implementation": "static"}'},
            400,
            "own cache",
        ),
        ("chat/completions", {**CHAT, "generation_config": '{"num_beams": 4}'}, 400, "leave num_beams out"),
        (
            "chat/completions",
            {**CHAT, "generation_config": '{"top_k": "x", "do_sample": true}'},
            400,
            "top_k",
        ),
        ("chat/completions", {**CHAT, "logit_bias": {"9999": 1}}, 400, "cannot generate by these settings"),
        (
            "chat/completions",
            {**CHAT, "generation_config": '{"watermarking_config": {}}'},
            400,
            "cannot generate by these settings",
        ),
        (
            "chat/completions",
            {**CHAT, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            400,
            "variables",
        ),
        ("chat/completions", {**CHAT, "chat_template_kwargs": {"messages": []}}, 400, "that the server sets"),
        ("chat/completions", {**CHAT, "stop": ""}, 400, "'stop' is a text or a list of texts, none of them"),
        ("chat/completions", {**CHAT, "stop": ["a", ""]}, 400, "'stop' is a text or a list of texts, none"),
        ("chat/completions", {**CHAT, "stop": ["\u4e00"]}, 400, "cannot generate by these settings"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
            400,
            "a part of the type 'image_url'",
        ),
        (
            "responses",
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]},
            400,
            "a part of the type 'input_image'",
        ),
        ("completions", b'{"prompt": "a", "stop": ' + b"[" * 900 + b"]" * 900 + b"}", 400, ""),
        ("completions", {"prompt": ["a", "b"]}, 400, "'prompt' is a text"),
        ("completions", {"prompt": ""}, 400, "no tokens"),
        ("responses", {"input": 3}, 400, "'input' is a text or a list"),
        ("responses", {"input": [{"type": "nothing"}, {"role": 3}]}, 400, "cannot be read"),
        ("embeddings", {"input": "a"}, 404, "There is no /v1/embeddings here"),
        ("systemone", {"input": "a"}, 404, "There is no /v1/systemone here"),
    ],
)
def test_bad_requests(served: Served, path: str, body: Any, status: int, words: str) -> None:
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    headers = {"Content-Type": "application/json"}
    assert words in sentence(httpx.post(f"{served.server.url}/{path}", headers=headers, **given), status)


def test_other_methods_and_content(served: Served) -> None:
    assert "does not take GET" in sentence(httpx.get(f"{served.server.url}/completions"), 405)
    plain = {"content": b'{"prompt": "a"}', "headers": {"Content-Type": "text/plain"}}
    assert "Content-Type: application/json" in sentence(
        httpx.post(f"{served.server.url}/completions", **plain), 400
    )
    for path in ("reset", "load_model", "docs", "openapi.json"):
        sentence(httpx.get(f"{served.root}/{path}"), 404)


@pytest.mark.parametrize("stream", [False, True])
def test_too_long(served: Served, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="together more than the 1024 positions"):
        served.client.completions.create(model=NAME, prompt="a" * 1000, max_tokens=25, stream=stream)
    with pytest.raises(openai.BadRequestError, match="shorten the prompt"):
        served.client.completions.create(model=NAME, prompt="a" * POSITIONS, stream=stream)
    got = served.client.completions.create(model=NAME, prompt="a" * 1000, max_tokens=24, temperature=0)
    assert got.usage is not None and got.usage.completion_tokens == 24


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
def test_of_a_text_that_is_far_too_long_little_is_read(
    served: Served, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    inner = served.tokenizer.backend_tokenizer

    class Counting:
        def encode(self, text: str, **given: Any) -> Any:
            read.append(len(text))
            return inner.encode(text, **given)

    monkeypatch.setattr(type(served.tokenizer), "backend_tokenizer", property(lambda _: Counting()))
    text = "word " * 1_000_000
    field = {"chat/completions": "messages", "completions": "prompt", "responses": "input"}[path]
    body = {field: [{"role": "user", "content": text}] if field == "messages" else text}
    response = httpx.post(f"{served.server.url}/{path}", json=body, timeout=60)
    assert "more than 2048 tokens, and there are 1024 positions" in sentence(response, 400)
    assert 0 < sum(read) < 20_000


def test_caches_of_a_fixed_size_bound_a_request(folder: Path) -> None:
    with serving(folder, patching={"static": 64}) as served:
        client = served.ready().client
        with pytest.raises(openai.BadRequestError, match="more than the 64 positions"):
            client.completions.create(model=NAME, prompt="a" * 60, max_tokens=5)
        got = client.completions.create(model=NAME, prompt="a" * 60, temperature=0)
        assert got.choices[0].text == Alone(folder).text("a" * 60, 4)


def test_a_failure_of_one_request_leaves_the_server_alive(
    served: Served, monkeypatch: Any, caplog: Any
) -> None:
    def fails(**_: Any) -> None:
        raise KeyError('a "quoted" name')

    with monkeypatch.context() as broken:
        broken.setattr(served.model, "generate", fails)
        with caplog.at_level(logging.CRITICAL, "farspan"):
            with pytest.raises(openai.InternalServerError, match="The model has failed"):
                served.client.chat.completions.create(model=NAME, **CHAT)
            with pytest.raises(openai.APIError):
                list(served.client.chat.completions.create(model=NAME, **CHAT, stream=True))
    assert served.client.chat.completions.create(model=NAME, **CHAT).usage


def test_503_while_the_model_is_loaded_and_after_a_fault(folder: Path, monkeypatch: Any, caplog: Any) -> None:
    go_on = threading.Event()
    with serving(folder, before=go_on.wait) as served:
        until(lambda: httpx.get(f"{served.root}/metrics").status_code == 200)
        response = httpx.post(f"{served.server.url}/chat/completions", json=CHAT)
        assert "being loaded" in sentence(response, 503) and int(response.headers["Retry-After"]) > 0
        assert httpx.get(f"{served.root}/health").status_code == 503
        assert httpx.get(f"{served.server.url}/models").json()["data"][0]["status"]["value"] == "loading"
        go_on.set()
        served.ready()
        assert served.client.chat.completions.create(model=NAME, **CHAT).usage

        def broken(**_: Any) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(served.model, "generate", broken)
        with caplog.at_level(logging.CRITICAL, "farspan"):
            assert "illegal memory" in sentence(
                httpx.post(f"{served.server.url}/chat/completions", json=CHAT), 503
            )
        monkeypatch.undo()
        assert "Restart" in sentence(httpx.post(f"{served.server.url}/chat/completions", json=CHAT), 503)
        assert httpx.get(f"{served.root}/health").status_code == 503


def test_a_model_that_cannot_be_loaded_ends_the_server(folder: Path) -> None:
    def load() -> Any:
        model, tokenizer = farspan.load(folder)
        return model, tokenizer, farspan.patch(model, "double_sparsity:k=8")

    server = Server(NAME, load, Where(port=0))
    with pytest.raises(FarspanError, match="recipe"):
        server.run()


def test_a_page_on_the_web_cannot_ask_under_its_own_name(served: Served, folder: Path) -> None:
    url = f"{served.server.url}/chat/completions"
    for host, status in (("evil.example:80", 403), ("127.0.0.1.evil.example", 403), ("LOCALHOST:1", 200)):
        response = httpx.post(url, json=CHAT, headers={"Host": host})
        assert response.status_code == status
        assert status == 200 or "asked as localhost" in sentence(response, 403)
    assert httpx.get(f"{served.root}/health", headers={"Host": "[::1]:80"}).status_code == 200
    with serving(folder, api_key="a-key") as other:
        headers = {"Host": "our.server", "Authorization": "bearer a-key"}
        assert httpx.get(f"{other.server.url}/models", headers=headers).status_code == 200


@pytest.mark.parametrize("key", ["", " a", "a\n", "\u4e00"])
def test_keys_that_no_header_carries(key: str) -> None:
    with pytest.raises(FarspanError, match="choose another one"):
        Where(api_key=key)


def test_api_key(folder: Path, capfd: Any) -> None:
    with serving(folder, api_key="a secret") as served:
        served.ready()
        url = f"{served.server.url}/chat/completions"
        for headers in ({}, {"Authorization": "Bearer a secreT"}, {"Authorization": "a secret"}):
            assert "API key" in sentence(httpx.post(url, json=CHAT, headers=headers), 401)
            assert httpx.get(f"{served.root}/metrics", headers=headers).status_code == 401
        assert httpx.get(f"{served.root}/health").status_code == 200
        client = served.client.with_options(api_key="a secret")
        assert client.chat.completions.create(model=NAME, **CHAT).usage
        with pytest.raises(openai.AuthenticationError):
            served.client.chat.completions.create(model=NAME, **CHAT)
    assert "a secret" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_hosts_need_a_key(host: str) -> None:
    with pytest.raises(FarspanError, match="needs an API key"):
        Where(host=host)
    assert Where(host=host, api_key="key").host == host
    assert not any("key-123" in repr(x) for x in (Where(api_key="key-123"),))


def test_a_port_that_is_taken(served: Served) -> None:
    with pytest.raises(FarspanError, match=f"port {served.server.port} .*another --port"):
        Where(port=served.server.port).listening()


def test_what_another_release_lacks_is_named(monkeypatch: Any) -> None:
    with pytest.raises(FarspanError, match=r"transformers\.cli\.serving\.utils\.NoSuchName is missing"):
        internals.check(("utils.BaseHandler", "utils.NoSuchName"))
    with pytest.raises(FarspanError, match=r"no_such_module\.Name is missing"):
        internals.check(("no_such_module.Name",))
    monkeypatch.setitem(internals.ARGUMENTS, "server.build_server", {"model_manager"})
    with pytest.raises(FarspanError, match="build_server wants chat_handler"):
        internals.check()


def test_without_the_extra(monkeypatch: Any) -> None:
    find = internals.find_spec
    monkeypatch.setattr(internals, "find_spec", lambda name: None if name == "fastapi" else find(name))
    with pytest.raises(FarspanError, match=r"needs fastapi: run pip install 'farspan\[serving\]'"):
        internals.check()
