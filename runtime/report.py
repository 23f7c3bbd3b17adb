"""The report of a patched model: what each layer read, and what dense attention would have read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, int64

from ..attention.attend import OnDevice, Reads
from ..attention.lookahead import Lookahead
from ..attention.method import DECODE, PREFILL
from ..parallel.mechanisms.call import Travel
from .measure import Measured
from .mixers import MixerReport
from .table import Table


@dataclass
class PhaseReport:
    """What one layer read in one phase, summed over calls. Over ranks, the counts are those of one rank.

    pairs: (query head, key) pairs read. causal_pairs: the pairs that dense attention would read. Their ratio
    is ``density``.
    kv_bytes: bytes of K and V read. dense_bytes: the bytes that dense attention would read.
    selection_bytes: bytes read to select the keys, in addition to kv_bytes. selecting_calls: the calls that
    read some; by methods that keep a selection, fewer than all.
    sent_bytes: bytes that this rank sent for attention. dense_sent_bytes: the bytes that dense attention
    would send, by a formula.
    mechanisms: how data moved between ranks, with the reason for each mechanism.
    implementations: by operation, the implementations that ran.
    fallbacks: by reason, the number of calls that read every visible key although the method is selective.
    measured: attention mass and seconds of a patch with measure_mass; None without it.
    on_device: counts that only the device knows, summed there, by their shape and what they count; a snapshot
    has them in pairs and kv_bytes.
    """

    method: str
    lookahead: Lookahead = field(default_factory=Lookahead)  # the one that the method declares
    calls: int = 0
    queries: int = 0
    pairs: int = 0
    causal_pairs: int = 0
    kv_bytes: int = 0
    dense_bytes: int = 0
    selection_bytes: int = 0
    selecting_calls: int = 0
    sent_bytes: int = 0
    dense_sent_bytes: int = 0
    mechanisms: dict[str, str] = field(default_factory=dict)
    implementations: dict[str, list[str]] = field(default_factory=dict)
    fallbacks: Counter[str] = field(default_factory=Counter)
    measured: Measured | None = None
    on_device: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, repr=False)

    @property
    def density(self) -> float | None:
        """The fraction of the causal pairs that was read; None before the first call."""
        return self.pairs / self.causal_pairs if self.causal_pairs else None

    def add(self, reads: Reads, queries: int, ran: Iterable[tuple[str, str]]) -> None:
        """Add one call. ran: the (operation, implementation) pairs of the call."""
        self.calls += 1
        self.queries += queries
        self.selecting_calls += reads.selection_bytes > 0
        self.pairs += reads.pairs
        self.causal_pairs += reads.causal_pairs
        self.kv_bytes += reads.kv_bytes
        self.dense_bytes += reads.dense_bytes
        self.selection_bytes += reads.selection_bytes
        for counted in reads.on_device:
            self._add_on_device(counted)
        for op, impl in ran:
            known = self.implementations.setdefault(op, [])
            if impl not in known:
                known.append(impl)
        if reads.reason:
            self.fallbacks[reads.reason] += 1

    def _add_on_device(self, counted: OnDevice) -> None:
        """Add counts to the sum of those of the same shape: one launch, and nothing waits for the device."""
        counts, each = counted.pairs
        key = (counts.shape, counts.device, each, counted.row_nbytes, counted.loads_shared_by)
        total = self.on_device.get(key)
        if total is None:
            self.on_device[key] = counts.to(int64, copy=True)
        else:
            total += counts

    def moved(self, travel: Travel) -> None:
        """Add the data that one call moved between ranks."""
        self.sent_bytes += travel.sent
        self.dense_sent_bytes += travel.dense_bytes
        self.mechanisms[travel.mechanism] = travel.why

    def snapshot(self) -> PhaseReport:
        """A copy in plain numbers; later calls do not change it."""
        pairs, kv_bytes = self.pairs, self.kv_bytes
        for (_, _, each, row_nbytes, shared_by), counts in self.on_device.items():
            known = int(counts.sum()) * each
            pairs, kv_bytes = pairs + known, kv_bytes + known * row_nbytes // shared_by
        return replace(
            self,
            pairs=pairs,
            kv_bytes=kv_bytes,
            on_device={},
            mechanisms=dict(self.mechanisms),
            implementations={op: list(impls) for op, impls in self.implementations.items()},
            fallbacks=self.fallbacks.copy(),
            measured=None if self.measured is None else self.measured.snapshot(),
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-compatible values, with the measured values at the same level."""
        known = asdict(replace(self, measured=None, on_device={})) | {
            "lookahead": str(self.lookahead),
            "fallbacks": dict(self.fallbacks),
        }
        del known["measured"], known["on_device"]
        measured = {} if self.measured is None else self.measured.to_dict()
        return {**known, "density": self.density, **measured}


