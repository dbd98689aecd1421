"""Plans on their way in and out of files: read and check one, and what of it a checkpoint stores as a preset."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from polybit.core.affine import ZeroKind
from polybit.core.plan import LEAST_GROUP, PLAN, Plan
from polybit.core.precision import FLOAT
from polybit.core.runtime import PolybitError, atomic_path
from polybit.data.files import read_utf8
from polybit.hub.files import read_json
from polybit.nn.convert import Target
from polybit.nn.switch import panel, set_presets


def read_plan(path: Path, flag: str = "--plan") -> Plan:
    """The Plan of a JSON file: {"default", "layers", "columns"}, or any object that holds one under "plan".

    `polybit allocate` may thus write further remarks beside the plan. A malformed one is refused with its key.
    flag: what named the file, for errors
    """
    if not path.is_file():
        raise PolybitError(f"{flag} {path}: there is no such file; give the JSON file of a plan")
    try:
        value = json.loads(read_utf8(path))
    except (ValueError, RecursionError) as error:
        raise PolybitError(f"{flag} {path} cannot be read as JSON ({error}): mend it at that place") from None
    inner = value.get("plan", value) if isinstance(value, Mapping) else value
    try:
        return Plan.from_json(inner)
    except PolybitError as error:
        raise PolybitError(f"{flag} {path}: {error}") from None


def counts_zero_points(path: Path) -> bool | None:
    """Whether a plan's bits count a zero point per group; None where the file does not say it."""
    value = read_json(path)
    zero = value.get("zero") if isinstance(value, Mapping) else None
    return zero == "group" if zero in get_args(ZeroKind) else None


def read_presets(text: str) -> dict[str, Plan]:
    """Name -> Plan from `A=w8a8,B=w4a4,C=plan.json`; a bare precision is its own name."""
    found: dict[str, Plan] = {}
    for part in (part.strip() for part in text.split(",") if part.strip()):
        name, _, value = part.partition("=")
        name, value = name.strip(), value.strip() or name.strip()
        if not name:
            raise PolybitError(f"--presets {part!r:.60} has no name: write NAME=PRECISION, as in A=w8a8")
        if name in found:
            raise PolybitError(f"--presets names {name!r:.60} twice: give every preset a name of its own")
        found[name] = read_plan(Path(value), "--presets") if value.endswith(".json") else Plan.uniform(value)
    if not found:
        raise PolybitError("--presets is empty: give names and precisions, as in A=w8a8,B=w4a4")
    return found


def write_plan(path: Path, plan: Plan, remarks: Mapping[str, Any] | None = None) -> None:
    """Write a plan for people: one line per layer. With `remarks` the plan stands under "plan" beside them."""
    value = plan.to_json()
    parts = [f' "default": {json.dumps(value["default"])}']
    for key in ("layers", "columns"):
        if value.get(key):
            rows = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value[key].items()]
            parts.append(f' "{key}": {{\n' + ",\n".join(rows) + "\n }")
    text = "{\n" + ",\n".join(parts) + "\n}"
    if remarks:
        rest = json.dumps(dict(remarks), indent=1, ensure_ascii=False, allow_nan=False)
        text = '{\n"plan": ' + text + ",\n" + rest[2:]
    with atomic_path(path) as staged:
        staged.write_text(text + "\n", encoding="utf-8")


def check_document(path: Path, targets: Sequence[Target], group_size: int) -> None:
    """What the file says beside its plan must fit the model; another group size is only warned of.

    A plan without a default must name every layer (of those `polybit allocate` gives a width), so that one that was
    lost while editing does not silently stay in float. `made_for` refuses the plan of another model.
    """
    value = read_json(path)
    assert isinstance(value, Mapping)  # read_plan read it
    made_for, inner = value.get("made_for"), value.get("plan", value)
    named = set(inner.get("layers", {}))
    known = {target.name: target for target in targets}
    if isinstance(made_for, Mapping) and named and not named & set(known):
        raise PolybitError(
            f"--plan {path} was made for {made_for.get('model')!r:.80} and names none of this model's layers: use "
            "the plan with the model it was made for"
        )
    missing = [name for name in known if name not in named]
    if "default" not in inner and missing:
        raise PolybitError(
            f"--plan {path} leaves out {len(missing)} layer(s), first {missing[0]!r}: give each a width, or "
            'add a default, as in "default": "w4"'
        )
    if isinstance(made_for, Mapping):
        weights = sum(known[name].size for name in named & set(known))
        if isinstance(made_for.get("weights"), int) and named <= set(known) and weights != made_for["weights"]:
            raise PolybitError(
                f"--plan {path} was made for {made_for.get('model')!r:.80} with {made_for['weights']} weights in these "
                f"layers, this model has {weights}: use the plan with the model it was made for"
            )
    planned = value.get("group_size")
    if isinstance(planned, int) and planned != group_size:
        print(
            f"polybit: warning: the plan counted groups of {planned or 'a row'}; --group-size {group_size} changes its "
            "bits per weight",
            file=sys.stderr,
        )


def check_plan(plan: Plan, targets: Sequence[Target], group_size: int) -> list[Target]:
    """The targets the plan gives a width, after checking every name and every column block; the rest stays in float."""
    plan.check_names(target.name for target in targets)
    chosen = [target for target in targets if plan.at(target.name).w != FLOAT]
    if not chosen:
        raise PolybitError("the plan leaves every layer in float: give layers or the default a width such as w4")
    if plan.columns and group_size < LEAST_GROUP:
        raise PolybitError(
            f"--group-size {group_size} is too small for widths inside layers, which are stored by groups of "
            f"{LEAST_GROUP} columns and more: give --group-size {LEAST_GROUP}"
        )
    for target in chosen:
        widths_G = plan.group_widths(target.name, target.columns, group_size)
        if widths_G is not None and max(widths_G) < 2:
            raise PolybitError(
                f"the plan gives layer {target.name!r:.120} 1 bit in every block of columns: "
                "give at least one block 2 bits or more"
            )
    return chosen


def store_plan(model: nn.Module, plan: Plan, *, nested: bool) -> None:
    """Store the plan as a preset: a nested file is read by it, a fixed one holds just what it says."""
    stored = {name: layer.bits for name, layer in panel(model).layers.items()}
    set_presets(model, {PLAN: plan if nested else fixed_preset(plan, stored)})


def fixed_preset(plan: Plan, stored: Mapping[str, int]) -> Plan:
    """What reads a checkpoint made by `plan` in full: every layer at its stored bits; column widths are in the file."""
    return Plan(plan.default, {name: replace(plan.at(name), w=bits) for name, bits in stored.items()})
