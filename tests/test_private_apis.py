"""Private APIs of torch, transformers and accelerate: each in one module per layer, and still there.

After an update that removes or changes one of them, the failing test names it, the release, and the module
that uses it. A test also finds private names in any other module of the package.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from farspan.attention.ops import torch_private
from farspan.runtime.hf import transformers_private

ROOT = Path(__file__).parents[1]
LAYERS = ("attention", "parallel", "runtime", "evals", "cli")
SHIMS = (
    "attention/ops/torch_private.py",
    "parallel/group/c10d.py",
    "runtime/hf/transformers_private.py",
    "runtime/hf/serving/internals.py",
    "evals/private_apis.py",
)
CHECKED_BY_WHAT_IT_DOES = {
    "__code__",
    "__globals__",  # by a test below
    "_attn_implementation_internal",
    "_non_persistent_buffers_set",
    "_hf_hook",
    "getsource",
    "__closure__",
    "_version",
}
BELONGS_TO_PYTHON = {"_replace", "_asdict", "_fields"}  # of a NamedTuple

# (shim, the name in it, what it takes there: by place, then by keyword; None for what is not called)
USED: list[tuple[str, str, int | None, tuple[str, ...]]] = [
    (SHIMS[0], "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", 5, ("attn_mask", "scale")),
    (SHIMS[0], "torch.ops.aten._scaled_dot_product_flash_attention", 5, ("scale",)),
    (SHIMS[0], "torch.ops.aten._scaled_dot_product_cudnn_attention", 7, ("scale",)),
    (SHIMS[0], "torch.ops.aten._scaled_dot_product_efficient_attention", 7, ("scale",)),
    (SHIMS[0], "torch.ops.aten._int_mm", 2, ()),  # what torch._int_mm calls, with a signature to read
    (SHIMS[0], "torch._int_mm", None, ()),
    (SHIMS[0], "torch.ops.mkldnn._linear_pointwise", 6, ()),
    (SHIMS[0], "torch.cpu._is_vnni_supported", 0, ()),
    (SHIMS[0], "torch.cpu._is_avx512_bf16_supported", 0, ()),
    (SHIMS[0], "torch.cpu._is_amx_tile_supported", 0, ()),
    (SHIMS[0], "torch._dynamo.config.fail_on_recompile_limit_hit", None, ()),
    (SHIMS[0], "torch._dynamo.exc.TorchDynamoException", None, ()),
    (SHIMS[0], "torch._dynamo.exc.FailOnRecompileLimitHit", None, ()),
    (SHIMS[1], "torch.distributed.distributed_c10d._get_default_store", 0, ()),
    (
        SHIMS[1],
        "torch.distributed.distributed_c10d._new_process_group_helper",
        6,
        ("timeout", "group_desc"),
    ),
    (SHIMS[1], "torch.distributed.distributed_c10d._world.pg_group_ranks", None, ()),
    (SHIMS[2], "transformers.GenerationConfig._get_default_generation_params", 0, ()),
    (SHIMS[2], "transformers.PreTrainedConfig._attn_implementation", None, ()),
    (SHIMS[2], "transformers.cache_utils.get_layer_types_and_kwargs", 1, ()),
    (SHIMS[2], "transformers.masking_utils.causal_mask_function", None, ()),
    (SHIMS[2], "transformers.masking_utils.sliding_window_overlay", 1, ()),
    (SHIMS[2], "transformers.masking_utils.find_packed_sequence_indices", 1, ()),
    (SHIMS[2], "transformers.models.qwen3_next.modeling_qwen3_next.apply_mask_to_padding_states", 2, ()),
    (SHIMS[3], "transformers.cli.serving.utils._StreamError", 1, ()),
]


@pytest.mark.parametrize(("shim", "name", "places", "keywords"), USED, ids=[name for _, name, *_ in USED])
def test_it_is_there_and_takes_what_it_is_given(
    shim: str, name: str, places: int | None, keywords: tuple[str, ...]
):
    library = name.split(".")[0]
    where = f"{name} of {library} {version(library)}, which farspan's {shim} uses,"
    found = _find(name)
    assert found is not _GONE, f"{where} is gone"
    if places is None:
        return
    if hasattr(found, "default"):  # one of torch's operators
        schema = found.default._schema.arguments
        takes = {a.name for a in schema}
        by_place = [a.name for a in schema if not a.kwarg_only]
        required = [a.name for a in schema if not a.has_default_value()]
    else:
        parameters = inspect.signature(found).parameters.values()
        takes = {p.name for p in parameters}
        by_place = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        required = [p.name for p in parameters if p.default is p.empty]
    assert places <= len(by_place), f"{where} takes only {len(by_place)} arguments by place, not {places}"
    assert takes.issuperset(keywords), f"{where} no longer takes {', '.join({*keywords} - takes)}"
    missing = {*required} - {*by_place[:places], *keywords}
    assert not missing, f"{where} now asks for {', '.join(sorted(missing))} as well"


_GONE = object()


def _find(name: str) -> Any:
    """What a dotted name stands for; _GONE where there is none."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:]:
            try:
                found = getattr(found, part)
            except AttributeError:
                return _GONE
        return found
    return _GONE


