"""The command line: what it prints where, its exit codes, and the sentence each bad input ends in."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import farspan
from farspan.attention.hybrid import Geometry, encoder_mixers, mixers, parse_mixer
from farspan.cli import main
from farspan.cli.options import split_methods, whole_numbers
from farspan.runtime.hf import releases, trial
from farspan.runtime.models import ALIASES, encode_prompt


def assert_sentence(result: tuple[int, str, str], *parts: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr with all of `parts`, no traceback."""
    code, out, err = result
    assert code == 2, (code, err)
    assert out == ""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("farspan: "), err
    for part in parts:
        assert part in lines[0]


# --- quick commands ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [["--help"], ["methods", "--help"], ["eval", "ruler", "--help"], ["plan", "--help"], ["--version"]],
)
def test_help_loads_no_torch(command):
    code = (
        "import sys\nfrom farspan.cli import main\n"
        f"try: main({command!r})\nexcept SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "farspan" in done.stdout


def test_module_and_entry_point_are_the_same_command():
    done = subprocess.run([sys.executable, "-m", "farspan", "--version"], capture_output=True, text=True)
    assert done.stdout == f"farspan {farspan.__version__}\n"


def test_methods_json_is_the_registry(farspan_command):
    code, out, _ = farspan_command("methods", "--json")
    listed = {entry["name"]: entry for entry in json.loads(out)}
    registry = farspan.methods()
    assert code == 0 and listed.keys() == registry.keys()
    for name, cls in registry.items():
        entry = listed[name]
        assert (entry["family"], entry["paper"]) == (cls.family, cls.paper)
        assert set(entry["phases"]) == cls.phases
        defaults = {
            f.name: f.default for f in dataclasses.fields(cls) if f.init and f.metadata.get("spec", True)
        }
        assert {p["name"]: p["default"] for p in entry["parameters"]} == defaults
        # What the table shows can be typed back: it is the method with its defaults.
        spelt = ",".join(f"{p['name']}={p['default']}" for p in entry["parameters"] if p["default"] != "")
        assert farspan.parse_method(f"{name}:{spelt}") == cls()


def test_mixers_json_is_the_registries(farspan_command):
    listed = json.loads(farspan_command("methods", "--mixers", "--json")[1])
    where = {entry["name"]: entry["stands_in"] for entry in listed}
    assert {name for name, place in where.items() if place == "causal models"} == mixers().keys()
    assert {name for name, place in where.items() if place == "encoders"} == encoder_mixers().keys()
    geometry = Geometry(hidden_size=16, num_heads=2, num_kv_heads=2, head_dim=8)
    for entry in listed:
        if {**mixers(), **encoder_mixers()}[entry["name"]].__module__.startswith("farspan."):
            assert re.fullmatch(r"\d{4}\.\d{5}", entry["paper"]) and entry["title"] and entry["summary"]
        if entry["stands_in"] == "causal models":
            spelt = ",".join(f"{p['name']}={p['default']}" for p in entry["parameters"])
            parse_mixer(f"{entry['name']}:{spelt}", geometry)  # what is shown can be typed back
    names = set(farspan_command("methods", "--mixers", columns=80)[1].split())
    assert mixers().keys() | encoder_mixers().keys() <= names, "a name was cut"


def test_a_budget_takes_the_place_of_the_default_one():
    registry = farspan.methods()
    assert farspan.parse_method("dhsa:k=640") == registry["dhsa"](k=640, fraction=None)
    assert farspan.parse_method("quest:fraction=0.1") == registry["quest"](k=None, fraction=0.1)
    assert farspan.parse_method("oracle:k=512") == registry["oracle"](mass=None, k=512)
    assert farspan.parse_method("oracle:k=512,mass=0.8") == registry["oracle"](mass=0.8, k=512)


@pytest.mark.parametrize("columns", [80, 60, 40])
@pytest.mark.parametrize("command", ["methods", "models"])
def test_tables_fit_the_terminal_and_cut_no_name(farspan_command, command, columns):
    code, out, _ = farspan_command(command, columns=columns)
    longest = max(len(word) for word in out.split() if "─" not in word)  # a path stays whole, in its column
    assert code == 0 and max(map(len, out.splitlines())) <= max(columns, longest + 2)
    names = farspan.methods() if command == "methods" else ALIASES
    assert set(names) <= set(out.split()), "a name was cut"


def test_models_json(farspan_command, smollm2):
    entries = {entry["alias"]: entry for entry in json.loads(farspan_command("models", "--json")[1])}
    assert set(entries) == {"smollm2-135m", "qwen2.5-coder-0.5b", "gemma3-270m"}
    smol = entries["smollm2-135m"]
    assert (Path(smol["cached"]) / "model.safetensors").is_file()
    assert smol["positions"] == smollm2[0].config.max_position_embeddings


def test_models_says_whose_upload_and_which_terms(farspan_command):
    rows = json.loads(farspan_command("models", "--json")[1])
    assert all("Somebody else's upload of the published" in row["origin"] for row in rows)
    assert "Gemma Terms of Use" in next(row["license"] for row in rows if row["alias"] == "gemma3-270m")
    table = farspan_command("models", columns=300)[1]
    assert table.count("Somebody else's upload") == len(rows) and "Gemma Terms of Use" in table


def test_doctor_says_what_there_is_and_tries_a_small_model(farspan_command, tiny_folder):
    code, out, err = farspan_command("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and not err and found["faults"] == [] and found["trial"]["model"] == "LlamaForCausalLM"
    versions = {package["name"]: package["version"] for package in found["packages"]}
    assert versions["torch"] == importlib.metadata.version("torch")
    assert found["transformers_tested"] == list(releases.TESTED) and found["devices"][0]["cores"] > 0
    assert found["implementations"]["head_dim"] == 128 and found["implementations"]["operations"]
    code, out, _ = farspan_command(
        "doctor", "--model", str(tiny_folder), "--dtype", "fp16", "--head-dim", "64"
    )
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert "taken for float16, heads of 64" in " ".join(out.split())
    assert f"transformers {versions['transformers']}" in " ".join(out.split()) and "the same" in out


def test_doctor_ends_in_one_sentence_where_something_is_wrong(farspan_command, monkeypatch, tmp_path):
    fault = trial.Trial(("a small copy of it computes other logits under farspan (a difference of 7%)",))
    monkeypatch.setattr(trial, "_try_out", lambda info: fault)
    code, out, err = farspan_command("doctor")
    assert code == 1 and "failed" in out
    [line] = err.splitlines()
    assert line.startswith("farspan: ") and "LlamaForCausalLM" in line and "a difference of 7%" in line
    monkeypatch.setattr(releases, "installed", lambda: "5.10.0")
    assert "farspan needs transformers<6,>=5.21, and 5.10.0 is installed" in farspan_command("doctor")[2]
    assert_sentence(farspan_command("doctor", "--model", str(tmp_path / "none")), "no folder")


def test_lists_in_options():
    assert split_methods(["dense; recycled:k=5,stride=1", "window"]) == [
        "dense",
        "recycled:k=5,stride=1",
        "window",
    ]
    assert split_methods(["block_topk:k=64 + quest:k=64"]) == ["block_topk:k=64 + quest:k=64"]
    assert whole_numbers(["1024 4K", "512,1024 1M"], "--lengths") == [1024, 4096, 512, 1 << 20]


# --- bad input that needs more than a line of test_bad_commands.py -------------------------------------


def test_a_prompt_longer_than_the_positions(farspan_command, tiny_folder):
    long = [
        "generate",
        "--model",
        str(tiny_folder),
        "--no-chat",
        "--max-new-tokens",
        "2",
        "--prompt-file",
        "-",
    ]
    text = "word " * 2500
    assert_sentence(
        farspan_command(*long, stdin=text), "tokens, but tiny has 2048 positions", "--rope yarn:2"
    )
    code, _, err = farspan_command(*long, "--beyond-positions", stdin=text)
    assert code == 0 and "Warning: The prompt has" in err
    code, _, err = farspan_command(*long, "--rope", "yarn:2", stdin=text)
    assert code == 0 and "Warning" not in err


def test_missing_network(farspan_command, tmp_path, monkeypatch):
    monkeypatch.setenv("FARSPAN_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    code, out, err = farspan_command("generate", "-p", "x")
    first, last = err.strip().splitlines()
    assert code == 2 and out == "" and first.startswith("Fetching smollm2-135m")
    assert last.startswith("farspan: Could not fetch 'smollm2-135m'")


# --- generate and calibrate ----------------------------------------------------------------------


def test_generate_streams_to_stdout_and_reports_on_stderr(farspan_command, smollm2):
    model, tokenizer = smollm2
    question = "What is the capital of France?"
    ids = encode_prompt(tokenizer, question)
    expected = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    short = ["generate", "--max-new-tokens", "16"]
    code, out, err = farspan_command(*short, "--prompt", question)
    assert code == 0 and out.strip() == tokenizer.decode(expected, skip_special_tokens=True)
    assert f"{ids.shape[1]} tokens read, {len(expected)} written" in err and "100.0 %" in err
    for stdin in (["-p", "-"], ["--prompt-file", "-"], []):
        assert farspan_command(*short, *stdin, stdin=question)[1] == out


def test_generate_json(farspan_command, tiny_folder):
    arguments = [
        "generate",
        "--model",
        str(tiny_folder),
        "--method",
        "recycled:k=32,stride=4",
        "--no-chat",
        "--json",
    ]
    arguments += ["--max-new-tokens", "12", "-p", "one two three four five " * 40]
    code, out, _ = farspan_command(*arguments)
    found = json.loads(out)
    assert code == 0 and found["new_tokens"] <= 12 and found["prompt_tokens"] >= 200
    assert found["report"]["summary"]["decode_density"] < 0.5
    assert found["report"]["summary"]["prefill_density"] == 1.0


def test_sampling_is_seeded(farspan_command, tiny_folder):
    arguments = [
        "generate",
        "--model",
        str(tiny_folder),
        "-p",
        "one",
        "--temperature",
        "1.5",
        "--max-new-tokens",
        "8",
    ]
    first, again, other = (farspan_command(*arguments, "--seed", seed)[1] for seed in ("3", "3", "4"))
    assert first == again != other


def test_prefill_chunks_change_nothing(farspan_command, tiny_folder):
    arguments = [
        "generate",
        "--model",
        str(tiny_folder),
        "-p",
        "a b c d e f g " * 30,
        "--max-new-tokens",
        "8",
    ]
    assert farspan_command(*arguments)[1] == farspan_command(*arguments, "--prefill-chunk", "64")[1]


def test_calibrate_then_use_it(farspan_command, tiny_folder, tiny_llama, smollm2, tmp_path):
    text, recipe = tmp_path / "text.txt", tmp_path / "recipe"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    made = ["calibrate", "--model", str(tiny_folder), "--text", str(text), "--tokens", "256", "--by", "k"]
    code, _, err = farspan_command(*made, "--out", str(recipe))
    assert code == 0 and f"--recipe {recipe}" in err
    assert farspan.Recipe.load(recipe).settings["by"] == "k"
    use = ["generate", "--method", "double_sparsity:k=16,dense_layers=0", "--recipe", str(recipe), "--json"]
    use += ["--max-new-tokens", "6", "-p", "one two three " * 30]
    code, out, _ = farspan_command(*use, "--model", str(tiny_folder))
    assert code == 0 and json.loads(out)["report"]["summary"]["decode_density"] < 0.5
    other = tmp_path / "other"
    tiny_llama(vocab_size=49152, num_hidden_layers=3).save_pretrained(other)
    smollm2[1].save_pretrained(other)
    assert_sentence(farspan_command(*use, "--model", str(other)), "made for another model")
    assert_sentence(farspan_command(*made, "--out", str(recipe), "--by", "v"), "ranked by q, k, qk", "'v'")


# --- eval ----------------------------------------------------------------------------------------


def test_eval_writes_resumes_and_refuses(farspan_command, small_needle, tmp_path):
    out = tmp_path / "run"
    code, table, err = farspan_command(*small_needle, "--out", str(out))
    assert code == 0, err
    assert max(map(len, table.splitlines())) <= 80 and "window:w=64" in table
    lines = (out / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 2 * 2  # methods, depths, samples
    assert {"config.json", "summary.json"} <= {file.name for file in out.iterdir()}
    code, printed, _ = farspan_command(*small_needle, "--out", str(out), "--json")
    assert code == 0 and (out / "samples.jsonl").read_text().splitlines() == lines, "done work was done again"
    assert json.loads(printed) == json.loads((out / "summary.json").read_text())
    assert_sentence(farspan_command(*small_needle, "--out", str(out), "--seed", "7"), "seed", str(out))


def test_eval_ruler_takes_lists_both_ways(farspan_command, tiny_folder, tmp_path):
    base = ["eval", "ruler", "--model", str(tiny_folder), "--samples", "1", "--json"]
    repeated = ["--lengths", "1024", "--lengths", "1280", "--tasks", "niah_single_1", "--tasks", "vt"]
    repeated += ["--methods", "dense", "--methods", "quest:k=64"]
    quoted = ["--lengths", "1K,1280", "--tasks", "niah_single_1 vt", "--methods", "dense; quest:k=64"]
    found = []
    for number, lists in enumerate((repeated, quoted)):
        code, _, err = farspan_command(*base, *lists, "--out", str(tmp_path / str(number)))
        assert code == 0, err
        rows = map(json.loads, (tmp_path / str(number) / "samples.jsonl").read_text().splitlines())
        found.append(sorted((row["method"], row["key"], row["prompt_sha256"], row["answer"]) for row in rows))
    assert found[0] == found[1] and len(found[0]) == 2 * 2 * 2


def test_eval_ppl_and_speed(farspan_command, tiny_folder, tmp_path):
    text = tmp_path / "prose.txt"
    text.write_text("It rained in the morning and the river rose. " * 400)
    base = ["--model", str(tiny_folder), "--text", str(text), "--methods", "dense; window:w=32"]
    ppl = ["eval", "ppl", *base, "--lengths", "144", "--new-tokens", "16", "--samples", "2"]
    code, table, err = farspan_command(*ppl, "--out", str(tmp_path / "ppl"))
    assert code == 0 and "window:w=32" in table and "perplexity" in table, err
    speed = ["eval", "speed", *base, "--lengths", "128", "--new-tokens", "32", "--repeats", "1"]
    code, table, err = farspan_command(*speed, "--out", str(tmp_path / "speed"))
    assert code == 0 and "unpatched" in table and max(map(len, table.splitlines())) <= 80, err
    speed[speed.index("128")] = "256"
    code, table, err = farspan_command(*speed, "--needle", "--out", str(tmp_path / "needle"))
    assert code == 0 and "found" in table and max(map(len, table.splitlines())) <= 80, err
    assert "found: right answers" in (tmp_path / "needle" / "speed.md").read_text()


def hear_interrupts():
    """A background job of a plain shell ignores SIGINT, and so would what it starts: undo that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_keeps_what_is_finished(small_needle, tmp_path):
    out = tmp_path / "run"
    arguments = [*small_needle, "--samples", "200", "--batch-size", "1", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "farspan", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=hear_interrupts,
    )
    try:
        deadline = time.monotonic() + 240
        samples = out / "samples.jsonl"
        while not (samples.is_file() and samples.read_text().count("\n") >= 3):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err
    assert "Run the same command to go on" in err
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert 3 <= len(rows) < 800
    assert json.loads((out / "summary.json").read_text())["complete"] is False


def test_a_fault_of_farspan_itself_is_not_hidden(monkeypatch):
    import farspan.cli.options as options

    def broken(*_, **__):
        raise RuntimeError("a fault")

    monkeypatch.setattr(options, "one_method", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["generate", "-p", "x"])
