"""Support tickets of an invented shop -> one fixed JSON object."""

from __future__ import annotations

import json
import random

from training.tasks.task import Item, Task

PRODUCTS = (
    "Lumora lamp",
    "Aquila kettle",
    "Brevo radio",
    "Corvo heater",
    "Dalmo toaster",
    "Elvina clock",
    "Fenno drill",
    "Gravia scale",
    "Hexa printer",
    "Ionix fan",
    "Juno blender",
    "Kestrel camera",
)
ISSUES = {
    "no power": ("does not turn on", "stays dark", "shows no sign of life"),
    "noise": ("makes a loud noise", "rattles all day", "hums and clicks"),
    "leak": ("is leaking", "drips on the table", "lost all its water"),
    "broken part": ("has a broken handle", "came with a cracked lid", "lost a screw"),
    "overheating": ("gets far too hot", "heats up by itself", "is hot after a minute"),
    "wrong item": ("is not the one I ordered", "has the wrong colour", "came in the wrong size"),
    "late delivery": ("has not arrived", "is a week late", "is still on its way"),
    "refund": ("is going back, I want my money", "must be refunded", "was charged twice"),
}
# The rule: danger or a deadline is high; patience is low; anything else is normal.
PRIORITIES = {
    "high": (
        "Please help at once.",
        "This is urgent.",
        "I need it by tomorrow.",
        "My children could get hurt.",
    ),
    "low": ("There is no hurry.", "Whenever you have time.", "It can wait.", "Just so you know."),
    "normal": ("", "Thank you.", "Please write back.", "I bought it in spring."),
}
OPENINGS = ("", "Hello. ", "Good morning. ", "Hi, ", "Dear team, ", "To the shop: ")
SUBJECTS = ("my {}", "the {}", "the new {}", "my wife's {}", "our {}", "the {} from your shop")


def _make(chance: random.Random) -> Item:
    product = chance.choice(PRODUCTS)
    issue = chance.choice(list(ISSUES))
    priority = chance.choice(list(PRIORITIES))
    subject = chance.choice(SUBJECTS).format(product)
    opening = chance.choice(OPENINGS)
    if not opening.endswith(", "):
        subject = subject[0].upper() + subject[1:]
    text = f"{opening}{subject} {chance.choice(ISSUES[issue])}."
    note = chance.choice(PRIORITIES[priority])
    if note and chance.random() < 0.3:
        text = f"{note} {text}"
    elif note:
        text = f"{text} {note}"
    answer = json.dumps({"product": product, "issue": issue, "priority": priority})
    return Item(f"Ticket: {text}", answer)


TICKETS = Task(
    name="tickets",
    title="Support tickets to JSON",
    about=(
        "`Ticket:` and what a customer wrote; the answer is one JSON object with product, issue "
        f"(one of {len(ISSUES)}) and priority: high for danger or a deadline, low where the "
        "customer has time, normal otherwise. The tested tickets were never trained on."
    ),
    make=_make,
)
