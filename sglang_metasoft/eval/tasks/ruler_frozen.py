"""RULER's tasks in other words, and so with other draws: for final figures alone.

Nothing is chosen by what they show. What a task asks for, and how it is scored, is RULER's; its instruction, needle,
question, start of the answer and filler are not. A name ends with ``_frozen``.
"""

from functools import partial

from sglang_metasoft.eval.case import Task
from sglang_metasoft.eval.tasks import needle, ruler

ENDING = "_frozen"
NEEDLES = needle.Wording(
    needle="In the ledger, {key} stands beside {value}.",
    head=(
        "A ledger is quoted once between the lines below, with its {type}. Look out for it; there will be one question "
        "when you are through.\n",
        "A ledger is quoted here and there between the lines below, with its {type}. Look out for them; there will be "
        "one question when you are through.\n",
    ),
    question=(
        "\nAccording to the ledger, which {type} stands beside {query}?",
        "\nAccording to the ledger, which {type} stand beside {query}? List every one.",
    ),
    prefix=(" In the ledger, the {type} beside {query} is", " In the ledger, the {type} beside {query} are"),
    noise="A cart rolled past the mill. Rain tapped on the roof. Someone had lit the stove. The clock ticked on.",
    kinds={"numbers": ("figure", "figures"), "uuids": ("serial", "serials")},
)
OTHERS = ruler.Wording(
    vt_head="Some boxes below get their contents from one another. Follow who gets what from whom.\n\n",
    vt_first="Box {name} receives {value}",
    vt_next="Box {name} receives what is in box {source} ",
    vt_question="\nWhich boxes end up holding {value}? Name each of them.",
    vt_prefix=" Following the boxes from start to end, {count} of them hold {value}, namely: ",
    vt_noise=NEEDLES.noise,
    cwe_head="What follows is a shopping list whose lines are numbered. A few items were written down again and again; "
    "keep track of those.\n",
    cwe_question="\nWhich ten items were written down most often?",
    cwe_prefix=" These ten items come up most often on the list:",
    fwe_head="A sailor noted these signals one after another. Count how often each signal comes. ",
    fwe_question="\nName the three signals that came most often, and nothing else. Dots like '....' are pauses, not "
    "signals.",
    fwe_prefix=" The three signals that came most often were:",
    qa_instruction="Use these texts to reply to the question with a few words, without a whole sentence.",
    qa_head="The texts:",
    qa_label="Text",
    qa_prefix=" In a few words:",
)
TASKS: list[Task] = [
    task._replace(name=task.name + ENDING, build=partial(task.build, wording=wording))
    for tasks, wording in ((needle.TASKS, NEEDLES), (ruler.TASKS, OTHERS))
    for task in tasks
    if task.name != "niah_grid"
]
