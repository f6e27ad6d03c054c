"""The demo's corpora: one public text and five private domains, all made on the spot; nothing is downloaded.

    public      docstrings and comments of the Python standard library, plus a small sample of every private domain
    math        generated problems, solved step by step
    code        the standard library through `ast.unparse`: no comments or docstrings
    reference   `pydoc_data.topics`, paragraphs deduplicated
    news        a template grammar (`demo_news.py`)
    records     synthetic visit notes whose numbers agree with one another (`demo_grammar.py`)

Sizes (Python 3.11): public 2.56 MB of prose and 10% of that from each domain; domains 1.5 MB, reference 0.3 MB.

Determinism: a corpus is a function of its name, the seed and the Python version, given a complete installation (the
library's text and `ast.unparse` change with the version, so figures are comparable only within one; some Linux
distributions package tkinter and others apart). Every random choice comes from `random.Random` seeded with a string,
which neither the global state nor `PYTHONHASHSEED` can reach.

Disjointness: no document of a private domain is in the public sample, or the demo would measure memory. Its SHA-256
alone decides whether a document may be public (`_may_be_public`), so the two are disjoint for any pair of seeds.
"""

import ast
import functools
import hashlib
import operator
import os
import random
import re
import sysconfig
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator
from datetime import date, timedelta
from fractions import Fraction
from math import lcm
from pathlib import Path
from pydoc_data.topics import topics

from flexpert.data import demo_grammar as grammar
from flexpert.data import demo_news
from flexpert.errors import UserError

#: Bytes of a private domain (reference has less to give), and of its public sample as a share of the public base.
PRIVATE_BYTES = 1_500_000
PUBLIC_SAMPLE_SHARE = 0.10
#: Share of all documents whose hash makes them public: below a quarter, so a small domain keeps three quarters.
PUBLIC_HASH_SHARE = 0.20

#: Shortest and longest document.
CODE_BYTES = (300, 3_600)
PUBLIC_TEXT_BYTES = (100, 3_000)
REFERENCE_BYTES = (100, 1_500)
MATH_CHARACTERS = (150, 400)

#: Left out of the standard library: tests, others' code, character tables, and the reference domain's source.
SKIPPED_DIRECTORIES = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data",
}  # fmt: skip
#: Files that the build or the distribution writes: they differ between machines.
SKIPPED_FILES = re.compile(r"_sysconfigdata.*|_sysconfig_vars.*|(site|user)customize\.py|python-config\.py")
#: Fields of a syntax tree's node that hold statements.
BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
#: Lines that are comments; other comments and strings are matched too, so that a `#` or a quote in one is no start.
COMMENTS_AND_STRINGS = re.compile(
    r"""(?P<comment>(?:^[ \t]*#.*\n)+)|#.*|(?P<quote>"{3}|'{3}|"|')(?:\\[\s\S]|(?!(?P=quote))[\s\S])*(?P=quote)""",
    re.MULTILINE,
)
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}

Source = Callable[[random.Random], Iterator[str]]
Solved = tuple[str, list[str], str]  # question, steps, answer

# ------------------------------------------------------------------------------------------------ packing and selection


def _size(text: str) -> int:
    return len(text.encode())


def _pack(pieces: Iterable[str], bounds: tuple[int, int], separator: str) -> Iterator[str]:
    """Join consecutive pieces into documents within `bounds` (bytes).

    A piece that is too long by itself is cut at line ends; a document that stays too short is dropped.
    """
    shortest, longest = bounds
    document = ""
    for piece in pieces:
        lines = [piece] if _size(piece) <= longest else [line for line in piece.splitlines() if _size(line) <= longest]
        for number, line in enumerate(lines):
            joined = document + (separator if number == 0 else "\n") + line if document else line
            if _size(joined) <= longest:
                document = joined
                continue
            if _size(document) >= shortest:
                yield document
            document = line
    if _size(document) >= shortest:
        yield document


def _fresh(texts: Iterable[str], seen: set[str]) -> Iterator[str]:
    """Texts of which nothing but the layout was seen before; `seen` is added to."""
    for text in texts:
        mark = " ".join(text.split())
        if mark and mark not in seen:
            seen.add(mark)
            yield text


