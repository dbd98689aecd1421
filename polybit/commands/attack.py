"""`polybit attack`: attack a checkpoint at every width, answer at every other, and judge random precision."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from polybit.commands.squad import EMBEDDED, open_file
from polybit.compress.sizes import stored_widths
from polybit.core.runtime import PolybitError, atomic_path, write_json
from polybit.hub.models import open_model

METHODS = ("greedy", "hotflip", "random", "characters", "words")
GRADIENT_FREE = ("characters", "words")
MOST_WIDTHS = 5


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Flags of `polybit attack`."""

    squad: str = EMBEDDED
    """Questions of a SQuAD or KorQuAD file, or 'embedded' for the reading task of the embedded model."""
    items: int = 48
    """Questions to attack, for each seed others."""
    precision: str | None = None
    """Widths to attack and to answer at, with commas (default: the stored ones, at most five)."""
    method: str = "greedy"
    """greedy (gradient, then measured: GCG), hotflip (gradient alone), random (search without a gradient), characters
    or words (typing errors and changed words)."""
    place: str = "suffix"
    """suffix: new tokens between the text and the question; swap: tokens of the text that are not the answer."""
    tokens: int = 6
    """Tokens (or edited words) the attacker has."""
    steps: int = 8
    """Steps of the search."""
    tries: int = 12
    """Changes measured per step."""
    seeds: str = "0"
    """Seeds, with commas: each asks other questions and begins elsewhere."""
    max_tokens: int = 24
    """Longest answer."""
    json: Path | None = None
    """Write all numbers there."""
    report: Path | None = None
    """Write a page with the heat map there."""
    restart: bool = False
    """Forget what an interrupted run with the same --json left."""


def attack(target: str, /, *, config: Annotated[AttackConfig, Parameter(name="*")] = AttackConfig()) -> None:
    """Attack TARGET (a polybit directory) at each width, answer at every width, and judge a width drawn per prompt."""
    seeds = check(config)
    from polybit.core.records import Run
    from polybit.report.robustness import page, terminal_table

    run = Run("attack", {"target": target, "target_name": Path(target).name, **plain(config)})
    with run.timed():
        run.numbers = measure(target, config, seeds)
    print(terminal_table(run.numbers))
    print("\n" + run.numbers["verdict"])
    if config.json is not None:
        run.write(config.json)
        print(f"All numbers: {config.json}")
    if config.report is not None:
        with atomic_path(config.report) as staged:
            staged.write_text(page(run.to_json()), encoding="utf-8")
        print(f"Page: {config.report}")


def plain(config: AttackConfig) -> dict[str, Any]:
    """The flags as JSON values."""
    return {**asdict(config), "json": str(config.json or ""), "report": str(config.report or "")}


def check(config: AttackConfig) -> list[int]:
    """Refuse flags that make no sense before anything is loaded; the seeds."""
    if config.method not in METHODS:
        raise PolybitError(f"--method {config.method!r} is not known: choose one of {', '.join(METHODS)}")
    if config.place not in ("suffix", "swap"):
        raise PolybitError(f"--place {config.place!r} is not known: choose suffix or swap")
    counts = ("items", "tokens", "steps", "tries", "max_tokens")
    for name, value in ((name, getattr(config, name)) for name in counts):
        if value < 1:
            raise PolybitError(f"--{name.replace('_', '-')} {value} is not possible: give 1 or more")
    if config.squad != EMBEDDED and not Path(config.squad).is_file():
        raise PolybitError(f"--squad {config.squad}: there is no such file; give a SQuAD .json, or 'embedded'")
    if config.report is not None and config.report.is_dir():
        raise PolybitError(f"--report {config.report} is a directory: give the name of the page, as in attack.html")
    try:
        seeds = [int(seed) for seed in config.seeds.split(",")]
    except ValueError:
        raise PolybitError(f"--seeds {config.seeds!r} cannot be read: give numbers with commas, as in 0,1,2") from None
    return list(dict.fromkeys(seeds))


