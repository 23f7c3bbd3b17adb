"""When decode steps are captured and replayed, and what a replay depends on, with a graph that stands for
CUDA's; and how many kernels a step launches."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import PAD, Feed, decode, padded, prompt, shared
from test_static import STATIC, every_static, generated, patched
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from farspan.runtime.hf import captured, returned_cache, with_cache
from farspan.runtime.hf.captured import Graph
from farspan.runtime.layer import Layer
from farspan.runtime.static_call import StaticCall
from farspan.runtime.store.static import StaticStore


class Graphs:
    """Graphs that run the captured call again, while the host believes in the lengths of the time of capture,
    and write into the tensors of the first output, as CUDA's do."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.stores: list[StaticStore] = []  # those of the present step
        self.error = ""

    def __call__(self, run: Callable[[], Any]) -> Graph:
        if self.error:
            raise RuntimeError(self.error)
        self.done["captured"] += 1
        lengths = [store.length for store in self.stores]
        output = run()
        tensors = _tensors(output)

        def replay() -> None:
            self.done["replayed"] += 1
            now = [store.length for store in self.stores]
            self._believe(lengths)
            for mine, new in zip(tensors, _tensors(run()), strict=True):
                mine.copy_(new)
            self._believe(now)

        return Graph(replay, output, lambda: self.done.update(["released"]))

    def _believe(self, lengths: list[int]) -> None:
        for store, length in zip(self.stores, lengths, strict=True):
            store.buffers.resize(length)


def _tensors(output: Any) -> list[Tensor]:
    parts = [output.last_hidden_state, *(output.hidden_states or ())]
    return parts


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """The graphs of this test, which are used on the CPU."""
    made = Graphs()
    enter = StaticCall.__enter__

    def entered(self: StaticCall) -> StaticCall:
        made.done["steps"] += 1
        made.stores = self.stores
        return enter(self)

    monkeypatch.setattr(StaticCall, "__enter__", entered)
    monkeypatch.setitem(captured.CAPTURE, "cpu", made)
    return made


@every_static
def test_replays_equal_a_growing_store(spec: str, graphs: Graphs) -> None:
    """One capture for each kind of step, a replay for each further token, and all of them freed at the
    end."""
    for inputs in (prompt(2, 41), padded((41, 38))):
        want = generated(spec, inputs)
        graphs.done.clear()
        got = generated(spec, inputs, static=64)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert got[2] == want[2]
        done = graphs.done
        assert 1 <= done["captured"] <= len(STATIC[spec]) + 1
        assert done["released"] == done["captured"]
        if not spec.startswith("recycled"):  # one kind of step is captured again when states get their place
            assert done["captured"] == len(STATIC[spec]) and done["steps"] == 19
            assert done["replayed"] == 19 - done["captured"]  # the first of a kind runs as it is


def test_other_buffers_are_captured_again(graphs: Graphs) -> None:
    model = shared("llama")
    with patched("quest:k=22,page=4,dense_layers=0", static=64):
        for rows, captures in ((1, 1), (3, 2), (2, 3)):
            decode(model, prompt(rows, 40), 6)
            assert graphs.done["captured"] == captures and graphs.done["released"] == captures - 1
            assert graphs.done["replayed"] == 4 * captures  # 5 steps, the first runs as it is
    assert graphs.done["released"] == 3