def _capital(sentence: str) -> str:
    """Raise the first letter, which may stand behind a quotation mark."""
    return re.sub(r"^\W?[a-z]", lambda match: match[0].upper(), sentence)


def _may_be_public(document: str) -> bool:
    """Whether the document belongs to the public part of its domain: a function of its text and nothing else."""
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest[:8], "big") < PUBLIC_HASH_SHARE * 2**64


# ------------------------------------------------------------------------------------------------- the standard library


def _library_files() -> list[Path]:
    """Source files of the standard library, in an order that does not depend on the file system."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        # Pruned here, not filtered afterwards: site-packages may hold a hundred thousand files.
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_DIRECTORIES]
        files += [Path(folder, name) for name in names if name.endswith(".py") and not SKIPPED_FILES.fullmatch(name)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _parse(path: Path) -> tuple[str, ast.Module] | None:
    """Text and syntax tree of a file, or None for one that is no valid Python (templates, deliberate errors)."""
    try:
        with tokenize.open(path) as file:  # honours the coding cookie
            text = file.read()
        return text, ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _code(rng: random.Random) -> Iterator[str]:
    """Documents of function or class size from the library's files in random order, without prose."""
    files = _library_files()
    for path in rng.sample(files, len(files)):
        if parsed := _parse(path):
            _remove_prose(parsed[1])
            yield from _pack(_code_pieces(parsed[1].body, CODE_BYTES[1]), CODE_BYTES, "\n")


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all statements below it. Expressions are not entered: they are nine nodes in ten, and hold none."""
    yield node
    for field in BLOCKS:
        block = getattr(node, field, None)
        for child in block if isinstance(block, list) else ():
            yield from _statements(child)


def _remove_prose(tree: ast.Module) -> None:
    """Drop docstrings and every other bare string: they are the public corpus, and the code must not repeat them."""
    for node in _statements(tree):
        for field in BLOCKS:
            block = getattr(node, field, None)
            if isinstance(block, list) and block:
                kept = [s for s in block if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
                setattr(node, field, kept or [ast.Pass()])


def _code_pieces(block: list[ast.stmt], longest: int) -> Iterator[str]:
    """Statements as text of at most `longest` bytes.

    A longer class or function is told in several pieces, each under its own header; any other longer statement is a
    table (of entities, of opcodes), and is left out.
    """
    for node in block:
        text = ast.unparse(node)
        if _size(text) <= longest:
            yield text
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            body, node.body = node.body, []
            header = ast.unparse(node)
            # Indentation takes bytes too: a quarter of the room covers it.
            room = (longest - _size(header)) * 3 // 4
            for piece in _pack(_code_pieces(body, room), (0, room), "\n"):
                indented = header + "\n" + textwrap.indent(piece, "    ")
                if _size(indented) <= longest:
                    yield indented


def _prose(path: Path) -> list[str]:
    """Paragraphs of one file's docstrings and whole-line comments, in source order."""
    if (parsed := _parse(path)) is None:
        return []
    source, tree = parsed
    found: list[tuple[int, str]] = []
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            found += [(node.body[0].lineno, part) for part in re.split(r"\n\s*\n", text) if part]
    line, position = 1, 0
    for match in COMMENTS_AND_STRINGS.finditer(source):
        if match["comment"]:
            line, position = line + source.count("\n", position, match.start()), match.start()
            words = (row.strip().lstrip("#! ").rstrip("#-=* ") for row in match["comment"].splitlines())
            found += [(line, part.strip().replace("\n", " ")) for part in re.split(r"\n{2,}", "\n".join(words))]
    # Python's sort is stable, so paragraphs of one docstring keep their order.
    return [text.strip("\n") for _, text in sorted(found, key=lambda item: item[0]) if _is_prose(text)]


def _is_prose(text: str) -> bool:
    """Sentences, not commented-out code, rulers, tables, coding cookies or directives for tools."""
    letters = sum(map(str.isalpha, text)) + text.count(" ")
    return len(text) >= 25 and letters >= 0.7 * len(text) and not re.match(r"type:|pragma|pylint|-\*-", text)


