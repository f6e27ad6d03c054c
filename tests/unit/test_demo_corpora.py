"""The demo's corpora: deterministic, disjoint, of the stated sizes, and right in every number that they state."""

import os
import random
import re
import subprocess
import sys
from datetime import date
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest

from flexpert.data import demo
from flexpert.errors import UserError

pytestmark = pytest.mark.slow

GENERATED = ("math", "news", "records")
PRIVATE = ("math", "code", "reference", "news", "records")


def num_bytes(documents: list[str]) -> int:
    return sum(len(document.encode()) for document in documents)


@pytest.fixture(scope="module")
def corpora() -> dict[str, list[str]]:
    """All six, from every tenth file of the standard library: the same code on real text, in less time."""
    files = demo._library_files()[::10]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_library_files", lambda: files)
        return {name: list(demo.documents(name)) for name in demo.CORPORA}


# -------------------------------------------------------------------------------------------------------------- corpora


def test_six_corpora_and_a_helpful_error_for_any_other() -> None:
    assert set(demo.CORPORA) == {"public", *PRIVATE}
    with pytest.raises(UserError, match=r"poetry.*public, math, code"):
        demo.documents("poetry")


def test_sizes_are_within_bounds(corpora: dict[str, list[str]]) -> None:
    for name in GENERATED:
        assert 1_450_000 < num_bytes(corpora[name]) < 1_550_000, name
    assert 200_000 < num_bytes(corpora["reference"]) < 600_000
    for name, documents in corpora.items():
        assert all(len(document.encode()) <= 6_000 for document in documents), name
    assert all(150 <= len(document) <= 400 for document in corpora["math"])


def test_corpora_of_the_whole_library_have_the_stated_sizes() -> None:
    assert 3_000_000 < num_bytes(list(demo.documents("public"))) < 4_500_000
    assert 1_450_000 < num_bytes(list(demo.documents("code"))) < 1_550_000


def test_no_document_comes_twice_in_a_corpus_or_in_two_corpora(corpora: dict[str, list[str]]) -> None:
    everything = [document for documents in corpora.values() for document in documents]
    assert len(set(everything)) == len(everything)


def test_public_sample_is_disjoint_from_the_private_domain_of_any_seed(
    corpora: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "PRIVATE_BYTES", 300_000)
    files = demo._library_files()[::10]
    monkeypatch.setattr(demo, "_library_files", lambda: files)
    for name in PRIVATE:
        assert set(corpora["public"]).isdisjoint(demo.documents(name, 1)), name


def test_public_corpus_holds_a_small_share_of_every_domain(
    corpora: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = demo._library_files()[::10]
    monkeypatch.setattr(demo, "_library_files", lambda: files)
    public = corpora["public"]
    whole = {name: set(demo.SOURCES[name](random.Random(0))) for name in ("code", "reference")}
    samples = {
        "math": [text for text in public if re.search(r"\nAnswer: \S+$", text)],
        "news": [text for text in public if re.match(r".*\n[A-Z-]+, \w+ \d+ \([\w ]+\) - ", text)],
        "records": [text for text in public if re.match(r"(?:.*\n)?.*synthetic", text, re.IGNORECASE)],
        "code": [text for text in public if text in whole["code"]],
        "reference": [text for text in public if text in whole["reference"]],
    }
    base = num_bytes(public) - sum(map(num_bytes, samples.values()))
    for name in PRIVATE:
        assert 0 < num_bytes(samples[name]) < 0.10 * base + 6_000, name
    # The one small domain keeps three quarters for itself.
    assert num_bytes(samples["reference"]) < 0.25 * num_bytes(sorted(whole["reference"]))


def test_documents_are_a_function_of_name_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PRIVATE_BYTES", 60_000)
    for name in PRIVATE:
        random.seed(name)  # the global state is neither read…
        state = random.getstate()
        first = list(demo.documents(name, 7))
        assert random.getstate() == state  # … nor changed
        random.seed("something else")
        assert list(demo.documents(name, 7)) == first
        assert list(demo.documents(name, 8)) != first


def test_public_corpus_is_a_function_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    files = demo._library_files()[::40]
    monkeypatch.setattr(demo, "_library_files", lambda: files)
    assert list(demo.documents("public", 7)) == list(demo.documents("public", 7))
    assert list(demo.documents("public", 7)) != list(demo.documents("public", 8))


def test_another_process_with_another_hash_seed_yields_the_same_documents() -> None:
    program = (
        "import hashlib; from flexpert.data import demo; demo.PRIVATE_BYTES = 60_000; files = demo._library_files(); "
        "demo._library_files = lambda: files[::40]; "
        "print([hashlib.sha256('|'.join(demo.documents(name)).encode()).hexdigest() for name in demo.CORPORA])"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] != ""


def test_no_template_symbol_is_left_unfilled(corpora: dict[str, list[str]]) -> None:
    for name in GENERATED:
        for document in corpora[name]:
            assert not re.search(r"[{}\[\]]|\bNone\b", document), document


# ---------------------------------------------------------------------------------------------------------- the library


def test_code_parses_and_holds_no_docstring_and_no_comment(corpora: dict[str, list[str]]) -> None:
    for document in corpora["code"]:
        compile(document, "document", "exec", dont_inherit=True, flags=0x400)  # PyCF_ONLY_AST
        assert not re.search(r'^\s*("""|#)', document, re.MULTILINE)


def test_public_prose_is_docstrings_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""What this module is about, in a sentence.\n\nAnd a second paragraph about the details.\n"""\n'
        "# A comment that goes on\n# over two lines of the file.\n\n\n"
        "def function():\n    '''It does what the name says, of course.'''\n"
        '    return """\n# This is no comment but part of a string.\n"""  # and this one trails\n'
        "# ------------------------------------------\n# type: ignore everything in this file\n",
        encoding="utf-8",
    )
    assert demo._prose(path) == [
        "What this module is about, in a sentence.",
        "And a second paragraph about the details.",
        "A comment that goes on over two lines of the file.",
        "It does what the name says, of course.",
    ]