def test_the_prompt_and_several_tokens_are_never_captured(graphs: Graphs) -> None:
    model, ids = shared("llama"), prompt(1, 40)
    with patched("dense", static=64), torch.no_grad():
        for length in (1, 2, 40):  # a prompt of one token is a prompt
            model(ids[:, :length], use_cache=True)
        decode(model, ids, 12, prompt_lookup_num_tokens=6, use_cache=True)
        model(ids, use_cache=False)
    assert graphs.done["steps"] <= 11
    with patched("dense"):
        decode(model, ids, 6)
    assert graphs.done["captured"] <= 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [("not permitted when stream is capturing\nand more",) * 2, ("\n", "RuntimeError")],
    ids=["said", "unsaid"],
)
def test_what_cannot_be_captured_runs_as_it_is(graphs: Graphs, error: str, reason: str) -> None:
    graphs.error, reason = error, reason.splitlines()[0]
    model, ids = shared("llama"), prompt(1, 40)
    with patched("dense"):
        want = decode(model, ids, 8)
    with patched("dense", static=64) as patch:
        with pytest.warns(UserWarning, match=rf"not captured in a CUDA graph \({reason}"):
            assert torch.equal(decode(model, ids, 8), want)
        notices = patch.report().notices
    assert notices == {f"decode steps were not captured: {reason}": 6}
    assert not graphs.done["captured"]


def test_outputs_are_the_callers_own(graphs: Graphs) -> None:
    """A later replay leaves earlier outputs alone, hidden states of all layers included, and names the cache
    of its own call."""
    model = shared("llama")
    how: dict[str, Any] = {"output_hidden_states": True, "return_dict_in_generate": True}
    given = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    states = []
    for size in ({}, {"static": 64}):
        with patched("dense", **size):
            out = model.generate(prompt(1, 40), **given, **how)
            states.append(out.hidden_states)
            assert returned_cache(out).get_seq_length() == 47
    assert graphs.done["replayed"] == 6
    for mine, right in zip(*states, strict=True):
        assert len(mine) == len(right) and all(map(torch.equal, mine, right))


def test_adapters_have_graphs_of_their_own(graphs: Graphs) -> None:
    """What PEFT changes in its modules when adapters are switched off, and on again."""
    model = shared("llama")
    adapted = model.model.layers[0].mlp.gate_proj
    with pytest.MonkeyPatch.context() as patching, patched("dense", static=64), torch.no_grad():
        for name, value in {
            "active_adapters": ["a"],
            "merged_adapters": [],
            "disable_adapters": False,
        }.items():
            patching.setattr(adapted, name, value, raising=False)
        out = model(prompt(1, 40), use_cache=True)
        for disabled, captures in ((False, 1), (True, 2), (False, 2)):
            adapted.disable_adapters = disabled
            for _ in range(3):
                out = model(prompt(1, 1), **with_cache(model, returned_cache(out)))
            assert graphs.done["captured"] == captures


def test_a_capture_has_a_stream_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the present stream is what it was, also where a capture fails. ``torch.cuda`` is stood in for."""
    now = {"device": 0, "stream": "default"}
    used = []

    @contextmanager
    def stream(new: str) -> Iterator[None]:
        before, now["stream"] = now["stream"], new
        try:
            yield
        finally:
            now["stream"] = before

    class Capture:  # as torch's, it does not set the stream back where the capture cannot end
        def __init__(self, graph: Any, *, stream: str, capture_error_mode: str) -> None:
            used.append(stream)

        def __enter__(self) -> None:
            now["stream"] = used[-1]

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation failed")

    stand_in = SimpleNamespace(
        CUDAGraph=SimpleNamespace,
        Stream=lambda device: f"side {device}",
        stream=stream,
        current_stream=lambda: now["stream"],
        current_device=lambda: now["device"],
        graph=Capture,
    )
    monkeypatch.setattr(captured, "torch", SimpleNamespace(cuda=stand_in))
    captured._stream.cache_clear()
    for now["device"] in (0, 1, 0):
        with pytest.raises(RuntimeError, match="operation failed"):
            captured.capture_on_cuda(lambda: None)
        assert now["stream"] == "default" and not captured._one_capture.locked()
    captured._stream.cache_clear()
    assert used == ["side 0", "side 1", "side 0"]


def test_a_graph_keeps_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers of a sequence are freed with its cache, not with the next capture."""
    monkeypatch.setitem(captured.CAPTURE, "cpu", lambda run: Graph(lambda: None, run(), lambda: None))
    with patched("dense", static=64), torch.no_grad():
        out = shared("llama")(prompt(1, 40), use_cache=True)
        for _ in range(3):
            out = shared("llama")(prompt(1, 1), **with_cache(shared("llama"), returned_cache(out)))
        cache = weakref.ref(returned_cache(out).layers[0].store)
        del out
        gc.collect()
        assert cache() is None


