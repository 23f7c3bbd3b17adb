"""`farspan plan`: what a long prompt costs on a number of devices, predicted without running it."""

from __future__ import annotations

import dataclasses
import json as json_module
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..attention.errors import FarspanError
from . import options, output


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of a device, in place of those of its data sheet."""

    flops: Annotated[float | None, typer.Option(help="Peak TFLOP/s of a device.")] = None
    utilisation: Annotated[
        float | None, typer.Option(help="Share of the peak that is reached, up to 1 [default: 0.6].")
    ] = None
    bandwidth: Annotated[float | None, typer.Option(help="Bandwidth of its memory, GB/s.")] = None
    link_bandwidth: Annotated[
        float | None, typer.Option(help="Bandwidth of a device to others in its node, GB/s.")
    ] = None
    node_bandwidth: Annotated[
        float | None, typer.Option(help="Bandwidth of a device to other nodes, GB/s.")
    ] = None
    host_bandwidth: Annotated[
        float | None, typer.Option(help="Bandwidth from the host's memory to a device, GB/s.")
    ] = None
    disk_bandwidth: Annotated[
        float | None, typer.Option(help="Bandwidth from a disk, GB/s [default: 5].")
    ] = None
    latency: Annotated[float | None, typer.Option(help="Latency of a message, microseconds.")] = None

    def in_units(self) -> dict[str, float]:
        """The given figures in FLOP/s, bytes/s and seconds.

        Raises FarspanError for one that is not a positive number.
        """
        found = {
            "flops": _positive(self.flops, "--flops", 1e12),
            "utilisation": _positive(self.utilisation, "--utilisation", most=1.0),
            "bandwidth": _positive(self.bandwidth, "--bandwidth", 1e9),
            "link_bandwidth": _positive(self.link_bandwidth, "--link-bandwidth", 1e9),
            "node_bandwidth": _positive(self.node_bandwidth, "--node-bandwidth", 1e9),
            "host_bandwidth": _positive(self.host_bandwidth, "--host-bandwidth", 1e9),
            "disk_bandwidth": _positive(self.disk_bandwidth, "--disk-bandwidth", 1e9),
            "latency": _positive(self.latency, "--latency", 1e-6),
            "node_latency": _positive(self.latency, "--latency", 1e-6),
        }
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Options of `farspan plan`."""

    length: Annotated[int, options.tokens("Tokens of the prompt, such as 128K or 1M.")]
    gpus: Annotated[int, options.count("Devices; for one the plan compares how the cache is kept.")] = 1
    model: options.Model = options.DEFAULT_MODEL
    method: Annotated[
        str, typer.Option(help='What attention reads; "A + B" is A in prefill and B in decode.')
    ] = "dense"
    gpu: Annotated[
        str, typer.Option(help='The device: A100, H100, H200, B200, or "here": this machine, measured.')
    ] = "H100"
    gpu_memory: Annotated[
        int | None, options.memory("Memory of a device, such as 80G (GiB) [default: the device's].")
    ] = None
    tensor_parallel: Annotated[int, options.count("Devices that share each layer's weights and heads.")] = 1
    per_node: Annotated[int | None, options.count("Devices of one node [default: 8].")] = None
    prefill_chunk: Annotated[int | None, options.tokens("Read the prompt in chunks of this many tokens.")] = (
        None
    )
    batch_size: Annotated[int, options.count("Prompts at once.")] = 1
    mechanism: Annotated[str, typer.Option(help="auto, gather, ring, ulysses, usp or pass_q.")] = "auto"
    dtype: options.Dtype = "auto"
    weights: Annotated[
        int | None, options.memory("Memory of all weights, such as 35G [default: parameters x dtype].")
    ] = None
    figures: Figures
    simulate: Annotated[bool, typer.Option("--simulate", help="Replay one layer on more and more ranks.")] = (
        False
    )
    ranks: Annotated[list[str] | None, typer.Option(help="Ranks to simulate [default: 1,2,4,...,1024].")] = (
        None
    )
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the simulation's picture and JSON.")
    ] = None
    json: options.Json = False

    def device(self) -> Any:
        """The device of --gpu, with the given figures in place of those of its data sheet."""
        own = {"per_node": self.per_node, "memory": self.gpu_memory}
        figures: dict[str, Any] = self.figures.in_units()
        figures |= {name: value for name, value in own.items() if value is not None}
        return dataclasses.replace(self._named(), **figures)

    def _named(self) -> Any:
        from ..parallel.planner.device import DEVICES

        if self.gpu.lower() == "here":
            if self.gpus > 1:
                raise FarspanError("--gpu here measures one device; leave --gpus out, or name a device.")
            from ..runtime.machine import measured

            return measured()
        if self.gpu.upper() not in DEVICES:
            raise FarspanError(
                f"Unknown --gpu {self.gpu!r}; it is {', '.join(DEVICES)} or here. For another, give the "
                "nearest of them and --flops, --bandwidth, --link-bandwidth, --node-bandwidth and "
                "--gpu-memory."
            )
        return DEVICES[self.gpu.upper()]

    def counts(self) -> list[int]:
        """The numbers of ranks to simulate, ascending."""
        from ..parallel.planner.job import MOST_RANKS

        if not self.ranks:
            return [1 << n for n in range(11)]
        counts = sorted(options.whole_numbers(self.ranks, "--ranks"))
        if counts[-1] > MOST_RANKS:
            raise FarspanError(f"--ranks takes numbers up to {MOST_RANKS}; got {counts[-1]}.")
        return counts


