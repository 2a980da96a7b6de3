"""Tasks that the embedded base was never shown: invented, made from a seed."""

from __future__ import annotations

from training.tasks.cipher import CIPHER
from training.tasks.task import Item, Split, Task
from training.tasks.tickets import TICKETS

TASKS: dict[str, Task] = {task.name: task for task in (CIPHER, TICKETS)}

__all__ = ["TASKS", "Item", "Split", "Task"]
