"""A user's fine-tuning loop under accelerate, its sequences spread over the ranks of whatever launcher
started this.

    LAUNCHER script_accelerate.py FOLDER

FOLDER holds "model" and "batch.pt"; rank 0 leaves "found.pt" there: of each run by its name its weights after
two steps, and what was refused. Ranks whose weights or order of collectives differ end with an error.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, ParallelismConfig
from accelerate.big_modeling import _attach_context_parallel_hooks
from accelerate.data_loader import prepare_data_loader
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

import farspan
from farspan.parallel.group.comm import Ranks

SPARSE = "block_topk:k=32,block=16"
STEPS, RATE = 2, 0.1
# when the patch is put on, the method, and the other options of the run
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "before, gather": ("before", "dense", {"mechanism": "gather"}),
    "after, ring": ("after", "dense", {"mechanism": "ring"}),
    "before, sparse": ("before", SPARSE, {}),
    "after, sparse, gradient checkpointing": ("after", SPARSE, {}),
    "before, ranks of a ParallelismConfig": ("before", "dense", {"mesh": "ParallelismConfig"}),
}


def load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).train()


def train(model: Any, optimizer: Any, backward: Any, batch: dict[str, torch.Tensor]) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        backward(model(**batch).loss)
        optimizer.step()


def main(folder: Path) -> None:
    # buckets of a few kilobytes: the gradients' all-reduces begin while layers still send keys in backward
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb=0.02)])
    assert accelerator.num_processes == 2
    batch = torch.load(folder / "batch.pt")
    found: dict[str, Any] = {}
    for name, (when, spec, options) in RUNS.items():
        parallel = farspan.ContextParallel(**options)
        if options.get("mesh"):
            parallel = farspan.ContextParallel(mesh=ParallelismConfig(cp_size=2))
        model = load(folder)
        if "checkpointing" in name:
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        if when == "before":
            patched = farspan.patch(model, spec, parallel=parallel)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        if when == "after":
            patched = farspan.patch(accelerator.unwrap_model(wrapped), spec, parallel=parallel)
        with recorded(wrapped) as calls, patched:
            train(wrapped, optimizer, accelerator.backward, batch)
            assert patched.report().summary["sent_bytes"] > 0
        assert_equal_on_ranks(name, calls)
        weights = accelerator.unwrap_model(wrapped).state_dict()
        assert_equal_on_ranks(name, {key: value.tolist() for key, value in weights.items()})
        found[name] = weights
        accelerator.free_memory()
    found["order"] = calls
    found["said"] = refused(accelerator, folder, batch)
    if accelerator.is_main_process:
        torch.save(found, folder / "found.pt")
    accelerator.end_training()


class recorded:
    """The collectives of farspan and of DistributedDataParallel, in the order in which this rank begins
    them."""

    def __init__(self, model: Any) -> None:
        self._original, calls = Ranks.counted, []
        self._calls: list[str] = calls

        def counted(ranks: Ranks, name: str, sent: int) -> Any:
            calls.append(f"farspan {name}")
            return self._original(ranks, name, sent)

        def reduce(group, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations, and not as text
            calls.append(f"gradients {bucket.index()}")
            return allreduce_hook(group, bucket)

        self._counted = counted
        model.register_comm_hook(None, reduce)

    def __enter__(self) -> list[str]:
        Ranks.counted = self._counted  # type: ignore[method-assign]
        return self._calls

    def __exit__(self, *_: object) -> None:
        Ranks.counted = self._original  # type: ignore[method-assign]


def assert_equal_on_ranks(name: str, mine: Any) -> None:
    every: list[Any] = [None, None]
    dist.all_gather_object(every, mine)
    assert every[0] == every[1], f"the ranks differ: {name}"


def refused(accelerator: Accelerator, folder: Path, batch: dict[str, torch.Tensor]) -> dict[str, str]:
    """What is said of a wrapped model, of accelerate's own context parallelism, and of other batches on each
    rank."""
    said = {}
    wrapped = accelerator.prepare(load(folder))
    said["wrapped"] = sentence(lambda: farspan.patch(wrapped, parallel="auto"))
    # what prepare does under ParallelismConfig(cp_size=2), which accelerate offers on GPUs alone
    model = load(folder)
    _attach_context_parallel_hooks(model)
    with farspan.patch(model, parallel="auto"):
        said["own context parallelism"] = sentence(lambda: model(**batch))
    data = DataLoader(batch["input_ids"], batch_size=1)
    model = load(folder)
    with farspan.patch(model, parallel="auto"):
        for ids in accelerator.prepare(data):
            said["other batches"] = sentence(lambda ids=ids: model(ids))
        for ids in prepare_data_loader(data, num_processes=1, process_index=0):
            said["the same batches"] = sentence(lambda ids=ids: model(ids))
    return said


def sentence(call: Any) -> str:
    try:
        call()
    except farspan.FarspanError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
