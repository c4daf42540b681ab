"""Responses to prompts: a pool for people, judges or reward models to label, or for `data.train`.

    python -m activedpo_jax.generate --config configs/x.py --workdir DIR --config.generation.prompts=prompts.jsonl

Writes `DIR/responses.jsonl`, which `data.pool_files` describes.  The same command on the same work directory goes on
where it stopped.
"""

if __name__ == "__main__":  # first, since the imports take seconds
    from activedpo_jax import errors

    errors.end_at_signals()

import sys
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from activedpo_jax import errors, flags, layout, start
from activedpo_jax.data.encoding import make_encoding
from activedpo_jax.data.groups import Texts, check_tokens
from activedpo_jax.data.pool_files import PoolFiles
from activedpo_jax.data.preferences import uniform
from activedpo_jax.data.prompts import read_prompts
from activedpo_jax.data.tokenize import encoded_texts
from activedpo_jax.generation.responses import GenerationSpec, Responder, generate
from activedpo_jax.huggingface import loading
from activedpo_jax.models.decoder import Params, unstack
from activedpo_jax.record import folders, inputs
from activedpo_jax.selection.strategies import STRATEGIES


def make_spec(config: ml_collections.ConfigDict, decoder: Any, stop: tuple[int, ...], mesh: Any) -> GenerationSpec:
    options = config.generation
    return GenerationSpec(
        start.decoding_spec(config, decoder, stop, mesh),
        options.responses,
        options.resamples,
        options.prompts_per_chunk,
    )


def described(config: ml_collections.ConfigDict, texts: Texts) -> dict[str, Any]:
    """What `inputs.hold` compares when a command resumes."""
    return {"prompts": inputs.describe_texts(texts, config.generation.prompts), **start.fingerprints(config)}


def main(argv: Sequence[str] | None = None) -> None:
    config, folder, _ = flags.read_plain_run(sys.argv if argv is None else argv, STRATEGIES)
    options, model = config.generation, config.model
    with errors.clean_errors():
        if not options.prompts or not model.path:
            missing = "generation.prompts" if not options.prompts else "model.path"
            raise ValueError(f"config.{missing} is empty; expected prompts and a model to respond to them: set it")
        if len(config.seeds) > 1:
            raise ValueError(f"config.seeds: got {tuple(config.seeds)}, expected one seed: a pool is sampled once")
        folders.check_workdir(folder, config, "generate")
        mesh = layout.make_mesh(config.mesh)
        records = read_prompts(options.prompts, options.split)
        tokenizer = loading.load_tokenizer(model.path, model.revision)
        widths = [prompt for prompt, _ in config.data.buckets]
        encoding = make_encoding(
            tokenizer, config.data.template, max(widths), options.max_new_tokens, start.template_kwargs(config)
        )
        texts = encoded_texts(records, encoding)
        for note in texts.notes:
            print(f"prompts: {note}")
        stop = start.stop_tokens(model.path, model.revision, tokenizer, config.data.template)
        decoder = start.load_decoder(config, mesh)
        check_tokens(texts, decoder.config.vocab_size, options.prompts)
        spec = make_spec(config, decoder, stop, mesh)
        folders.open_workdir(folder, config, "generate")
        inputs.hold(folder / "inputs" / "prompts.json", described(config, texts))
        files = PoolFiles(folder, records)
        params: Params = {}
        lora = None
        if files.missing:
            on_cpu = mesh.devices.flat[0].platform == "cpu"
            take_apart = jax.jit(unstack, static_argnums=1)
            params = take_apart(start.load_params(config, mesh, decoder.dtype), on_cpu)
            lora = unstack(start.initial_lora(config, decoder, mesh, config.seeds[0])) if config.lora.path else None

        responder = Responder(spec, params, lora, start.text_of(tokenizer, stop))
        draws = [uniform(config.seeds[0], "generation", name) for name in records.ids]
        seeds = (np.array(draws) * 2**32).astype(np.uint32)
        for results in generate(responder, texts.prompt_tokens, seeds, widths, files.missing):
            files.add(results)
        print(files.finish(options.responses, options.max_new_tokens, options.resamples))


if __name__ == "__main__":
    main()