def measure(target: str, config: AttackConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """The matrix over all seeds, and the verdict."""
    from polybit.hub.lm import LocalLM

    model, tokenizer = open_model(target)
    widths = stored_widths(model)
    if widths is None:
        raise PolybitError(f"{target} is a float model, which has one precision only: quantize it first")
    presets = [name.strip() for name in (config.precision or "").split(",") if name.strip()]
    presets = presets or [f"w{bits}" for bits in widths][:MOST_WIDTHS]
    lm = LocalLM(model, tokenizer)
    store = None if config.json is None else open_store(target, config, presets)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = play(lm, presets, config, seeds, Path(folder), store)
        if store is not None:
            store.discard()
        return found
    finally:
        if store is not None:
            store.close()


def open_store(target: str, config: AttackConfig, presets: Sequence[str]) -> Any:
    """Where finished attacks are kept until all are, so that an interrupted run goes on."""
    from polybit.core.runtime import sha256_file
    from polybit.hub.workspace import Workspace

    decided = {k: v for k, v in plain(config).items() if k not in ("json", "report", "restart", "max_tokens")}
    manifest = Path(target) / "manifest.json"
    digest = sha256_file(manifest) if manifest.is_file() else ""
    assert config.json is not None
    fingerprint = {"verb": "attack", **decided, "precision": list(presets), "model": digest}
    return Workspace(config.json, fingerprint, restart=config.restart)


def remembered(store: Any, name: str, make: Callable[[], list[Any]], like: Sequence[Any]) -> list[Any]:
    """Cases an earlier, interrupted run found, else those `make` finds, which are then kept; `like` gives the rest."""
    if store is None:
        return make()
    path = store.file(name).with_suffix(".json")
    if path.is_file():
        rows = json.loads(path.read_text())
        return [replace(case, ids=tuple(ids)) for case, ids in zip(like, rows, strict=True)]
    found = make()
    write_json(path, [list(case.ids) for case in found])
    return found


def play(
    lm: Any,
    presets: Sequence[str],
    config: AttackConfig,
    seeds: Sequence[int],
    folder: Path,
    store: Any = None,
) -> dict[str, Any]:
    """Attack and answer for every seed, pool the questions, and sum up."""
    import numpy as np

    from polybit.robust.transfer import Game

    games = [one_seed(lm, presets, replace(config, seeds=str(seed)), folder, store) for seed in seeds]
    right_ADN = np.concatenate([game.right_ADN for game in games], axis=2)
    game = Game(games[0].attackers, games[0].defenders, right_ADN)
    return summarize(game, config) | {"source": config.squad, "seeds": list(seeds)}


def one_seed(lm: Any, presets: Sequence[str], config: AttackConfig, folder: Path, store: Any = None) -> Any:
    """Every attacker against every width, on the questions of one seed."""
    import numpy as np

    from polybit.data.squad import choose
    from polybit.evals.squad import freeze, score, thaw
    from polybit.evals.tasks import Predictions
    from polybit.robust.transfer import Game, answer_at_every

    seed = int(config.seeds)
    file = open_file(config.squad, folder, config.items * (seed + 1) if config.squad == EMBEDDED else None)
    questions = file.questions()
    asked = questions[-config.items :] if config.squad == EMBEDDED else choose(questions, config.items, seed)
    gold = file.answers()  # the attacker knows what is right; the answering model never sees it
    asked = [one for one in asked if gold[one.id]]
    prompts = attacked_prompts(lm, presets, config, asked, gold, store)
    said = answer_at_every(lm, prompts, presets, max_tokens=config.max_tokens)
    right = np.zeros((len(prompts), len(presets), len(asked)))
    for a, attacker in enumerate(prompts):
        for d, preset in enumerate(presets):
            ids = tuple(case.id for case in prompts[attacker])
            path = freeze(Predictions("squad", ids, tuple(said[attacker, preset])), folder / f"{seed}-{a}-{d}.json")
            right[a, d] = score(thaw(path), gold)["em"]
    return Game(tuple(prompts), tuple(presets), right)


def attacked_prompts(
    lm: Any, presets: Sequence[str], config: AttackConfig, asked: Sequence[Any], gold: Any, store: Any
) -> Any:
    """attacker -> cases: nobody, random tokens, each width by itself, and all widths at once."""
    from polybit.robust.cases import allowed_tokens, build_cases
    from polybit.robust.gradients import Target
    from polybit.robust.swaps import Search
    from polybit.robust.swaps import attack as search_swaps
    from polybit.robust.transfer import ADAPTIVE, NOISE

    seed, room = int(config.seeds), None if lm.max_length is None else lm.max_length - config.max_tokens
    untouched = build_cases(lm.tokenizer, asked, gold, place="swap", room=room)
    attackers = {preset: [preset] for preset in presets} | {ADAPTIVE: list(presets)}
    found = {"nobody": untouched}
    if config.method in GRADIENT_FREE:
        for name, looked_at in attackers.items():
            found[name] = edited_prompts(Target(lm, looked_at), config, asked, gold, room)
        return found
    place: Any = config.place
    cases = build_cases(lm.tokenizer, asked, gold, place=place, count=config.tokens, room=room, seed=seed)
    if config.place == "suffix":
        found[NOISE] = cases
    search = Search(config.method, config.steps, config.tries, changes=config.tokens if place == "swap" else 0)  # type: ignore[arg-type]
    allowed = allowed_tokens(lm.tokenizer)
    for name, looked_at in attackers.items():

        def make(looked_at: Sequence[str] = looked_at) -> list[Any]:
            return search_swaps(Target(lm, looked_at), cases, search, allowed, seed=seed)

        found[name] = remembered(store, f"{seed} {name}", make, cases)
    return found


def edited_prompts(target: Any, config: AttackConfig, asked: Sequence[Any], gold: Any, room: int | None) -> Any:
    """The worst of several random edits of each question, by the loss the attacker sees."""
    from polybit.robust.cases import build_cases
    from polybit.robust.edits import worst_edits

    def cases_of(versions: Sequence[Any]) -> Any:
        return build_cases(target.lm.tokenizer, versions, gold, place="swap", room=room)

    worst = worst_edits(
        lambda versions: target.losses(cases_of(versions)).tolist(),
        asked,
        gold,
        config.method,
        count=config.tokens,
        tries=config.steps * config.tries,
        seed=int(config.seeds),
    )
    return cases_of(worst)


def summarize(game: Any, config: AttackConfig) -> dict[str, Any]:
    """Means with intervals, and the verdict on drawing a width per prompt."""
    from polybit.evals.scoring import bootstrap
    from polybit.robust.transfer import ADAPTIVE

    matrix: dict[str, Any] = {}
    for attacker in game.attackers:
        row = {name: bootstrap(game.cell(attacker, name) > 0.5).to_json() for name in game.defenders}
        row["drawn per prompt"] = bootstrap(game.against([attacker]).mean(1)[0]).to_json()
        matrix[attacker] = row
    plain_attackers = list(game.defenders)
    everyone = [*plain_attackers, ADAPTIVE]
    judged: dict[str, Any] = {}
    for label, names in (("plain", plain_attackers), ("adaptive", everyone)):
        best = game.best_fixed(names)
        judged[label] = {
            "best_fixed": best,
            "fixed": bootstrap(game.fixed(best, names)).to_json(),
            "drawn": bootstrap(game.drawn(names)).to_json(),
            "gain": bootstrap(game.drawn(names), paired_with=game.fixed(best, names)).to_json(),
        }
    draws = [float(game.one_draw(ADAPTIVE, seed).mean()) for seed in range(3)]
    return {
        "items": game.right_ADN.shape[2],
        "attackers": list(game.attackers),
        "defenders": list(game.defenders),
        "matrix": matrix,
        "random_precision": judged | {"three_draws": draws},
        "transfer": transfer_gap(game),
        "verdict": verdict(judged["adaptive"]),
    }


def transfer_gap(game: Any) -> dict[str, Any]:
    """Score at other widths minus score at the attacked width, over all single-width attackers: above 0, attacks
    transfer poorly."""
    import numpy as np

    from polybit.evals.scoring import bootstrap

    own, other = [], []
    for name in game.defenders:
        own.append(game.cell(name, name))
        rest = [game.cell(name, answering) for answering in game.defenders if answering != name]
        other.append(np.mean(rest, axis=0) if rest else game.cell(name, name))
    diagonal, off = np.mean(own, axis=0), np.mean(other, axis=0)
    return {
        "diagonal": bootstrap(diagonal).to_json(),
        "off_diagonal": bootstrap(off).to_json(),
        "difference": bootstrap(off, paired_with=diagonal).to_json(),
    }


def verdict(judged: dict[str, Any]) -> str:
    """One sentence: is a width drawn per prompt more robust than the best fixed one?"""
    gain = judged["gain"]
    points = f"{100 * gain['value']:+.1f} points, 95 % interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
    against = f"the best fixed width ({judged['best_fixed']}), each under its worst attacker ({points})"
    if gain["low"] > 0:
        return f"A width drawn per prompt is more robust than {against}."
    if gain["high"] < 0:
        return f"A width drawn per prompt is less robust than {against}."
    return f"A width drawn per prompt is not shown to be more robust than {against}."
