"""How an act has its float model, which several acts can be told."""

# annotations are evaluated here: a record in another file that extends this one does not know their names
from dataclasses import dataclass

from polybit.options.checks import Device, possible_memory


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """Where a float model computes, and in how much memory."""

    device: Device = "auto"
    """Where to compute; auto = a GPU where there is one."""
    memory: float | None = None
    """Gigabytes of memory the run should keep to; a model that is larger is read a block at a time, from its files
    (default: as this machine has)."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""

    def __post_init__(self) -> None:
        possible_memory(self.memory)
