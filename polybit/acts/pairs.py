"""Answer prompts with a float model and its quantized self, and keep where the answers part."""

from __future__ import annotations

import os

from polybit.compress.sizes import base_model, default_presets, plain_widths, stored_widths
from polybit.core.precision import FLOAT, Precision
from polybit.core.records import Run
from polybit.core.runtime import PolybitError
from polybit.hub.directory import check_output
from polybit.hub.endpoint import Endpoint
from polybit.hub.models import open_model, own_name, resolve
from polybit.hub.workers import Where
from polybit.nn.rotation import rotation_of
from polybit.options.checks import plain
from polybit.options.pairs import PairsOptions
from polybit.train.answering import AskedModels, Asking, Hands, make_pairs

DEFAULT_PRECISION = "w4"


def pairs(model: str, options: PairsOptions) -> Run:
    """Have MODEL (a float model, which is then rounded, or a polybit checkpoint with its float model) answer prompts in
    float and quantized, and write the pairs to `options.out`."""
    run = Run("pairs", {"model": model, **plain(options)})
    with run.timed():
        check_output(options.out, overwrite=options.overwrite)
        models = model_pair(
            model,
            precision=options.precision,
            reference=options.reference,
            group_size=options.group_size,
            trust_remote_code=options.trust_remote_code,
        )
        asking = Asking(
            prompts=options.prompts,
            limit=options.limit,
            max_tokens=options.max_tokens,
            top=options.top,
            shard=options.shard,
            writer=writer(models, options),
            float_only=options.float_only,
        )
        hands = Hands(where=Where(options.workers, options.ray), device=options.device)
        run.numbers = make_pairs(
            models, asking, options.out, hands=hands, overwrite=options.overwrite, restart=options.restart
        )
    return run


def writer(models: AskedModels, options: PairsOptions) -> Endpoint | None:
    """The endpoint that writes the float answers, if there is one."""
    if options.endpoint is None:
        return None
    return Endpoint(
        options.endpoint,
        options.endpoint_model or own_name(models.float_name),
        key=os.environ.get(options.key_from) or "none",
        max_tokens=options.max_tokens,
        timeout=options.timeout,
        retries=options.retries,
        concurrency=options.concurrency,
    )


def model_pair(
    model: str, *, precision: str | None, reference: str | None, group_size: int, trust_remote_code: bool = False
) -> AskedModels:
    """Which float model and which quantized one MODEL means; see the flags of these names."""
    loaded, _ = open_model(model, trust_remote_code=trust_remote_code)
    widths = stored_widths(loaded)
    narrow = [f"w{bits}" for bits in plain_widths(loaded)] or default_presets(loaded) if widths else [DEFAULT_PRECISION]
    precision = precision or narrow[-1]
    if widths is None:
        if reference is not None:
            raise PolybitError(f"--reference {reference}: {model} is itself a float model, leave it out")
        if not 2 <= Precision.parse(precision).w < FLOAT:
            raise PolybitError(f"--precision {precision} leaves the weights in float: give w2 to w8")
        return AskedModels(resolve(model), None, precision, group_size, trust_remote_code)
    parent = reference or base_model(loaded)
    if parent is None:
        raise PolybitError(f"{model} does not say which model it was made from: name it with --reference")
    return AskedModels(resolve(parent), resolve(model), precision, group_size, trust_remote_code, rotation_of(loaded))
