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
    "solve": ("Solve for x:", "Find x if", "Which x satisfies"),
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

# ----------------------------------------------------------------------------------------------------------------- news

#: Symbols that any story may use.
NEWS_SHARED: dict[str, tuple[str, ...]] = {
    "town": ("Alderby", "Brackenford", "Caldmoor", "Dunhollow", "Eastmere", "Fennick", "Garrowby", "Hartlewick",
             "Ilmarsh", "Jessendale", "Kelbrook", "Lowenstead", "Marrowgate", "Netherfell", "Oxley-Vane", "Pellwater",
             "Quarrington", "Ravensea", "Stonewick", "Thornhaven", "Umberleigh", "Valemont", "Westerlyn", "Yarrowdale",
             "Zellbridge", "Brightwater", "Coppershaw", "Drumlin-Head", "Elmsgarth", "Foxholt", "Greywater",
             "Hollin-Bay", "Kestrel-Point", "Larkmouth", "Millrace", "Northam-Cross", "Orchard-End", "Port-Sable",
             "Redlynch", "Silvermoor"),
    "surname": ("Abrantel", "Bexholm", "Corvane", "Dellamar", "Estrick", "Farrowen", "Gantry-Low", "Hessaly",
                "Imbreck", "Jorrick", "Kaldane", "Lunaway", "Marbeck", "Nystrel", "Orvando", "Pellarin", "Quistow",
                "Rendahl", "Sallowby", "Tervane", "Ulvestad", "Varnholt", "Wexcombe", "Yarbeck", "Zandrel", "Ashquill",
                "Brindlow", "Coldary", "Drayson-Lee", "Elwick", "Fentress", "Grovander", "Holmquay", "Isbrand",
                "Kettlow", "Lanstrom", "Mirrowby", "Ostrand"),
    "first": FIRST_NAMES,
    "weekday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "daypart": ("early on {weekday}", "late on {weekday}", "on {weekday} morning", "on {weekday} afternoon",
                "on {weekday} evening", "on {weekday}", "shortly before noon on {weekday}"),
    "span": tuple(str(n) for n in range(2, 31)),
    "deadline": ("by the end of the year", "before the {season}", "within {span} weeks", "by next {season}",
                 "in the coming months", "no later than {month}"),
    "attribution": ("{speaker} said", "{speaker} told reporters", "{speaker} added", "{speaker} explained",
                    "{speaker} said in a statement", "{speaker} told the {paper}"),
    "speaker": ("{first} {surname}", "{role} {surname}", "a resident of {place}", "a spokesperson", "{official}",
                "{surname}, who has lived in {place} for {span} years,", "a shopkeeper in {place}"),
    "role": ("Mayor", "Councillor", "Inspector", "Professor", "Director", "Captain", "Minister", "Commissioner"),
    "paper": ("{place} Courier", "{place} Gazette", "Evening Ledger", "Morning Post of {place}", "Harbour Times"),
    "residents": ("residents", "neighbours", "local families", "people living nearby", "commuters", "shop owners"),
    "reaction": ("welcomed", "criticised", "cautiously backed", "questioned", "praised", "rejected"),
    "building": ("town hall", "old library", "railway station", "covered market", "grain exchange", "civic centre",
                 "harbour office", "swimming hall", "museum", "bus depot"),
    "district": ("the old town", "the harbour district", "the northern suburbs", "the valley", "the west bank",
                 "the mill quarter", "the hillside estates", "the university quarter"),
    "quote": (
        '"{quoted}," {attribution}.', '"{quoted}," {attribution} {daypart}.', 'As {speaker} put it: "{quoted}."',
    ),
    "quoted": (
        "we have waited {span} years for this", "nobody here expected it to happen so soon",
        "this is only a first step",
        "people in {district} deserve a clear answer", "we will look at the figures again {deadline}",
        "it was the right thing to do", "we learned a lot from what happened in {other}", "the work starts now",
        "there is still a long way to go", "I have never seen anything like it", "we owe it to the next generation",
        "the numbers speak for themselves", "we are grateful to everyone who helped", "it could have been much worse",
        "we would do the same again", "the whole of {place} was talking about it", "we need patience and good planning",
        "there were moments when we doubted it", "our doors stay open to everyone",
        "this changes the mood in {district}",
    ),
    "closing": (
        "A further announcement is expected {deadline}.", "Officials in {other} are said to be watching closely.",
        "It is the second such event in {place} this {season}.", "The {paper} first reported the story {daypart}.",
        "More details will be published {deadline}.", "A public meeting will be held at the {building} {daypart}.",
        "Similar reports have come from {other} and {town}.", "The last comparable case dates back {span} years.",
        "{role} {surname} declined to comment.", "About {hundreds} people in {district} are affected.",
        "Many {residents} {reaction} the news.", "The matter returns to the agenda in {month}.",
    ),
}

