"""`polybit train`: one model made good at several precisions, saved as one checkpoint with its presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from polybit.commands import train_spans
from polybit.core.runtime import PolybitError
from polybit.hub.models import EMBEDDED, device_of, open_model, resolve

HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 200


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Flags of `polybit train`."""

    out: Path
    """Directory of the new checkpoint."""
    presets: str = "A=w8a8,B=w4a4,C=w3a4"
    """Names and precisions, with commas; a precision may also be the JSON file of a plan, as in B=plan.json."""
    data: str = "embedded"
    """What to train on: a .txt or .jsonl file, a SQuAD .json, a named set or a dataset id."""
    head: Literal["lm", "span"] = "lm"
    """lm = what is learnt is written word by word; span = a head that points at the answer in the text (SQuAD), trained
    from a new one where the model has none."""
    method: Literal["cdt", "joint", "sp", "recursive", "independent"] = "cdt"
    """Who teaches: cdt = every more precise preset, the float model on top; sp = only the top; recursive = the next
    more precise; joint = the data alone; independent = one checkpoint per preset, each trained by itself."""
    schedule: Literal["all", "cyclic", "random", "sandwich", "fixed"] = "all"
    """Presets of a step: all; one along CPT's cosine; one at random; the widest, the narrowest and one between; or the
    widest only."""
    cycles: int = 8
    """Cycles of --schedule cyclic."""
    steps: int = 300
    """Gradient steps."""
    batch: int = 8
    """Rows per step."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    length: int | None = None
    """Longest row in tokens; longer ones are left out and counted, never cut (default: the model's context, at most
    512)."""
    rows: int | None = None
    """Rows of the data to use, drawn at random (default: all; 2000 of embedded)."""
    distance: Literal["kl", "mse"] = "kl"
    """What a student is measured by against its teacher: kl of the tokens' distributions, or mse of the logits."""
    beta: float = 1.0
    """Weight of a teacher beside the data."""
    labels: float = 1.0
    """Weight of the data itself; 0 = learn from teachers alone, best for a model that knows the data already."""
    teacher: bool = True
    """The float model teaches too; --no-teacher where it has not learnt the task yet."""
    consistency: float = 0.0
    """Weight of the KL between presets."""
    alignment: float = 0.0
    """Weight of the distance of hidden states to those of the most precise preset."""
    switchability: float = 0.0
    """Weight of the distance between the presets' adapters (with --adapter lora)."""
    adversarial: float = 0.0
    """Train against moved input embeddings, by at most this share of their mean length (0.05 is much); with --schedule
    random it is random precision training. Presets are then taught by the data and the float model only."""
    balance: Literal["sum", "gradient", "project"] = "sum"
    """How gradients of the presets are put together: added, brought to equal length, or that without conflicts."""
    adapter: Literal["none", "nested", "lora"] = "none"
    """none = one code for all presets, one file; lora = the same and an adapter per preset beside it, in peft's format;
    nested = low-rank updates inside the quantizer, codes of their own and a checkpoint per preset."""
    rank: int = 16
    """Rank of the adapters at the narrowest width."""
    scales: Literal["learned", "frozen", "recomputed"] = "learned"
    """Scales of the grid."""
    norms: bool = False
    """Train norms and biases too, which all presets share; helps narrow activations."""
    group_size: int = 64
    """Weights that share a scale, where MODEL is a float model."""
    reference: str | None = None
    """The float model of a polybit checkpoint (default: the one it says it was made from)."""
    held_out: int | None = None
    """Rows kept for choosing the best moment (default: a tenth, at most 200)."""
    probes: int = 5
    """How often held-out rows are read; 0 = keep the last moment."""
    slack: float = 0.02
    """Share by which a preset's held-out loss may exceed its start before a moment is refused."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto = a GPU where there is one."""
    seed: int = 0
    """Seed of everything that is drawn."""
    overwrite: bool = False
    """Replace an existing checkpoint at --out."""
    restart: bool = False
    """Forget what an interrupted run has finished instead of going on from there."""
    json: Path | None = None
    """Write the run with all its numbers there."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""


def train(model: str, /, *, config: Annotated[TrainConfig, Parameter(name="*")]) -> None:
    """Train MODEL (a float model or a polybit checkpoint) at all --presets, so that one file is good at each.

    Best from a checkpoint of `polybit quantize`: training then starts at its quality. The moment of the run with the
    least held-out loss at which no preset is worse than it was at the start is kept, the start if there is none.
    """
    check(config)
    from polybit.core.records import Run
    from polybit.hub.directory import check_output

    run = Run("train", {"model": model, **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}})
    check_output(config.out, overwrite=config.overwrite)
    with run.timed():
        run.numbers = build_all(model, config, run)
    if config.json is not None:
        run.write(config.json)
    print_result(model, config, run.numbers)


def check(config: TrainConfig) -> None:
    """Refuse flags that contradict each other before anything is loaded."""
    for flag, least in (("steps", 1), ("batch", 1), ("rank", 1), ("probes", 0), ("cycles", 1)):
        if getattr(config, flag) < least:
            raise PolybitError(f"--{flag} {getattr(config, flag)} is not possible: give {least} or more")
    if not config.labels and config.method == "joint":
        raise PolybitError("--method joint learns from the data alone: leave --labels 0 out, or choose another method")
    if config.switchability and config.adapter != "lora":
        raise PolybitError("--switchability compares the presets' adapters: give --adapter lora with it")
    if config.schedule == "cyclic" and config.steps < config.cycles:
        raise PolybitError(
            f"a cycle of --cycles {config.cycles} is longer than the run: give --steps {config.steps} or fewer"
        )
    if config.norms and config.head == "span":
        raise PolybitError("--norms belongs to --head lm: leave it out")
    read_presets(config.presets)


def read_presets(text: str) -> dict[str, Any]:
    """Name -> Plan from `A=w8a8,B=w4a4,C=plan.json`; a bare precision is its own name."""
    from polybit.compress.plan_files import read_plan
    from polybit.core.plan import Plan

    found: dict[str, Any] = {}
    for part in (part.strip() for part in text.split(",") if part.strip()):
        name, _, value = part.partition("=")
        name, value = name.strip(), value.strip() or name.strip()
        if name in found:
            raise PolybitError(f"--presets names {name!r:.60} twice: give every preset a name of its own")
        found[name] = read_plan(Path(value)) if value.endswith(".json") else Plan.uniform(value)
    if not found:
        raise PolybitError("--presets is empty: give names and precisions, as in A=w8a8,B=w4a4")
    return found


def build_all(name: str, config: TrainConfig, run) -> dict[str, Any]:
    """One run, or one for each preset with --method independent."""
    presets = read_presets(config.presets)
    if config.method != "independent":
        return build(name, config, presets, config.out, run)
    found: dict[str, Any] = {"presets": {}, "saved": [], "training_seconds": 0.0}
    for preset, plan in presets.items():
        numbers = build(name, config, {preset: plan}, config.out / preset, run)
        found["presets"] |= numbers["presets"]
        found["saved"] += numbers["saved"]
        found["training_seconds"] += numbers["training_seconds"]
        found["kept"] = {**found.get("kept", {}), preset: numbers["kept"]}
    return found


def build(name: str, config: TrainConfig, presets: Mapping[str, Any], out: Path, run) -> dict[str, Any]:
    """Load, train, freeze, save; returns the numbers of the run."""
    from polybit.hub.directory import check_output, output_lock
    from polybit.hub.workspace import Workspace
    from polybit.train.latent import quantized_names
    from polybit.train.schedules import choose, widest_first
    from polybit.train.spans import run_spans
    from polybit.train.switchable import run as train_run

    check_output(out, overwrite=config.overwrite)
    spans = config.head == "span"
    lessons: Any
    held_out: Any
    if spans:
        model, tokenizer, parent, digest, presets = train_spans.prepare(name, config, presets)
        lessons, held_out = train_spans.material(config, model, tokenizer)
    else:
        model, tokenizer, parent, digest = prepare(name, config, presets)
        lessons, held_out = material(config, model, tokenizer)
    with output_lock(out):
        store = Workspace(out, fingerprint(config, digest, presets), restart=config.restart)
        try:
            model.to(device_of(config.device))
            layers = quantized_names(model)
            ordered = widest_first(presets, layers)
            plans = {preset: presets[preset] for preset in ordered}
            schedule = choose(
                config.schedule, plans, layers, steps=config.steps, cycles=config.cycles, seed=config.seed
            )
            before = measure(model, held_out, ordered)
            learn = train_spans.objective(config) if spans else objective(config, model, parent)
            where: dict[str, Any] = {"out": store.path / "run", "course": course(config), "schedule": schedule}
            if spans:
                outcome = run_spans(model, lessons, held_out, learn, ordered, fill=tokenizer.pad_token_id or 0, **where)
            else:
                outcome = train_run(model, lessons, learn, ordered, held_out=held_out, **where)
            after = measure(model, held_out, ordered)
            saved = save_all(
                model.cpu(), tokenizer, plans, out, config, {"base_model": parent, "trained": noted(config, run)}
            )
            store.discard()
        finally:
            store.close()
    return {
        "presets": {p: {"plan": presets[p].to_json(), "start": before[p], "end": after[p]} for p in ordered},
        "float": before["float"],
        "rows": len(lessons if spans else lessons.rows),
        "held_out": len(held_out if spans else held_out.rows),
        "too_long": 0 if spans else lessons.too_long,
        "kept": "the last moment" if outcome.picker is None else outcome.picker.reason(),
        "training_seconds": round(outcome.seconds, 2),
        "saved": saved,
    }


def prepare(name: str, config: TrainConfig, presets: Mapping[str, Any]):
    """(trainable model, tokenizer, name of the float model, digest of what it starts from)."""
    from polybit.compress.sizes import base_model, quantized_layers, stored_widths
    from polybit.core.planes import unpack
    from polybit.hub.load import load_float
    from polybit.hub.workspace import model_digest
    from polybit.nn.linear import QuantLinear
    from polybit.nn.rotation import rotate, rotation_of
    from polybit.train.latent import Freedom, make_trainable

    loaded, tokenizer = open_model(name, trust_remote_code=config.trust_remote_code)
    digest, start = model_digest(loaded), None
    parent: str | None = EMBEDDED if is_embedded(name) else name
    model = loaded
    if stored_widths(loaded) is not None:
        parent = config.reference or base_model(loaded)
        if parent is None:
            raise PolybitError(f"{name} does not say which model it was made from: name it with --reference")
        others = [key for key, layer in quantized_layers(loaded).items() if not isinstance(layer, QuantLinear)]
        if others:
            raise PolybitError(
                f"{others[0]!r:.120} of {name} is no linear layer and cannot be trained: quantize it otherwise"
            )
        start = {key: unpack(layer.planes) for key, layer in quantized_layers(loaded).items()}
        model, tokenizer = load_float(resolve(parent), trust_remote_code=config.trust_remote_code)
        if (rotation := rotation_of(loaded)) is not None:
            rotate(model, rotation)  # it says the same, in the basis of the codes
    elif config.reference is not None:
        raise PolybitError(f"--reference {config.reference}: {name} is itself a float model, leave it out")
    # codes of a checkpoint make up for each other's errors, which latents at the borders of their cells would undo
    margin = 0.0 if start is None else 0.5
    freed: Any = "norms" if config.norms else False
    freedom = Freedom(scales=config.scales, rank=config.rank, others=freed, margin=margin)
    make_trainable(model, presets, start=start, group_size=config.group_size, adapter=config.adapter, freedom=freedom)
    return model, tokenizer, parent, digest


def is_embedded(name: str) -> bool:
    """Whether a model is the one inside the package."""
    return Path(resolve(name)).resolve() == Path(resolve(EMBEDDED)).resolve()


def material(config: TrainConfig, model, tokenizer):
    """(rows to train on, held-out rows)."""
    import sys

    from polybit.data.lessons import read_lessons
    from polybit.hub.lm import longest_input

    longest = longest_input(model)
    length = config.length or min(longest or 512, 512)
    if longest is not None and length > longest:
        raise PolybitError(f"--length {length} is longer than the model's context of {longest}: give at most {longest}")
    count = config.rows or (2000 if config.data == "embedded" else None)
    found = read_lessons(config.data, tokenizer, length=length, count=count, seed=config.seed)
    if found.too_long:
        print(
            f"polybit: warning: {found.too_long} of {found.too_long + len(found.rows)} rows are longer than {length} "
            "tokens and left out",
            file=sys.stderr,
        )
    held_out = config.held_out or max(1, min(HELD_OUT_MOST, int(len(found.rows) * HELD_OUT_SHARE)))
    return found.split(held_out, seed=config.seed)


def objective(config: TrainConfig, model, parent: str):
    """The objective the flags mean; with --norms the float model teaches as a model of its own."""
    from polybit.train.cascade import Agreement, Cascade

    source = None
    if config.norms and config.teacher:
        source = open_model(parent, trust_remote_code=config.trust_remote_code)[0].to(device_of(config.device))
    cascade = Cascade(config.method, config.distance, config.beta, config.labels, teacher=config.teacher, source=source)
    terms = (config.consistency, config.alignment, config.switchability)
    found = Agreement(cascade, model, *terms) if any(terms) else cascade
    if not config.adversarial:
        return found
    from polybit.robust.embeddings import Adversarial

    if any(terms):
        raise PolybitError("--adversarial attacks presets one by one: leave consistency, alignment, switchability out")
    return Adversarial(found, model, epsilon=config.adversarial, seed=config.seed)


def course(config: TrainConfig):
    """The course of the run."""
    from polybit.train.balance import Balance
    from polybit.train.fit import Course

    return Course(
        steps=config.steps,
        batch=config.batch,
        learning_rate=config.learning_rate,
        probes=config.probes,
        slack=config.slack,
        seed=config.seed,
        balance=Balance(config.balance),
    )


def measure(model, held_out, presets) -> dict[str, dict[str, float]]:
    """Held-out nats per token, share of wrong tokens and KL to the float model, at every preset and in float."""
    from polybit.train.cascade import FLOAT
    from polybit.train.spans import SpanProbe, SpanScores
    from polybit.train.switchable import means, rows_of

    if isinstance(held_out, list):
        return {k: dict(v) for k, v in SpanProbe(held_out, (*presets, FLOAT), 0)(SpanScores(model)).items()}
    return {name: means(rows_of(model, held_out, name)) for name in (*presets, FLOAT)}


def fingerprint(config: TrainConfig, digest: str, presets: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the result, so that a resumed run cannot mix two."""
    ignored = ("out", "json", "overwrite", "restart", "trust_remote_code", "presets", "device")
    flags = {key: value for key, value in asdict(config).items() if key not in ignored}
    return {"model": digest, **flags, "presets": {name: plan.to_json() for name, plan in presets.items()}}