@dataclass
class LayerReport:
    """The reports of one layer by phase.

    stored_by_tier: memory of the layer's cache after its last call, by tier ("device", "host", "disk"): keys,
    values and summaries, spare room of the buffers included. dense_stored_bytes: all keys and values of the
    same tokens, without spare room. Over ranks, the memory of one rank, and a rank's part.
    rows_asked, rows_hit: rows that were fetched from another memory, and those of them that were on the
    device already, because they had been read or prefetched.
    """

    layer: int
    phases: dict[str, PhaseReport]
    stored_by_tier: dict[str, int] = field(default_factory=dict)
    dense_stored_bytes: int = 0
    rows_asked: int = 0
    rows_hit: int = 0

    @property
    def stored_bytes(self) -> int:
        """The bytes of all tiers."""
        return sum(self.stored_by_tier.values())


@dataclass
class Report:
    """A snapshot of what a patched model has read so far; ``print(report)`` shows a table."""

    model: str
    layers: list[LayerReport]
    untouched: dict[int, str] = field(default_factory=dict)  # layers that are not patched, with the reason
    traffic: dict[str, int] = field(default_factory=dict)  # by collective, all bytes that this rank has sent
    notices: dict[str, int] = field(default_factory=dict)  # by notice, the number of calls that it is about
    mixers: list[MixerReport] = field(default_factory=list)  # of layers whose attention a mixer replaces

    @property
    def summary(self) -> dict[str, Any]:
        """Totals over all layers.

        They are the density of each phase (None where the phase did not run), bytes, fallbacks, the
        mechanisms that moved data between ranks, the implementation and the notices. A patch with
        measure_mass adds, for each phase, the mean recall of attention mass and the seconds of selection and
        of attention.
        """
        totals: dict[str, Any] = {}
        for phase in (PREFILL, DECODE):
            done = [layer.phases[phase] for layer in self.layers]
            causal = sum(p.causal_pairs for p in done)
            totals[f"{phase}_density"] = sum(p.pairs for p in done) / causal if causal else None
            measured = [p.measured for p in done if p.measured is not None]
            if measured:
                found = [m.recall for m in measured if m.recall is not None]
                totals[f"{phase}_mass_recall"] = sum(found) / len(found) if found else None
                for name in ("selection_seconds", "attention_seconds"):
                    totals[f"{phase}_{name}"] = sum(getattr(m, name) for m in measured)
        every = [p for layer in self.layers for p in layer.phases.values()]
        for out, name in (
            ("kv_bytes_read", "kv_bytes"),
            ("kv_bytes_dense", "dense_bytes"),
            ("selection_bytes",) * 2,
            ("sent_bytes",) * 2,
            ("sent_bytes_dense", "dense_sent_bytes"),
        ):
            totals[out] = sum(getattr(p, name) for p in every)
        totals["kv_bytes_stored"] = sum(layer.stored_bytes for layer in self.layers)
        tiers: Counter[str] = sum((Counter(layer.stored_by_tier) for layer in self.layers), Counter())
        totals["kv_bytes_stored_by_tier"] = dict(tiers)
        asked = sum(layer.rows_asked for layer in self.layers)
        totals["hit_rate"] = sum(layer.rows_hit for layer in self.layers) / asked if asked else None
        totals["kv_bytes_stored_dense"] = sum(layer.dense_stored_bytes for layer in self.layers)
        totals["fallbacks"] = dict(sum((p.fallbacks for p in every), Counter()))
        totals["mechanisms"] = {name: why for p in every for name, why in p.mechanisms.items()}
        totals["implementation"] = _implementation(every)
        totals["notices"] = dict(self.notices)
        return totals

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON-compatible values."""
        return {
            "model": self.model,
            "summary": self.summary,
            "layers": [
                {
                    "layer": layer.layer,
                    "stored_bytes": layer.stored_bytes,
                    "stored_by_tier": dict(layer.stored_by_tier),
                    "dense_stored_bytes": layer.dense_stored_bytes,
                    **{phase: p.to_dict() for phase, p in layer.phases.items()},
                }
                for layer in self.layers
            ],
            "traffic": dict(self.traffic),
            "untouched": {str(layer): reason for layer, reason in self.untouched.items()},
            "notices": dict(self.notices),
            "mixers": [asdict(mixer) for mixer in self.mixers],
        }

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int | None = None) -> str:
        """A table of what each method read, followed by sentences on totals, fallbacks and notices.

        width: the largest width of the table in terminal cells; None sets no limit.
        """
        measured = any(p.measured is not None for layer in self.layers for p in layer.phases.values())
        totals = self.summary
        lines = [f"{self.model}: what attention read"]
        lines += [line for row in self._table(measured).lines(width) for line in row]
        lines.append(
            f"total: {as_bytes(totals['kv_bytes_read'])} of K and V for {as_bytes(totals['kv_bytes_dense'])} "
            f"dense, {as_bytes(totals['selection_bytes'])} to select; implementation: "
            f"{totals['implementation'] or 'none ran'}"
        )
        tiers = totals["kv_bytes_stored_by_tier"]
        if lower := {tier: size for tier, size in tiers.items() if tier != "device" and size}:
            parts = [
                f"{as_bytes(size)} {'on disk' if t == 'disk' else f'in {t} memory'}"
                for t, size in lower.items()
            ]
            lines.append(
                f"stored: {', '.join(parts)} and {as_bytes(tiers.get('device', 0))} on the device, where all "
                f"keys and values take {as_bytes(totals['kv_bytes_stored_dense'])}"
            )
            if totals["hit_rate"] is not None:
                lines.append(f"rows that were on the device already: {as_percent(totals['hit_rate'])}")
        elif totals["kv_bytes_stored"] < totals["kv_bytes_stored_dense"]:
            lines.append(
                f"stored: {as_bytes(totals['kv_bytes_stored'])} where all keys and values take "
                f"{as_bytes(totals['kv_bytes_stored_dense'])}"
            )
        for phase in (PREFILL, DECODE) if measured else ():
            chosen, read = totals[f"{phase}_selection_seconds"], totals[f"{phase}_attention_seconds"]
            if chosen or read:
                lines.append(f"{phase}: selection {as_seconds(chosen)} of {as_seconds(chosen + read)}")
        if measured:
            lines.append(
                "mass: the share of the true attention that falls on the keys read, on sampled queries"
            )
        if totals["mechanisms"]:
            lines.append(
                f"over ranks: this one sent {as_bytes(totals['sent_bytes'])} for attention where dense sends "
                f"{as_bytes(totals['sent_bytes_dense'])}; {as_bytes(sum(self.traffic.values()))} in all"
            )
            lines += [f"  {name}: {why}" for name, why in sorted(totals["mechanisms"].items())]
        prefills = [layer.phases[PREFILL] for layer in self.layers]
        for method in sorted({p.method for p in prefills if p.calls and p.lookahead.is_prompt}):
            lines.append(f"{method} selects by a prompt's last queries: no likelihoods of its earlier tokens")
        for reason, count in sorted(totals["fallbacks"].items()):
            lines.append(f"read everything in {count} layer calls: {reason}")
        for reason, count in sorted(self.notices.items()):
            lines.append(f"in {count} calls of the model: {reason}")
        for name, size, grows in sorted({x.kind for x in self.mixers}):
            same = [x for x in self.mixers if x.kind == (name, size, grows)]
            pairs, more = (
                ("pairs not counted", f", {as_bytes(grows)} more a token") if grows else ("no pairs", "")
            )
            lines.append(
                f"mixer {name} in layers {_ranges([x.layer for x in same])}: {pairs}, a state of "
                f"{as_bytes(size)} a row and layer{more}; {sum(x.calls for x in same)} calls"
            )
        for reason in sorted(set(self.untouched.values())):
            names = _ranges([layer for layer, why in self.untouched.items() if why == reason])
            lines.append(f"not patched, layers {names}: {reason}")
        return "\n".join(lines)

    def _table(self, measured: bool) -> Table:
        mass = ("mass",) if measured else ()
        table = Table("layers", "phase", "method", "density", "KV read", "of dense", *mass, numbers_from=3)
        for layers, phase, p, recall in self._grouped():
            if p.calls:
                of_dense = as_percent(p.kv_bytes / p.dense_bytes if p.dense_bytes else None)
                cells = (layers, phase, p.method, as_percent(p.density), as_bytes(p.kv_bytes), of_dense)
                table.add_row(*cells, *([as_percent(recall)] if measured else []))
        return table

    def _grouped(self) -> list[tuple[str, str, PhaseReport, float | None]]:
        """(layers, phase, sum, mean recall of attention mass) of the layers that ran one method in a
        phase."""
        groups: dict[tuple[str, str], tuple[list[int], PhaseReport, list[float]]] = {}
        for phase in (PREFILL, DECODE):
            for layer in self.layers:
                p = layer.phases[phase]
                layers, total, found = groups.setdefault((phase, p.method), ([], PhaseReport(p.method), []))
                layers.append(layer.layer)
                for name in ("calls", "pairs", "causal_pairs", "kv_bytes", "dense_bytes"):
                    setattr(total, name, getattr(total, name) + getattr(p, name))
                if p.measured is not None and p.measured.recall is not None:
                    found.append(p.measured.recall)
        return [
            (_ranges(layers), phase, total, sum(found) / len(found) if found else None)
            for (phase, _), (layers, total, found) in groups.items()
        ]


def _implementation(phases: Iterable[PhaseReport]) -> str:
    """The one implementation that ran, such as "eager"; where operations differ, the implementation of each,
    such as "block_sparse triton, scores eager"."""
    ran = {(op, impl) for p in phases for op, impls in p.implementations.items() for impl in impls}
    names = sorted({impl for _, impl in ran})
    return names[0] if len(names) == 1 else ", ".join(f"{op} {impl}" for op, impl in sorted(ran))


def _ranges(layers: list[int]) -> str:
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return text if len(text) <= 8 else f"{len(layers)} of them"


def as_percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def as_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def as_bytes(count: float) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