def _reference(rng: random.Random) -> Iterator[str]:
    """Sections of the language reference: consecutive paragraphs of one topic, each paragraph once in the corpus."""
    seen: set[str] = set()
    found: list[str] = []
    for name in sorted(topics):
        # Rulers under titles carry nothing.
        paragraphs = (re.sub(r"\n[*=~^-]{3,}\s*$", "", text) for text in re.split(r"\n\s*\n", topics[name].strip("\n")))
        found += _pack(_fresh(paragraphs, seen), REFERENCE_BYTES, "\n\n")
    yield from rng.sample(found, len(found))


# ---------------------------------------------------------------------------------------------------------- mathematics


def _math(rng: random.Random) -> Iterator[str]:
    """Problems: a question line, the working (as one paragraph or as numbered lines), and a line `Answer: N`."""
    # `None` stands for the one kind that no table can express.
    while True:
        kind = rng.choice([None, *grammar.PROBLEMS])
        question, steps, answer = _fraction_sum(rng) if kind is None else _from_template(kind, rng)
        style = rng.randrange(3)
        if style == 0:
            working = "\n".join(f"Step {number}: {step}" for number, step in enumerate(steps, start=1))
        elif style == 1:
            first, *middle, last = rng.choice(grammar.MATH_LINKS)
            links = [first, *(middle * len(steps))[: len(steps) - 2], last]
            working = " ".join(link + step for link, step in zip(links, steps, strict=True))
        else:
            working = rng.choice(grammar.MATH_STARTS) + " ".join(map(_capital, steps))
        document = f"{rng.choice(grammar.MATH_OPENINGS)}{question}\n{working}\nAnswer: {answer}"
        if MATH_CHARACTERS[0] <= len(document) <= MATH_CHARACTERS[1]:
            yield document


def _from_template(problem: grammar.Problem, rng: random.Random) -> Solved:
    """Draw the numbers and words of one problem of the table, and do its sums as the steps are told."""
    large, small, factor = rng.choice(grammar.UNITS)
    name, other = rng.sample(grammar.FIRST_NAMES, 2)
    item, thing = rng.sample(grammar.ITEMS, 2)
    words = {"large": large, "small": small, "name": name, "other": other, "item": item, "thing": thing}
    words |= {symbol: rng.choice(table) for symbol, table in grammar.MATH_WORDS.items()}
    numbers = {"factor": Fraction(factor)}

    def tell(text: str) -> str:
        # "[c = a * b]" in a step reads "3 * 4 = 12" and defines c for what follows.
        def sum_(match: re.Match[str]) -> str:
            terms = match[2].split()
            numbers[match[1]] = _left_to_right(terms, numbers)
            shown = [_number(numbers[term]) if term in numbers else term for term in terms]
            return f"{' '.join(shown)} = {_number(numbers[match[1]])}"

        facts = words | {symbol: _number(value) for symbol, value in numbers.items()}
        return re.sub(r"\[(\w+) = ([^]]+)\]", sum_, text.format(**facts))

    for definition in problem.given.split("; "):
        symbol, _, value = definition.partition(" = ")
        bounds = [_left_to_right(bound.split(), numbers) for bound in value.split("..")]
        numbers[symbol] = bounds[0] if len(bounds) == 1 else Fraction(rng.randint(int(bounds[0]), int(bounds[1])))
    return tell(rng.choice(problem.questions)), [tell(step) for step in problem.steps], _number(numbers[problem.answer])


def _left_to_right(terms: list[str], numbers: dict[str, Fraction]) -> Fraction:
    """Value of `a op b op c …`, without precedence: the tables keep products in front of sums."""
    value, *rest = (numbers.get(term, term) for term in terms)
    result = Fraction(value)
    for sign, operand in zip(rest[::2], rest[1::2], strict=True):
        result = OPERATORS[str(sign)](result, Fraction(operand))
    return result


def _number(value: Fraction) -> str:
    """As an integer, or as a decimal number of at most two places: the tables make no other fractions."""
    assert 100 % value.denominator == 0, value
    return str(value) if value.denominator == 1 else f"{float(value):.2f}".rstrip("0")


