"""The one list of options, with their defaults.  A file in `configs/` changes some, and is a run's record."""

import ml_collections


def default() -> ml_collections.ConfigDict:
    """Every option of a run.  Fields that the paper fixes have the paper's value (arXiv 2505.19241, section 5)."""
    config = ml_collections.ConfigDict()

    # What to run: every strategy on every seed.  More than one run gets a folder each, `<strategy>/seed<seed>/`,
    # and the comparison of them at the top of the work directory.
    config.strategies = ("activedpo",)
    config.seeds = (0,)
    config.rounds = 10
    config.labels_per_round = 50  # K

    config.model = ml_collections.ConfigDict()
    config.model.path = ""  # a Hugging Face directory or Hub name; empty: the synthetic task's own tiny decoder
    config.model.revision = ""  # Hub branch, tag or commit; empty: the default branch
    config.model.dtype = "auto"  # base weights and compute: auto (float32 on CPU, else bfloat16), float32, bfloat16
    config.model.quantisation = "none"  # base weights of the linear maps: none, int8, nf4 (pip install '.[quant]')
    config.model.remat = "dots"  # the backward pass recomputes: none, dots (all but the linear maps), full
    config.model.attention = "auto"  # splash (TPU), cudnn (NVIDIA), xla; auto: by platform, where it can run
    config.model.logits_chunk = 512  # tokens whose logits exist at a time

    config.lora = ml_collections.ConfigDict()
    config.lora.rank = 128
    config.lora.alpha = 512.0
    config.lora.target_modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    config.lora.rslora = False
    config.lora.path = ""  # start from this PEFT adapter, of the shape above: directory or Hub name; empty: a fresh one
    config.lora.revision = ""

    config.data = ml_collections.ConfigDict()
    config.data.train = ""  # JSONL or Parquet file, or a `datasets` name; `synthetic` for the procedural task
    config.data.train_split = "train"  # split of a `datasets` name
    config.data.heldout = ""  # likewise; empty: split off `train`, by prompt
    config.data.heldout_split = "test"
    config.data.heldout_fraction = 0.1  # share of the prompts held out when `heldout` is empty
    config.data.train_limit = 0  # use this many pairs of the pool, drawn by seed; 0: all
    config.data.heldout_limit = 0
    config.data.template = "auto"  # auto (the tokenizer's chat template if it has one), chat, plain
    config.data.template_kwargs = ""  # options for the chat template as JSON, {"enable_thinking": false} say
    config.data.buckets = ((128, 128), (256, 512))  # (prompt, response) tokens: one compiled program each

    config.synthetic = ml_collections.ConfigDict()  # the procedural task, data.train='synthetic'; see data/synthetic.py
    config.synthetic.families = 32
    config.synthetic.styles = 3
    config.synthetic.topics = 12
    config.synthetic.topics_per_family = 2
    config.synthetic.context_words = 2
    config.synthetic.min_response = 5  # words
    config.synthetic.max_response = 8
    config.synthetic.purity = 0.7
    config.synthetic.zipf = 1.5
    config.synthetic.pool_pairs = 1024
    config.synthetic.heldout_pairs = 1024

    config.scratch = ml_collections.ConfigDict()  # the decoder of the synthetic task, trained from nothing
    config.scratch.hidden_size = 64
    config.scratch.intermediate_size = 128
    config.scratch.num_layers = 2
    config.scratch.num_heads = 4
    config.scratch.num_kv_heads = 2
    config.scratch.steps = 400
    config.scratch.batch_size = 64
    config.scratch.examples = 2048
    config.scratch.learning_rate = 3e-3

    config.sft = ml_collections.ConfigDict()  # supervised fine-tuning, before the first round or alone
    config.sft.data = ""  # prompts with completions, or preferences, whose chosen response is learnt; empty: no SFT
    config.sft.split = "train"  # split of a `datasets` name
    config.sft.limit = 0  # use this many examples, drawn by seed; 0: all
    config.sft.weights = "lora"  # what is trained: lora (the adapter, which the rounds go on with), full (all weights)
    config.sft.learning_rate = 2e-5
    config.sft.epochs = 1
    config.sft.batch_size = 8  # examples an optimiser step, whose loss is the mean over its completion tokens
    config.sft.examples_per_chunk = 8  # examples whose activations exist at a time; a chunk is of one bucket
    config.sft.schedule = "linear"  # after the warm-up: linear, cosine, constant
    config.sft.warmup_fraction = 0.1
    config.sft.weight_decay = 0.0  # of everything that is trained, norms included
    config.sft.max_grad_norm = 1.0
    config.sft.heldout_fraction = 0.0  # share of the prompts that the loss is measured on, not learnt; 0: none
    config.sft.checkpoint_every = 100  # steps

    config.features = ml_collections.ConfigDict()
    config.features.dim = 8192  # D
    config.features.normalisation = "response"  # response, none
    config.features.groups_per_chunk = 8

    config.selection = ml_collections.ConfigDict()
    config.selection.lam = 1.0  # λ of V = λI + Σ φφᵀ
    config.selection.posterior = "refreshed"  # features of labelled pairs: refreshed at the current θ, or frozen
    config.selection.block = 1024  # candidates a device holds while selecting

    config.oracle = ml_collections.ConfigDict()
    config.oracle.noise = "none"  # none, flip, bradley_terry
    config.oracle.flip_probability = 0.0  # of a label, with `flip`
    config.oracle.temperature = 1.0  # of the rewards, with `bradley_terry`

    config.dpo = ml_collections.ConfigDict()
    config.dpo.beta = 0.1
    config.dpo.label_smoothing = 0.0
    config.dpo.learning_rate = 1e-4
    config.dpo.epochs = 4
    config.dpo.batch_size = 8  # pairs an optimiser step
    config.dpo.pairs_per_chunk = 8  # pairs whose activations exist at a time; gradients of a batch's chunks add up
    config.dpo.schedule = "linear"  # after the warm-up: linear, cosine, constant
    config.dpo.warmup_fraction = 0.1  # of the round's steps
    config.dpo.weight_decay = 0.0
    config.dpo.max_grad_norm = 1.0
    config.dpo.train_on = "all"  # labels: all, newest
    config.dpo.start_from = "sft"  # each round's θ: sft, current

    config.round = ml_collections.ConfigDict()
    config.round.mode = "auto"  # fused (one compiled program), staged (progress bars), auto

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.pairs_per_chunk = 16

    config.export = ml_collections.ConfigDict()
    config.export.merged = False  # beside `adapter/` write `merged/`, a whole Hugging Face checkpoint

    config.generation = ml_collections.ConfigDict()  # responses to prompts: `python -m activedpo_jax.generate`
    config.generation.prompts = ""  # JSONL or Parquet file, or a `datasets` name, with prompts or preferences
    config.generation.split = "train"  # split of a `datasets` name
    config.generation.responses = 3  # different ones to each prompt; m
    config.generation.temperature = 1.0
    config.generation.top_k = 0  # sample among the k likeliest tokens; 0: all
    config.generation.top_p = 1.0  # among the fewest likeliest tokens that have this probability between them; 1: all
    config.generation.max_new_tokens = 128
    config.generation.resamples = 3  # attempts to replace responses that are empty, or the same as another
    config.generation.prompts_per_chunk = 8

    config.mesh = ml_collections.ConfigDict()  # devices along each axis; -1: all that are left
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    return config