def test_a_name_that_is_gone_is_named():
    with pytest.raises(
        AssertionError, match=r"torch\._no_such_name of torch .*torch_private.py uses, is gone"
    ):
        test_it_is_there_and_takes_what_it_is_given(SHIMS[0], "torch._no_such_name", 0, ())
    with pytest.raises(AssertionError, match="no longer takes colour"):
        test_it_is_there_and_takes_what_it_is_given(SHIMS[0], "torch.ops.aten._int_mm", 2, ("colour",))
    with pytest.raises(AssertionError, match="now asks for mat2 as well"):
        test_it_is_there_and_takes_what_it_is_given(SHIMS[0], "torch.ops.aten._int_mm", 1, ())


# --- what they do ----------------------------------------------------------------------------------------


def test_the_cpu_kernel_returns_output_and_lse():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    out, lse = torch_private.flash_attention_cpu(q, k, v, causal=True, bias=None, scale=0.3)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    logits = (q @ k.transpose(-1, -2) * 0.3).masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(out, logits.softmax(-1) @ v)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1))


def test_products_of_int8_are_exact():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (32, 32), generator=generator, dtype=torch.int8) for _ in range(2))
    assert torch.equal(torch_private.int8_matmul(a, b).long(), a.long() @ b.long())


def test_long_products_of_few_rows_equal_those_in_float64():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 3, 5000, generator=generator)
    b = torch.randn(1, 5000, 24, generator=generator)
    expected = a.double() @ b.double()
    torch.testing.assert_close(torch_private.wide_product(a, b).double(), expected, rtol=1e-5, atol=1e-3)


def test_masks_of_transformers_are_recognised():
    from transformers.masking_utils import (
        and_masks,
        causal_mask_function,
        chunked_causal_mask_function,
        sliding_window_causal_mask_function,
    )

    sliding = sliding_window_causal_mask_function(4)
    assert transformers_private.is_causal_mask(causal_mask_function)
    assert transformers_private.is_sliding_window_mask(sliding)
    chunked = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
    for other in (chunked, and_masks(sliding, chunked)):
        assert not transformers_private.is_causal_mask(other)
        assert not transformers_private.is_sliding_window_mask(other)


def test_packed_sequences_are_found():
    assert transformers_private.finds_packed_sequences(torch.tensor([[0, 1, 2, 0, 1]]))
    assert not transformers_private.finds_packed_sequences(torch.arange(5)[None])


def test_attention_classes_call_attention_by_the_name_in_the_config():
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

    release = f"transformers {version('transformers')}"
    calls = transformers_private.calls_attention_interface
    assert calls(LlamaAttention.forward), f"LlamaAttention of {release} no longer says attention_interface"
    assert calls(LlamaMLP.forward) is False
    assert calls(eval("lambda self, x: x")) is None


def test_the_attention_of_one_config_is_set_and_reset():
    from transformers import LlamaConfig

    config = LlamaConfig(attn_implementation="eager")
    assert transformers_private.attention_of(config) == "eager"
    transformers_private.set_attention(config, "farspan")
    assert config._attn_implementation == "farspan", f"{transformers_private.ATTENTION} is gone"
    transformers_private.reset_attention(config)
    assert transformers_private.attention_of(config) is None
    assert transformers_private.attention_of(None) is None


def test_the_cache_says_which_layers_it_makes():
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    release = f"transformers {version('transformers')}"
    cache = DynamicCache()
    assert transformers_private.replicated_layer(cache) is DynamicLayer, f"not so in {release}"
    assert not transformers_private.is_offloading(cache)
    assert transformers_private.is_offloading(DynamicCache(offloading=True)), f"not so in {release}"


def test_the_names_of_scans_in_the_files_of_hybrid_models():
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    release = f"transformers {version('transformers')}"
    for layer, name in (
        (FalconH1Mixer, "mamba2_chunk_scan"),
        (Qwen3NextGatedDeltaNet, "torch_chunk_gated_delta_rule"),
    ):
        assert transformers_private.global_of(layer.forward, name) is not None, f"not so in {release}"
        other = transformers_private.with_globals(layer.forward, {name: 3})
        assert other.__globals__[name] == 3 and layer.forward is not other
        assert transformers_private.global_of(layer.forward, name) != 3


