"""`polybit study`: the questions about switchable precision answered for one model, with tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from polybit.core.runtime import PolybitError

ARMS: dict[str, dict[str, Any]] = {  # what is trained: flags of `polybit train`
    "cdt": {"method": "cdt"},
    "joint": {"method": "joint", "labels": 1.0},
    "sp": {"method": "sp"},
    "recursive": {"method": "recursive"},
    "agreeing": {"method": "cdt", "consistency": 0.5, "alignment": 0.5},
    "cyclic": {"method": "joint", "schedule": "cyclic", "labels": 1.0},
    "random": {"method": "joint", "schedule": "random", "labels": 1.0},
    "independent": {"method": "independent"},
}


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Flags of `polybit study`."""

    out: Path
    """Directory of all runs and of the page."""
    presets: str = "A=w8a8,B=w4a4,C=w3a4"
    """Names and precisions, with commas."""
    squad: str = "embedded"
    """Questions to score on: a SQuAD .json, or embedded for the reading task."""
    data: str = "embedded"
    """What to train on, as in polybit train."""
    arms: str = ",".join(ARMS)
    """What is trained and compared, with commas; cdt must be among them."""
    steps: int = 60
    """Gradient steps of every run."""
    batch: int = 8
    """Rows per step."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    labels: float = 1.0
    """Weight of the data beside the teachers, for the arms that have teachers."""
    rows: int | None = None
    """Rows of the data to use."""
    length: int | None = None
    """Longest row in tokens."""
    cycles: int = 4
    """Cycles of the cyclic arm."""
    seeds: str = "0"
    """Seeds of training, with commas; scores are pooled over them."""
    teacher: bool = True
    """The float model teaches too; --no-teacher where it has not learnt the task yet."""
    group_size: int = 0
    """Weights that share a scale."""
    items: int = 100
    """Questions to score."""
    attack_items: int = 12
    """Questions to attack; 0 = no attack."""
    evaluations: int = 24
    """Whole models the frontier may measure beside its starts."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""


def study(model: str, /, *, config: Annotated[StudyConfig, Parameter(name="*")]) -> None:
    """Quantize MODEL, train it in every way, score, search, attack, and write one page that answers the questions.

    Every part that is finished is kept in --out and not done again, so an interrupted study goes on.
    """
    check(config)
    from polybit.core.runtime import atomic_path, write_json
    from polybit.report.study import page, text_summary

    facts = gather(model, config)
    write_json(config.out / "study.json", facts)
    with atomic_path(config.out / "study.html") as staged:
        staged.write_text(page(facts), encoding="utf-8")
    print(text_summary(facts))
    print(f"\nPage: {config.out / 'study.html'}")


def check(config: StudyConfig) -> None:
    """Refuse flags that make no sense before anything is loaded."""
    from polybit.compress.plan_files import read_presets

    names = arm_names(config)
    if "cdt" not in names:
        raise PolybitError(f"--arms {config.arms!r:.80} lacks cdt, with which the others are compared: add it")
    for name in names:
        if name not in ARMS:
            raise PolybitError(f"--arms names {name!r:.40}: choose from {', '.join(ARMS)}")
    if config.items < 1 or config.steps < 1 or config.attack_items < 0:
        raise PolybitError("--items and --steps need 1 or more, --attack-items 0 or more")
    if len(read_presets(config.presets)) < 2:
        raise PolybitError("--presets needs two or more: a study compares them")
    seed_numbers(config)


def arm_names(config: StudyConfig) -> list[str]:
    """The arms asked for."""
    return [name.strip() for name in config.arms.split(",") if name.strip()]


def seed_numbers(config: StudyConfig) -> list[int]:
    """The seeds asked for."""
    try:
        return [int(seed) for seed in config.seeds.split(",")]
    except ValueError:
        raise PolybitError(f"--seeds {config.seeds!r} cannot be read: give numbers with commas, as in 0,1,2") from None


def gather(model: str, config: StudyConfig) -> dict[str, Any]:
    """Everything the page says, each part from its own file when it is there."""
    source = quantized(model, config)
    runs = {
        (arm, seed): trained(source, arm, seed, config) for seed in seed_numbers(config) for arm in arm_names(config)
    }
    presets = list(preset_plans(config))
    scores = score_all(model, source, runs, presets, config)
    main = str(config.out / f"cdt-{seed_numbers(config)[0]}")
    return {
        "model": model,
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "presets": {name: str(plan.default) for name, plan in preset_plans(config).items()},
        "scores": scores,
        "seconds": {
            f"{arm}-{seed}": numbers["numbers"].get("training_seconds", numbers["seconds"])
            for (arm, seed), numbers in runs.items()
        },
        "loss": {f"{arm}-{seed}": numbers["numbers"]["presets"] for (arm, seed), numbers in runs.items()},
        "frontier": kept(config.out / "frontier.json", lambda: search_frontier(main, config)),
        "attack": kept(config.out / "attack.json", lambda: attacked(main, presets, config)),
    }


def preset_plans(config: StudyConfig):
    """Name -> Plan of the presets, as given."""
    from polybit.compress.plan_files import read_presets

    return read_presets(config.presets)


def kept(path: Path, make) -> Any:
    """The JSON of a finished part, or that of making it now."""
    from polybit.core.runtime import write_json
    from polybit.hub.files import read_json

    if not path.is_file():
        write_json(path, make())
    return read_json(path)


