"""Put a finished directory on the hub, or say what would be put there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError


def check_repo(repo: str) -> None:
    """Refuse what is no name of a repository, before any work is done."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = repo if "/" in repo else f"OWNER/{repo}"
        raise PolybitError(f"--push {repo!r:.120} is no repository: give OWNER/NAME, as in me/my-model-gguf") from None
    if repo.count("/") != 1:
        raise PolybitError(f"--push {repo!r:.120} names no owner: give OWNER/NAME, as in me/my-model-gguf")


def push(directory: Path, repo: str, *, private: bool, dry_run: bool) -> dict[str, Any]:
    """Upload every file of a directory in one commit; with `dry_run` nothing leaves this machine.

    Returns the repository, its files with their bytes, and the address of the commit (None for a dry run). The token is
    the one that `hf auth login` keeps, or HF_TOKEN.
    """
    files = {str(p.relative_to(directory)): p.stat().st_size for p in sorted(directory.rglob("*")) if p.is_file()}
    found: dict[str, Any] = {"repo": repo, "private": private, "files": files, "bytes": sum(files.values())}
    if dry_run:
        return {**found, "commit": None}
    from huggingface_hub import HfApi

    api = HfApi()
    with in_words(directory, repo):
        api.create_repo(repo, private=private, exist_ok=True)
        said = api.upload_folder(repo_id=repo, folder_path=directory, commit_message="Export of polybit")
    return {**found, "commit": str(said.commit_url)}


@contextmanager
def in_words(directory: Path, repo: str) -> Iterator[None]:
    """One sentence in place of what the hub or the network says; the export itself is finished."""
    try:
        yield
    except Exception as error:  # of requests, httpx, the hub: each has kinds of its own
        said = " ".join(str(error).split())[:160] or type(error).__name__
        raise PolybitError(
            f"{repo} was not pushed ({said}): {directory} is finished and whole, log in with `hf auth login` and "
            f"upload it with `hf upload {repo} {directory}`"
        ) from error
