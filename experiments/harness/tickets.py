"""A small data set that looks private: support tickets, and the structured triage line that a company would want for
each.

Everything in it is made up by a seeded generator; a small model can learn the mapping in a few dozen steps and cannot
know it before.
"""

from __future__ import annotations

import calendar
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from isthmus.experiments.harness.prose import write_jsonl

FIRST = "Amara Bogdan Chen Dagny Elif Farid Greta Hugo Ines Jonas Kavya Lior Mette Nuria Olek"
LAST = "Abara Brandt Castell Dahl Eriksen Fontaine Grossi Haddad Ito Jansen Kovacs Lindqvist Moreau"
PRODUCTS = ("Harbor", "Lantern", "Quill", "Tessera", "Voyage")

# What the customer writes, the team, the topic, and how urgent it is.
CASES = (
    ("my card was charged twice for the {product} subscription on {date}", "billing", "duplicate charge", "high"),
    ("the invoice {number} for {product} shows the wrong company address", "billing", "invoice data", "low"),
    ("please refund the {product} renewal of {date}, we had cancelled it", "billing", "refund", "normal"),
    ("I cannot sign in to {product} since {date}, the reset mail never comes", "access", "login", "high"),
    ("a former colleague still has access to our {product} workspace", "access", "revoke access", "urgent"),
    ("{product} asks for a code from a phone that I no longer own", "access", "second factor", "high"),
    ("exporting report {number} from {product} ends with an empty file", "product", "export", "normal"),
    ("{product} has been down for all of our {count} users since this morning", "product", "outage", "urgent"),
    ("the search in {product} does not find documents older than {date}", "product", "search", "normal"),
    ("the parcel with order {number} arrived without the {product} hub", "logistics", "missing item", "normal"),
    ("order {number} has been at the customs office since {date}", "logistics", "delay", "normal"),
    ("the {product} hub was broken in the box, order {number}", "logistics", "damage", "high"),
)
OPENINGS = ("Hello,", "Hi team,", "Good morning,", "To whom it may concern:", "Dear support,")
CLOSINGS = ("Thanks", "Kind regards", "Please help", "Best", "Waiting for your answer")
MONTHS = tuple(calendar.month_name)[1:]


@dataclass(frozen=True, slots=True)
class Ticket:
    """A ticket as a prompt, and its triage line as the completion."""

    prompt: str
    completion: str


def make_tickets(count: int, seed: int = 0) -> list[Ticket]:
    """Make tickets; the same seed gives the same ones."""
    source = random.Random(seed)  # noqa: S311 - a data set, not a secret
    return [_ticket(source) for _ in range(count)]


def write_tickets(path: Path, tickets: list[Ticket]) -> None:
    """Write tickets as JSONL with `prompt` and `completion`."""
    write_jsonl(path, map(asdict, tickets))


def _ticket(source: random.Random) -> Ticket:
    template, team, topic, urgency = source.choice(CASES)
    product = source.choice(PRODUCTS)
    name = f"{source.choice(FIRST.split())} {source.choice(LAST.split())}"
    body = template.format(
        product=product,
        date=f"{source.randint(1, 28)} {source.choice(MONTHS)}",
        number=f"{source.choice('ABKX')}{source.randint(10_000, 99_999)}",
        count=source.randint(12, 400),
    )
    prompt = f"{source.choice(OPENINGS)} {body}. {source.choice(CLOSINGS)}, {name}\nTriage:"
    return Ticket(prompt, f" [{urgency}] {team} / {topic} / {product} / customer {name.split()[1]}")