def quantized(model: str, config: StudyConfig) -> str:
    """The checkpoint every arm starts from: post-training quantization at all weight widths of the presets."""
    from polybit.acts.quantize import quantize
    from polybit.options.quantize import QuantizeOptions
    from polybit.report.quantizing import made

    out = config.out / "quantized"
    widths = sorted({plan.default.w for plan in preset_plans(config).values()} | {8}, reverse=True)
    if not out.is_dir():
        more = {"widths": ",".join(map(str, widths))} if len(widths) > 1 else {"bits": widths[0]}
        options = QuantizeOptions(
            out=out, group_size=config.group_size, measure=False, trust_remote_code=config.trust_remote_code, **more
        )
        print(made(str(out), model, quantize(model, options).numbers))
    return str(out)


def trained(source: str, arm: str, seed: int, config: StudyConfig) -> dict[str, Any]:
    """One arm with one seed: its run.json."""
    from polybit.acts.train import train
    from polybit.hub.files import read_json
    from polybit.options.train import TrainOptions

    out = config.out / f"{arm}-{seed}"
    numbers = out.with_suffix(".json")
    if not numbers.is_file():
        shared = {field.name for field in fields(StudyConfig)} & {field.name for field in fields(TrainOptions)}
        flags: dict[str, Any] = {name: getattr(config, name) for name in shared - {"out", "seeds"}}
        flags |= {"out": out, "seed": seed, "overwrite": True, "probes": 0, **ARMS[arm]}
        train(source, TrainOptions(**flags)).write(numbers)
    return read_json(numbers)


def score_all(
    model: str, source: str, runs: Mapping[tuple[str, int], Any], presets: Sequence[str], config: StudyConfig
) -> dict[str, Any]:
    """EM and F1 of every arm at every preset, pooled over seeds, and paired differences to cdt and to the start."""
    from polybit.data.squad import choose, open_squad
    from polybit.evals.scoring import bootstrap

    folder = config.out / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    file = open_squad(config.squad, folder, count=config.items)
    asked = choose(file.questions(), config.items)
    plans = preset_plans(config)
    found: dict[str, dict[str, list[float]]] = {"em": {}, "f1": {}}

    def add(label: str, path: str, name: str | None) -> None:
        precision = None if name is None else str(plans[name].default)
        rows = answers_of(path, precision, label, asked, file, config)
        for metric in found:
            found[metric].setdefault(label, []).extend(rows[metric])

    add("float", model, None)
    for name in presets:
        add(f"quantized {name}", source, name)
        for (arm, seed), _ in runs.items():
            path = config.out / f"{arm}-{seed}"
            add(f"{arm} {name}", str(path / name if arm == "independent" else path), name)
    table: dict[str, Any] = {"questions": len(asked), "seeds": len(seed_numbers(config)), "rows": {}}
    for label in found["em"]:
        row = {metric: bootstrap(values[label]).to_json() for metric, values in found.items()}
        arm, _, name = label.rpartition(" ")
        for other in ("cdt", "quantized"):
            base = found["f1"].get(f"{other} {name}")
            if arm and arm != other and base is not None:
                times = len(found["f1"][label]) // len(base) or 1
                if len(base) * times == len(found["f1"][label]):
                    paired = bootstrap(found["f1"][label], paired_with=base * times)
                    row[f"f1 over {other}"] = paired.to_json()
        table["rows"][label] = row
    return table


def answers_of(
    path: str, precision: str | None, label: str, asked, file, config: StudyConfig
) -> dict[str, list[float]]:
    """Scores per question of one model at one precision; predictions are frozen before an answer is read."""
    from polybit.core.runtime import write_json
    from polybit.evals.squad import generative, run
    from polybit.hub.files import read_json
    from polybit.hub.lm import LocalLM
    from polybit.hub.models import open_model

    name = f"{Path(path).parent.name}-{Path(path).name}-{label}".replace(" ", "-")
    stored = config.out / "predictions" / f"{name}.scores.json"
    if not stored.is_file():
        model, tokenizer = open_model(path, trust_remote_code=config.trust_remote_code)
        lm = LocalLM(model, tokenizer)
        with lm.at(precision):
            scores = run(generative(lm), asked, file, config.out / "predictions" / f"{name}.json")
        write_json(stored, {metric: [float(v) for v in scores[metric]] for metric in ("em", "f1")})
    return read_json(stored)


def search_frontier(checkpoint: str, config: StudyConfig) -> dict[str, Any]:
    """The frontier over the presets' precisions and their crosses, by bit operations."""
    from polybit.acts.frontier import searched
    from polybit.options.frontier import FrontierOptions

    found = [plan.default for plan in preset_plans(config).values()]
    crossed = {f"w{w}a{a}" for w in {p.w for p in found} for a in {p.a for p in found} if a < 16}
    names = sorted(crossed | {str(p) for p in found})
    return searched(
        checkpoint,
        FrontierOptions(
            out=config.out, presets=",".join(names), cost="bitops", windows=4, window=96, points=6,
            evaluations=config.evaluations, trust_remote_code=config.trust_remote_code,
        ),
    )  # fmt: skip


def attacked(checkpoint: str, presets: Sequence[str], config: StudyConfig) -> dict[str, Any]:
    """The transfer matrix of the trained checkpoint, and the verdict on drawing a precision."""
    from polybit.acts.attack import attack
    from polybit.options.attack import AttackOptions

    if not config.attack_items:
        return {}
    squad = config.squad
    options = AttackOptions(squad=squad, items=config.attack_items, precision=",".join(presets), steps=4, tries=8)
    return attack(checkpoint, options).numbers
