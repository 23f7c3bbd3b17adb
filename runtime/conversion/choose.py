"""Which layers keep their attention: given by number, spaced evenly, or chosen by measurement."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...attention.checks import whole_number
from ...attention.errors import FarspanError
from .heal import Healed
from .probe import ProbeText, retrieval_loss
from .student import Student

AUTO, EVEN = "auto:", "even:"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What it costs to replace one layer alone, after the mixers were aligned.

    error: of the mixer's output, relative to the mean square of the attention's. nll, kl: the changes of the
    text's loss, and the divergence from the original model, in nats a token. retrieval: the change of the
    loss on values to look up. need: the share of this layer in the sums of kl and of retrieval over layers,
    each counted from 0 up, so that both weigh the same.
    """

    layer: int
    error: float
    nll: float
    kl: float
    retrieval: float
    need: float = 0.0


def parse_layers(given: str | Sequence[int], can: Sequence[int], count: int) -> list[int] | int:
    """The layers that keep their attention: "auto:N" gives the number N; "even:N", N evenly spaced ones of
    ``can``; else a list, or text like "0,4,8", of layer numbers, where -1 is the last.

    can: the layers that can be converted. count: all layers. Raises FarspanError for anything else, and
    unless at least one layer stays and one is replaced.
    """
    if isinstance(given, str) and given.startswith((AUTO, EVEN)):
        kind, _, text = given.partition(":")
        number = whole_number(int(text) if text.isdigit() else text)
        if number is None or not 1 <= number < len(can):
            raise FarspanError(
                f"attention_layers={given!r} must name a number from 1 to {len(can) - 1}, since the model "
                f"has {len(can)} layers that can be converted."
            )
        if kind == "auto":
            return number
        return [can[(2 * i + 1) * len(can) // (2 * number)] for i in range(number)]
    if not isinstance(given, str | Sequence):
        raise FarspanError(
            f"attention_layers is 'auto:N', 'even:N' or a list of layer numbers; got {given!r}."
        )
    parts = given.split(",") if isinstance(given, str) else list(given)
    chosen = set()
    for part in parts:
        text = str(part).strip()
        index = int(text) if text.removeprefix("-").isdigit() else None
        if index is None or not -count <= index < count or index % count not in can:
            raise FarspanError(
                f"attention_layers names {text!r}: it takes layers with full attention, which are "
                f"{', '.join(map(str, can))} here, or 'auto:N', or 'even:N'."
            )
        chosen.add(index % count)
    if not chosen or len(chosen) == len(can):
        raise FarspanError(
            f"attention_layers={given!r} keeps {len(chosen)} of {len(can)} layers: keep at least one, and "
            "leave at least one to be replaced."
        )
    return sorted(chosen)


def measure(
    student: Student,
    windows: Tensor,
    probe: list[ProbeText],
    errors: dict[str, float],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Measured]:
    """Replace each layer alone and measure. windows: held-out ids [n, T]. errors: the held-out measures of
    the alignment, with the relative output error of "layer <i>"."""
    dense, found = retrieval_loss(student, probe, []), []
    ids = [window[None].to(student.device) for window in windows]
    teachers = [Healed(student, []).original(one) for one in ids]
    for done, index in enumerate(student.mixers):
        alone = Healed(student, [index])
        text = [alone.evaluate(one, teacher) for one, teacher in zip(ids, teachers, strict=True)]
        found.append(
            Measured(
                layer=index,
                error=errors[f"layer {index}"],
                nll=sum(x["nll_difference"] for x in text) / len(text),
                kl=sum(x["kl"] for x in text) / len(text),
                retrieval=retrieval_loss(student, probe, [index]) - dense,
            )
        )
        progress(done + 1, len(student.mixers))
    totals = {name: sum(max(getattr(m, name), 0.0) for m in found) for name in ("kl", "retrieval")}
    shares = [
        sum(max(getattr(m, name), 0.0) / total / 2 for name, total in totals.items() if total > 0)
        for m in found
    ]
    return [Measured(**{**asdict(m), "need": share}) for m, share in zip(found, shares, strict=True)]


def most_needed(measured: Sequence[Measured], number: int) -> list[int]:
    """The ``number`` layers that are needed most as attention, ascending; ties go to the lower layer."""
    order = sorted(measured, key=lambda m: (-m.need, m.layer))
    return sorted(m.layer for m in order[:number])


def keep_choice(folder: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` returns. It is kept in the folder, and read from there when a conversion goes on: the
    folder's checkpoints have one alignment, which they do not change once it has ended."""
    path = folder / "choice.json"
    try:
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    except (OSError, ValueError):
        made = make()
    keep_json(path, made)
    return made


def keep_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content``. Raises FarspanError where it cannot be written; nothing is left then."""
    new = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(content, indent=1))
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise FarspanError(
            f"{path} could not be written ({error.strerror}): free some space and give the same command "
            "again."
        ) from error
