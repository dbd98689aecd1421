"""The command line: verbs looked up by name, so that `polybit --help` answers before anything heavy is imported."""

from __future__ import annotations

import errno
import os
import sys
import tomllib
import warnings
from pathlib import Path

from cyclopts import App, Group
from cyclopts.config import Env, Toml

from polybit import __version__

QUANTIZE, MEASURE, TRAIN, STUDY = "Quantize", "Run and measure", "Train", "Study"  # the groups of --help, in order
COMMANDS = {
    "plan": ("polybit.commands.plan:plan", QUANTIZE, "Say what quantizing would give and cost, before running it."),
    "quantize": ("polybit.commands.quantize:quantize", QUANTIZE, "Turn a model into one checkpoint of many widths."),
    "allocate": ("polybit.commands.allocate:allocate", QUANTIZE, "Spend a budget of bits where it matters."),
    "mix": ("polybit.commands.mix:mix", QUANTIZE, "Find the mixture of texts to calibrate on."),
    "columns": ("polybit.commands.columns:columns", QUANTIZE, "Search widths inside layers and write them as a plan."),
    "export": ("polybit.commands.export:export", QUANTIZE, "Write a checkpoint in the format of another engine."),
    "generate": ("polybit.commands.generate:generate", MEASURE, "Answer a prompt at a chosen width."),
    "chat": ("polybit.commands.chat:chat", MEASURE, "Talk with a model, and change its width between turns."),
    "serve": ("polybit.commands.serve:serve", MEASURE, "Answer over HTTP, each request at its own precision."),
    "route": ("polybit.commands.route:route", MEASURE, "Learn which width a prompt needs, for the server's auto."),
    "eval": ("polybit.commands.evaluate:evaluate", MEASURE, "Measure what each width costs against the float model."),
    "judge": ("polybit.commands.judge:judge", MEASURE, "Have answers judged by an endpoint, or offline by fidelity."),
    "bench": ("polybit.commands.bench:bench", MEASURE, "Measure how fast this machine runs every width."),
    "cost": ("polybit.commands.cost:cost", MEASURE, "Say what a token costs: bit operations, bytes, milliseconds."),
    "report": ("polybit.commands.report:report", MEASURE, "Write one self-contained HTML page from measured numbers."),
    "doctor": ("polybit.commands.doctor:doctor", MEASURE, "Look at versions, kernels, GPU, caches and disk."),
    "pairs": ("polybit.commands.pairs:pairs", TRAIN, "Answer prompts in float and quantized; keep where they part."),
    "align": ("polybit.commands.align:align", TRAIN, "Teach a quantized model to answer as its float self."),
    "train": ("polybit.commands.train:train", TRAIN, "Train one model to be good at several precisions."),
    "sweep": ("polybit.commands.sweep:sweep", STUDY, "Quantize and measure under every combination of some flags."),
    "frontier": ("polybit.commands.frontier:frontier", STUDY, "Draw the best precision per layer at every cost."),
    "attack": ("polybit.commands.attack:attack", STUDY, "Attack a checkpoint at each width and answer at every other."),
    "study": ("polybit.commands.study:study", STUDY, "Answer the questions about switchable precision for a model."),
}
TRACEBACK = "POLYBIT_TRACEBACK"  # set, an error nobody foresaw is raised as it is
SHOWN = warnings.formatwarning
LARGEST_CONFIG = 1 << 20  # bytes
INTERRUPTED = 130  # the shell's status for Ctrl-C


def build_app(config_file: Path | None = None) -> App:
    """The cyclopts application; flags come first, then the [verb] of a TOML file, then the environment."""
    app = App(
        name="polybit",
        help="One language model, many precisions. Try: polybit quantize tinychat --out my-model",
        version=__version__,
        config=[*([Toml(config_file, must_exist=True)] if config_file else []), Env("POLYBIT_")],  # the first wins
        help_format="plaintext",
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    groups = {title: Group(title, sort_key=rank) for rank, title in enumerate((QUANTIZE, MEASURE, TRAIN, STUDY))}
    for rank, (name, (target, group, summary)) in enumerate(COMMANDS.items()):
        app.command(target, name=name, help=summary, group=groups[group], sort_key=rank)
    app.register_install_completion_command(
        name="--install-completion", help="Let this shell (bash, zsh or fish) complete verbs and flags."
    )
    return app


def take_config(tokens: list[str]) -> tuple[list[str], Path | None]:
    """Split `--config FILE` off the command line."""
    if "--config" not in tokens:
        return tokens, None
    at = tokens.index("--config")
    if at + 1 == len(tokens):
        fail("--config needs the path of a TOML file, as in --config quantize.toml")
    path = Path(tokens[at + 1])
    try:
        there = path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        fail(f"--config {path}: there is no such file; give the path of a TOML file")
    check_config(path)
    return tokens[:at] + tokens[at + 2 :], path


def check_config(path: Path) -> None:
    """One sentence for a file that is no TOML, or has a section of no verb, which would be left out in silence."""
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has {path.stat().st_size} bytes, and {LARGEST_CONFIG} are allowed")
        sections = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:160]
        fail(f"--config {path} cannot be read as TOML ({said}): mend it, or give the flags themselves")
    for name, section in sections.items():
        if name not in COMMANDS or not isinstance(section, dict):
            what = f"a section [{name!s:.80}]" if isinstance(section, dict) else f"{name!r:.80} outside of a section"
            fail(f"--config {path} has {what}: sections are named as verbs ({', '.join(COMMANDS)})")


def fail(sentence: str, status: int = 2) -> None:
    """One sentence on stderr, and the exit status."""
    print(f"polybit: {sentence}", file=sys.stderr)
    raise SystemExit(status)


def one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """How a warning is shown: one of this package as one sentence, others as ever."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        return f"polybit: {message}\n"
    return SHOWN(message, category, filename, lineno, line)


def main(tokens: list[str] | None = None) -> None:
    """Entry point of the `polybit` command: errors a user can mend are one sentence and a non-zero status."""
    if sys.stdout is None:  # closed by whoever called; what is printed goes nowhere
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    tokens, config_file = take_config(list(sys.argv[1:] if tokens is None else tokens))
    app = build_app(config_file)
    warnings.formatwarning = one_line
    try:
        app(tokens)
    except KeyboardInterrupt:
        fail("interrupted; nothing finished is lost - run the same command again to go on", INTERRUPTED)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        fail(
            f"{error.filename or 'the output'}: {reason}; nothing finished is lost - mend it and run the command again"
        )
    except Exception as error:
        from polybit.core.runtime import PolybitError, lacks_memory

        if isinstance(error, PolybitError):
            fail(str(error))
        if os.environ.get(TRACEBACK):
            raise
        said = " ".join(str(error).split())
        if type(error).__name__ == "OutOfMemoryError" or lacks_memory(error):
            fail(
                f"the memory is used up ({said[:80] or 'no further words'}); nothing finished is lost - "
                "free some or ask for less (--memory, --samples, --window, --device cpu), and run the command again"
            )
        fail(
            f"{type(error).__name__}: {said[:200] or 'no further words'}; this is a fault of polybit, please report it "
            f"with what is shown when {TRACEBACK}=1 is set",
            1,
        )


if __name__ == "__main__":
    main()