#: One story kind per key: its headlines, leads (first sentences, after the dateline) and body sentences.
STORIES: dict[str, dict[str, tuple[str, ...]]] = {
    "council": {
        "headline": ("{place} council approves {project} by {ayes} votes to {noes}",
                     "Council in {place} backs {project}", "{project} to go ahead in {place}",
                     "Vote clears the way for {project}", "{place} spends {millions} million on {project}"),
        "lead": ("The council of {place} voted {ayes} to {noes} {daypart} to fund {project}.",
                 "After {weeks} weeks of debate, councillors in {place} approved {project} {daypart}.",
                 "{place} will spend {millions} million crowns on {project}, the council decided {daypart}.",
                 "A plan for {project} passed by {ayes} votes to {noes} in {place} {daypart}."),
        "body": ("The plan will cost {millions} million crowns over {years} years.",
                 "Work in {district} should begin {deadline}.",
                 "Opponents argued that the money was needed for {alternative}.",
                 "{official} called the result a turning point.", "The motion passed by {ayes} votes to {noes}.",
                 "Supporters say that it will create {hundreds} jobs.",
                 "A petition against the plan had gathered {hundreds} signatures.",
                 "Part of the sum comes from the province.", "An earlier draft failed {years} years ago.",
                 "Members from {district} abstained or left the chamber.",
                 "The contract will be put out to tender {deadline}.",
                 "{alternative} will have to wait, the treasurer warned."),
    },
    "weather": {
        "headline": ("{storm} warning for {place}", "{place} braces for {storm}",
                     "{storm} to reach {place} and {other}", "Forecast: {storm} until {weekday_fixed}",
                     "{degrees} degrees expected in {place}"),
        "lead": ("Forecasters have warned of {storm} in {place} and {other} until {weekday_fixed}.",
                 "The weather service expects {storm} in {place} {daypart}.",
                 "People in {place} were told to prepare for {storm} with temperatures near {degrees} degrees.",
                 "A change in the weather will bring {storm} to {place} before {weekday_fixed}."),
        "body": ("Temperatures will stay near {degrees} degrees.",
                 "Gusts of up to {speed} kilometres per hour are possible on the coast.",
                 "About {millimetres} millimetres of rain may fall in {district}.",
                 "Ferries to {other} have been cancelled.",
                 "Drivers should avoid the road between {place} and {other}.",
                 "Schools in {district} will remain closed.",
                 "The river stood {millimetres} centimetres above its usual level.",
                 "Conditions should improve by {weekday_fixed}.",
                 "Crews have placed {hundreds} sandbags along the quay.",
                 "Farmers hope that the {season} harvest will be spared.",
                 "The weather service raised its alert from yellow to orange.", "Skies over {other} will clear first."),
    },
    "match": {
        "headline": ("{winner} beat {loser} {goals} to {conceded}",
                     "{goals}-{conceded}: {winner} celebrate against {loser}",
                     "{winner} stay {rank} after win over {loser}", "{scorer} leads {winner} past {loser}",
                     "Late goal sinks {loser}"),
        "lead": ("{winner} beat {loser} {goals} to {conceded} in front of {crowd} spectators {daypart}.",
                 "{scorer} scored the decisive goal as {winner} defeated {loser} {goals} to {conceded} {daypart}.",
                 "A strong second half gave {winner} a {goals} to {conceded} victory over {loser}.",
                 "{winner} moved into {rank} place with a {goals}-{conceded} win against {loser} {daypart}."),
        "body": ("{scorer} opened the scoring in minute {minute}.",
                 "The visitors had {shots} shots but lacked precision.", "A penalty was saved shortly after the break.",
                 "{winner} are now {rank} in the league.",
                 "Coach {surname} changed the line-up after {minute} minutes.",
                 "The crowd of {crowd} sang until the final whistle.",
                 "{loser} have not won in {place} for {years} years.", "The referee showed {cards} yellow cards.",
                 "{scorer} has now scored {season_goals} goals this season.", "{loser} meet {town} next {weekday}.",
                 "Rain made the pitch heavy in the closing minutes.",
                 "The goalkeeper of {loser} left with an injured hand."),
    },
    "markets": {
        "headline": ("{place} index {rose} {percent} percent", "Shares {rose} to {index} points",
                     "{company} {moved} the market", "{sector} shares in focus as index {rose}",
                     "Traders watch {sector} as market closes at {index}"),
        "lead": ("The {place} share index {rose} {percent} percent to {index} points {daypart}.",
                 "Shares in {place} closed at {index} points {daypart}, a change of {points} points.",
                 "{company} {moved} the {place} market, which {rose} {percent} percent.",
                 "Trading in {place} ended at {index} points after a busy day for {sector} shares."),
        "body": ("The index had opened at {opening} points.",
                 "The move of {points} points was the largest in {weeks} weeks.",
                 "{company} reported sales of {millions} million crowns.",
                 "Analysts pointed to {sector} as the main reason.",
                 "The crown was little changed against other currencies.", "Bond yields moved by {basis} basis points.",
                 "{company} expects to open {cards} branches {deadline}.",
                 "Turnover reached {millions} million crowns.", "The central bank meets next {weekday}.",
                 "Smaller {sector} firms did not follow the trend.", "Copper and wheat prices were steady.",
                 "Some investors in {other} took their profits."),
    },
    "fire": {
        "headline": ("{crews} crews fight fire at {place} {building_fixed}", "Fire damages {building_fixed} in {place}",
                     "{rescued} people rescued from {building_fixed}",
                     "Blaze in {place} under control after {hours} hours",
                     "Smoke over {place} as {building_fixed} burns"),
        "lead": ("Firefighters rescued {rescued} people from the {building_fixed} in {place} {daypart}.",
                 "A fire at the {building_fixed} in {place} was brought under control after {hours} hours.",
                 "{crews} crews were called to the {building_fixed} in {place} {daypart}.",
                 "The {building_fixed} in {place} was badly damaged by a fire that broke out {daypart}."),
        "body": ("Nobody was seriously hurt.", "It took {crews} crews {hours} hours to put out the flames.",
                 "The cause is thought to be {cause}.", "{rescued} people were treated for smoke.",
                 "The alarm was raised by {witness}.", "Damage is estimated at {millions} million crowns.",
                 "Streets around {district} were closed until the evening.",
                 "Captain {surname} praised the volunteers.", "The roof over the east wing collapsed.",
                 "Investigators will examine the building {daypart}.", "Water was pumped from the harbour.",
                 "An inspection {years} years ago had found no faults."),
    },
    "court": {
        "headline": ("Court in {place} rules on {dispute}", "Verdict in {dispute} case",
                     "{place} judge fines {company} {millions} million", "Ruling on {dispute} expected to be appealed",
                     "Judges in {place} settle {dispute}"),
        "lead": ("A court in {place} ruled {daypart} in the long dispute over {dispute}.",
                 "{company} must pay {millions} million crowns in the case about {dispute}, judges in {place} decided.",
                 "Judge {surname} closed the hearing on {dispute} {daypart} after {weeks} weeks.",
                 "The case about {dispute} ended in {place} {daypart} with a fine of {millions} million crowns."),
        "body": ("The court heard {witnesses} witnesses.", "Lawyers for {company} announced an appeal.",
                 "The fine of {millions} million crowns is due {deadline}.", "The judge spoke of serious negligence.",
                 "The case began {years} years ago in {other}.",
                 "Documents of more than {hundreds} pages were examined.",
                 "The plaintiffs, {hundreds} families, embraced outside the court.",
                 "A settlement had been refused in {month}.", "One of the charges was dropped for lack of evidence.",
                 "The province will review its rules on {dispute}.", "The hearing was interrupted twice.",
                 "The ruling is likely to be cited in {other}."),
    },
    "science": {
        "headline": ("Researchers in {place} find {discovery}", "{discovery} found near {place}",
                     "Study of {subject} surprises scientists", "University of {place} reports {discovery}",
                     "New hope for {subject} after {years} years of research"),
        "lead": ("Scientists at the University of {place} have found {discovery}, they reported {daypart}.",
                 "A study of {subject} led by Professor {surname} points to {discovery}.",
                 "After {years} years of work on {subject}, researchers in {place} announced {discovery}.",
                 "The find of {discovery} may change what is known about {subject}, a team from {place} said."),
        "body": ("The team examined {hundreds} samples.", "The results were checked by a laboratory in {other}.",
                 "The project on {subject} has cost {millions} million crowns.",
                 "Professor {surname} warned against quick conclusions.",
                 "The effect appeared in {percent_whole} percent of the cases.",
                 "Instruments for the study were built in {other}.",
                 "Students helped to collect the data over {weeks} weeks.",
                 "The findings appear in a journal this {weekday}.", "Critics say that the sample was too small.",
                 "A second expedition will leave {deadline}.", "Nobody had studied {subject} in this region before.",
                 "The measurements were repeated {cards} times."),
    },
    "school": {
        "headline": ("{place} opens school for {pupils} pupils", "Pupils from {place} win {prize}",
                     "{pupils} pupils return to class in {place}", "Teachers in {place} ask for {demand}",
                     "School in {place} tries {demand}"),
        "lead": ("A new school for {pupils} pupils opened in {place} {daypart}.",
                 "Pupils from {place} have won {prize} with a project about {subject}.",
                 "Teachers in {place} called for {demand} at a meeting {daypart}.",
                 "{demand} will be tried at a school in {place} with {pupils} pupils."),
        "body": ("The school has {pupils} pupils and {teachers} teachers.", "Parents {reaction} the decision.",
                 "The building cost {millions} million crowns.", "{demand} was the most frequent request.",
                 "Lessons on {subject} proved to be the most popular.",
                 "The head teacher, {first} {surname}, took office in {month}.",
                 "About {percent_whole} percent of the pupils come by bus.",
                 "A choir from {other} sang at the ceremony.", "The jury of {prize} praised the careful work.",
                 "The old building will become a {building}.", "Classes had been held in containers for {years} years.",
                 "The ministry will decide on {demand} {deadline}."),
    },
    "transport": {
        "headline": ("{line} between {place} and {other} to reopen", "{line} delayed by {weeks} weeks",
                     "Repairs close {line} in {place}", "{place} and {other} linked by {line}",
                     "{thousands} passengers a day expected on {line}"),
        "lead": ("The {line} between {place} and {other} will reopen {daypart}, the operator said.",
                 "Travellers between {place} and {other} face delays of {minute} minutes: the {line} is under repair.",
                 "After {weeks} weeks of repairs, the {line} from {place} to {other} is back in service.",
                 "The opening of the {line} between {place} and {other} has been put off by {weeks} weeks."),
        "body": ("The journey to {other} takes {minute} minutes.", "The operator expects {thousands} passengers a day.",
                 "Tickets will cost {cards} crowns.", "Replacement buses leave from the {building}.",
                 "The cost rose to {millions} million crowns.", "Engineers found cracks in {cards} places.",
                 "A test run took place {daypart}.", "Cyclists had asked for more space.",
                 "The {line} was last renewed {years} years ago.",
                 "Signals between {place} and {district} will be replaced.", "Freight will be moved at night.",
                 "Delays of up to {minute} minutes are possible until {month}."),
    },
    "culture": {
        "headline": ("{festival} draws {thousands} visitors to {place}", "{place} celebrates {festival}",
                     "{artist} wins prize at {festival}", "{festival} returns after {years} years",
                     "Full houses at {festival} in {place}"),
        "lead": ("The {festival} in {place} ended {daypart} with a performance by {artist}.",
                 "{thousands} people came to {place} for the {festival} this week.",
                 "{artist} received the main prize of the {festival} in {place} {daypart}.",
                 "For the first time in {years} years, {place} is host to the {festival}."),
        "body": ("{artist} was applauded for {minute} minutes.", "Organisers counted {thousands} visitors.",
                 "Tickets for the final evening were gone within {hours} hours.",
                 "The jury praised a work about {subject}.", "Hotels in {district} were fully booked.",
                 "The next {festival} will be held in {other}.", "Street musicians played until midnight.",
                 "The prize is worth {cards} thousand crowns.", "A children's day drew {hundreds} families.",
                 "{artist} grew up in {other}.", "The stage stood in front of the {building}.",
                 "Rain stopped one concert but spoiled nothing else."),
    },
    "election": {
        "headline": ("{candidate} wins {place} vote with {share} percent", "{party} ahead in {place}",
                     "{candidate} to lead {place}", "Turnout of {turnout} percent in {place}",
                     "{party} and {rival} in talks after vote in {place}"),
        "lead": ("{candidate} of the {party} won the vote in {place} with {share} percent {daypart}.",
                 "Voters in {place} have chosen {candidate} as head of the district; turnout was {turnout} percent.",
                 "The {party} won {share} percent in {place}, ahead of the {rival} with {rival_share} percent.",
                 "With {share} percent, the {party} is ahead of the {rival} by {lead_points} points in {place}."),
        "body": ("The {rival} came second with {rival_share} percent.", "Turnout reached {turnout} percent.",
                 "{candidate} promised {project}.", "The lead of {lead_points} points surprised observers.",
                 "A recount in {district} changed only a few votes.", "The {rival} conceded {daypart}.",
                 "Talks between the {party} and the {rival} begin next {weekday}.",
                 "Young voters favoured the {party}.", "{candidate} takes office in {month}.",
                 "In {other} the {rival} remained ahead.", "The campaign was dominated by {alternative}.",
                 "Polling stations closed at eight in the evening."),
    },
    "farming": {
        "headline": ("Harvest of {crop} {percent_whole} percent larger in {place}",
                     "Farmers near {place} worry about {crop}", "Price of {crop} doubles in {place}",
                     "Growers of {crop} in {place} seek help", "Dry {season} hurts {crop} near {place}"),
        "lead": ("Farmers around {place} have brought in {tonnes} tonnes of {crop}, the growers' union said {daypart}.",
                 "The harvest of {crop} near {place} is likely to be the smallest in {years} years.",
                 "Growers of {crop} in {place} asked the province for {millions} million crowns {daypart}.",
                 "Prices of {crop} in {place} and {other} have doubled in {weeks} weeks."),
        "body": ("The harvest amounts to {tonnes} tonnes.", "Frost in {month} damaged the young plants.",
                 "Some {hundreds} farms in the region grow {crop}.", "Buyers from {other} offered higher prices.",
                 "The union expects losses of {millions} million crowns.",
                 "Wells in {district} ran dry for {weeks} weeks.",
                 "A new variety of {crop} was tried on {cards} farms.", "Helpers are paid {cards} crowns an hour.",
                 "The market at the {building} opens {daypart}.", "Beetles were found in one field in {cards}.",
                 "Insurance covers only part of the damage.", "Next year some farmers will plant something else."),
    },
}

