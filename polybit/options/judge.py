"""What `judge` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from polybit.core.runtime import PolybitError
from polybit.evals.table import JUDGING
from polybit.options.checks import Device, EndpointOptions, WorkerOptions, at_least, names_of


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(EndpointOptions, WorkerOptions):
    """What is asked, how answers are judged, and by whom."""

    questions: str
    """Questions: a .jsonl file (MT-Bench, Vicuna, KoMT-Bench, FLASK or yours), a dataset id, mt-bench, komt-bench."""
    out: Path
    """Directory for answers, replies and verdicts; the same command goes on where an earlier one stopped."""
    reference: str | None = None
    """The float model (default: the one the first checkpoint says it was made from)."""
    precision: str | None = None
    """Precisions of models that name none, with commas (default: every stored width)."""
    mode: str | None = None
    """What to judge, with commas: pair, single, skills, fidelity (default: fidelity, and pair with an endpoint)."""
    baseline: str | None = None
    """Row that pairs are judged against (default: float; for fidelity, where float always wins: the first row)."""
    endpoint: str | None = None
    """Address of the judge, OpenAI-compatible, as in http://localhost:8000/v1."""
    judge: str | None = None
    """Name of the judge model at the endpoint."""
    references: Path | None = None
    """Reference answers by question_id, shown to the judge for math, reasoning and coding."""
    prompts: Path | None = None
    """Judge prompts in FastChat's, KoMT-Bench's, FLASK's or Vicuna's form (default: our own)."""
    skills: Path | None = None
    """FLASK's description of the skills (default: our own one-liners)."""
    limit: int | None = None
    """Only the first so many questions."""
    max_tokens: int = 256
    """Longest answer."""
    judge_tokens: int = 2048
    """Longest reply of the judge."""
    seed: int = 0
    """Seed of intervals."""
    restart: bool = False
    """Answer again instead of going on; replies of the judge are kept, they depend on the answers only."""
    device: Device = "auto"
    """Where models run (auto: a GPU where there is one)."""
    trust_remote_code: bool = False
    """Allow code that a model's repository brings."""

    def __post_init__(self) -> None:
        EndpointOptions.__post_init__(self)
        WorkerOptions.__post_init__(self)
        if isinstance(self.out, str):  # the library takes text as well
            object.__setattr__(self, "out", Path(self.out))
        for mode in self.modes:
            if mode not in JUDGING:
                raise PolybitError(f"--mode {mode!r} is not known: choose from {', '.join(JUDGING)}")
        if self.asking and not (self.endpoint and self.judge):
            raise PolybitError(
                f"--mode {','.join(self.asking)} asks a judge: give --endpoint URL and --judge NAME, or --mode "
                "fidelity for the offline one"
            )
        at_least(self, limit=1, max_tokens=1, judge_tokens=1)
        if self.out.is_file():
            raise PolybitError(f"--out {self.out} is a file: give a directory")

    @property
    def modes(self) -> list[str]:
        """What to judge."""
        return names_of(self.mode or ("pair,fidelity" if self.endpoint else "fidelity"))

    @property
    def asking(self) -> list[str]:
        """The modes that ask the endpoint."""
        return [mode for mode in self.modes if mode in JUDGING and JUDGING[mode].asks]
