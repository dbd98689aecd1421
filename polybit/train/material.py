"""What a training step reads: answers with the reference's log-probabilities, cached once, laid out as batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from polybit.core.runtime import PolybitError, track
from polybit.data.batches import buckets, pad
from polybit.hub.directory import check_manifest
from polybit.hub.lm import LocalLM
from polybit.hub.tensors import read_tensors, write_tensors
from polybit.train.forward import logits_of
from polybit.train.pairs import SHARDS, Pair, digest_rows, first_divergence, read_shard, scores_name, summary

WHOLE_VOCABULARY = 1024  # up to here the whole distribution is cached, above it the likeliest tokens and the rest
TOP = 64


@dataclass(frozen=True, slots=True)
class Scored:
    """One answer and what the float model says at each of its T tokens.

    logp_T: log-probability of the token, float32 · top_logp_TK, top_index_TK: the K likeliest tokens, likeliest first
    (K = the vocabulary when it is small), None where only logp is needed.
    """

    tokens: list[int]
    logp_T: Tensor
    top_logp_TK: Tensor | None = None
    top_index_TK: Tensor | None = None


def kept_tokens(vocabulary: int, top: int | None = None) -> int:
    """How many of the likeliest tokens are cached: all of a small vocabulary, otherwise `top`."""
    if top is None:
        return vocabulary if vocabulary <= WHOLE_VOCABULARY else TOP
    return min(top, vocabulary)


@torch.inference_mode()
def score(
    reference: LocalLM,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    top: int = 0,
    label: str = "reference",
) -> list[Scored]:
    """The reference's float32 log-probabilities at every token of every answer, and its `top` likeliest tokens."""
    rows = [[*prompt, *answer][:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    found: list[Scored | None] = [None] * len(rows)
    most = max((len(answer) for answer in answers), default=1)
    kept = max(1, reference.batch_logits // reference.vocabulary // max(1, most))
    groups = buckets([len(row) for row in rows], tokens=reference.batch_tokens, rows=kept)
    for group in track(groups, label):
        ids_BT, mask_BT = pad([rows[index] for index in group], reference.pad_token())
        first_B1 = torch.tensor([[len(prompts[index]) - 1] for index in group])
        keep_BT = mask_BT & (torch.arange(ids_BT.shape[1]) >= first_B1)
        part = {"ids_BT": ids_BT, "mask_BT": mask_BT.long(), "keep_BT": keep_BT}
        part = {name: tensor.to(reference.device) for name, tensor in part.items()}
        logp_NV = logits_of(reference.model, part).float().log_softmax(-1)
        lengths = [len(answers[index]) for index in group]
        for index, logp_TV in zip(group, logp_NV.split(lengths), strict=True):
            target_T = torch.tensor(answers[index], dtype=torch.int64, device=logp_TV.device)
            logp_T = logp_TV.gather(1, target_T[:, None])[:, 0].cpu()
            best = logp_TV.topk(top, dim=-1) if top else None
            index_type = torch.int16 if logp_TV.shape[-1] < 1 << 15 else torch.int32  # half a cache is indices
            found[index] = Scored(
                list(answers[index]),
                logp_T,
                None if best is None else best.values.cpu(),
                None if best is None else best.indices.to(index_type).cpu(),
            )
    return [scored for scored in found if scored is not None]


@dataclass(slots=True)
class PairMaterial:
    """Prompts with the float model's answers and, where there are pairs, the quantized model's.

    rejected: preset -> one answer per prompt, None where it is the float model's own; the key "" holds those made
    before training, which every preset without renewed ones uses.
    """

    prompts: list[list[int]]
    chosen: list[Scored]
    rejected: dict[str, list[Scored | None]] = field(default_factory=dict)
    pad_token: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def other(self, row: int, preset: str = "") -> Scored | None:
        """The quantized model's answer to a prompt, None where it is the float model's."""
        found = self.rejected.get(preset, self.rejected.get("", []))
        answer = found[row] if found else None
        return None if answer is None or answer.tokens == self.chosen[row].tokens else answer

    def part(self, rows: Sequence[int], answers: Sequence[Scored], starts: Sequence[int]) -> dict[str, Tensor]:
        """One padded batch of prompts with answers, each counted from its token `start` on.

        ids_BT, mask_BT as the model reads them; keep_BT where it must give logits. Over the N counted tokens in order:
        target_N, row_N (line of the batch), place_N (index in the answer), logp_N and, where cached, top_logp_NK and
        top_index_NK. tokens_B: counted tokens of each line.
        """
        full = [[*self.prompts[row], *answer.tokens] for row, answer in zip(rows, answers, strict=True)]
        ids_BT, mask_BT = pad([line[:-1] for line in full], self.pad_token)
        keep_BT = torch.zeros_like(mask_BT)
        for line, (row, answer, start) in enumerate(zip(rows, answers, starts, strict=True)):
            first = len(self.prompts[row]) - 1
            keep_BT[line, first + start : first + len(answer.tokens)] = True
        cuts = [slice(start, None) for start in starts]
        tokens_B = torch.tensor([len(a.tokens) - start for a, start in zip(answers, starts, strict=True)])
        places = [torch.arange(start, len(a.tokens)) for a, start in zip(answers, starts, strict=True)]
        targets = [torch.tensor(a.tokens[cut], dtype=torch.int64) for a, cut in zip(answers, cuts, strict=True)]
        part = {
            "ids_BT": ids_BT,
            "mask_BT": mask_BT.long(),
            "keep_BT": keep_BT,
            "target_N": torch.cat(targets),
            "row_N": torch.repeat_interleave(torch.arange(len(rows)), tokens_B),
            "place_N": torch.cat(places),
            "logp_N": torch.cat([a.logp_T[cut] for a, cut in zip(answers, cuts, strict=True)]),
            "tokens_B": tokens_B,
        }
        tops = [(a.top_logp_TK, a.top_index_TK, cut) for a, cut in zip(answers, cuts, strict=True)]
        if all(logp is not None for logp, _, _ in tops):
            part["top_logp_NK"] = torch.cat([logp[cut] for logp, _, cut in tops])  # type: ignore[index]
            part["top_index_NK"] = torch.cat([index[cut] for _, index, cut in tops])  # type: ignore[index]
        return part

    def own(self, rows: Sequence[int], preset: str) -> dict[str, Tensor]:
        """The current model's own answers, where they were renewed with the teacher's distribution."""
        answers = [self.other(row, preset) or self.chosen[row] for row in rows]
        return self.part(rows, answers, [0] * len(rows))

    def pairs(self, rows: Sequence[int], preset: str, *, tails: bool, joined: bool) -> dict[str, Any]:
        """Both answers of each prompt for one preset.

        active_B: False where they are the same · star_B: first divergence · with `tails` only what comes after it is
        counted, because what comes before cancels in the margin · `joined`: the pair as one row, see `join`.
        """
        others = [self.other(row, preset) for row in rows]
        theirs = [self.chosen[row] for row in rows]
        ours = [other or chosen for other, chosen in zip(others, theirs, strict=True)]
        pairs = zip(theirs, ours, strict=True)
        stars = [first_divergence(w.tokens, l.tokens) or 0 for w, l in pairs]
        starts = [min(star, len(w.tokens), len(l.tokens)) for star, w, l in zip(stars, theirs, ours, strict=True)]
        starts = starts if tails else [0] * len(rows)
        found: dict[str, Any] = {
            "active_B": torch.tensor([other is not None for other in others]),
            "star_B": torch.tensor(stars),
            "chosen": self.part(rows, theirs, starts),
            "rejected": self.part(rows, ours, starts),
        }
        if joined:
            answers = zip(theirs, ours, strict=True)
            triples = [(self.prompts[row], w.tokens, l.tokens) for row, (w, l) in zip(rows, answers, strict=True)]
            found["joined"] = join(triples, stars, self.pad_token)
        return found

    def split(self, held_out: int) -> tuple[PairMaterial, PairMaterial]:
        """(training rows, held-out rows): the last ones, which no step may read."""
        cut = len(self) - held_out
        if held_out < 1 or cut < 1:
            raise PolybitError(
                f"{len(self)} prompts cannot give {held_out} held-out ones and some to train on: add more"
            )
        ends = (slice(0, cut), slice(cut, None))
        first, last = (
            PairMaterial(
                self.prompts[end],
                self.chosen[end],
                {preset: found[end] for preset, found in self.rejected.items()},
                self.pad_token,
            )
            for end in ends
        )
        return first, last


def join(
    triples: Sequence[tuple[list[int], list[int], list[int]]], stars: Sequence[int], fill: int
) -> dict[str, Tensor]:
    """Pairs as one row each, `[prompt + common beginning | tail w | tail l]`, the beginning computed once.

    tail l has the positions tail w has and does not see it (mask_B1TT, True = sees); the beginning keeps its graph, so
    that the gradient is that of two separate rows. keep_BT counts tail tokens; chosen_N tells which are of w. Each tail
    begins with the last common token, repeated for l, whose logits predict the first differing one.
    """
    rows, positions, sides = [], [], []
    for (prompt, w, l), star in zip(triples, stars, strict=True):
        prefix = [*prompt, *w[:star]]
        common, last = prefix[:-1], prefix[-1]
        tail_w, tail_l = [last, *w[star:-1]][: len(w) - star], [last, *l[star:-1]][: len(l) - star]
        rows.append([*common, *tail_w, *tail_l])
        positions.append([*range(len(common) + len(tail_w)), *range(len(common), len(common) + len(tail_l))])
        sides.append([0] * len(common) + [1] * len(tail_w) + [2] * len(tail_l))
    ids_BT, real_BT = pad(rows, fill)
    positions_BT, side_BT = pad(positions, 0)[0], pad(sides, 3)[0]
    size = ids_BT.shape[1]
    causal_TT = torch.ones(size, size, dtype=torch.bool).tril()
    other_BTT = (side_BT[:, :, None] == 2) & (side_BT[:, None, :] == 1)
    sees_BTT = causal_TT & ~other_BTT & real_BT[:, None, :]
    sees_BTT |= torch.eye(size, dtype=torch.bool)  # padding sees itself, so that no row of the softmax is empty
    keep_BT = (side_BT == 1) | (side_BT == 2)
    return {
        "ids_BT": ids_BT,
        "positions_BT": positions_BT,
        "mask_B1TT": sees_BTT[:, None],
        "keep_BT": keep_BT,
        "chosen_N": side_BT[keep_BT] == 1,
    }


class AnswersRead(Protocol):
    """An objective over answers: a loss of a batch at some presets, and in `needs` which parts of a batch it reads.

    One in stages also has `at(step)`, the objective of a step.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Some of "chosen", "own", "pairs" and, of pairs, "tails" and "joined" (Gather)."""
        ...

    def __call__(
        self, forward: Any, batch: Any, presets: tuple[str, ...]
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """(loss, what to log), with `forward(part, preset)` giving logits."""
        ...


@dataclass(frozen=True)
class Gather:
    """Turns row numbers into the batch an objective needs at a step; what the Trainer calls just before the step.

    The batch: step, and by need "chosen" (whole float answers), "own" and "pairs" by preset.
    """

    material: PairMaterial
    objective: AnswersRead
    presets: tuple[str, ...]

    def __call__(self, rows: Sequence[int], step: int) -> dict[str, Any]:
        """Build the batch of one step."""
        objective = self.objective.at(step) if hasattr(self.objective, "at") else self.objective
        needs, material = objective.needs, self.material
        batch: dict[str, Any] = {"step": step}
        if "chosen" in needs:
            batch["chosen"] = material.part(rows, [material.chosen[row] for row in rows], [0] * len(rows))
        if "own" in needs:
            batch["own"] = {preset: material.own(rows, preset) for preset in self.presets}
        if "pairs" in needs:
            tails, joined = "tails" in needs, "joined" in needs
            batch["pairs"] = {
                preset: material.pairs(rows, preset, tails=tails, joined=joined) for preset in self.presets
            }
        return batch


def order_of(rows: int, count: int, *, seed: int) -> list[int]:
    """`count` row numbers: shuffled passes over all rows, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < count:
        found += torch.randperm(rows, generator=generator).tolist()
    return found[:count]


def prepare(
    reference: LocalLM, pairs: Sequence[Pair], *, top: int | None = None, preferences: bool = True
) -> PairMaterial:
    """Score pairs with the float model: whole distributions (or the likeliest tokens) of its own answers, and the
    log-probabilities of the quantized model's."""
    vocabulary = reference.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    prompts = [pair.prompt for pair in pairs]
    kept = kept_tokens(vocabulary, top)
    chosen = score(reference, prompts, [pair.chosen for pair in pairs], top=kept, label="reference, float answers")
    rejected: list[Scored | None] = [None] * len(pairs)
    differing = [index for index, pair in enumerate(pairs) if preferences and pair.star is not None]
    answers = [pairs[index].rejected for index in differing]
    scored = score(reference, [prompts[index] for index in differing], answers, label="reference, quantized answers")
    for index, found in zip(differing, scored, strict=True):
        rejected[index] = found
    return PairMaterial(prompts, chosen, {"": rejected} if preferences else {}, reference.pad_token())


def write_cache(path: Path, material: PairMaterial, *, reference: str) -> None:
    """Keep the scores beside the pairs, in float32, under the fingerprint of the model that gave them."""
    rejected = [answer for answer in material.rejected.get("", []) if answer is not None]
    tensors = {"chosen_logp": torch.cat([a.logp_T for a in material.chosen])}
    if material.chosen[0].top_logp_TK is not None:
        tensors["top_logp"] = torch.cat([a.top_logp_TK for a in material.chosen])  # type: ignore[misc]
        tensors["top_index"] = torch.cat([a.top_index_TK for a in material.chosen])  # type: ignore[misc]
    if rejected:
        tensors["rejected_logp"] = torch.cat([a.logp_T for a in rejected])
    write_tensors(path, tensors, notes={"reference": reference, "rows": rows_digest(material)})


def read_cache(path: Path, pairs: Sequence[Pair], *, reference: str, pad_token: int = 0) -> PairMaterial:
    """The inverse of write_cache; scores of another model or of other answers are refused."""
    tensors, notes = read_tensors(path)
    if notes.get("reference") != reference:
        raise PolybitError(
            f"{path} holds log-probabilities of another reference (fingerprint {notes.get('reference')!s:.12}, this "
            f"model has {reference:.12}): give the float model the pairs were made with, or remove the file"
        )
    differing = [pair.rejected if pair.star is not None else None for pair in pairs]
    if notes.get("rows") != digest_rows(pairs) or not lengths_fit(tensors, pairs):
        raise PolybitError(f"{path} belongs to other pairs: remove it, it is computed again")
    lengths = [len(pair.chosen) for pair in pairs]
    columns: dict[str, Sequence[Tensor | None]] = {
        name: tensors[name].split(lengths) if name in tensors else [None] * len(pairs)
        for name in ("chosen_logp", "top_logp", "top_index")
    }
    chosen = [
        Scored(pair.chosen, logp, best, index) for pair, logp, best, index in zip(pairs, *columns.values(), strict=True)
    ]
    rejected: dict[str, list[Scored | None]] = {}
    if "rejected_logp" in tensors:
        counts = [len(tokens) for tokens in differing if tokens is not None]
        parts = iter(tensors["rejected_logp"].split(counts))
        rejected[""] = [None if tokens is None else Scored(tokens, next(parts)) for tokens in differing]
    return PairMaterial([pair.prompt for pair in pairs], chosen, rejected, pad_token)


def lengths_fit(tensors: Mapping[str, Tensor], pairs: Sequence[Pair]) -> bool:
    """Whether there is a score for every token of the answers, and as many of one kind as of the other."""
    chosen = sum(len(pair.chosen) for pair in pairs)
    rejected = sum(len(pair.rejected) for pair in pairs if pair.star is not None)
    sizes = {"chosen_logp": chosen, "top_logp": chosen, "top_index": chosen, "rejected_logp": rejected}
    fit = all(len(tensors[name]) == size for name, size in sizes.items() if name in tensors)
    return fit and "chosen_logp" in tensors and ("top_logp" in tensors) == ("top_index" in tensors)


def largest_token(material: PairMaterial) -> int:
    """The largest token number of prompts and answers."""
    rows = list(material.prompts) + [answer.tokens for answer in material.chosen]
    rows += [answer.tokens for answers in material.rejected.values() for answer in answers if answer is not None]
    return max(max(tokens) for tokens in rows if tokens)


def read_material(directory: Path, *, reference: str, pad_token: int) -> PairMaterial:
    """A finished directory of pairs with their scores; what was changed, or is of another float model, is refused."""
    float_only = bool(summary(directory).get("float_only"))
    check_manifest(directory)
    whole = PairMaterial([], [], {} if float_only else {"": []}, pad_token)
    for number, path in enumerate(sorted(directory.glob(SHARDS))):
        part = read_cache(directory / scores_name(number), list(read_shard(path)), reference=reference)
        whole.prompts += part.prompts
        whole.chosen += part.chosen
        if not float_only:
            whole.rejected[""] += part.rejected.get("", [None] * len(part))
    return whole


def rows_digest(material: PairMaterial) -> str:
    """`digest_rows` of what a material was made from."""
    rows = zip(material.prompts, material.chosen, strict=True)
    return digest_rows(Pair(prompt, answer.tokens, answer.tokens, None) for prompt, answer in rows)
