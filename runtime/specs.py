"""The methods of a patch, from the specs that users give."""

from __future__ import annotations

from collections.abc import Mapping

from ..attention.dense import Dense
from ..attention.errors import SpecError
from ..attention.method import DECODE, PREFILL, AttentionMethod
from ..attention.spec import parse_method
from .layer_numbers import by_layer

Spec = str | AttentionMethod


def resolve(
    spec: Spec | None, prefill: Spec | None = None, decode: Spec | None = None
) -> tuple[AttentionMethod, AttentionMethod]:
    """The (prefill, decode) methods of a spec, or of a spec for each phase. Raises SpecError for a bad
    spec."""
    if spec is not None and (prefill is not None or decode is not None):
        raise SpecError(
            "A spec was given together with prefill= or decode=: give one spec for both phases, or prefill= "
            "and decode= alone."
        )
    if isinstance(spec, str) and " + " in spec:
        parts = spec.split(" + ")
        if len(parts) != 2:
            raise SpecError(
                f"A spec joins one prefill and one decode method, as in 'block_topk + quest'; got {spec!r}."
            )
        prefill, decode, spec = parts[0], parts[1], None
    dense = Dense()
    if spec is not None:
        method = parse_method(spec)
        return (
            method if PREFILL in method.phases else dense,
            method if DECODE in method.phases else dense,
        )
    chosen = []
    for phase, given in ((PREFILL, prefill), (DECODE, decode)):
        method = dense if given is None else parse_method(given)
        if phase not in method.phases:
            raise SpecError(
                f"{method.name} has no {phase}: it serves {' and '.join(sorted(method.phases))}. Give a "
                f"method that has {phase} (farspan methods lists them)."
            )
        chosen.append(method)
    return chosen[0], chosen[1]


def spelt(prefill: AttentionMethod, decode: AttentionMethod) -> str:
    """The spec of the methods of both phases."""
    return str(prefill) if prefill == decode else f"{prefill} + {decode}"


def per_layer(
    methods: tuple[AttentionMethod, AttentionMethod],
    overrides: Mapping[int, Spec],
    count: int,
    untouched: Mapping[int, str],
) -> list[tuple[AttentionMethod, AttentionMethod]]:
    """The (prefill, decode) methods of each of ``count`` layers.

    overrides: other specs for single layers, by number. untouched: why a layer keeps the model's own
    attention. Raises SpecError for an override that would select in such a layer.
    """
    chosen = [methods] * count
    for index, (name, spec) in by_layer("layers", overrides, count).items():
        chosen[index] = resolve(spec)
        reason = untouched.get(index)
        if reason and any(m.selective for m in chosen[index]):
            raise SpecError(
                f"layers= cannot give layer {name} a method: {reason}. Leave this layer out of layers=."
            )
    return chosen
