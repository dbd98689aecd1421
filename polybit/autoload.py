"""Called by torch when it is imported (entry point group torch.backends); must stay tiny and never raise."""


def register() -> None:
    """Nothing to do until transformers is imported."""