def _fraction_sum(rng: random.Random) -> Solved:
    """Sum or (positive) difference of two fractions, by way of the common denominator."""
    b, d = rng.sample(range(2, 13), 2)
    high, low = sorted((Fraction(rng.randint(1, b - 1), b), Fraction(rng.randint(1, d - 1), d)), reverse=True)
    sign = rng.choice("+-") if high > low else "+"
    common = lcm(high.denominator, low.denominator)
    left, right = (fraction.numerator * (common // fraction.denominator) for fraction in (high, low))
    top = left + right if sign == "+" else left - right
    result = Fraction(top, common)
    steps = [f"the common denominator of {high.denominator} and {low.denominator} is {common}.",
             f"with it, {high} = {left}/{common} and {low} = {right}/{common}.",
             f"the numerators give {left} {sign} {right} = {top}, which makes {top}/{common}."]  # fmt: skip
    if result.denominator != common:
        steps.append(f"dividing both by {common // result.denominator}, we get {top}/{common} = {result}.")
    verb = rng.choice(("Work out", "Compute", "Find"))
    return f"{verb} {high} {sign} {low} and give the result in lowest terms.", steps, str(result)


# ----------------------------------------------------------------------------------------------------------------- news


def _expand(rng: random.Random, template: str, facts: dict[str, str]) -> str:
    """Replace every `{symbol}` by the fact of that name, or else by a random production of the grammar."""

    def replacement(match: re.Match[str]) -> str:
        return facts.get(match[1]) or _expand(rng, rng.choice(demo_news.NEWS_SHARED[match[1]]), facts)

    return re.sub(r"\{(\w+)\}", replacement, template)


def _news(rng: random.Random) -> Iterator[str]:
    """Stories: a headline, then a dateline and three to seven sentences that agree with it on every number."""
    while True:
        story = demo_news.STORIES[rng.choice(list(demo_news.STORIES))]
        facts = _news_facts(rng)
        # Quotations and closing remarks belong to no kind of story: they take about a third of the sentences.
        num_body = rng.randint(1, 4)
        sentences = [rng.choice(story["lead"]), *rng.sample(story["body"], num_body), "{quote}", "{closing}"]
        if rng.random() < 0.4:
            sentences.remove(rng.choice(("{quote}", "{closing}")))
        sentences[1:-1] = rng.sample(sentences[1:-1], len(sentences) - 2)
        headline, *told = (_capital(_expand(rng, text, facts)) for text in (rng.choice(story["headline"]), *sentences))
        dateline = f"{facts['place'].upper()}, {facts['month']} {facts['day']} ({facts['agency']})"
        yield f"{headline}\n{dateline} - {' '.join(told)}"


def _news_facts(rng: random.Random) -> dict[str, str]:
    """What one story holds fixed. Numbers that are told together are computed from one another."""
    facts = {symbol: str(rng.randrange(*bounds)) for symbol, bounds in demo_news.NEWS_NUMBERS.items()}
    facts["place"], facts["other"] = rng.sample(demo_news.NEWS_SHARED["town"], 2)
    for symbol, table in demo_news.NEWS_FACTS.items():
        facts[symbol] = _expand(rng, rng.choice(table), facts)
    storm, degrees = rng.choice(list(demo_news.STORMS.items()))
    facts |= {"storm": storm, "degrees": str(rng.randint(*degrees))}
    teams = [f"{facts[town]} {rng.choice(demo_news.TEAMS)}" for town in ("place", "other")]
    facts["winner"], facts["loser"] = rng.sample(teams, 2)
    facts["party"], facts["rival"] = rng.sample(demo_news.PARTIES, 2)
    pairs = {("ayes", "noes"): (8, 31), ("goals", "conceded"): (1, 5), ("share", "rival_share"): (30, 53)}
    for (larger, smaller), bounds in pairs.items():
        high = rng.randint(*bounds)
        facts |= {larger: str(high), smaller: str(rng.randint(high // 3, high * 9 // 10))}
    facts["lead_points"] = str(int(facts["share"]) - int(facts["rival_share"]))
    facts["season_goals"] = str(int(facts["goals"]) + rng.randint(1, 15))
    opening, points, up = rng.randint(1000, 4000), rng.randint(5, 99), rng.random() < 0.5
    facts |= {"opening": str(opening), "points": str(points), "percent": f"{100 * points / opening:.1f}"}
    facts |= {"index": str(opening + points if up else opening - points)}
    return facts | ({"rose": "rose", "moved": "lifted"} if up else {"rose": "fell", "moved": "weighed on"})


# -------------------------------------------------------------------------------------------------------------- records


def _records(rng: random.Random) -> Iterator[str]:
    """Visit notes in one of three house styles; ages, BMI, means, flags, doses and dates follow from the rest."""
    while True:
        condition = rng.choice(grammar.CONDITIONS)
        visit = date(2031, 1, 1) + timedelta(days=rng.randrange(1200))
        child = condition.children and rng.random() < 0.4
        born = visit - timedelta(days=rng.randrange(*((2 * 366, 15 * 365) if child else (18 * 366, 92 * 365))))
        age = visit.year - born.year - ((visit.month, visit.day) < (born.month, born.day))
        review_days = rng.choice((2, 3, 5, 7, 10, 14, 21, 28, 42))
        clinic = rng.randrange(len(grammar.CLINICS))
        facts: dict[str, object] = {
            "number": f"N-{rng.randrange(10**5):05d}", "clinic": f"{grammar.CLINICS[clinic]}-{rng.randint(1, 9)}",
            "date": visit, "born": born, "age": age, "clinician": f"C-{rng.randint(100, 199)}",
            "patient": f"P-{rng.randrange(10**5):05d}", "sex": rng.choice(("female", "male")),
            "complaint": rng.choice(condition.complaints), "days": rng.randint(2, 14), "condition": condition.name,
            "history": "no earlier illness" if child else rng.choice(grammar.HISTORIES),
            "allergy": rng.choice(grammar.ALLERGIES), "review": visit + timedelta(days=review_days),
            "review_days": review_days, "plan": " ".join(rng.sample(condition.plans, rng.randint(1, 3))),
            "findings": " ".join(rng.sample(condition.findings, rng.randint(2, 4))),
        }  # fmt: skip
        facts |= _vitals(rng, condition, child) | _body(rng, visit, age, child)
        kilograms = int(float(str(facts["weight"]))) if child else None
        facts["medication"] = _medication(rng, condition, str(facts["allergy"]), kilograms)
        facts["extra"] = f"Pain score: {rng.randint(2, 8)}/10.\n" if condition.pain else ""
        if not child and rng.random() < 0.3:
            taken, lost = rng.randrange(800, 2600, 50), rng.randrange(700, 2300, 50)
            facts["extra"] = f"{facts['extra']}{grammar.FLUIDS.format(taken, lost, taken - lost)}"
        yield grammar.LAYOUTS[clinic % len(grammar.LAYOUTS)].format(**facts)


def _vitals(rng: random.Random, condition: grammar.Condition, child: bool) -> dict[str, object]:
    """Vital signs that fit the condition, and the flags that they raise."""
    tenths = rng.randint(380, 397) if condition.fever else rng.randint(362, 374)
    pulse = rng.randint(60, 95) + (25 if child else 0) + (15 if condition.fever else 0)
    systolic = rng.randint(*((90, 112) if child else (142, 178) if condition.raised_pressure else (104, 138)))
    diastolic = systolic * rng.randint(58, 64) // 100
    oxygen = rng.randint(89, 95) if condition.low_oxygen else rng.randint(95, 99)
    raised = (condition.fever, pulse > 100, systolic >= 140, oxygen < 94)
    return {
        "temperature": f"{tenths / 10:.1f}", "pulse": pulse, "systolic": systolic, "diastolic": diastolic,
        "mean_pressure": (2 * (systolic + 2 * diastolic) + 3) // 6, "oxygen": oxygen,
        "breaths": rng.randint(12, 18) + (6 if child else 0) + (4 if condition.low_oxygen else 0),
        "flags": ", ".join(flag for flag, is_raised in zip(grammar.FLAGS, raised, strict=True) if is_raised) or "none",
    }  # fmt: skip


def _body(rng: random.Random, visit: date, age: int, child: bool) -> dict[str, object]:
    """Weight, height and BMI (weight / height², in integers: halves round up on every machine)."""
    if child:
        height, tenths = 80 + 6 * age + rng.randint(-4, 4), 10 * (2 * (age + 4) + rng.randint(-1, 2))
    else:
        height = rng.randint(150, 194)
        tenths = height**2 * rng.randint(176, 360) // 10**4
    bmi_tenths = (2 * tenths * 10**4 + height**2) // (2 * height**2)
    classes = ((300, "obese"), (250, "overweight"), (185, "normal weight"), (0, "underweight"))
    body_class = "" if child else next(f" ({name})" for bound, name in classes if bmi_tenths >= bound)
    change = ""
    if not child and rng.random() < 0.4:
        past, days = tenths + rng.randint(-45, 45), rng.randint(20, 300)
        since = f"{past / 10:.1f} kg on {visit - timedelta(days=days)} ({days} days ago)"
        change = f" Weight was {since}: change {(tenths - past) / 10:+.1f} kg."
    weight, bmi = f"{tenths / 10:.1f}", f"{bmi_tenths / 10:.1f}"
    return {"weight": weight, "height": height, "bmi": bmi, "bmi_class": body_class, "change": change}


def _medication(rng: random.Random, condition: grammar.Condition, allergy: str, kilograms: int | None) -> str:
    """One line for each medicine: dose (by weight for a child), times a day, days, and the totals."""
    fitting = [m for m in condition.medicines if m.family != allergy and (kilograms is None or m.child_dose)]
    lines = []
    for medicine in rng.sample(fitting, min(len(fitting), rng.randint(1, 2))) or [grammar.PARACETAMOL]:
        dose, unit = medicine.dose, medicine.unit
        shown = f"{dose} {unit}"
        if kilograms is not None:
            dose = medicine.child_dose * kilograms
            shown = f"{medicine.child_dose} {unit}/kg x {kilograms} kg = {dose} {unit}"
        times = "once" if medicine.times == 1 else f"{medicine.times} times"
        doses = medicine.times * medicine.days
        totals = f"{dose * medicine.times} {unit} a day, {doses} doses, {dose * doses} {unit} in all"
        lines.append(f"Medication: {medicine.name} {shown}, {times} a day for {medicine.days} days: {totals}.\n")
    return "".join(lines)


# -------------------------------------------------------------------------------------------------------------- corpora

SOURCES: dict[str, Source] = {"math": _math, "code": _code, "reference": _reference, "news": _news, "records": _records}


def _sample(name: str, stream: str, public: bool, num_bytes: int) -> list[str]:
    """About `num_bytes` of the public or of the private part of a domain, without repetitions."""
    rng = random.Random(stream)
    taken: list[str] = []
    for text in _fresh(SOURCES[name](rng), set()):
        if num_bytes <= 0:
            break
        if _may_be_public(text) is public:
            taken.append(text)
            num_bytes -= _size(text)
    rng.shuffle(taken)  # documents of one source file apart, so that any cut of the corpus is a fair sample of it
    return taken


def _private(name: str, seed: int) -> Iterator[str]:
    return iter(_sample(name, f"{name}-{seed}", False, PRIVATE_BYTES))


def _public(seed: int) -> Iterator[str]:
    """Prose of the library, and the public samples of all domains, shuffled together."""
    seen: set[str] = set()  # licences and inherited docstrings come again in file after file
    prose = (_fresh(_prose(path), seen) for path in _library_files())
    texts = [text for paragraphs in prose for text in _pack(paragraphs, PUBLIC_TEXT_BYTES, "\n\n")]
    share = int(PUBLIC_SAMPLE_SHARE * sum(map(_size, texts)))
    for name in SOURCES:
        texts += _sample(name, f"{name}-public-{seed}", True, share)
    random.Random(f"public-{seed}").shuffle(texts)
    return iter(texts)


#: Corpus name to a function of the seed.
CORPORA: dict[str, Callable[[int], Iterator[str]]] = {"public": _public}
CORPORA |= {name: functools.partial(_private, name) for name in SOURCES}


def documents(name: str, seed: int = 0) -> Iterator[str]:
    """Documents of one corpus: a deterministic function of the name, the seed and the Python version.

    Raises:
        UserError: there is no corpus of that name.
    """
    if name not in CORPORA:
        raise UserError(f"there is no demo corpus {name!r}: choose one of {', '.join(CORPORA)}")
    return CORPORA[name](seed)
