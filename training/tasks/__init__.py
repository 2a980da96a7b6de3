"""Tasks that the embedded base was never shown: invented, made from a seed."""

from __future__ import annotations

from training.tasks.cipher import CIPHER
from training.tasks.facts import FACTS
from training.tasks.manual import MANUAL
from training.tasks.particles import PARTICLES
from training.tasks.records import RECORDS
from training.tasks.task import Item, Split, Task
from training.tasks.tickets import TICKETS

ALL = (CIPHER, TICKETS, RECORDS, FACTS, MANUAL, PARTICLES)
TASKS: dict[str, Task] = {task.name: task for task in ALL}

__all__ = ["TASKS", "Item", "Split", "Task"]
