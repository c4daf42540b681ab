import ml_collections

from activedpo_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    config = default()
    config.model.path = "meta-llama/Llama-2-7b-hf"
    config.data.train = "trl-lib/tldr"
    config.data.heldout = "trl-lib/tldr-preference"
    config.data.heldout_split = "validation"
    config.data.heldout_limit = 512
    config.data.buckets = ((512, 128),)
    config.sft.data = "trl-lib/tldr"
    config.candidates.source = "policy"
    config.candidates.prompts_per_round = 1000
    config.generation.responses = 3
    config.generation.max_new_tokens = 128
    config.oracle.kind = "people"
    config.dpo.batch_size = 16
    config.sft.batch_size = 16
    config.mesh.data = 1
    config.mesh.fsdp = 16
    return config