def test_saved_buffers_and_hooks_are_told_apart():
    from accelerate.hooks import ModelHook, add_hook_to_module

    from farspan.evals import private_apis

    module = nn.Linear(2, 2)
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    assert private_apis.is_saved(module, "kept") and not private_apis.is_saved(module, "scratch")
    assert not private_apis.has_accelerate_hook(module)
    add_hook_to_module(module, ModelHook())
    assert private_apis.has_accelerate_hook(module), f"not so in accelerate {version('accelerate')}"


# --- nobody else names them --------------------------------------------------------------------------------


def test_private_names_are_used_in_the_shims_alone():
    trees = {
        str(file.relative_to(ROOT)): ast.parse(file.read_text())
        for layer in LAYERS
        for file in sorted((ROOT / layer).rglob("*.py"))
    }
    own = {name for tree in trees.values() for name in _defined(tree)} | BELONGS_TO_PYTHON
    wrong = [
        f"{file}:{line} uses {name}"
        for file, tree in trees.items()
        if file not in SHIMS
        for line, name in _foreign(tree, own)
    ]
    assert not wrong, f"private names belong into {', '.join(SHIMS)}: {'; '.join(wrong)}"


@pytest.mark.parametrize("shim", SHIMS)
def test_every_private_name_of_a_shim_is_checked(shim: str):
    tree = ast.parse((ROOT / shim).read_text())
    checked = {part for file, name, *_ in USED if file == shim for part in name.split(".")}
    used = {name.split(".")[-1] for _, name in _foreign(tree, set(_defined(tree)))} - {"aten"}
    missing = sorted(used - checked - CHECKED_BY_WHAT_IT_DOES - {"distributed_c10d"})
    assert not missing, f"{shim}: {', '.join(missing)} are in no test"
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    silent = [f.name for f in functions if not f.name.startswith("_") and not ast.get_docstring(f)]
    assert not silent, f"{shim}: {', '.join(silent)} do not say what they stand for"


def test_the_search_finds_what_it_should():
    for code in (
        "torch._int_mm(a, b)",
        "torch.ops.aten.add(a, b)",
        "x.model._hidden",
        "getattr(config, '_attn_implementation')",
        "from torch._dynamo import config",
        "import torch._inductor.config",
        "from transformers.utils import _helper",
        "from torch.distributed import distributed_c10d",
        "import torch.distributed.distributed_c10d as c10d",
        "inspect.getsource(forward)",
        "getattr(f, '__closure__')",
        "f.__code__.co_names",
        "NAME = '_attn_implementation_internal'",
    ):
        assert list(_foreign(ast.parse(code), set())), code
    for code in ("self._x", "super()._map(1)", "x._ours", "from .tools import _ours", "a.__class__", "'_x_'"):
        assert not list(_foreign(ast.parse(code), {"_ours", "_map"})), code


def _defined(tree: ast.AST) -> list[str]:
    """Private names that a module defines: functions, classes, variables, attributes of self."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) in ("self", "cls")
        ):
            found.append(node.attr)
    return [name for name in found if _private(name)]


_BY_NAME = {"getattr", "setattr", "delattr", "hasattr"}
_INTROSPECTION = {"__closure__", "__code__", "__globals__"}


def _foreign(tree: ast.AST, own: set[str]) -> list[tuple[int, str]]:
    """(line, what) of each use of a private name that the package does not define."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            mine = ast.unparse(node.value) in ("self", "cls") or node.attr in own
            if (
                (_private(node.attr) and not mine)
                or node.attr in _INTROSPECTION
                or text == "torch.ops.aten"
                or node.attr in ("getsource", "getsourcelines")
            ):
                names = [text]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in _BY_NAME:
            names = [
                x.value
                for x in node.args[1:2]
                if isinstance(x, ast.Constant) and isinstance(x.value, str) and _strange(x.value, own)
            ]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            value = node.value.value
            if isinstance(value, str) and value.isidentifier() and _strange(value, own):
                names = [value]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if _strange_path(a.name)]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module != "__future__":
            paths = [f"{node.module}.{a.name}" for a in node.names]
            names = [path for path in paths if _strange_path(path)]
        found += [(node.lineno, name) for name in names]
    return found


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def _strange(name: str, own: set[str]) -> bool:
    ours = name in own or name.startswith("_farspan")
    return name in _INTROSPECTION or (_private(name) and not ours)


def _strange_path(path: str) -> bool:
    parts = path.split(".")
    return any(map(_private, parts)) or "distributed_c10d" in parts


def test_a_tensors_version_counts_its_changes() -> None:
    x = torch.zeros(3)
    before = torch_private.version_of(x)  # torch's _version
    x += 1
    assert torch_private.version_of(x) == before + 1
    with torch.inference_mode():
        assert torch_private.version_of(torch.zeros(3)) == -1