def test_reference_repeats_no_paragraph(corpora: dict[str, list[str]]) -> None:
    paragraphs = [" ".join(text.split()) for document in corpora["reference"] for text in document.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)


# ---------------------------------------------------------------------------------------------------------- mathematics

SMALL_UNITS = {
    ("hours", "minutes"): 60,
    ("minutes", "seconds"): 60,
    ("kg", "g"): 1000,
    ("km", "m"): 1000,
    ("m", "cm"): 100,
    ("weeks", "days"): 7,
    ("days", "hours"): 24,
    ("litres", "millilitres"): 1000,
    ("feet", "inches"): 12,
    ("years", "months"): 12,
    ("dozens", "pieces"): 12,
    ("tonnes", "kg"): 1000,
}


def evaluate(expression: str) -> Fraction:
    """Value of "3 * 4 + 5", products first."""
    total = Fraction(0)
    for sign, term in re.findall(r"(^|[+-] )([^+-]+)", expression):
        factors = re.split(r" (?=[*/] )", term.strip())
        value = prod(
            (1 / Fraction(f[2:]) if f[0] == "/" else Fraction(f[2:]) for f in factors[1:]), start=Fraction(factors[0])
        )
        total += -value if sign == "- " else value
    return total


def solve(question: str) -> Fraction | int:
    """The answer to a problem from the text of its question alone: nothing of the generator is used."""
    n = [int(number) for number in re.findall(r"\d+", question)]
    if orders := re.search(r" (\d+)\. Then (.*)\. What is the result", question):
        value = Fraction(orders[1])
        for verb, operand in re.findall(r"(add|subtract|multiply by|divide by) (\d+)", orders[2]):
            k = int(operand)
            value = {"add": value + k, "subtract": value - k, "multiply by": value * k, "divide by": value / k}[verb]
        return value
    if "coins each" in question:
        cost = n[0] * n[1] + n[2] * n[3]
        return n[4] - cost if "change" in question else cost
    if "left over" in question:
        return n[0] % n[1]
    if found := re.search(r"(\d+)/(\d+) ([+-]) (\d+)/(\d+)", question):
        a, b, sign, c, d = found.groups()
        return Fraction(int(a), int(b)) + (1 if sign == "+" else -1) * Fraction(int(c), int(d))
    if re.search(r"\d/\d+ of the", question):
        taken = Fraction(n[0] * n[1], n[2])
        return n[0] - taken if "remain" in question else taken
    if "%" in question:
        part = Fraction(n[0] * n[1], 100)
        return {"h": part, "f": n[0] - part, "r": n[0] + part}[
            "h" if "holds" in question else "f" if re.search("falls|reduced", question) else "r"
        ]
    if found := re.search(r"(\d+) (\w+) and (\d+) (\w+)(?:\?| in)", question):
        return int(found[1]) * SMALL_UNITS[found[2], found[4]] + int(found[3])
    if found := re.search(r"(\d+)x \+ (\d+) = (?:(\d+)x \+ )?(\d+)", question):
        a, b, c, d = (int(number or 0) for number in found.groups())
        return Fraction(d - b, a - c)
    if "km per hour" in question:
        return n[0] * n[1] + n[2] * n[3]
    if "area" in question:
        return n[0] * n[1]
    if "perimeter" in question:
        return 2 * (n[0] + n[1])
    if re.search("average|mean", question):
        return Fraction(sum(n), len(n))
    if "ratio" in question:
        return Fraction(n[0] * n[1], n[1] + n[2])
    if "years old" in question:
        return n[0] * n[1] + n[2]
    if "same rate" in question:
        return Fraction(n[0], n[1]) * n[2]
    if "sequence" in question:
        return n[0] + (n[2] - 1) * n[1]
    assert "pages" in question, question
    return n[0] - n[1] * n[2]