#: Facts that are drawn once per story from these tables.
NEWS_FACTS: dict[str, tuple[str, ...]] = {
    "scorer": ("{first} {surname}",), "artist": ("{first} {surname}",), "candidate": ("{first} {surname}",),
    "official": ("{role} {surname}",),
    "project": ("a new bridge", "the tram extension", "a flood wall", "the park on the river", "a public swimming hall",
                "cheaper bus tickets", "the repair of the old bridge", "a home for young musicians",
                "free school meals", "solar panels on public roofs", "a cycle path to {other}",
                "the renovation of the market"),
    "alternative": ("housing", "road repairs", "the hospital", "school buildings", "clean water", "street lighting",
                    "child care", "the fire brigade", "the library"),
    "rank": ("first", "second", "third", "fourth", "fifth", "sixth"),
    "company": ("Brightwater Mills", "Copper & Reed", "Dunhollow Motors", "Fennick Foods", "Greywater Power",
                "Lantern Bank", "Northam Steel", "Ostrand Shipping", "Pellwater Glass", "Sable Textiles",
                "Tern Airways", "Umber Paper"),
    "sector": ("energy", "banking", "shipping", "food", "steel", "paper", "textile", "insurance", "mining", "software"),
    "cause": ("an electrical fault", "a forgotten candle", "welding work on the roof", "lightning",
              "an overheated motor", "a gas leak", "a broken heater"),
    "witness": ("a night watchman", "two cyclists", "a baker on the way to work", "a schoolgirl", "passing drivers",
                "the crew of a fishing boat"),
    "building_fixed": ("furniture warehouse", "paper mill", "old brewery", "apartment house", "boat shed", "theatre",
                       "grain store", "hotel", "sports hall", "timber yard"),
    "dispute": ("fishing rights", "a polluted stream", "the ownership of a forest", "unpaid wages", "a collapsed dam",
                "forged paintings", "noise from the airfield", "the name of a cheese", "faulty brakes", "a lost cargo"),
    "discovery": ("traces of an ancient harbour", "a new kind of moss", "unusual magnetic rocks",
                  "a way to store heat in sand", "a comet that nobody had catalogued", "bones of a giant otter",
                  "a cheaper water filter", "an unknown species of beetle", "signs of an early settlement",
                  "a faster test for soil"),
    "subject": ("the river", "sea birds", "old languages", "glaciers", "bees", "volcanic ash", "deep lakes",
                "the night sky", "medieval trade", "salt marshes", "mountain plants", "city traffic"),
    "prize": ("the Copper Globe", "the provincial science cup", "the Blue Lantern award", "the young builders' prize",
              "the reading medal"),
    "demand": ("smaller classes", "longer breaks", "more music lessons", "later school hours", "better laboratories",
               "lessons outdoors", "more language teaching"),
    "line": ("coastal railway", "tram line", "mountain road", "ferry route", "night train", "harbour tunnel",
             "express bus",
             "canal crossing", "cable car"),
    "festival": ("lantern festival", "harbour film week", "festival of old music", "book fair", "puppet theatre week",
                 "kite festival", "poetry night", "jazz weekend", "accordion meeting"),
    "crop": ("barley", "apples", "potatoes", "grapes", "sugar beet", "hops", "onions", "rye", "cherries", "pumpkins"),
    "month": ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
              "November", "December"),
    "weekday_fixed": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "season": ("spring", "summer", "autumn", "winter"),
    "agency": ("Wire", "Lantern News", "Coast Agency", "Valley Press"),
}

