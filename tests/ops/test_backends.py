"""Which of torch's attention kernels runs on CUDA: a table of machines and calls, and what they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from farspan.attention.kv import KV
from farspan.attention.ops import kernel
from farspan.attention.ops.backends import Call, Machine, choose
from farspan.attention.ops.dispatch import implementations
from farspan.attention.ops.flash import flash
from farspan.attention.softmax import Softmax

from ..simulated import Device, Simulated
from .tools import assert_law_5, brute_mask, make_qkv, oracle

AMPERE, ADA, HOPPER, BLACKWELL, TURING = (8, 0), (8, 9), (9, 0), (10, 0), (7, 5)
NEW = 91600  # a release of cuDNN
LLAMA: dict[str, Any] = {"dtype": torch.bfloat16, "head_dim": 128, "value_dim": 128, "keys": 4096}
SQUARE = Call(**LLAMA, causal=True, grouped=True)
PAST = Call(**LLAMA)  # keys that every query sees
SINKS = Call(**LLAMA | {"keys": 4}, masked=True)
TABLE: list[tuple[Machine, Call, str]] = [
    # Plain causal attention of grouped heads
    (Machine(HOPPER, NEW), SQUARE, "cudnn"),
    (Machine(BLACKWELL, NEW), SQUARE, "cudnn"),
    (Machine((10, 3), NEW), SQUARE, "cudnn"),
    (Machine(AMPERE, NEW), SQUARE, "fa2"),
    (Machine(ADA, NEW), SQUARE, "fa2"),
    (Machine((12, 0), NEW), SQUARE, "fa2"),
    (Machine(TURING, NEW), SQUARE, "math"),
    (Machine(HOPPER, 91500), SQUARE, "fa2"),  # wrong where the length is no multiple of 128
    (Machine(HOPPER), SQUARE, "fa2"),  # no cuDNN, or switched off
    (Machine(HOPPER, NEW, deterministic=True), SQUARE, "fa2"),
    (Machine(HOPPER, NEW, flash=""), SQUARE, "cudnn"),
    (Machine(HOPPER, flash=""), SQUARE, "math"),
    (Machine(HOPPER, flash=""), SQUARE._replace(grouped=False), "efficient"),
    # FlashAttention-3 and -4, where they are activated and run on the device
    (Machine(HOPPER, NEW, flash="FA3"), SQUARE, "fa3"),
    (Machine(HOPPER, NEW, flash="FA4"), SQUARE, "fa4"),
    (Machine(BLACKWELL, NEW, flash="FA4"), SQUARE, "fa4"),
    (Machine(BLACKWELL, NEW, flash="FA3"), SQUARE, "cudnn"),
    (Machine(AMPERE, NEW, flash="FA3"), SQUARE._replace(grouped=False), "efficient"),
    (Machine(HOPPER, NEW, flash="FA3"), SQUARE._replace(head_dim=256, value_dim=256), "fa3"),
    (Machine(HOPPER, NEW, flash="FA4"), SQUARE._replace(head_dim=256, value_dim=256), "math"),
    # Heads
    (Machine(HOPPER, NEW), SQUARE._replace(head_dim=80, value_dim=80), "cudnn"),
    (Machine(HOPPER, NEW), SQUARE._replace(head_dim=256, value_dim=256), "fa2"),
    (Machine(HOPPER, NEW), SQUARE._replace(head_dim=192), "cudnn"),  # latent attention
    (Machine(HOPPER), SQUARE._replace(head_dim=192), "math"),
    (Machine(HOPPER), SQUARE._replace(head_dim=192, grouped=False), "efficient"),
    (Machine(HOPPER, NEW), SQUARE._replace(head_dim=36, value_dim=36), "math"),
    (Machine(HOPPER, NEW), SQUARE._replace(head_dim=512, value_dim=512, grouped=False), "efficient"),
    # Types
    (Machine(HOPPER, NEW), SQUARE._replace(dtype=torch.float16), "cudnn"),
    (Machine(HOPPER, NEW), SQUARE._replace(dtype=torch.float32), "math"),
    (Machine(HOPPER, NEW), SQUARE._replace(dtype=torch.float64), "math"),
    # No mask and no diagonal
    (Machine(HOPPER, NEW), PAST, "cudnn"),
    (Machine(HOPPER, NEW), PAST._replace(keys=1), "fa2"),  # cuDNN takes no single key
    (Machine(AMPERE), PAST, "fa2"),
    # Masks: sinks, bands, windows
    (Machine(HOPPER, NEW), SINKS, "efficient"),
    (Machine(HOPPER, NEW, flash="FA3"), SINKS, "efficient"),
    (Machine(AMPERE), SINKS, "efficient"),
    (Machine(TURING), SINKS, "math"),  # no bfloat16
    (Machine(TURING), SINKS._replace(dtype=torch.float16), "efficient"),
    (Machine(HOPPER, NEW), SINKS._replace(head_dim=64), "efficient"),
    (Machine(HOPPER, NEW), SINKS._replace(value_dim=60), "math"),
    (Machine(HOPPER, NEW), SINKS._replace(dtype=torch.float32), "math"),
    (Machine(HOPPER, NEW, efficient=False), SINKS, "math"),
    (Machine(HOPPER, NEW), SINKS._replace(causal=True), "math"),
]


@pytest.mark.parametrize(("machine", "call", "name"), TABLE)
def test_the_kernel_that_torch_prefers(machine: Machine, call: Call, name: str) -> None:
    assert choose(call, machine) == name


def test_switches_and_activation_are_read_when_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: NEW)
    here = torch.device("cuda", 0)
    assert choose(SQUARE, Machine.of(here)) == "fa2"  # tests of operations ask for deterministic algorithms
    torch.use_deterministic_algorithms(False)
    assert choose(SQUARE, Machine.of(here)) == "cudnn"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        assert choose(SQUARE, Machine.of(here)) == "fa2"
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3")
    assert choose(SQUARE, Machine.of(here)) == "fa3"


def test_a_dense_square_is_one_launch_and_is_named() -> None:
    """Grouped heads go to the kernel as they are, whole batches at once, and its lse comes back."""
    q, k, v = make_qkv(2, 8, 2, 100, 100, 16, dtype=torch.bfloat16)
    device = Device("cuda")
    with torch.no_grad(), device.running():
        given = device.put(q), KV(device.put(k), device.put(v)), Softmax(0.25)
        with device.counted() as counts, implementations() as ran:
            got = flash(*given)
        with implementations() as capped:
            flash(*given[:2], Softmax(0.25, 5.0), impl="eager")
    assert dict(counts.launches) == {"_scaled_dot_product_cudnn_attention": 1}
    assert ran == {("flash", "cudnn")} and capped == {("flash", "math")}
    assert isinstance(got.lse, Simulated) and got.lse.shape == (2, 8, 100)
    reference = flash(q, KV(k, v), Softmax(0.25), impl="reference")
    truth = oracle(q, k, v, brute_mask(100, 100, [0, 0]), scale=0.25)
    assert_law_5(type(got)(got.out.held, got.lse.held), reference, truth)


def test_masked_attention_is_one_kernel_under_a_bias() -> None:
    """Rows that read nothing, and a number of keys that does not fill the bias's rows."""
    q, k, v = make_qkv(2, 2, 2, 70, 5, 16, dtype=torch.bfloat16)
    mask = torch.rand(2, 1, 70, 5, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[:, :, :9] = False
    device = Device("cuda")
    with torch.no_grad(), device.running():
        put = device.put
        with device.counted() as counts, implementations() as ran:
            got = kernel.attend(put(q), KV(put(k), put(v)), Softmax(0.25), mask=put(mask))
    assert ran == {("attend", "efficient")}
    assert counts.launches.total() <= 10 and not counts.reads and not counts.uploads
    want = kernel.attend(q, KV(k, v), Softmax(0.25), mask=mask)
    assert torch.equal(got.lse.held == -torch.inf, want.lse == -torch.inf)
    assert torch.equal(got.out.held, want.out) and torch.equal(got.lse.held, want.lse)


def test_few_keys_are_few_launches_in_float32_too() -> None:
    """Nothing fuses float32: the definition's tiles grow with what a device holds."""
    q, k, v = (torch.randn(1, 2, n, 8) for n in (8192, 4, 4))
    mask = torch.ones(8192, 4, dtype=torch.bool).tril_()
    device = Device("cuda")
    with torch.no_grad(), device.running():
        put = device.put
        with device.counted() as counts, implementations() as ran:
            got = kernel.attend(put(q), KV(put(k), put(v)), Softmax(0.25), mask=put(mask)[None, None])
    assert ran == {("attend", "math")} and counts.launches.total() < 40
    want = kernel.attend(q, KV(k, v), Softmax(0.25), mask=mask[None, None])
    assert torch.allclose(got.out.held, want.out, atol=1e-6)


def test_off_cuda_there_is_no_machine_to_ask() -> None:
    """As where every implementation is asked why it cannot run, whatever the device."""
    q, k, v = make_qkv(1, 4, 2, 10, 10, 16, dtype=torch.bfloat16)
    assert not kernel.serves_groups(q, KV(k, v), Softmax(0.25))


def test_torch_is_left_what_it_serves_best() -> None:
    """Values narrower than keys: cuDNN takes them, FlashAttention does not, and the definition is no
    choice."""
    pytest.importorskip("triton")
    q, k, v = make_qkv(1, 4, 2, 70, 70, 192, dtype=torch.bfloat16)
    device = Device("cuda")
    ran = []
    with torch.no_grad(), device.running():
        given = device.put(q), KV(device.put(k), device.put(v[..., :128])), Softmax(0.07)
        for machine in (Machine(HOPPER, NEW), Machine(HOPPER)):
            with pytest.MonkeyPatch.context() as patch, implementations() as seen:
                patch.setattr(Machine, "of", lambda _, machine=machine: machine)
                flash(*given)
            ran.append(seen)
    assert ran == [{("flash", "cudnn")}, {("flash", "triton")}]