@options.command
def plan(given: Plan) -> None:
    """Plan a long prompt: memory of each GPU, bytes moved, seconds, the best mechanism, and what does not
    fit. For one device: how long a prompt fits in each format and memory of the cache, at which speed.

    Of the model only its config is read. The figures of --gpu come from data sheets; give measured ones where
    you have them. docs/PLAN.md lists the assumptions.
    """
    if not given.simulate and (given.ranks or given.out):
        raise FarspanError("--ranks and --out belong to --simulate; give that as well.")
    device, counts = given.device(), given.counts()
    if given.out is not None:
        from ..runtime.writable import check_writable

        check_writable(given.out, "give another --out")
    from ..runtime.specs import resolve

    prefill, decode = resolve(options.one_method(given.method))
    from ..parallel.planner.job import Job
    from ..parallel.planner.plan import plan as work_out
    from ..runtime.hf.config import read_shape

    shape = read_shape(given.model, given.dtype)
    job = Job(
        model=shape,
        device=device,
        length=given.length,
        gpus=given.gpus,
        memory=device.memory,
        weights=given.weights or shape.parameters * shape.element_size,
        prefill=prefill,
        decode=decode,
        tensor=given.tensor_parallel,
        chunk=given.prefill_chunk,
        batch=given.batch_size,
        mechanism=given.mechanism,
    )
    if given.simulate:
        return _simulate(job, counts, given.out, given.json)
    result = work_out(job)
    storages = []
    if job.gpus == 1:
        from ..parallel.planner.fits import what_fits

        storages = what_fits(job, [max(1, job.length // 2), job.length, 2 * job.length, 4 * job.length])
    if given.json:
        kept = {"storages": [dataclasses.asdict(fit) for fit in storages]} if storages else {}
        return output.show_json({**result.to_dict(), **kept})
    _show(result, storages)


def _positive(
    value: float | None, option: str, unit: float = 1.0, *, most: float = float("inf")
) -> float | None:
    if value is not None and (not 0 < value <= most or value == float("inf")):
        above = "" if most == float("inf") else f", at most {most:g}"
        raise FarspanError(f"{option} takes a positive number{above}; got {value:g}.")
    return None if value is None else value * unit


def _show(result: Any, storages: list[Any]) -> None:
    from ..parallel.mechanisms.volume import readable

    job = result.job
    where = f"{job.gpus} × {job.device.name}" + (
        f" ({job.ranks} ranks of {job.tensor})" if job.tensor > 1 else ""
    )
    fits = "fits" if result.fits else "does not fit"
    memory = output.Table(
        "memory of each GPU", "", title=f"{job.model.name}, {job.length} tokens on {where}", numbers_from=1
    )
    for name, size in result.memory.items():
        memory.add_row(_spelt(name, result), readable(size))
    memory.add_section()
    memory.add_row(f"needed ({fits})", f"{readable(result.needed)} of {readable(job.memory)}")
    output.show(memory)
    if storages:
        _show_storages(storages)
    moved = output.Table("speed" if storages else "sent by each GPU", "", numbers_from=1)
    if not storages:
        _add_sent(moved, result)
    moved.add_row("K and V read, a token", readable(result.read))
    if result.selection_read:
        moved.add_row("read to select, a token", readable(result.selection_read))
    moved.add_section()
    moved.add_row("prefill", _seconds(result.prefill_seconds))
    moved.add_row("decode, a token, at least", _seconds(result.decode_seconds))
    output.show(moved)
    if not storages:
        print(f"Mechanism: {result.choice.reason}")
    for note in result.notes:
        print(note)
    if result.fits:
        print(f"It fits into the memory; so would {result.longest} tokens.")


def _show_storages(fits: list[Any]) -> None:
    """Print the table of storages by length."""
    lengths = list(dict.fromkeys(fit.length for fit in fits))
    table = output.Table(
        "cache kept as",
        *(f"{n} tokens" for n in lengths),
        title="what fits, and the time of a token at decode",
    )
    for name in dict.fromkeys(fit.storage for fit in fits):
        row = {fit.length: fit for fit in fits if fit.storage == name}
        cells = [f"fits, {_seconds(row[n].seconds)}" if row[n].fits else "does not fit" for n in lengths]
        table.add_row(name, *cells)
    output.show(table)


def _add_sent(moved: Any, result: Any) -> None:
    """The rows about what GPUs send to each other."""
    from ..parallel.mechanisms.volume import readable

    for name, size in result.sent.items():
        mark = " (chosen)" if result.mechanisms == [name] else ""
        moved.add_row(f"prefill by {name}{mark}", readable(size))
    if "fetch" in result.mechanisms:
        moved.add_row("prefill by fetch (chosen), at most", readable(result.sent_prefill))
        moved.add_row("prefill by fetch, at least", readable(result.sent_least))
    elif len(result.mechanisms) > 1:
        mixed = " and ".join(result.mechanisms)
        moved.add_row(f"prefill by {mixed}, call by call (chosen)", readable(result.sent_prefill))
    moved.add_row("decode, a token", readable(result.sent_decode))
    moved.add_section()


def _spelt(name: str, result: Any) -> str:
    tall = "attention" if result.memory["transient"] > result.transient["mlp"] else "MLP"
    return {
        "weights": "weights",
        "kv_cache": "KV cache, its share",
        "room_to_grow": "room for the cache to grow",
        "fetched": "keys and values on the device at a time",
        "summaries": "summaries of keys",
        "states": "states of mixers",
        "transient": f"while a layer runs (its {tall})",
        "logits": "logits of the last token",
        "reserved": "left for the runtime",
    }[name]


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _simulate(job: Any, counts: list[int], out: Path | None, json: bool) -> None:
    """Show one full-attention layer on each number of ranks: strong scaling at the given length, and weak
    scaling with length / GPUs tokens on each rank."""
    from ..parallel.planner.cost import sequence_device, work
    from ..parallel.planner.simulate import scaling

    layer = next((x for x in job.model.layers if x.window is None), job.model.layers[0])
    per_rank = max(1, job.length // job.ranks)
    rows = scaling(
        work(job, layer), sequence_device(job), counts, job.length, per_rank, in_order=job.model.in_order
    )
    about = {
        "model": job.model.name,
        "device": dataclasses.asdict(sequence_device(job)),
        "length": job.length,
        "tokens_per_rank": per_rank,
        "rows": rows,
    }
    if out is not None:
        from ..parallel.planner.picture import scaling_picture

        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "scaling.json").write_text(json_module.dumps(about, indent=1) + "\n", encoding="utf-8")
            scaling_picture(rows, out / "scaling.png", f"{job.model.name}, one layer on {job.device.name}")
        except OSError as error:
            raise FarspanError(f"{out} cannot be written: {error.strerror}; give another --out.") from None
    if json:
        return output.show_json(about)
    names = list(dict.fromkeys(row["mechanism"] for row in rows))
    titles = {
        "strong": f"Strong scaling: {job.length} tokens",
        "weak": f"Weak scaling: {per_rank} tokens a rank",
    }
    for kind, title in titles.items():
        table = output.Table(
            "ranks", "best s a layer", *names, title=f"{title}; efficiency of a layer", numbers_from=0
        )
        for count in counts:
            found = {r["mechanism"]: r for r in rows if r["kind"] == kind and r["ranks"] == count}
            best = min(row["seconds"] for row in found.values())
            cells = [f"{100 * found[name]['efficiency']:.1f} %" if name in found else "–" for name in names]
            table.add_row(str(count), f"{best:.4g}", *cells)
        output.show(table)
    if out is not None:
        output.note(f"The picture and the numbers are in {out}.")
