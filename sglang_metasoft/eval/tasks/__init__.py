"""The tasks by name, and the groups that the command line takes."""

from sglang_metasoft.eval.case import Task
from sglang_metasoft.eval.tasks import (
    books,
    longbench,
    longbench_official,
    natural,
    needle,
    ruler,
    ruler_frozen,
    shared,
)

_MODULES = (needle, ruler, ruler_frozen, longbench, shared, books, natural, longbench_official)
TASKS: dict[str, Task] = {task.name: task for module in _MODULES for task in module.TASKS}
RULER = [name for name in needle.VARIANTS] + [task.name for task in ruler.TASKS]
GROUPS: dict[str, list[str]] = {
    "ruler": RULER,
    "ruler_frozen": [name + ruler_frozen.ENDING for name in RULER],
    "niah": ["niah_grid"],
    "longbench": [task.name for task in longbench.TASKS],
    "longbench_official": [task.name for task in longbench_official.TASKS],
    "scbench": [task.name for task in shared.TASKS],
    "natural": [natural.task_name(kind) for kind in natural.KINDS if kind.split == natural.DEVELOPMENT],
    "natural_frozen": [natural.task_name(kind) for kind in natural.KINDS if kind.split == natural.FROZEN],
    "perplexity": [task.name for task in books.TASKS],
}
# Families whose kind of task may take part in training; the others never do.
TRAINED_FAMILIES = frozenset({"needle"})


def find_tasks(names: list[str]) -> list[Task]:
    """Tasks of names and groups, in order, each once.

    Raises:
        ValueError: an unknown name; the message lists groups and tasks.
    """
    found: dict[str, Task] = {}
    for name in names:
        members = GROUPS.get(name, [name])
        for member in members:
            if member not in TASKS:
                raise ValueError(
                    f"task {member!r} is unknown; allowed: the groups {', '.join(GROUPS)}; the tasks {', '.join(TASKS)}"
                )
            found[member] = TASKS[member]
    return list(found.values())
