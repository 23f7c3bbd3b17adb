"""Which model a folder is about: the same content is the same model, whatever it is called; other is not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan.evals.identity import identify
from farspan.evals.results import ResultsError, read
from farspan.evals.run import run
from farspan.runtime.rope import stretch

_spec = importlib.util.spec_from_file_location("farspan_tests_tiny", Path(__file__).with_name("tiny.py"))
assert _spec is not None and _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


def differing(a: dict, b: dict) -> set[str]:
    return {name for name in a if a[name] != b[name]}


@pytest.fixture
def model() -> Any:
    return tiny.tiny_model()


@pytest.fixture
def identity(model: Any) -> dict:
    return identify(model, tiny.CharTokenizer())


def test_a_copy_under_another_path_is_the_same_model(model: Any, identity: dict, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    for path in (tmp_path / "a", f"{tmp_path}/./b/", tmp_path / "shards"):
        loaded = AutoModelForCausalLM.from_pretrained(path)
        assert identify(loaded, tiny.CharTokenizer()) == identity, path
    assert list((tmp_path / "shards").glob("model-00002-of-*"))


@pytest.mark.parametrize("name", [name for name, _ in tiny.tiny_model().named_parameters()])
def test_one_bit_of_any_weight_makes_another_model(model: Any, identity: dict, name: str) -> None:
    weight = model.get_parameter(name).detach().view(-1).view(torch.int32)
    weight[len(weight) // 2 + 1] ^= 1
    assert differing(identity, identify(model, tiny.CharTokenizer())) == {"weights"}


def test_rows_that_have_changed_places_make_another_model(model: Any, identity: dict) -> None:
    weight = model.model.layers[1].mlp.down_proj.weight.detach()
    weight[[3, 4]] = weight[[4, 3]]
    assert differing(identity, identify(model, tiny.CharTokenizer())) == {"weights"}


def test_stretched_positions_count_by_what_they_come_to(model: Any, identity: dict) -> None:
    found = []
    for rope in ("yarn:2", "yarn:2.0", " YARN:4096", "yarn:3"):
        copy = tiny.tiny_model()
        stretch(copy.config, rope)
        found.append(identify(copy, tiny.CharTokenizer()))
    assert model.config.max_position_embeddings == 2048
    assert found[0] == found[1] == found[2]
    assert differing(found[0], found[3]) == differing(found[0], identity) == {"config"}


def test_end_tokens_belong_to_the_model(model: Any, identity: dict) -> None:
    model.generation_config.eos_token_id = [2, 7]
    assert differing(identity, identify(model, tiny.CharTokenizer())) == {"config"}


def test_tokenizer_and_chat_template_are_told_apart(model: Any, smollm2_tokenizer: Any) -> None:
    from copy import deepcopy

    before = identify(model, smollm2_tokenizer)
    other = deepcopy(smollm2_tokenizer)
    other(["a", "b c d"], padding=True, truncation=True, max_length=2)  # how it was last called is no matter
    other.model_max_length = 77
    assert identify(model, other) == before
    other.chat_template += " "
    assert differing(before, identify(model, other)) == {"chat_template"}
    other.chat_template = None
    assert identify(model, other)["chat_template"] is None
    other = deepcopy(smollm2_tokenizer)
    other.add_tokens(["farspan"])
    assert differing(before, identify(model, other)) == {"tokenizer"}


def test_a_tokenizer_that_shows_nothing_counts_by_what_it_does(model: Any, identity: dict) -> None:
    class Lower(tiny.CharTokenizer):
        def __call__(self, text: str, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(text.lower(), *args, **kwargs)

    assert differing(identity, identify(model, Lower())) == {"tokenizer"}


@pytest.mark.parametrize("disk", [False, True])
def test_offloaded_weights_count_by_content(model: Any, identity: dict, tmp_path: Path, disk: bool) -> None:
    from accelerate import cpu_offload, disk_offload

    where = {"execution_device": torch.device("cpu")}
    model = disk_offload(model, tmp_path, **where) if disk else cpu_offload(model, **where)
    assert all(weight.is_meta for weight in model.parameters())
    assert identify(model, tiny.CharTokenizer()) == identity
    assert all(weight.is_meta for weight in model.parameters())


def test_weights_made_of_several_tensors_count_by_all_of_them(model: Any) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    def found(value: float) -> dict:
        a, b = torch.ones(4), torch.full((4,), value)
        model.register_buffer("extra", TwoTensor(a, b))
        return identify(model, tiny.CharTokenizer())

    assert found(1.0) == found(1.0)
    assert differing(found(1.0), found(2.0)) == {"weights"}


def evaluate(model: Any, out: Path, name: str, **config: Any) -> Any:
    settings = {"suite": "ruler", "seed": 1, "samples": 2, **config}
    return run(tiny.setup(model, ["dense"], out, name=name, config=settings), tiny.samples(2))


def test_the_next_checkpoint_at_the_same_path_is_refused(model: Any, tmp_path: Path) -> None:
    evaluate(model, tmp_path, "chat")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    loss = model(torch.arange(3, 40)[None], labels=torch.arange(3, 40)[None]).loss
    loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 1e-6 * weight.grad
    with pytest.raises(ResultsError, match=r"\(the model's weights \"\w{16}\" there, \"\w{16}\" here\)"):
        evaluate(model, tmp_path, "chat")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_spelling_is_the_same_folder(model: Any, tmp_path: Path) -> None:
    evaluate(model, tmp_path, "chat", rope="yarn:2")
    lines = (tmp_path / "samples.jsonl").read_text()
    for name, rope in (("./chat/", "yarn:2.0"), ("/somewhere/else", None)):
        assert evaluate(model, tmp_path, name, rope=rope).complete
    assert (tmp_path / "samples.jsonl").read_text() == lines
    assert read(tmp_path)[0]["model"] == "chat"


def test_another_storage_is_another_run(model: Any, tmp_path: Path) -> None:
    """The answers are those of the device; a folder is not resumed with another storage."""
    scores = []
    for out, storage in (("device", None), ("disk", f"disk:folder={tmp_path / 'kv'}")):
        setup = tiny.setup(model, ["dense", "quest:k=8,page=4"], tmp_path / out, storage=storage)
        run(setup, tiny.samples(2))
        scores.append([(row["method"], row["score"], row["nll"]) for row in read(tmp_path / out)[1]])
    assert scores[0] == scores[1]
    with pytest.raises(ResultsError, match="storage"):
        run(tiny.setup(model, ["dense", "quest:k=8,page=4"], tmp_path / "disk"), tiny.samples(2))
