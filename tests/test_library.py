"""The acts as functions: documented, loading no torch, and found whatever was imported before."""

import inspect
import subprocess
import sys

import pytest

import polybit
from polybit import library

ACTS = [name for name, where in polybit._PUBLIC.items() if where == "polybit.library"]


@pytest.mark.parametrize("name", ACTS)
def test_an_act_says_what_it_takes(name):
    act = getattr(polybit, name)
    assert act is getattr(library, name) and act.__doc__
    for parameter in inspect.signature(act).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            assert f"\n{parameter.name}: " in act.__doc__, f"{name}: {parameter.name} is not explained"


def test_a_room_does_not_hide_the_act_of_its_name():
    code = (
        "import polybit, polybit.report.tables, polybit.train.table, polybit.allocate\n"
        "from polybit.report import tables\n"
        "assert tables.size(1) and all(callable(getattr(polybit, name)) for name in ('report', 'train', 'allocate'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