#: Numbers that are drawn once per story: `range(start, stop, step)`.
NEWS_NUMBERS = {
    "day": (1, 29, 1), "millions": (2, 95, 1), "years": (3, 40, 1), "weeks": (2, 13, 1), "hundreds": (120, 980, 10),
    "minute": (5, 86, 1), "cards": (2, 10, 1), "hours": (2, 15, 1), "rescued": (2, 20, 1), "crews": (3, 16, 1),
    "crowd": (900, 32000, 100), "pupils": (120, 900, 5), "teachers": (9, 60, 1), "speed": (60, 145, 5),
    "millimetres": (15, 96, 1), "witnesses": (4, 60, 1), "thousands": (2000, 60000, 500), "tonnes": (300, 9000, 10),
    "shots": (4, 23, 1), "basis": (1, 21, 1), "percent_whole": (5, 91, 1), "turnout": (38, 84, 1),
}

#: A kind of weather and the temperatures that go with it.
STORMS = {
    "heavy snow": (-14, 0), "a severe storm": (6, 18), "freezing rain": (-3, 1), "dense fog": (1, 9),
    "a heat wave": (33, 40),
    "thunderstorms with hail": (19, 28), "strong winds": (5, 16), "a cold spell": (-19, -6), "days of rain": (7, 17),
    "high tides": (8, 20),
}
TEAMS = ("Rovers", "Athletic", "United", "Wanderers", "Lanterns", "Harriers", "Millers", "Falcons")
PARTIES = ("Harbour Union", "Green Valley List", "Citizens' League", "Workers' Alliance", "Free Towns Party")

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
