"""Attack a checkpoint at every width, answer at every other, and judge random precision."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polybit.acts.attack_numbers import MatrixNumbers, numbers_of
from polybit.compress.sizes import default_presets, stored_widths
from polybit.core.records import Run
from polybit.core.runtime import PolybitError, sha256_file
from polybit.data.squad import Asked, choose, open_squad
from polybit.data.table import EMBEDDED
from polybit.evals.squad import freeze, score, thaw
from polybit.evals.tasks import Predictions
from polybit.hub.lm import LocalLM
from polybit.hub.models import open_model
from polybit.hub.workspace import Workspace
from polybit.options.attack import AttackOptions
from polybit.options.checks import names_of, plain, seeds_of
from polybit.robust.attackers import Quiz, attacked_prompts
from polybit.robust.table import ATTACKS
from polybit.robust.transfer import TransferGame, answer_at_every, embedding_game

MOST_WIDTHS = 5


def attack(model: str, options: AttackOptions) -> Run:
    """Attack MODEL (a polybit directory) at each width, answer at every width, and judge a width drawn per prompt."""
    run = Run("attack", {"target": model, "target_name": Path(model).name, **plain(options)})
    with run.timed():
        run.numbers = dict(measure(model, options))
    if options.json is not None:
        run.write(options.json)
    return run


def measure(model: str, options: AttackOptions) -> MatrixNumbers:
    """The matrix over all seeds, and the verdict."""
    loaded, tokenizer = open_model(model, device=options.device)
    if stored_widths(loaded) is None:
        raise PolybitError(f"{model} is a float model, which has one precision only: quantize it first")
    presets = names_of(options.precision) or default_presets(loaded)[:MOST_WIDTHS]
    lm, seeds = LocalLM(loaded, tokenizer), seeds_of(options.seeds)
    store = None if options.json is None else open_store(model, options.json, options, presets)
    try:
        with tempfile.TemporaryDirectory() as folder:
            games = [one_seed(lm, presets, options, seed, Path(folder), store) for seed in seeds]
        if store is not None:
            store.discard()
    finally:
        if store is not None:
            store.close()
    right_ADN = np.concatenate([game.right_ADN for game in games], axis=2)  # the questions of all seeds
    game = TransferGame(games[0].attackers, games[0].defenders, right_ADN)
    return numbers_of(game) | {"source": options.squad, "seeds": seeds}


def open_store(model: str, path: Path, options: AttackOptions, presets: Sequence[str]) -> Workspace:
    """Where finished attacks are kept until all are, so that an interrupted run goes on."""
    ignored = ("json", "restart", "max_tokens")
    decided = {name: value for name, value in plain(options).items() if name not in ignored}
    manifest = Path(model) / "manifest.json"
    digest = sha256_file(manifest) if manifest.is_file() else ""
    fingerprint = {"verb": "attack", **decided, "precision": list(presets), "model": digest}
    return Workspace(path, fingerprint, restart=options.restart)


def one_seed(
    lm: LocalLM,
    presets: Sequence[str],
    options: AttackOptions,
    seed: int,
    folder: Path,
    store: Workspace | None = None,
) -> TransferGame:
    """Every attacker against every width, on the questions of one seed; `folder` takes the answers, sealed."""
    quiz = quiz_of(lm, options, seed, folder)
    part, budget = ATTACKS[options.method], options.budget()
    if part.changes == "embeddings":
        how = {"epsilon": budget.epsilon, "iterations": budget.steps, "seed": seed}
        return embedding_game(lm, quiz.untouched(), presets, **how, ascent=part)  # type: ignore[arg-type]
    prompts = attacked_prompts(lm, quiz, presets, options.method, budget, place=options.place, seed=seed, store=store)
    said = answer_at_every(lm, prompts, presets, max_tokens=options.max_tokens)
    right_ADN = np.zeros((len(prompts), len(presets), len(quiz.asked)))
    for a, (attacker, cases) in enumerate(prompts.items()):
        for d, preset in enumerate(presets):
            ids = tuple(case.id for case in cases)
            path = freeze(Predictions("squad", ids, tuple(said[attacker, preset])), folder / f"{seed}-{a}-{d}.json")
            right_ADN[a, d] = score(thaw(path), quiz.answers)["em"]
    return TransferGame(tuple(prompts), tuple(presets), right_ADN)


def quiz_of(lm: LocalLM, options: AttackOptions, seed: int, folder: Path) -> Quiz:
    """The questions of one seed; the attacker knows what is right, the answering model never sees it."""
    own = options.squad == EMBEDDED
    file = open_squad(options.squad, folder, count=options.items * (seed + 1))
    questions = file.questions()
    asked: Sequence[Asked] = questions[-options.items :] if own else choose(questions, options.items, seed)
    answers = file.answers()
    room = None if lm.max_length is None else lm.max_length - options.max_tokens
    return Quiz(lm.tokenizer, [one for one in asked if answers[one.id]], answers, room)
