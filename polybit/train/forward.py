"""One forward pass of a part of a batch: only the logits that are needed are made, and little is read twice or in vain.

Training rows begin alike (the system prompt of a chat template) and end at different places. What all begin with is
read once, its keys and values shared with their graph, and the rest goes in rectangles of rows of about one length:
the logits and gradients are those of one rectangle, `at_once`, which is also the slow twin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polybit.core.precision import FLOAT
from polybit.hub.likelihood import keep_positions, repeatable, rows_of
from polybit.nn.board import board_of

NAMES = {"mask_BT": "attention_mask", "positions_BT": "position_ids"}
PASS = {"cpu": 64}  # tokens one more pass through the model costs as much as, by the kind of device
LAUNCHES = 4096  # the same where every pass waits for its launches


def logits_of(model: nn.Module, part: Mapping[str, Tensor], *, head_of: nn.Module | None = None) -> Tensor:
    """logits_BTV of a part with ids_BT and, where given, mask_BT, positions_BT, mask_B1TT (True = sees); with keep_BT
    the logits at those positions alone, [N, V].

    head_of: the model whose output head is watched, when `model` is a wrapper around it.
    """
    head = head_of or model
    if "keep_BT" in part and "mask_BT" in part and not {"mask_B1TT", "positions_BT"} & set(part) and divisible(head):
        length_B = ends(part)
        shared, groups = layout(length_B, beginning(part), PASS.get(part["ids_BT"].device.type, LAUNCHES))
        if shared or len(groups) > 1:
            found = in_pieces(model, head, part, shared, groups)
            if found is not None:
                return found
    return at_once(model, part, head)


def at_once(model: nn.Module, part: Mapping[str, Tensor], head: nn.Module) -> Tensor:
    """`logits_of` by one pass over the padded rectangle."""
    given: dict[str, Any] = {"input_ids": part["ids_BT"], "use_cache": False}
    given |= {theirs: part[ours] for ours, theirs in NAMES.items() if ours in part}
    if "mask_B1TT" in part:  # added to the scores, which every attention understands; some take no mask of truths
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        seen = part["mask_B1TT"]
        given["attention_mask"] = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    if "keep_BT" not in part:
        return model(**given).logits
    with keep_positions(head, part["keep_BT"]):
        return model(**given).logits[0]


def divisible(model: nn.Module) -> bool:
    """Whether rows may be read in several passes: not where blocks are computed again in the backward pass (no cache
    goes through that, and processes must make the same passes), where keys or values are rounded, or where every row of
    the batch has a precision of its own."""
    board = board_of(model)
    rounded = any(min(o.precision.q, o.precision.k, o.precision.v) != FLOAT for o in (board.operands or {}).values())
    again = getattr(model, "is_activation_checkpointing", None)  # the name of newer versions of transformers
    again = getattr(model, "is_gradient_checkpointing", False) if again is None else again
    return not (again or rounded or board.rows is not None)


def ends(part: Mapping[str, Tensor]) -> list[int]:
    """Tokens of each row up to its last wanted logit; 0 = none is wanted."""
    keep_BT = part["keep_BT"].bool()
    place_T = torch.arange(1, keep_BT.shape[1] + 1, device=keep_BT.device)
    return (keep_BT * place_T).amax(1).tolist()


def beginning(part: Mapping[str, Tensor]) -> int:
    """First tokens that all rows have, none of them padding, none with a wanted logit."""
    ids_BT = part["ids_BT"]
    same_T = ((ids_BT == ids_BT[:1]) & part["mask_BT"].bool() & ~part["keep_BT"].bool()).all(0)
    return int(same_T.long().cumprod(0).sum())


def layout(lengths: Sequence[int], shared: int, price: int) -> tuple[int, list[list[int]]]:
    """(tokens to read once, rows of each rectangle) with the fewest tokens, a pass counted as `price` of them."""
    plain, with_beginning = (rectangles([n - cut for n in lengths], price) for cut in (0, shared))
    if len(lengths) > 1 and with_beginning[0] + shared + price < plain[0]:
        return shared, with_beginning[1]
    return 0, plain[1]


def rectangles(lengths: Sequence[int], price: int) -> tuple[int, list[list[int]]]:
    """(tokens, rows of each group) of the cheapest cut of rows, sorted by length, into padded groups; rows of which
    nothing is wanted are in none."""
    order = sorted((row for row, length in enumerate(lengths) if length > 0), key=lambda row: lengths[row])
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first rows, and where their last group begins
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        best.append(min((best[start][0] + (stop - start) * longest + price, start) for start in range(stop)))
    groups, stop = [], len(order)
    while stop:
        groups.append(sorted(order[best[stop][1] : stop]))
        stop = best[stop][1]
    return best[-1][0], groups


def in_pieces(
    model: nn.Module, head: nn.Module, part: Mapping[str, Tensor], shared: int, groups: Sequence[Sequence[int]]
) -> Tensor | None:
    """The same logits, what is shared read first and the groups after it; None where the model's cache cannot be
    repeated."""
    ids_BT, mask_BT, keep_BT = part["ids_BT"], part["mask_BT"], part["keep_BT"].bool()
    cache = None
    if shared:
        last_1T = torch.arange(shared, device=ids_BT.device)[None] == shared - 1  # a head wants something to see
        with keep_positions(head, last_1T):
            cache = model(input_ids=ids_BT[:1, :shared], use_cache=True).past_key_values
        if not repeatable(cache, stem=True):
            return None
    length_B = ends(part)
    found, places = [], []
    first_B = keep_BT.sum(1).cumsum(0) - keep_BT.sum(1)
    for rows in groups:
        row_R = torch.tensor(rows, device=ids_BT.device)
        stop = max(length_B[row] for row in rows)
        given: dict[str, Any] = {"input_ids": ids_BT[row_R, shared:stop], "attention_mask": mask_BT[row_R, :stop]}
        if cache is not None:
            given["past_key_values"] = rows_of(cache, torch.zeros_like(row_R))
        kept_RT = keep_BT[row_R, shared:stop]
        with keep_positions(head, kept_RT):
            found.append(model(**given, use_cache=cache is not None).logits[0])
        places += [first_B[row] + torch.arange(int(keep_BT[row].sum()), device=ids_BT.device) for row in rows]
    return torch.cat(found)[torch.cat(places).argsort()]
