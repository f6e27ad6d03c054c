"""Pure tables of the demo's generated domains: no code, and nothing that was taken from real people or places.

A production is a string in which `{symbol}` stands for a fact of the document (a number, a winner, drawn once, so that
the headline and every sentence agree) or else for a random production of the table with that name. `demo.py` expands
them. Place names and surnames are invented; medicine names are ordinary generics in ordinary adult doses, because a
clinical note without them would not look like one, but no figure here is medical advice.
"""

from typing import NamedTuple

# Tables are read by rows; one item a line would make two thousand lines of them.
# fmt: off

# ---------------------------------------------------------------------------------------------------------- mathematics

FIRST_NAMES = ("Ana", "Bela", "Carlo", "Dina", "Emil", "Farah", "Goran", "Hanna", "Ivo", "Jana", "Karim", "Lena",
               "Milo", "Nora", "Omar", "Petra", "Quinn", "Rosa", "Sami", "Tara", "Uma", "Viktor", "Wanda", "Yusuf",
               "Zora", "Amir", "Britt", "Cleo", "Dario", "Elif", "Fritz", "Greta", "Hugo", "Ines", "Jonas", "Kira",
               "Luca", "Mina", "Nils", "Olga")

ITEMS = ("pencils", "notebooks", "apples", "lemons", "marbles", "candles", "tickets", "postcards", "buttons", "shells",
         "bricks", "tiles", "bottles", "baskets", "cookies", "stamps", "ribbons", "lanterns", "muffins", "coasters",
         "spoons", "pebbles", "peaches", "balloons", "beads", "cups", "envelopes", "flags", "magnets", "nails")

#: (large unit, small unit, how many small ones make a large one)
UNITS = (
    ("hours", "minutes", 60), ("minutes", "seconds", 60), ("kg", "g", 1000), ("km", "m", 1000), ("m", "cm", 100),
    ("weeks", "days", 7), ("days", "hours", 24), ("litres", "millilitres", 1000), ("feet", "inches", 12),
    ("years", "months", 12), ("dozens", "pieces", 12), ("tonnes", "kg", 1000),
)

MATH_OPENINGS = ("Problem: ", "Question: ", "Task: ", "Exercise: ", "")
MATH_STARTS = ("Solution: ", "We work step by step. ", "Let us see. ", "Working: ", "")
MATH_LINKS = (
    ("First, ", "Then, ", "Next, ", "Finally, "),
    ("To begin, ", "After that, ", "Now, ", "At last, "),
    ("At first, ", "From there, ", "Next, ", "In the end, "),
)

#: Words of a problem; each symbol is drawn once per problem.
MATH_WORDS: dict[str, tuple[str, ...]] = {
    "container": ("boxes", "crates", "bags", "trays", "jars", "cartons", "sacks", "drawers"),
    "maker": ("printer", "loom", "press", "bakery", "workshop", "robot", "packing line", "kiln", "mint", "sawmill"),
    "traveller": ("train", "cyclist", "ferry", "bus", "truck", "courier", "sailing boat", "tram", "drone",
                  "horse cart"),
    "goods": ("coat", "lamp", "bicycle", "kettle", "radio", "desk", "guitar", "tent", "camera", "clock", "sofa",
              "heater"),
    "surface": ("garden", "field", "hall", "carpet", "courtyard", "stage", "car park", "meadow", "terrace",
                "classroom"),
    "book": ("novel", "atlas", "diary", "textbook", "cookbook", "biography", "travel guide", "history book"),
    "relative": ("uncle", "aunt", "grandmother", "neighbour", "teacher", "cousin", "coach", "godfather"),
    "buys": ("buys", "orders", "picks out"), "packed": ("are packed into", "must go into", "are sorted into"),
    "gives": ("gives away", "sells", "paints", "loses", "lends"), "state": ("red", "blue", "broken", "sold", "old"),
    "moves": ("travels", "moves", "keeps going"), "share": ("share", "split", "divide"),
    "marks": ("readings", "scores", "marks", "results"),
    "makes": ("makes", "finishes", "turns out"), "think": ("Start with", "Take the number", "Think of"),
    "solve": ("Solve for x:", "Find x if", "Look for the x with"),
}


class Problem(NamedTuple):
    """A kind of problem.

    `given` draws (`low..high`) and defines numbers in order; a step's `[c = a * b]` reads "3 * 4 = 12" and defines c;
    sums are done from left to right. `answer` is the number that the answer line gives.
    """

    given: str
    questions: tuple[str, ...]
    steps: tuple[str, ...]
    answer: str


