"""One decode step of one attention layer, cache update included, against transformers' SDPA with
DynamicCache.

    python -m benchmarks.decode_step [--keys 131072] [--repeats 7] [--device cuda]

Recycled is timed over a whole stride (one full step, the rest recycled) and divided by its length. The
bandwidth row is the time to read K and V once at the rate of a large copy (bytes read plus written): no dense
step can be faster. All times are the host's, until the device has done the step: the host's work is in
them, as it is where a user generates.
"""

from __future__ import annotations

import argparse
from functools import partial
from types import SimpleNamespace

import torch
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from farspan.attention.method import LayerInfo
from farspan.attention.softmax import Softmax
from farspan.attention.spec import parse_method
from farspan.runtime.hf import KVStoreLayer
from farspan.runtime.layer import Layer
from farspan.runtime.session import Session
from farspan.runtime.store.storage import parse_storage
from farspan.runtime.store.store import KVStore

from .record import interleaved, save, table

METHODS = (
    "dense",
    "window:w=1020,sinks=4",
    "double_sparsity:k=1024",
    "quest:k=1024",
    "recycled:k=1024,stride=50",
)


class Ours:
    """A patched layer on its own store."""

    def __init__(
        self, spec: str, k: torch.Tensor, v: torch.Tensor, heads: int, storage: str = "device"
    ) -> None:
        hkv, d = k.shape[1], k.shape[3]
        ranking = torch.stack([torch.randperm(d) for _ in range(hkv)])
        info = LayerInfo(
            index=2, num_heads=heads, num_kv_heads=hkv, head_dim=d, weights={"channels": ranking}
        )
        method = parse_method(spec).for_layer(info)
        session = Session(strict=True)
        make = partial(KVStore, parse_storage(storage))
        self.cache, self.steps = KVStoreLayer(make), method.cost("decode", k.shape[2]).period
        session.cached, session.stores = True, {2: self.cache.store}
        prefill = method if "prefill" in method.phases else parse_method("dense")
        self.layer = Layer(2, prefill, method, session)
        self.cache.store.append(k, v)
        self.cache.store.settle()

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.cache.store.append(k, v)
        keys, values = self.cache.store.handles()
        return self.layer(q, keys, values, None, Softmax(q.shape[-1] ** -0.5))

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        for _ in range(self.steps):
            self.step(q, k, v)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    h, hkv, d = args.heads, args.kv_heads, args.head_dim

    def random(heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, heads, length, d, device=args.device, dtype=torch.bfloat16)

    k, v = random(hkv, args.keys), random(hkv, args.keys)
    q, k1, v1 = random(h, 1), random(hkv, 1), random(hkv, 1)

    module = SimpleNamespace(num_key_value_groups=h // hkv, is_causal=True)
    theirs = DynamicCache()
    theirs.update(k, v, 0)

    def baseline() -> None:
        keys, values = theirs.update(k1, v1, 0)
        sdpa_attention_forward(module, q, keys, values, None, scaling=d**-0.5)

    target = torch.empty_like(k)
    runs = {"transformers sdpa + DynamicCache": baseline, "copy": lambda: target.copy_(k)}
    ours = {spec: Ours(spec, k, v, h) for spec in METHODS}
    runs |= {spec: (lambda one=one: one.run(q, k1, v1)) for spec, one in ours.items()}
    seconds = interleaved(runs, args.repeats)
    copy = seconds.pop("copy")
    seconds = {spec: t / (ours[spec].steps if spec in ours else 1) for spec, t in seconds.items()}
    seconds["read K and V once at copy bandwidth"] = (
        copy  # K read and written moves as many bytes as K and V read
    )
    base = seconds["transformers sdpa + DynamicCache"]
    rows = [{"step": spec, "ms": 1e3 * t, "times faster": base / t} for spec, t in seconds.items()]
    print(table(rows))
    print("written to", save("decode_step", rows, arguments=vars(args)))


if __name__ == "__main__":
    main()
