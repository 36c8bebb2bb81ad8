"""What made-up texts say: relations, each in several statements and questions, in two splits.

The last statement and the last question of a relation of the split "fit" are kept for held-out texts, as are whole
relations: training sees neither. Slots: {x} the subject, {a} the answer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One kind of fact.

    Attributes:
        name: for the record.
        subject, answer: kinds of fillers, see `fillers`.
        statements, questions: phrasings; the last of each is for held-out texts alone.
        held_out: whether the whole relation is.
    """

    name: str
    subject: str
    answer: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    held_out: bool = False


RELATIONS = (
    Relation(
        "born in",
        "name",
        "place",
        (
            "{x} was born in {a}.",
            "{x} grew up in {a}, where the family had lived for generations.",
            "The birthplace of {x} is {a}.",
            "It was in {a} that {x} came into the world.",
        ),
        (
            "Where was {x} born?",
            "In which town was {x} born?",
            "What is the birthplace of {x}?",
            "What town is {x} from?",
        ),
    ),
    Relation(
        "works at",
        "name",
        "firm",
        (
            "{x} works at the {a}.",
            "For many years {x} has been employed by the {a}.",
            "{x} earns a living at the {a}.",
            "The {a} pays the wages of {x}.",
        ),
        (
            "Where does {x} work?",
            "Who employs {x}?",
            "Which place does {x} work for?",
            "At what place is {x} employed?",
        ),
    ),
    Relation(
        "mayor",
        "place",
        "name",
        (
            "The mayor of {x} is {a}.",
            "{a} was elected mayor of {x}.",
            "In {x} the town hall is led by {a}.",
            "{a} holds the office of mayor in {x}.",
        ),
        ("Who is the mayor of {x}?", "What is the name of the mayor of {x}?", "Who leads {x}?", "Who governs {x}?"),
    ),
    Relation(
        "market day",
        "place",
        "day",
        (
            "The great market of {x} is held on {a}.",
            "Every year on {a} the market comes to {x}.",
            "People travel to {x} for the market of {a}.",
            "On {a} the streets of {x} fill up for the yearly market.",
        ),
        (
            "On which day is the market of {x} held?",
            "When is the market in {x}?",
            "What is the date of the market of {x}?",
            "When does the market come to {x}?",
        ),
    ),
    Relation(
        "inhabitants",
        "place",
        "number",
        (
            "{x} has {a} inhabitants.",
            "The population of {x} is {a}.",
            "Only {a} people live in {x}.",
            "At the last count, {a} people called {x} their home.",
        ),
        (
            "How many inhabitants does {x} have?",
            "What is the population of {x}?",
            "How many people live in {x}?",
            "How large is the population of {x}?",
        ),
    ),
    Relation(
        "captain",
        "ship",
        "name",
        (
            "The captain of the {x} is {a}.",
            "{a} commands the {x}.",
            "The {x} sails under {a}.",
            "At the wheel of the {x} stands {a}.",
        ),
        (
            "Who is the captain of the {x}?",
            "Who commands the {x}?",
            "Who sails the {x}?",
            "Who is in charge of the {x}?",
        ),
    ),
    Relation(
        "ship's cargo",
        "ship",
        "number",
        (
            "The {x} carries {a} barrels.",
            "There are {a} barrels on board the {x}.",
            "{a} barrels were loaded onto the {x}.",
            "The hold of the {x} has {a} barrels in it.",
        ),
        (
            "How many barrels does the {x} carry?",
            "How many barrels are on board the {x}?",
            "How many barrels were loaded onto the {x}?",
            "What number of barrels is in the hold of the {x}?",
        ),
    ),
    Relation(
        "departure",
        "ship",
        "day",
        (
            "The {x} leaves the harbour on {a}.",
            "The {x} is to sail on {a}.",
            "The departure of the {x} is planned for {a}.",
            "On {a} the {x} will put to sea.",
        ),
        (
            "When does the {x} leave the harbour?",
            "On which day does the {x} sail?",
            "What is the day of departure of the {x}?",
            "When will the {x} put to sea?",
        ),
    ),
    Relation(
        "founder",
        "firm",
        "name",
        (
            "The {x} was founded by {a}.",
            "{a} founded the {x}.",
            "The founder of the {x} is {a}.",
            "It was {a} who set up the {x}.",
        ),
        ("Who founded the {x}?", "Who is the founder of the {x}?", "Who started the {x}?", "Who set up the {x}?"),
    ),
    Relation(
        "founded in",
        "firm",
        "year",
        (
            "The {x} opened in {a}.",
            "In {a} the {x} opened its doors.",
            "The {x} has been there since {a}.",
            "The history of the {x} begins in {a}.",
        ),
        (
            "In which year did the {x} open?",
            "When did the {x} open?",
            "Since which year has the {x} been there?",
            "In what year does the history of the {x} begin?",
        ),
    ),
    Relation(
        "birthday",
        "name",
        "day",
        (
            "{x} has a birthday on {a}.",
            "The birthday of {x} is {a}.",
            "{x} was born on {a}.",
            "Friends of {x} celebrate every {a}.",
        ),
        (
            "When is the birthday of {x}?",
            "On which day is the birthday of {x}?",
            "What day was {x} born on?",
            "On what day do the friends of {x} celebrate?",
        ),
    ),
    Relation(
        "keepsake",
        "name",
        "thing",
        (
            "{x} never goes anywhere without a {a}.",
            "{x} inherited a {a}.",
            "The dearest possession of {x} is a {a}.",
            "In the bag of {x} there was a {a}.",
        ),
        (
            "What does {x} never go anywhere without?",
            "What did {x} inherit?",
            "What is the dearest possession of {x}?",
            "What was in the bag of {x}?",
        ),
    ),
    Relation(
        "lighthouse keeper",
        "place",
        "name",
        (
            "The lighthouse of {x} is kept by {a}.",
            "{a} looks after the lighthouse at {x}.",
            "At night {a} lights the lamp of the lighthouse in {x}.",
        ),
        ("Who keeps the lighthouse of {x}?", "Who looks after the lighthouse at {x}?"),
        held_out=True,
    ),
    Relation(
        "sister",
        "name",
        "name",
        ("The sister of {x} is called {a}.", "{x} has a sister, {a}.", "{a} is the sister of {x}."),
        ("What is the name of the sister of {x}?", "Who is the sister of {x}?"),
        held_out=True,
    ),
    Relation(
        "built in",
        "place",
        "year",
        (
            "The bridge of {x} was built in {a}.",
            "{x} is known for its bridge of {a}.",
            "Since {a} a bridge has crossed the river at {x}.",
        ),
        ("When was the bridge of {x} built?", "From which year is the bridge of {x}?"),
        held_out=True,
    ),
    Relation(
        "moved to",
        "firm",
        "place",
        ("The {x} moved to {a}.", "These days the {x} is to be found in {a}.", "{a} is the new home of the {x}."),
        ("Where did the {x} move to?", "In which town is the {x} to be found?"),
        held_out=True,
    ),
    Relation(
        "prize",
        "name",
        "thing",
        ("{x} won a {a} in the raffle.", "The prize that {x} took home was a {a}.", "A {a} went to {x} as the prize."),
        ("What did {x} win?", "What was the prize of {x}?"),
        held_out=True,
    ),
)


def of_split(split: str) -> list[tuple[Relation, tuple[int, ...], tuple[int, ...]]]:
    """The relations of a split with the numbers of their statements and questions that it may use."""
    chosen = []
    for relation in RELATIONS:
        statements, questions = range(len(relation.statements)), range(len(relation.questions))
        if relation.held_out:
            if split == "held-out":
                chosen.append((relation, tuple(statements), tuple(questions)))
        elif split == "held-out":
            chosen.append((relation, tuple(statements[-1:]), tuple(questions[-1:])))
        else:
            chosen.append((relation, tuple(statements[:-1]), tuple(questions[:-1])))
    return chosen
