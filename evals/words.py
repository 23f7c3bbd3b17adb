"""Sentences of a report: what was measured, in words, and nothing that was not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .folders import Evaluation, Found
from .recommend import BEYOND, KEYS, LARGEST, OPEN, Candidate, Recommendation
from .tables import number, percent, short_length


def length_of(found: Recommendation) -> str:
    """`32K`, or `32K (extrapolated from 16K)`."""
    if found.asked == found.length:
        return short_length(found.length)
    return f"{short_length(found.asked)} (extrapolated from {short_length(found.length)})"


def basis(found: Recommendation, one: Candidate) -> str:
    """`ruler, 11 tasks, 220 prompts`."""
    return f"{found.suite}, {counted(one.tasks, 'task')}, {counted(one.n, 'prompt')}"


def counted(number: int, what: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def quality(one: Candidate) -> str:
    """`keeps 98 % ± 2 of dense`, with the reason where there is no interval."""
    if one.kept is None:
        return "cannot be compared, because dense scores 0"
    spread = (
        " (too few prompts for an interval)" if one.half is None else f" ± {_points(one.half / one.baseline)}"
    )
    return f"keeps {percent(one.kept, 0)} %{spread} of dense"


def reads(one: Candidate) -> str:
    """`reads 22 % of the keys in prefill and 6 % in decode`; a phase that reads everything is left out."""
    shares = [("prefill", one.prefill_density), ("decode", one.decode_density)]
    less = [(phase, share) for phase, share in shares if share is not None and share < 0.9995]
    if not less:
        return "reads every key"
    first, *rest = [f"{_share(share)} of the keys in {phase}" for phase, share in less]
    return f"reads {' and '.join([first, *(part.replace(' of the keys', '') for part in rest)])}"


def faster(found: Found, evaluation: Evaluation, method: str, length: int) -> str:
    """`first token 2.4× sooner on this machine`; empty where no speed was measured at the length."""
    for one in found.speeds(evaluation):
        for row in one.data["overall"]:
            if row["method"] == method and row["length"] == length and row["prefill_speedup"]:
                ratio = row["prefill_speedup"]
                said = f"{ratio:.1f}× sooner" if ratio >= 1 else f"{1 / ratio:.1f}× later"
                return f"first token {said} on {machine(one)}"
    return ""


def machine(evaluation: Evaluation) -> str:
    """`this machine (AMD EPYC, 2 threads)`, by the last session."""
    sessions = evaluation.config["sessions"]
    last: Mapping[str, Any] = sessions[-1] if sessions else {}
    name = last.get("gpu") or last.get("cpu")
    threads = "" if last.get("gpu") or not last.get("threads") else f", {last['threads']} threads"
    return f"this machine ({name}{threads})" if name else "this machine"


def claim(found: Found, evaluation: Evaluation, of: Recommendation, one: Candidate) -> str:
    """What one method keeps and costs, without its name."""
    parts = [f"{quality(one)} at {length_of(of)} ({basis(of, one)})", reads(one)]
    fast = faster(found, evaluation, one.method, of.length) if of.asked == of.length else ""
    return ", ".join([*parts, fast] if fast else parts) + "."


def bound(of: Recommendation) -> str:
    """`at most 1 point below dense with 95 % confidence`."""
    unit = "point" if of.max_drop == 1 else "points"
    return f"at most {of.max_drop:g} {unit} below dense with {percent(of.confidence, 0)} % confidence"


def limits(one: Candidate) -> str:
    """`loses 0.8 points (at most 3.1)`."""
    said = f"{abs(100 * one.loss):.1f}"
    measured = f"loses {said}" if one.loss > 0 else f"gains {said}" if one.loss < 0 else "loses 0.0"
    return f"{measured} points" + ("" if one.most is None else f" (at most {100 * one.most:.1f} lost)")


def needed(of: Recommendation, one: Candidate) -> str:
    """How many prompts would decide about an open method."""
    if one.times is not None:
        count = one.times * one.n
        return f"about {one.times} times as many prompts ({count}) would show it, if they are like these"
    if 100 * one.loss > of.max_drop:
        return "its measured loss is above the bound, so more prompts like these would not help"
    return f"more than {LARGEST} times as many prompts are needed"


def rivals(of: Recommendation) -> list[Candidate]:
    """The open methods that are cheaper than the chosen one; all open ones where none is chosen."""
    chosen = of.chosen
    return [one for one in of.of(OPEN) if one.saves and (chosen is None or _cheaper(one, chosen))]


def unanswerable(of: Recommendation) -> str:
    """Why there is nothing to choose from; empty where there is."""
    if of.candidates:
        return ""
    return "Dense scores 0 on every task here, so these prompts cannot show what a method loses."


def doubts(of: Recommendation) -> list[str]:
    """What limits the recommendation besides the open methods."""
    out = []
    if of.asked != of.length:
        out.append(
            f"Nothing was measured at {short_length(of.asked)}; this is what was measured at "
            f"{short_length(of.length)}, and no interval covers the step between them."
        )
    if of.blind:
        out.append(
            f"Dense scores 0 at {', '.join(of.blind)}: no method can lose there, so these prompts are left "
            "out of the scores above."
        )
    most = of.tasks - len(of.blind)
    fewer = [one.method for one in of.candidates if one.tasks < most]
    if fewer:
        out.append(
            f"{len(fewer)} methods were measured on fewer than the {most} tasks; each is compared with "
            "dense on its own prompts."
        )
    return out


def cost(of: Recommendation, one: Candidate) -> str:
    """The cost of a candidate by the measure of the recommendation."""
    if one.cost is None:
        return "not measured"
    return percent(one.cost, 0, " %") if of.by == KEYS else f"{number(one.cost, 2)} s"


def _cheaper(one: Candidate, than: Candidate) -> bool:
    return one.cost is not None and than.cost is not None and one.cost < than.cost


def _points(share: float) -> str:
    value = 100 * share
    return f"{value:.1f}" if value < 1 else f"{value:.0f}"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.095 else f"{100 * value:.1f} %"


def recommendation(of: Recommendation) -> str:
    """The whole answer of `farspan recommend` about one evaluation, for a terminal."""
    lines = [f"{of.model} ({of.dtype}), {of.suite} at {length_of(of)}, {counted(of.tasks, 'task')}:"]
    if (chosen := of.chosen) is not None:
        lines += [
            f"  {chosen.method} is {bound(of)}: it {quality(chosen)}, {limits(chosen)}, {reads(chosen)}."
        ]
        lines += [f"  Cost: {cost(of, chosen)} ({of.by}).", ""]
        lines += [f"    {chosen.patch}"]
        lines += [f"    farspan generate --model {of.given} {chosen.options} --prompt-file FILE", ""]
    elif said := unanswerable(of):
        return "\n".join([*lines, f"  {said}", ""])
    else:
        lines += [f"  No method that costs less than dense is shown to be {bound(of)}.", ""]
    if open_ones := rivals(of):
        lines += ["  Not ruled out, because the intervals are too wide:"]
        lines += [
            f"    {one.method}: {cost(of, one)}, {limits(one)}; {needed(of, one)}." for one in open_ones
        ]
    if beyond := of.of(BEYOND):
        lines += ["  Ruled out, because they lose more:"]
        lines += [f"    {one.method}: loses at least {100 * (one.least or 0):.1f} points." for one in beyond]
    if of.by != KEYS and (unmeasured := [one.method for one in of.candidates if one.cost is None]):
        lines += [f"  Without a measured cost, so left out: {'; '.join(unmeasured)}."]
    return "\n".join([*lines, *(f"  {doubt}" for doubt in doubts(of)), ""])
