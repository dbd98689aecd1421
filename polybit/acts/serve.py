"""Serve a model over HTTP until the process is told to stop."""

from __future__ import annotations

import sys

from polybit.core.records import Run
from polybit.core.runtime import PolybitError
from polybit.options.checks import names_of, plain
from polybit.options.serve import ServeOptions

try:
    from polybit.serve.loading import load_service
    from polybit.serve.server import run as run_server
except ModuleNotFoundError as error:
    raise PolybitError(f"serve needs {error.name}: pip install 'polybit[serve]'") from None


def serve(model: str, options: ServeOptions) -> Run:
    """Answer requests over HTTP with MODEL (a polybit directory or any model), each at its own precision."""
    keys = options.keys()
    secret = plain(options) | {"api_key": "***" if options.api_key else None}
    run = Run("serve", {"model": model, **secret})
    with run.timed():
        run_server(
            lambda: load_service(
                model,
                name=options.name,
                default=options.precision,
                auto=tuple(names_of(options.auto)),
                pressure=(options.auto_from, options.auto_to),
                slots=options.slots,
                context=options.context,
                most_tokens=options.max_tokens,
                queue=options.queue,
                chunk=options.chunk,
                threads=options.threads,
                device=options.device,
                trust_remote_code=options.trust_remote_code,
            ),
            host=options.host,
            port=options.port,
            keys=keys,
            origins=tuple(names_of(options.cors)),
            most_bytes=options.max_body,
            drain=options.drain,
            told=lambda text: print(f"polybit: {text}", file=sys.stderr, flush=True),
        )
    return run