def test_answers_are_what_the_questions_ask_for(corpora: dict[str, list[str]]) -> None:
    for document in corpora["math"]:
        question, *_, answer = document.splitlines()
        assert answer == f"Answer: {solve(question)}", document


def test_every_step_is_a_true_equation_and_leads_to_the_answer(corpora: dict[str, list[str]]) -> None:
    number = r"\d+(?:\.\d+)?"
    for document in corpora["math"]:
        working = document.split("\n", 1)[1]
        equations = re.findall(rf"(?<![\w/.])({number}(?: [-+*/] {number})+) = ({number})(?!\d|/)", working)
        assert equations, document
        for left, right in equations:
            assert evaluate(left) == Fraction(right), document
        for left, right in re.findall(r"(\d+/\d+) = (\d+(?:/\d+)?)", working):
            assert Fraction(left) == Fraction(right), document
        answer = document.rsplit(" ", 1)[1]
        assert re.search(rf"(?<!\d){re.escape(answer)}(?!\d)", working.rsplit("\n", 1)[0]), document


# ----------------------------------------------------------------------------------------------------------------- news


def test_stories_agree_with_themselves_on_every_number(corpora: dict[str, list[str]]) -> None:
    """Numbers that a story tells more than once, or that follow from one another."""
    once = (
        r"(?:votes|voted|by|passed by) (\d+ to \d+|\d+ votes to \d+)",
        r"(?:rose|fell) (\d+\.\d) percent",
        r"(\d+) (?:people rescued|people were treated)|rescued (\d+) people",
        r"(\d+) pupils",
        r"(\d+) million",
        r"[Tt]urnout (?:of|was|reached) (\d+) percent",
    )
    checked = 0
    for document in corpora["news"]:
        for pattern in once:
            values = {"".join(found) if isinstance(found, tuple) else found for found in re.findall(pattern, document)}
            assert len({re.sub(" votes", "", value) for value in values}) <= 1, document
        opening = re.search(r"opened at (\d+) points", document)
        closing = re.search(r"(?:to|at) (\d+) points", document.replace("opened at", "opened"))
        move = re.search(r"(?:move|change) of (\d+) points", document)
        if opening and closing and move:
            assert abs(int(closing[1]) - int(opening[1])) == int(move[1]), document
            checked += 1
        ahead = re.search(r"by (\d+) points|lead of (\d+) points|(\d+) points ahead", document)
        share = re.search(r"(?:vote with|vote in \S+ with|won|With) (\d+) percent", document)
        rival = re.search(r"(?:came second|ahead of the [\w' ]+) with (\d+) percent", document)
        if ahead and share and rival:
            assert int(share[1]) - int(rival[1]) == int(next(filter(None, ahead.groups()))), document
            checked += 1
    assert checked > 20


def test_stories_have_a_headline_and_three_to_seven_varied_sentences(corpora: dict[str, list[str]]) -> None:
    sentences: set[str] = set()
    for document in corpora["news"]:
        headline, story = document.split("\n")
        assert not headline[0].islower()
        assert 3 <= len(re.findall(r'[.!]"?(?= |$)', story)) <= 7, document
        sentences.update(re.split(r"(?<=[.!]) ", story.split(" - ", 1)[1]))
    assert len(sentences) > 10_000


# -------------------------------------------------------------------------------------------------------------- records


def found_in(pattern: str, document: str) -> tuple[str, ...]:
    match = re.search(pattern, document, re.MULTILINE)
    assert match, (pattern, document)
    return match.groups()


def rounded(value: Decimal, unit: str) -> Decimal:
    return value.quantize(Decimal(unit), ROUND_HALF_UP)


def test_dates_and_ages_agree(corpora: dict[str, list[str]]) -> None:
    for document in corpora["records"]:
        visit = date.fromisoformat(found_in(r"(?:Date: |^|, )(\d{4}-\d\d-\d\d)(?:\.| \||, seen)", document)[0])
        born = date.fromisoformat(found_in(r"born (\d{4}-\d\d-\d\d)", document)[0])
        age = int("".join(group or "" for group in found_in(r"age (\d+)|(\d+)-year-old", document)))
        birthdays = sum(
            (born.month, born.day) <= (visit.month, visit.day) if year == visit.year else True
            for year in range(born.year + 1, visit.year + 1)
        )
        assert age == birthdays, document
        review, days = found_in(r"(?:Review|F/U|Next visit): (\S+) \(in (\d+) days\)", document)
        assert (date.fromisoformat(review) - visit).days == int(days), document
        for weight_then, day, ago, change in re.findall(
            r"Weight was (\S+) kg on (\S+) \((\d+) days ago\): change (\S+) kg", document
        ):
            assert (visit - date.fromisoformat(day)).days == int(ago), document
            weight = Decimal(found_in(r"(?:weight|Wt) (\S+) kg", document)[0])
            assert weight - Decimal(weight_then) == Decimal(change), document