_BASKET = "{name} {buys} {n} {item} at {p} coins each and {m} {thing} at {q} coins each. "
_BASKET_STEPS = ("the {item} cost [s = n * p] coins.", "the {thing} cost [t = m * q] coins.",
                 "together that is [cost = s + t] coins.")
_PERCENT_STEPS = ("one percent of {base} is [one = base / 100].", "{percent} percent is [part = one * percent].")
_PERCENT = "f = 1..16; percent = f * 5; g = 2..45; base = g * 20"

PROBLEMS = (
    Problem("s = 5..60; a = 3..59; b = 2..7; c = 2..15",
            ("{think} {s}. Then add {a}, multiply by {b} and subtract {c}. What is the result?",),
            ("add {a}: [x = s + a].", "multiply by {b}: [y = x * b].", "subtract {c}: [z = y - c]."), "z"),
    Problem("s = 30..90; a = 3..29; b = 2..7; c = 2..59",
            ("{think} {s}. Then subtract {a}, multiply by {b} and add {c}. What is the result?",),
            ("subtract {a}: [x = s - a].", "multiply by {b}: [y = x * b].", "add {c}: [z = y + c]."), "z"),
    Problem("q = 5..60; b = 2..9; s = q * b; a = 3..59; c = 2..8; d = 1..9",
            ("{think} {s}. Then divide by {b}, add {a}, multiply by {c} and subtract {d}. What is the result?",),
            ("divide by {b}: [x = s / b].", "add {a}: [y = x + a].", "multiply by {c}: [w = y * c].",
             "subtract {d}: [z = w - d]."), "z"),
    Problem("q = 12..60; b = 2..9; a = 3..30; s = q * b - a; c = 1..11; d = 2..6",
            ("{think} {s}. Then add {a}, divide by {b}, subtract {c} and multiply by {d}. What is the result?",),
            ("add {a}: [x = s + a].", "divide by {b}: [y = x / b].", "subtract {c}: [w = y - c].",
             "multiply by {d}: [z = w * d]."), "z"),
    Problem("n = 2..19; p = 2..19; m = 2..19; q = 2..19", (_BASKET + "How much is the bill?",
                                                           _BASKET + "What is the total price?"),
            _BASKET_STEPS, "cost"),
    Problem("n = 2..15; p = 2..15; m = 2..15; q = 2..15; spare = 1..60; u = m * q; paid = n * p + u + spare",
            (_BASKET + "{name} pays with {paid} coins. How much change is due?",),
            (*_BASKET_STEPS, "the change is [change = paid - cost] coins."), "change"),
    Problem("k = 4..24; q = 5..40; last = k - 1; r = 1..last; total = k * q + r",
            ("{total} {item} {packed} {container} that hold {k} {item} each. How many {item} are left over?",),
            ("the number of full {container} is {q}, because [full = q * k].",
             "one more would need [more = full + k] {item}, which is too many.",
             "what is left over is [rest = total - full]."), "rest"),
    Problem("b = 3..12; last = b - 1; a = 1..last; c = 3..40; total = b * c",
            ("{name} has {total} {item} and {gives} {a}/{b} of the {item}. How many {item} is that?",),
            ("one part of {b} is [part = total / b] {item}.",
             "the share that {name} {gives} is [taken = part * a] {item}."), "taken"),
    Problem("b = 3..12; last = b - 1; a = 1..last; c = 3..40; total = b * c",
            ("{name} has {total} {item} and {gives} {a}/{b} of the {item}. How many {item} remain?",),
            ("one part of {b} is [part = total / b] {item}.",
             "the share that {name} {gives} is [taken = part * a] {item}.",
             "the rest is [rest = total - taken] {item}."), "rest"),
    Problem(_PERCENT,
            ("A shop holds {base} {item}, and {percent}% of them are {state}. How many {state} {item} are there?",),
            (*_PERCENT_STEPS, "that is how many of the {item} are {state}."), "part"),
    Problem(_PERCENT, ("A {goods} costs {base} coins. The price falls by {percent}%. What is the new price?",
                       "A {goods} for {base} coins is reduced by {percent}%. What is the new price?"),
            (*_PERCENT_STEPS, "the price falls to [price = base - part] coins."), "price"),
    Problem(_PERCENT, ("A {goods} costs {base} coins. The price rises by {percent}%. What is the new price?",
                       "A {goods} for {base} coins becomes {percent}% dearer. What is the new price?"),
            (*_PERCENT_STEPS, "the price rises to [price = base + part] coins."), "price"),
    Problem("a = 2..60; last = factor - 1; b = 1..last",
            ("Convert {a} {large} and {b} {small} into {small}.", "How many {small} are {a} {large} and {b} {small}?",
             "Write {a} {large} and {b} {small} in {small} only."),
            ("each of the {large} counts {factor} {small}.", "the {a} {large} are [most = a * factor] {small}.",
             "with the other {b} {small} this makes [total = most + b] {small}."), "total"),
    Problem("a = 2..12; x = 2..25; b = 1..60; total = a * x + b", ("{solve} {a}x + {b} = {total}.",),
            ("subtract {b} from both sides: {a}x = [y = total - b].", "divide both sides by {a}: x = [z = y / a].",
             "a check: [w = a * z + b], as it should be."), "z"),
    Problem("c = 1..6; e = 2..9; a = c + e; x = 2..25; b = 1..60; d = e * x + b", ("{solve} {a}x + {b} = {c}x + {d}.",),
            ("take {c}x from both sides: {e}x + {b} = {d}.", "take away {b}: {e}x = [y = d - b].",
             "divide by {e}: x = [z = y / e].", "a check: [l = a * z + b] and [r = c * z + d]."), "z"),
    Problem("v = 8..90; t = 2..9; w = 8..90; u = 2..9",
            ("A {traveller} {moves} at {v} km per hour for {t} hours and then at {w} km per hour for {u} hours. "
             "How far is that?",),
            ("the first part is [s = v * t] km.", "the second part is [r = w * u] km.",
             "the whole way is [far = s + r] km."), "far"),
    Problem("l = 12..80; w = 3..40", ("A rectangular {surface} is {l} m long and {w} m wide. What is its area?",
                                      "What is the area of a {surface} that is {l} m long and {w} m wide?"),
            ("to find the area, multiply the two sides.", "this gives [area = l * w] square metres."), "area"),
    Problem("l = 12..80; w = 3..40", ("A rectangular {surface} is {l} m long and {w} m wide. What is its perimeter?",
                                      "A {surface} is {l} m long and {w} m wide. What is its perimeter?"),
            ("one long and one short side make [half = l + w] m.", "there are two of each: [round = half * 2] m."),
            "round"),
    Problem("m = 45..60; a = 20..60; b = 20..60; c = 20..60; d = m * 4 - a - b - c",
            ("The {marks} are {a}, {b}, {c} and {d}. What is their average?",
             "What is the mean of the {marks} {a}, {b}, {c} and {d}?"),
            ("the sum is [sum = a + b + c + d].", "there are 4 {marks}.", "the average is [mean = sum / 4]."), "mean"),
    Problem("a = 1..11; b = 1..11; c = 3..30; parts = a + b; total = parts * c",
            ("{name} and {other} {share} {total} {item} in the ratio {a}:{b}. How many {item} does {name} get?",),
            ("the ratio has [n = a + b] parts.", "one part is [part = total / n] {item}.",
             "the share of {name} is [own = a * part] {item}."), "own"),
    Problem("a = 4..21; k = 2..4; y = 2..19",
            ("{name} is {a} years old, and the {relative} of {name} is {k} times as old. "
             "How old will the {relative} be in {y} years?",),
            ("the {relative} is now [old = a * k] years old.", "in {y} years, that will be [then = old + y] years."),
            "then"),
    Problem("r = 4..60; t = 2..9; n = r * t; u = 2..24",
            ("A {maker} {makes} {n} {item} in {t} hours. At the same rate, how many {item} come out in {u} hours?",),
            ("the rate is [rate = n / t] {item} per hour.", "in {u} hours that makes [out = rate * u] {item}."), "out"),
    Problem("s = 1..60; d = 2..15; n = 6..40",
            ("A sequence starts with {s} and grows by {d} each time. What is term number {n}?",),
            ("term {n} comes after [jumps = n - 1] jumps.", "the jumps add [add = jumps * d].",
             "the term is [term = s + add]."), "term"),
    Problem("a = 6..40; t = 3..12; more = 5..200; pages = a * t + more",
            ("A {book} has {pages} pages. {name} reads {a} pages a day for {t} days. How many pages remain?",),
            ("in {t} days, {name} reads [read = a * t] pages.", "what remains is [rest = pages - read] pages."),
            "rest"),
)

