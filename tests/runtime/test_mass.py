"""patch(measure_mass=...): the recall of attention mass in a report, against float64 over every pair."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch
from small_models import decode, logits, make, padded, prompt, served, shared, snapshot

import farspan
from farspan import FarspanError
from farspan.attention.method import DECODE, PREFILL
from farspan.attention.selection import as_selection
from farspan.attention.spec import parse_method
from farspan.runtime import layer as layer_module
from farspan.runtime import patch as patch_module

ROWS = 5
PREFILLS = [
    "pbs:mass=0.5,block=8,segment=16",
    "pbs:mass=0.4,block=8,segment=16,gqa_reduce=sum",
    "vertical_slash:vertical=8,slash=12,block=8,last=8,sinks=2,local=4",
    "window:w=9,sinks=2",
    "strided:w=4,stride=6",
    "block_topk:k=16,block=8",
]
DECODES = ["quest:k=16,page=4,dense_layers=1", "recycled:k=12,stride=3", "window:w=9,sinks=2", "h2o:k=12"]


@contextmanager
def recorded(*specs):
    """Every selection of these methods: (phase, q, k, scale, softcap, causal [B, Tq, Tk], mask [B, Hs, Tq,
    Tk])."""
    seen = []
    with pytest.MonkeyPatch.context() as patching:
        for cls in {type(parse_method(spec)) for spec in specs}:
            for phase in (PREFILL, DECODE):
                original = getattr(cls, f"select_{phase}")

                def select(self, q, keys, original=original, phase=phase):
                    index = original(self, q, keys)
                    b, _, tq, _ = q.shape
                    rows = torch.arange(keys.past, keys.length)[:, None]
                    first = torch.zeros(b) if keys.start is None else keys.start
                    cols = torch.arange(keys.length)
                    causal = (cols <= rows) & (cols >= first[:, None, None])  # [B, Tq, Tk]
                    mask = as_selection(index, phase).to_mask(tq, keys.length, keys.start, b)
                    mask = mask & causal[:, None]
                    seen.append(
                        (
                            phase,
                            q.clone(),
                            keys.kv.k.clone(),
                            keys.softmax.scale,
                            keys.softmax.softcap,
                            causal,
                            mask,
                        )
                    )
                    return index

                patching.setattr(cls, f"select_{phase}", select)
        yield seen


def expected(seen, layers, rows):
    """By (layer, phase): mean recall of each head over the sampled rows, from whole float64 matrices."""
    found = defaultdict(list)
    turn = defaultdict(int)
    for phase, q, k, scale, softcap, causal, mask in seen:
        layer = layers[phase][turn[phase] % len(layers[phase])]
        turn[phase] += 1
        group = q.shape[1] // k.shape[1]
        logit = q.double() @ k.double().repeat_interleave(group, 1).transpose(-1, -2) * scale
        if softcap is not None:
            logit = softcap * torch.tanh(logit / softcap)
        share = torch.softmax(logit.masked_fill(~causal[:, None], -torch.inf), -1)
        mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
        recall = share.masked_fill(~mask, 0).sum(-1)  # [B, H, Tq]
        tq = q.shape[2]
        count = tq if phase == DECODE else min(rows, tq)
        picked = [(i + 1) * tq // count - 1 for i in range(count)]
        for b in range(q.shape[0]):
            found[layer, phase] += [recall[b, :, i] for i in picked if bool(causal[b, i].any())]
    return {key: torch.stack(rows).mean(0) for key, rows in found.items()}


def assert_matches(report, want):
    for layer in report.layers:
        for phase, part in layer.phases.items():
            got = part.measured.head_recall
            if (layer.layer, phase) not in want:
                continue
            assert got == pytest.approx(want[layer.layer, phase].tolist(), abs=2e-6), (layer.layer, phase)
            assert part.measured.recall == pytest.approx(sum(got) / len(got), abs=1e-12)


@pytest.mark.parametrize("spec", PREFILLS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])  # grouped heads; a soft-cap and layers left alone
def test_a_prefill(spec, name):
    model, ids = shared(name), prompt(2, 61)
    with farspan.patch(model, prefill=spec, measure_mass=ROWS) as patched, recorded(spec) as seen:
        logits(model, ids)
        report = patched.report(measure_mass=True)
    want = expected(seen, {PREFILL: served(model)}, ROWS)
    assert len(want) == len(served(model))
    assert_matches(report, want)
    mean = sum(float(x.mean()) for x in want.values()) / len(want)
    assert report.summary["prefill_mass_recall"] == pytest.approx(mean, abs=2e-6)
    assert mean < 0.99, "everything was read: the case shows nothing"
    assert report.summary["decode_mass_recall"] is None


@pytest.mark.parametrize("spec", DECODES)
@pytest.mark.parametrize("batch", ["one", "padded"])
def test_every_decode_step_is_a_row(spec, batch):
    model = shared("llama")
    inputs = prompt(1, 41) if batch == "one" else padded((41, 29, 12))
    with farspan.patch(model, decode=spec, measure_mass=ROWS) as patched, recorded(spec, "dense") as seen:
        decode(model, inputs, 7)
        report = patched.report(measure_mass=True)
    first = 1 if "dense_layers" in spec else 0
    layers = {PREFILL: served(model), DECODE: served(model)}
    want = expected([s for s in seen if s[0] == DECODE], layers, ROWS)
    assert_matches(report, want)
    rows = 6 * (1 if batch == "one" else 3)
    assert all(layer.phases[DECODE].measured.rows == rows for layer in report.layers)
    recalls = [layer.phases[DECODE].measured.recall for layer in report.layers]
    assert recalls[:first] == [1.0] * first and max(recalls[first:]) < 0.97


def test_a_padded_batch_with_both_phases_and_chunks():
    model, inputs = shared("llama"), padded((101, 53, 101))  # rows that can be cut alike
    pre, dec = "pbs:mass=0.5,block=8,segment=16", "quest:k=16,page=4,dense_layers=0"
    how = {"prefill": pre, "decode": dec, "measure_mass": ROWS, "prefill_chunk": 48}
    with farspan.patch(model, **how) as patched, recorded(pre, dec) as seen:
        decode(model, inputs, 5)
        report = patched.report(measure_mass=True)
    by_layer, layers = [], served(model)
    chunks = [(0, 48), (48, 101)]
    for begin, end in chunks:  # of a padded batch each row with a token in the chunk is asked by itself
        rows = sum(first < end for first in (0, 48, 0))
        by_layer += [layer for layer in layers for _ in range(rows)]
        assert begin < end
    want = expected(seen, {PREFILL: by_layer, DECODE: layers}, ROWS)
    assert len(want) == 2 * len(layers)
    assert_matches(report, want)
    sampled = 2 * ROWS + 3 * ROWS
    assert all(layer.phases[PREFILL].measured.rows == sampled for layer in report.layers)


def test_dense_reads_all_of_it_and_padding_is_no_row():
    model, inputs = shared("llama"), padded((41, 10, 40))
    with farspan.patch(model, "dense", measure_mass=41) as patched:
        decode(model, inputs, 4)
        report = patched.report(measure_mass=True)
    for layer in report.layers:
        assert layer.phases[PREFILL].measured.head_recall == [1.0] * 4
        assert layer.phases[PREFILL].measured.rows == 41 + 10 + 40
        assert layer.phases[DECODE].measured.recall == 1.0
    assert report.summary["prefill_mass_recall"] == report.summary["decode_mass_recall"] == 1.0


def test_a_budget_that_covers_everything():
    model = shared("llama")
    with farspan.patch(model, "block_topk:k=64,block=8 + quest:k=64,page=4", measure_mass=True) as patched:
        decode(model, prompt(1, 50), 4)
        summary = patched.report(measure_mass=True).summary
    assert summary["prefill_mass_recall"] == summary["decode_mass_recall"] == 1.0


def test_measuring_changes_no_output_and_is_no_part_of_what_ran():
    model, ids = shared("llama"), prompt(2, 61)
    spec, reports, outputs = "window:w=9,sinks=2", [], []
    for measured in (False, True):
        with farspan.patch(model, spec, measure_mass=measured) as patched:
            outputs.append((logits(model, ids), decode(model, ids, 5)))
            reports.append(patched.report().to_dict())
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    plain, more = reports
    for a, b in zip(plain["layers"], more["layers"], strict=True):
        for phase in (PREFILL, DECODE):
            added = {k for k in b[phase] if k not in a[phase]}
            assert added == {
                "mass_recall",
                "mass_recall_by_head",
                "mass_rows",
                "selection_seconds",
                "attention_seconds",
            }
            assert a[phase] == {k: x for k, x in b[phase].items() if k not in added}


def test_without_the_option_nothing_is_measured(monkeypatch):
    def never(*_, **__):
        raise AssertionError("measured without being asked")

    monkeypatch.setattr(layer_module, "Meter", never)
    model = shared("llama")
    with farspan.patch(model, "window:w=9,sinks=2") as patched:
        decode(model, prompt(), 4)
        report = patched.report()
        with pytest.raises(FarspanError, match=r"patch the model with measure_mass=True.*\.$") as error:
            patched.report(measure_mass=True)
    assert "\n" not in str(error.value)
    assert not any("mass" in key or "seconds" in key for key in report.summary)
    assert "mass" not in str(report) and "mass" not in str(report.to_dict())


@pytest.mark.parametrize("value", [0, -3, 2.5, "yes", None])
def test_rows_that_there_cannot_be(value):
    model = shared("llama")
    before = snapshot(model)
    with pytest.raises(
        FarspanError, match=r"measure_mass is True, False or a number of queries.*at least 1; got"
    ):
        farspan.patch(model, "dense", measure_mass=value)
    assert snapshot(model) == before


def test_over_ranks_it_is_refused(monkeypatch):
    class Mesh:
        size, closed = 2, False

        def close(self):
            self.closed = True

    mesh, model = Mesh(), shared("llama")
    before = snapshot(model)
    monkeypatch.setattr(patch_module.hf, "join_ranks", lambda *_: mesh)
    with pytest.raises(
        FarspanError, match="given for a model over 2 ranks, and attention mass is measured on one"
    ):
        farspan.patch(model, "dense", parallel="auto", measure_mass=True)
    assert mesh.closed and snapshot(model) == before


def test_seconds_of_selection_and_of_attention(monkeypatch):
    """Time that a method sleeps while it selects, or is told of a prompt, is its selection's."""
    quest = type(parse_method("quest"))
    model, nap = shared("llama"), 0.03
    for name in ("select_decode", "on_prefill_end"):
        original = getattr(quest, name)

        def slow(self, q, keys, original=original):
            time.sleep(nap)
            return original(self, q, keys)

        monkeypatch.setattr(quest, name, slow)
    with farspan.patch(model, "quest:k=16,page=4,dense_layers=1", measure_mass=True) as patched:
        decode(model, prompt(), 4)
        report = patched.report(measure_mass=True)
        first, *others = (layer.phases[DECODE].measured for layer in report.layers)
        assert first.selection_seconds < nap, "a layer left dense selects nothing"
        for one in others:
            assert 4 * nap <= one.selection_seconds < 8 * nap  # told once, asked three times
            assert 0 < one.attention_seconds < nap
        assert all(layer.phases[PREFILL].measured.selection_seconds < nap for layer in report.layers)
        total = sum(m.selection_seconds for m in (first, *others))
        assert report.summary["decode_selection_seconds"] == pytest.approx(total)
        assert f"decode: selection {total:.2f} s of" in str(report)
        patched.reset_report()
        clean = patched.report(measure_mass=True)
        assert all(layer.phases[DECODE].measured.selection_seconds == 0 for layer in clean.layers)
        assert clean.summary["prefill_mass_recall"] is None
    assert all(layer.phases[DECODE].measured.rows == 3 for layer in report.layers), "a report stands still"


def test_what_a_decode_method_reads_after_the_prompt_is_counted():
    model, ids = shared("llama"), prompt(1, 41)
    with farspan.patch(model, decode="h2o:k=12") as patched:
        with torch.no_grad():
            model(ids, use_cache=True)
        report = patched.report()
    keys = 2 * 41 * 16 * 4  # heads, positions, size, bytes: every key once
    assert [layer.phases[DECODE].selection_bytes for layer in report.layers] == [keys] * 3


def test_the_printed_table():
    model = make("llama")
    with farspan.patch(model, "window:w=9,sinks=2", measure_mass=True) as patched:
        decode(model, prompt(), 4)
        report = patched.report(measure_mass=True)
    head, prefill, *_ = str(report).splitlines()[1:]
    assert head.split()[-1] == "mass"
    assert prefill.endswith(f"{100 * report.summary['prefill_mass_recall']:.1f} %")
    assert "mass: the share of the true attention" in str(report)