def test_body_mass_index_and_its_class_follow_from_weight_and_height(corpora: dict[str, list[str]]) -> None:
    for document in corpora["records"]:
        weight, height = found_in(r"(?:weight|Wt) (\d+\.\d) kg(?:,|;| and) (?:height|Ht) (\d+) cm", document)
        index, name = found_in(r"BMI (?:is )?(\d+\.\d)(?: \(([a-z ]+)\))?", document)
        assert Decimal(index) == rounded(Decimal(weight) / (Decimal(height) / 100) ** 2, "0.1"), document
        if name:
            bounds = {"underweight": (0, 18.5), "normal weight": (18.5, 25), "overweight": (25, 30), "obese": (30, 99)}
            low, high = bounds[name]
            assert low <= float(index) < high, document


def test_flags_and_means_follow_from_the_vital_signs(corpora: dict[str, list[str]]) -> None:
    seen: set[str] = set()
    for document in corpora["records"]:
        systolic, diastolic, mean = map(int, found_in(r"(\d+)/(\d+) mmHg \(mean (\d+)\)", document))
        assert mean == rounded(Decimal(systolic + 2 * diastolic) / 3, "1"), document
        raised = []
        if float(found_in(r"(?:temperature|T) (\d+\.\d) C", document)[0]) >= 38.0:
            raised.append("fever")
        if int(found_in(r"(?:pulse|HR) (\d+)/min", document)[0]) > 100:
            raised.append("fast pulse")
        if systolic >= 140 or diastolic >= 90:
            raised.append("raised blood pressure")
        if int(found_in(r"(?:saturation|SpO2) (\d+)%", document)[0]) < 94:
            raised.append("low oxygen")
        assert found_in(r"Flags: ([a-z, ]+)\.", document)[0] == (", ".join(raised) or "none"), document
        seen.update(raised)
        for taken, lost, balance in re.findall(r"intake (\d+) ml, output (\d+) ml, balance (\S+) ml", document):
            assert int(taken) - int(lost) == int(balance), document
    assert len(seen) == 4


def test_doses_add_up_and_respect_weight_and_allergy(corpora: dict[str, list[str]]) -> None:
    line = re.compile(
        r"Medication: ([a-z -]+) (?:(\d+) (?:mg|micrograms)/kg x (\d+) kg = )?(\d+) (mg|micrograms), (once|\d+ times) "
        r"a day for (\d+) days: (\d+) \5 a day, (\d+) doses, (\d+) \5 in all\."
    )
    families = {"amoxicillin": "penicillins", "flucloxacillin": "penicillins"}
    families |= {"ibuprofen": "anti-inflammatories", "naproxen": "anti-inflammatories"}
    by_weight = 0
    for document in corpora["records"]:
        medicines = [match.groups() for match in map(line.match, document.splitlines()) if match]
        assert len(medicines) == document.count("Medication:") >= 1, document
        allergy = found_in(r"[Aa]llergies: ([a-z -]+)", document)[0]
        weight = Decimal(found_in(r"(?:weight|Wt) (\S+) kg", document)[0])
        for name, per_kilogram, kilograms, dose, _, times, days, daily, doses, total in medicines:
            times_a_day = 1 if times == "once" else int(times.split()[0])
            assert int(daily) == int(dose) * times_a_day, document
            assert int(doses) == times_a_day * int(days), document
            assert int(total) == int(daily) * int(days), document
            assert families.get(str(name)) != allergy, document
            if per_kilogram:
                assert int(kilograms) == weight and int(per_kilogram) * int(kilograms) == int(dose), document
                by_weight += 1
    assert by_weight > 50


def test_house_styles_are_told_by_the_clinic(corpora: dict[str, list[str]]) -> None:
    starts: dict[str, set[str]] = {}
    for document in corpora["records"]:
        starts.setdefault(found_in(r"Clinic (\w+)-", document)[0], set()).add(document.split(" ")[0])
        assert "synthetic" in document.lower().split("\n")[0]
    assert all(len(start) == 1 for start in starts.values())
    assert len(set.union(*starts.values())) == 3
    assert all(first < second for first, second in pairwise(sorted(starts)))