# -------------------------------------------------------------------------------------------------------------- records


class Medicine(NamedTuple):
    """One line of a plan: `dose` in mg (or mg per kg of body weight for a child), `times` a day, for `days` days."""

    name: str
    dose: int
    times: int
    days: int
    child_dose: int = 0
    family: str = ""
    unit: str = "mg"


class Condition(NamedTuple):
    """What a visit is about: the tables that the note draws its sentences from."""

    name: str
    complaints: tuple[str, ...]
    findings: tuple[str, ...]
    plans: tuple[str, ...]
    medicines: tuple[Medicine, ...]
    fever: bool = False
    raised_pressure: bool = False
    low_oxygen: bool = False
    children: bool = False
    pain: bool = False


PARACETAMOL = Medicine("paracetamol", 1000, 3, 5, 15)
IBUPROFEN = Medicine("ibuprofen", 400, 3, 5, 10, "anti-inflammatories")
AMOXICILLIN = Medicine("amoxicillin", 500, 3, 7, 12, "penicillins")
DOXYCYCLINE = Medicine("doxycycline", 100, 2, 7)
OMEPRAZOLE = Medicine("omeprazole", 20, 1, 28)
CETIRIZINE = Medicine("cetirizine", 10, 1, 14)

CONDITIONS = (
    Condition("acute bronchitis", ("cough with yellow sputum", "persistent cough", "cough and tight chest"),
              ("Scattered wheezes in both lungs.", "Throat slightly red.", "No crackles.", "Breath sounds equal."),
              ("Fluids and rest.", "Return if short of breath.", "No smoking."), (PARACETAMOL, DOXYCYCLINE),
              children=True),
    Condition("pneumonia of the right lower lobe", ("fever and cough", "chills with productive cough",
                                                    "fever and chest pain"),
              ("Crackles at the right base.", "Dull percussion on the right.", "Lips dry.",
               "Uses no accessory muscles."),
              ("Chest X-ray today.", "Blood count and C-reactive protein.", "Recheck oxygen saturation tomorrow."),
              (AMOXICILLIN, PARACETAMOL, DOXYCYCLINE), fever=True, low_oxygen=True),
    Condition("tonsillitis", ("sore throat and fever", "painful swallowing", "fever and swollen glands"),
              ("Tonsils enlarged with white patches.", "Tender glands in the neck.", "Ears normal.", "No rash."),
              ("Rapid streptococcus test.", "Soft food and cool drinks.", "Stay home until free of fever."),
              (AMOXICILLIN, IBUPROFEN, PARACETAMOL), fever=True, children=True, pain=True),
    Condition("otitis media", ("earache on the left", "earache after a cold", "ear pain at night"),
              ("Left eardrum red and bulging.", "No discharge.", "Mastoid not tender.", "Nose congested."),
              ("Recheck the eardrum.", "Keep water out of the ear.", "Return if hearing gets worse."),
              (AMOXICILLIN, PARACETAMOL, IBUPROFEN), fever=True, children=True, pain=True),
    Condition("arterial hypertension", ("ringing ears", "headache in the morning",
                                        "dizziness"),
              ("Heart sounds regular.", "No ankle swelling.", "Pulses present in both feet.", "Fundi not examined."),
              ("Blood pressure diary at home.", "Less salt, more walking.", "Kidney function and potassium."),
              (Medicine("amlodipine", 5, 1, 30), Medicine("lisinopril", 10, 1, 30), Medicine("indapamide", 2, 1, 30)),
              raised_pressure=True),
    Condition("type 2 diabetes", ("dry mouth", "thirst and tiredness", "frequent urination"),
              ("Feet warm, no ulcers.", "Monofilament test normal.", "Abdomen soft.", "Skin dry."),
              ("HbA1c and fasting glucose.", "Dietician appointment.", "Annual eye check."),
              (Medicine("metformin", 500, 2, 30), Medicine("gliclazide", 80, 1, 30)), raised_pressure=True),
    Condition("migraine", ("throbbing headache", "headache with nausea", "headache with flashing lights"),
              ("No neck stiffness.", "Pupils equal and reactive.", "Gait normal.", "Cranial nerves intact."),
              ("Headache diary.", "Rest in a dark room.", "Avoid known triggers."),
              (IBUPROFEN, PARACETAMOL, Medicine("propranolol", 40, 2, 30)), pain=True),
    Condition("low back pain", ("low back pain after lifting", "stiff back in the morning", "back pain for some days"),
              ("Paraspinal muscles tender.", "Straight leg raise negative.", "Reflexes symmetric.",
               "Power full in both legs."),
              ("Keep moving, avoid heavy loads.", "Physiotherapy referral.", "Return at once if numbness appears."),
              (IBUPROFEN, PARACETAMOL, Medicine("naproxen", 500, 2, 7, 0, "anti-inflammatories")), pain=True),
    Condition("urinary tract infection", ("burning on urination", "frequent painful urination", "lower abdominal pain"),
              ("Suprapubic tenderness.", "No flank pain.", "Dipstick positive for leucocytes.",
               "Abdomen otherwise soft."),
              ("Urine culture sent.", "Drink two litres a day.", "Return if fever develops."),
              (Medicine("trimethoprim", 200, 2, 3), Medicine("nitrofurantoin", 50, 4, 5), PARACETAMOL), pain=True),
    Condition("gastritis", ("burning upper abdominal pain", "nausea after meals", "heartburn at night"),
              ("Epigastric tenderness.", "No guarding.", "Bowel sounds normal.", "No jaundice."),
              ("Avoid coffee and alcohol.", "Test for Helicobacter.", "Small, frequent meals."),
              (OMEPRAZOLE, Medicine("famotidine", 20, 2, 14)), pain=True),
    Condition("gastroenteritis", ("vomiting and diarrhoea", "watery diarrhoea", "cramps and vomiting"),
              ("Mucous membranes slightly dry.", "Abdomen soft, not distended.", "Skin turgor normal.",
               "Bowel sounds lively."),
              ("Oral rehydration solution.", "Light food when tolerated.", "Wash hands carefully."),
              (PARACETAMOL, Medicine("ondansetron", 4, 2, 2)), fever=True, children=True),
    Condition("asthma", ("wheezing at night", "short of breath on exertion", "cough when running"),
              ("Wheezes at the end of expiration.", "Speaks in full sentences.", "Chest clear on the left.",
               "No cyanosis."),
              ("Check inhaler technique.", "Peak flow diary.", "Written action plan given."),
              (Medicine("prednisolone", 40, 1, 5, 1), Medicine("montelukast", 10, 1, 30)), low_oxygen=True,
              children=True),
    Condition("seasonal allergy", ("sneezing and itchy eyes", "runny nose outdoors", "itchy, watery eyes"),
              ("Nasal mucosa pale and swollen.", "Conjunctivae slightly red.", "Lungs clear.", "No sinus tenderness."),
              ("Keep windows closed in the morning.", "Saline nose rinse.", "Allergy test if no better."),
              (CETIRIZINE, Medicine("loratadine", 10, 1, 21))),
    Condition("ankle sprain", ("twisted ankle", "painful swollen ankle", "ankle pain after a fall"),
              ("Swelling below the outer ankle.", "No bony tenderness.", "Drawer test negative.", "Walks with a limp."),
              ("Ice and elevation.", "Elastic bandage for a week.", "No sports for three weeks."),
              (IBUPROFEN, PARACETAMOL), children=True, pain=True),
    Condition("cellulitis of the left leg", ("red, warm leg", "swollen painful leg", "spreading redness of the leg"),
              ("Warm redness of the left shin.", "Border marked with a pen.", "No abscess.", "Calf soft."),
              ("Leg elevation.", "Recheck the border in two days.", "Blood count today."),
              (Medicine("flucloxacillin", 500, 4, 7, 0, "penicillins"), Medicine("clindamycin", 300, 3, 7),
               PARACETAMOL),
              fever=True, pain=True),
    Condition("iron deficiency anaemia", ("tiredness for weeks", "pale skin and fatigue", "short of breath on stairs"),
              ("Conjunctivae pale.", "Soft systolic murmur.", "No enlarged spleen.", "Nails brittle."),
              ("Ferritin and blood count.", "Diet rich in iron.", "Look for a source of bleeding."),
              (Medicine("ferrous sulfate", 200, 2, 30), Medicine("folic acid", 5, 1, 30))),
    Condition("underactive thyroid", ("weight gain and feeling cold", "tiredness and dry skin", "hoarse voice"),
              ("Thyroid not enlarged.", "Slow ankle reflexes.", "Skin cool and dry.", "No tremor."),
              ("TSH in six weeks.", "Take tablets before breakfast.", "Weight check at each visit."),
              (Medicine("levothyroxine", 50, 1, 30, unit="micrograms"),)),
    Condition("knee osteoarthritis", ("knee pain on stairs", "stiff knee after rest", "swollen right knee"),
              ("Crepitus in the right knee.", "Small effusion.", "Ligaments stable.", "Full extension possible."),
              ("Exercises for the thigh.", "Weight loss advised.", "X-ray of both knees."),
              (PARACETAMOL, Medicine("naproxen", 250, 2, 14, 0, "anti-inflammatories")), pain=True,
              raised_pressure=True),
    Condition("insomnia", ("trouble falling asleep", "waking at three in the morning", "poor sleep for weeks"),
              ("Alert and oriented.", "Mood slightly low.", "No tremor.", "Thyroid normal."),
              ("Sleep diary.", "No screens in the evening.", "Fixed time of getting up."),
              (Medicine("melatonin", 2, 1, 21),)),
    Condition("influenza", ("sudden fever and aches", "fever, cough and headache", "chills and muscle pain"),
              ("Looks tired.", "Throat red.", "Lungs clear.", "No neck stiffness."),
              ("Rest and fluids.", "Stay home for five days.", "Return if short of breath."),
              (PARACETAMOL, IBUPROFEN, Medicine("oseltamivir", 75, 2, 5)), fever=True, children=True),
)