def noted(config: TrainConfig, run) -> dict[str, Any]:
    """What the checkpoint says of its training."""
    kept = ("method", "schedule", "steps", "batch", "learning_rate", "data", "adapter", "seed")
    return {key: getattr(config, key) for key in kept}


def save_all(model, tokenizer, plans: Mapping[str, Any], out: Path, config: TrainConfig, notes) -> list[str]:
    """Freeze and save: one checkpoint, with LoRA adapters beside it, or one per preset for codes of their own."""
    import copy

    from polybit.hub.checkpoint import save, verify
    from polybit.hub.peft import save_peft
    from polybit.train.latent import freeze, latent_layers

    def one(frozen, path: Path) -> str:
        widths = sorted({min(plan.at(n).w for n in layers) for plan in plans.values()}, reverse=True)
        stored = max(layer.bits for layer in quantized(frozen).values())
        kept = tuple(width for width in widths if width <= stored) or (stored,)
        saved = save(frozen, path, tokenizer=tokenizer, widths=kept, notes=notes, overwrite=config.overwrite)
        verify(saved, frozen)
        return str(saved)

    layers = latent_layers(model)
    loras: dict[str, Any] = {}
    if config.adapter == "lora":
        loras = {preset: {name: layer.loras[preset] for name, layer in layers.items()} for preset in plans}
    if config.adapter == "nested" and len(plans) > 1:
        return [one(freeze(copy.deepcopy(model), preset), out / preset) for preset in plans]
    saved = [one(freeze(model), out)]
    for preset, factors in loras.items():
        saved.append(str(save_peft(factors, out / "adapters" / preset, base_model=str(notes["base_model"]))))
    return saved


def quantized(model):
    """The quantized layers of a frozen model."""
    from polybit.compress.sizes import quantized_layers

    return quantized_layers(model)


def print_result(name: str, config: TrainConfig, numbers: Mapping[str, Any]) -> None:
    """What every preset gained, where it is, and what to type next."""
    print(f"{'preset':12}{'nats per token: start':>24}{'end':>10}{'wrong tokens: start':>22}{'end':>9}")
    for preset, row in numbers["presets"].items():
        start, end = row["start"], row["end"]
        print(f"{preset:12}{start['nll']:24.4f}{end['nll']:10.4f}{start['wrong']:22.2%}{end['wrong']:9.2%}")
    if "float" in numbers:
        print(f"{'float':12}{numbers['float']['nll']:24.4f}{'':10}{numbers['float']['wrong']:22.2%}")
    print(f"\nKept: {numbers['kept']}.")
    print("Saved: " + ", ".join(numbers["saved"]))
    first = next(iter(numbers["presets"]))
    print(f'Next: polybit generate {numbers["saved"][0]} --prompt "Hello" --precision {first}')