def test_the_memory_of_the_last_call_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a reset of the report was followed by replays alone, and steps by a prompt."""
    monkeypatch.setitem(captured.CAPTURE, "cpu", lambda run: Graph(lambda: None, run(), lambda: None))
    row = 256  # bytes of a key and a value in two heads of 16 float32 numbers
    with patched("dense", static=64) as patch, torch.no_grad():

        def stored() -> tuple[int, int]:
            layer = patch.report().layers[0]
            return layer.stored_bytes, layer.dense_stored_bytes

        feed = Feed(shared("llama"), prompt(1, 60), torch.ones(1, 60).long())
        for count in (40, 1, 1, 1):
            feed(count)
        patch.reset_report()
        feed(1)
        assert stored() == (64 * row, 44 * row)
        feed(1)
        shared("llama")(prompt(3, 20), use_cache=True)
        assert stored() == (3 * 64 * row, 3 * 20 * row)


# --- launches ---------------------------------------------------------------------------------------

BUDGET = {  # launches of a layer and decode step, where the keys are cut into several splits
    "dense": 4,
    "window:w=200,sinks=3": 4,
    "quest:k=200,dense_layers=0": 6,
    "quest:k=200,dense_layers=0,gqa_reduce=none": 6,
    "double_sparsity:k=200,dense_layers=0": 6,
    "recycled:k=200,stride=40": 4,
}
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach")


class Launches(TorchDispatchMode):
    """Counts the operations that would launch a kernel, Triton's by ``counted``, and refuses host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "equal"), f"a host read: {func}"
        if not func.is_view and name not in FREE:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Counter[str]]]:
    """What each call of a layer in a step launches, by Triton's kernels under the interpreter."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    counted: list[Counter[str]] = []
    current: list[Launches] = []
    launch, call = interpreter.GridExecutor.__call__, Layer.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        for mode in current:
            mode.names[self.fn.__name__] += 1
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    def called(self: Layer, *args: Any) -> Tensor:
        if self.session.step is None:
            return call(self, *args)
        with Launches() as mode:
            current[:] = [mode]
            result = call(self, *args)
            current.clear()
        counted.append(mode.names)
        return result

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    monkeypatch.setattr(Layer, "__call__", called)
    monkeypatch.setattr(StaticStore, "impl", "triton")
    yield counted


@contextmanager
def no_host_reads(model: Any) -> Iterator[None]:
    """Around calls of the decoder: what it and its hooks do reads no tensor on the host."""
    forward = model.model.__class__.__call__

    def called(*args: Any, **kwargs: Any) -> Any:
        with Launches():
            return forward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(model.model.__class__, "__call__", called)
        yield


@pytest.mark.parametrize("spec", BUDGET)
@pytest.mark.parametrize("inputs", [prompt(1, 241), padded((241, 230))], ids=["alone", "padded"])
def test_launches_of_a_step(spec: str, inputs: Any, launches: list[Counter[str]]) -> None:
    """The budgets of static decode, and that a step with its hooks reads nothing on the host."""
    model = shared("llama")
    given = (
        {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
        if isinstance(inputs, Tensor)
        else inputs
    )
    with patched(spec, static=300), torch.no_grad():
        out = model(**given, use_cache=True)
        mask = torch.cat([given["attention_mask"], torch.ones(len(out.logits), 1).long()], 1)
        cache = returned_cache(out)
        token, position = out.logits[:, -1:].argmax(-1), mask.sum(1, keepdim=True) - 1
        with no_host_reads(model):
            model(token, mask, position, cache)
    assert len(launches) == model.config.num_hidden_layers
    for counted in launches:
        assert counted["_append"] == counted["_combine"] == 1, dict(counted)
        assert counted.total() <= BUDGET[spec], dict(counted)