CLINICS = ("Alder", "Birch", "Cedar", "Hazel", "Larch", "Maple", "Rowan", "Willow")
HISTORIES = ("no earlier illness", "asthma in childhood", "appendix removed", "high cholesterol", "gall stones",
             "broken wrist", "hay fever", "one uneventful operation", "mild eczema",
             "kidney stone years ago")
ALLERGIES = ("penicillins", "anti-inflammatories", "latex", "pollen", "none known", "none known", "none known", "nuts")

FLAGS = ("fever", "fast pulse", "raised blood pressure", "low oxygen")
FLUIDS = "Fluids in 24 hours: intake {} ml, output {} ml, balance {:+d} ml.\n"

#: House styles of notes, told apart by the clinic, so that the first lines announce the layout of the rest.
LAYOUTS = (
    "SYNTHETIC VISIT NOTE {number}\nSite: Clinic {clinic}. Date: {date}. Clinician: {clinician}.\n"
    "Patient: {patient}, {sex}, born {born}, age {age}.\nReason for visit: {complaint} for {days} days.\n"
    "History: {history}. Allergies: {allergy}.\n"
    "Vitals: temperature {temperature} C, pulse {pulse}/min, blood pressure {systolic}/{diastolic} mmHg "
    "(mean {mean_pressure}), breathing {breaths}/min, oxygen saturation {oxygen}%.\nFlags: {flags}.\n"
    "Body: weight {weight} kg, height {height} cm, BMI {bmi}{bmi_class}.{change}\n"
    "Findings: {findings}\nAssessment: {condition}.\nPlan: {plan}\n{medication}{extra}"
    "Review: {review} (in {review_days} days).",
    "Clinic {clinic} | note {number} | synthetic\n{date} | {clinician} | {patient} | {sex} | born {born} | age {age}\n"
    "CC: {complaint}, {days} d\nPMH: {history}; allergies: {allergy}\n"
    "T {temperature} C; HR {pulse}/min; BP {systolic}/{diastolic} mmHg (mean {mean_pressure}); RR {breaths}/min; "
    "SpO2 {oxygen}%\nFlags: {flags}.\nWt {weight} kg; Ht {height} cm; BMI {bmi}{bmi_class}.{change}\n"
    "O/E: {findings}\nDx: {condition}\nP: {plan}\n{medication}{extra}F/U: {review} (in {review_days} days).",
    "Synthetic record {number}, Clinic {clinic}, {date}, seen by {clinician}.\n"
    "{patient} is a {age}-year-old {sex} patient (born {born}) with {complaint} for {days} days. "
    "Past history: {history}. Allergies: {allergy}.\n"
    "On arrival temperature {temperature} C, pulse {pulse}/min, blood pressure {systolic}/{diastolic} mmHg "
    "(mean {mean_pressure}), {breaths} breaths/min, saturation {oxygen}%. Flags: {flags}.\n"
    "At weight {weight} kg and height {height} cm the BMI is {bmi}{bmi_class}.{change}\n"
    "Examination: {findings} Impression: {condition}.\n{plan}\n{medication}{extra}"
    "Next visit: {review} (in {review_days} days).",
)
