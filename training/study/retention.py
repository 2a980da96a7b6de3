"""What the base knows before it learns anything new, so that forgetting can be seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from training.study.config import StudyConfig

SEED = 5  # no other measurement of the embedded base draws these items
EACH = 8  # of each instruction task, and of each number of facts in the context


def write_retention(study: StudyConfig, path: Path) -> None:
    """The study's own rows; of the embedded base, held-out items of everything it was taught."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if study.retention is not None:
        shutil.copyfile(study.retention, path)
    elif study.base == "mini":
        rows = _of_mini()
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _of_mini() -> list[dict[str, str]]:
    """Prompts as the base's chat template renders them, and what is to be said."""
    from base.mini import held_out  # reads Python's documentation, which takes seconds

    documents = [item.document for item in held_out.context_items(SEED, EACH)]
    for task in held_out.task_items(SEED, EACH).values():
        documents += task
    end = "<|im_end|>"
    return [
        {"prompt": asked.text, "completion": said.text.removesuffix(end)}
        for asked, said in documents
    ]
