"""The sections of a config: frozen models, each owned by the stage it configures; unknown keys are errors."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from llmattrib.methods import canonical

Method = Annotated[str, AfterValidator(canonical)]
"""The canonical name of a method; see methods.py for its forms."""
METHODS: tuple[Method, ...] = ("shapley", "influence", "trak", "grad_dot", "grad_cos")
"""What `reduce` does when nothing is said."""
ValuesMethod = (
    Literal["permutation", "subset", "one_sample", "msr_banzhaf", "ame_lasso", "knn_shapley", "freeshap"] | Method
)
"""Data values by sampling or a game of their own, or by a method of reduce."""
CurveKind = Literal["remove_highest", "remove_lowest", "keep_highest", "keep_lowest"]
OutputFunction = Literal["loss", "log_odds", "margin", "logits", "pntk"]
PositiveInt = Annotated[int, Field(gt=0)]
Place = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A path, or a name that may be one; `~` is the home folder."""


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys forbidden, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LoraConfig(Section):
    """Shape of the LoRA adapter that `train` makes, and of the fresh one that `init` features are taken over.

    A given adapter brings its own shape, and this section is then not read.
    """

    rank: PositiveInt = 8
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    layers: str | None = Field(None, pattern=r"^\d+-\d+$", description="first-last, inclusive; all when null")
    use_rslora: bool = False


class ModelConfig(Section):
    """The base model and its adapters.

    `name` is a hub id, a folder with safetensors, a `.gguf` file, or `package:NAME/FILE` for a file that an installed
    Python package carries. `adapters` are PEFT folders; when empty, `run_dir/adapter` made by `train`. `quantization`
    holds the base's linear layers in 4 (NF4) or 8 bits by bitsandbytes; `deterministic` has a GPU add in a fixed order.
    """

    name: str
    revision: str | None = None
    adapters: tuple[Place, ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    quantization: Literal["4bit", "8bit"] | None = None
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    deterministic: bool = True
    trust_remote_code: bool = False
    lora: LoraConfig = LoraConfig()

    @field_validator("adapters")
    @classmethod
    def _adapters_differ(cls, adapters: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(map(os.path.abspath, adapters))) < len(adapters):
            raise ValueError("one adapter is named twice")
        return adapters


class DataConfig(Section):
    """The training examples to attribute to.

    `train` is a JSONL, JSON, CSV or Parquet file, or the name of a `datasets` data set. Rows have a prompt and a
    completion column, or a chat `messages` column whose last assistant turn is the completion.

    `label_words` makes completions classes: each is one of these words, and each word one token. Labels that are no
    single token get one by `label_map`, completion in the data -> label word (several may share a word). The label
    words are then its words, in the order of the map, and need not be given. Quote Yes and No: YAML reads them as
    true and false.
    """

    train: Place
    split: str = "train"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str | None = None
    id: str | None = None
    system: str | None = None
    chat_template: Literal["auto", "none"] = "auto"
    label_map: dict[str, str] = Field(default_factory=dict)
    label_words: tuple[str, ...] = Field((), validate_default=True)
    max_length: PositiveInt | None = Field(None, description="tokens; the model's context when null")
    overlong: Literal["error", "truncate", "skip"] = "error"
    limit: PositiveInt | None = None

    @field_validator("label_map")
    @classmethod
    def _map_is_clear(cls, label_map: dict[str, str]) -> dict[str, str]:
        texts, words = [text.strip() for text in label_map], list(dict.fromkeys(label_map.values()))
        if not all(texts) or not all(word.strip() for word in words):
            raise ValueError("a completion or a word is empty")
        for kind, names in (("completions", texts), ("words", [word.strip() for word in words])):
            if len(set(names)) < len(names):
                raise ValueError(f"two {kind} differ in space only")
        mapped = {text.strip(): word.strip() for text, word in label_map.items()}
        for word in mapped.values():
            if mapped.get(word, word) != word:
                raise ValueError(f"the word {word!r} is also a completion, and one of another word, {mapped[word]!r}")
        return label_map

    @field_validator("label_words")
    @classmethod
    def _words_are_of_the_map(cls, words: tuple[str, ...], info: Any) -> tuple[str, ...]:
        # `info` is a pydantic.ValidationInfo, a protocol that cannot be checked at run time
        mapped = tuple(dict.fromkeys(info.data.get("label_map", {}).values()))
        if mapped and words and words != mapped:
            raise ValueError(f"label_map has the words {list(mapped)}; leave label_words out")
        return words or mapped


class TrainConfig(Section):
    """LoRA fine-tuning: AdamW, linear warm-up and decay, loss on completion tokens only.

    `num_adapters` are trained, with the seeds `seed`, `seed` + 1, ...; each is also kept after `checkpoints` - 1
    earlier epochs, evenly spaced. Together they are what `features.linearisation=trained` takes; the first, at its last
    epoch, gives the answers.

    `dtype` is of the frozen base weights; `auto` is bfloat16 on a GPU that computes in it and float32 elsewhere (a
    CPU without bfloat16 instructions is some fifteen times slower in it).
    """

    epochs: PositiveInt = 3
    num_adapters: PositiveInt = 1
    checkpoints: PositiveInt = 1
    learning_rate: float = Field(2e-4, gt=0)
    batch_size: PositiveInt = 8
    warmup_ratio: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    @model_validator(mode="after")
    def _checkpoints_are_epochs(self) -> "TrainConfig":
        if self.checkpoints > self.epochs:
            raise ValueError(f"checkpoints={self.checkpoints} is more than epochs={self.epochs}")
        return self


class SketchConfig(Section):
    """How a gradient is compressed: `oporp` (blocks by calibrated norm), dense `rademacher`, or `none` (exact)."""

    kind: Literal["oporp", "rademacher", "none"] = "oporp"
    dim: PositiveInt = 4096
    calibration_examples: PositiveInt = 32


class FeaturesConfig(Section):
    """What a feature is: the sketched gradient of `output` with respect to the LoRA parameters at `linearisation`.

    `init` is the base model with fresh LoRA matrices (B = 0); `num_inits` of them are averaged at no extra pass.
    `trained` is the adapters as trained. `dtype` `auto` is int8 of a sketch and float16 of exact features.

    `preconditioner` `ekfac` whitens gradients before the sketch by the EK-FAC curvature (H + lam)^-1/2 of each LoRA
    factor: inner products of features, `grad_dot`, are EK-FAC influence. lam is `damping` times the factor's mean
    eigenvalue. H is fitted on `curvature_examples` training examples, evenly spaced (all when there are fewer). Sides
    of a factor longer than `max_eigen_side` keep their coordinates.
    """

    output: OutputFunction = "loss"
    linearisation: Literal["init", "trained"] = "init"
    num_inits: PositiveInt = 1
    preconditioner: Literal["none", "ekfac"] = "none"
    damping: float = Field(0.1, gt=0)
    curvature_examples: PositiveInt = 2048
    max_eigen_side: PositiveInt = 4096
    sketch: SketchConfig = SketchConfig()
    dtype: Literal["auto", "int8", "float16", "float32"] = "auto"
    tokens_per_batch: PositiveInt = 2048
    shard_size: PositiveInt = 256

    @model_validator(mode="after")
    def _inits_are_at_init(self) -> "FeaturesConfig":
        if self.linearisation == "trained" and self.num_inits > 1:
            raise ValueError(f"num_inits={self.num_inits} is for linearisation=init; trained takes model.adapters")
        return self


class WordsConfig(Section):
    """Word gradients, which `tracin_we` reads: gradients at the output of the input embedding, summed over a word.

    `build` makes them, at `features.linearisation` and of `features.output`, when `tracin_we` is among
    `reduce.methods`. `top_positions` of an example are kept, those of the largest gradients; null keeps all.
    `exclude` leaves out tokens that are no words of the example: `special` tokens (padding, BOS, EOS, turn marks), and
    with `template` all text of the chat template and `data.system`; `none` is raw.
    `synonym_cosine` takes tokens whose embeddings have this cosine or more for one word.
    `adapter_weights` weigh `model.adapters` (learning rates, of checkpoints); all alike, with sum 1, when empty.
    `sketch_dim` numbers an example are searched; `sketch_width` of them stand for a word, as many as its gradient has
    when null, so that the rest makes buckets. `shortlist` examples of either kind are then valued exactly.
    """

    top_positions: PositiveInt | None = 10
    exclude: Literal["template", "special", "none"] = "template"
    synonym_cosine: Annotated[float, Field(gt=0, le=1)] | None = None
    adapter_weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    dtype: Literal["float16", "float32"] = "float16"
    sketch_dim: PositiveInt = 8192
    sketch_width: PositiveInt | None = None
    shortlist: PositiveInt = 100


class ReduceConfig(Section):
    """How features become representers.

    `auto` follows docs/methods.md: a semivalue on generation is centred, unit-norm, ridge 0.1; on label words it is not
    centred, unit-norm, ridge by leave-one-out; on features that a preconditioner has whitened it is, for both, not
    centred, unit-norm, ridge 10; the gradient family takes raw features, ridge 0.1. `methods` are names of methods.py;
    semivalues share one sweep over q. `normalize` is to unit norm, of several adapters each one's part by itself.
    `ridge` is in units of the mean squared feature norm (below 1e-8 it is lost in rounding); `loo` chooses it by
    closed-form leave-one-out error. `form` is how semivalues are taken from the mean field: `pairs` is the most exact,
    `total_gradient` 2-5 times quicker, `streamed` holds no features, is linear in the examples and shared out over
    processes, `cavity` misses the sum rule; `auto` is pairs up to 2,048 examples, total_gradient up to 20,000 (or 16
    for each dimension, if that is more) and streamed beyond. `certificate_draws` random subsets (8 or more; 0 for none)
    measure the bias of the mean field. `iterations` is the most that influence_cg and influence_lissa take, each a pass
    over the features. `ensemble` is of features at several adapters: `kernel` adds their inner products before a
    curvature is formed, `members` gives each adapter a curvature of its own and takes the mean of their values. It is
    for the gradient family; semivalues, grad_dot and grad_cos take the kernel.
    """

    methods: tuple[Method, ...] = METHODS
    ridge: Annotated[float, Field(ge=1e-8, le=1e8)] | Literal["auto", "loo"] = "auto"
    center: bool | Literal["auto"] = "auto"
    normalize: bool | Literal["auto"] = "auto"
    response: Literal["auto", "labels", "unit", "residual"] = "auto"
    form: Literal["auto", "pairs", "total_gradient", "streamed", "cavity"] = "auto"
    sum_rule_tolerance: float = Field(1e-3, gt=0)
    certificate_draws: int = Field(32, ge=0)
    iterations: PositiveInt = 200
    ensemble: Literal["kernel", "members"] = "kernel"
    dtype: Literal["float16", "float32"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _freeshap_is_of_values(cls, tree: Any) -> Any:
        named = (tree.get("method"), tree.get("methods")) if isinstance(tree, Mapping) else ()
        if any(value == "freeshap" or (isinstance(value, list | tuple) and "freeshap" in value) for value in named):
            raise ValueError(
                "freeshap values examples over a validation set and has no representers: "
                "set values.method=freeshap and values.data, and run `llmattrib values`"
            )
        return tree

    @model_validator(mode="after")
    def _has_methods(self) -> "ReduceConfig":
        if not self.methods:
            raise ValueError("methods is empty")
        twice = sorted({name for name in self.methods if self.methods.count(name) > 1})
        if twice:
            raise ValueError(f"methods names {', '.join(twice)} twice")
        if 0 < self.certificate_draws < 8:
            raise ValueError("certificate_draws is below 8; take 16 to 64, or 0 for no certificate")
        return self


class IndexConfig(Section):
    """The faiss index over representers: exact `flat`, or approximate `scan`, `hnsw` and `ivfpq`.

    `auto` is flat below 100,000 examples and scan from there on. `scan` and `ivfpq` read short codes and then the
    vectors of the `candidates` best, or of 20 a hit if these are more; codes leave out no more than `tail` of the mean
    squared value. The kinds side by side: docs/architecture.md.
    """

    kind: Literal["auto", "flat", "scan", "hnsw", "ivfpq"] = "auto"
    candidates: PositiveInt = 4000
    tail: float = Field(0.01, ge=0, lt=1)
    hnsw_neighbors: PositiveInt = 32
    hnsw_ef_construction: PositiveInt = 80
    hnsw_ef_search: PositiveInt = 2048
    ivf_lists: PositiveInt = 256
    ivf_probes: PositiveInt = 256
    pq_subquantizers: PositiveInt = 128


class QueryConfig(Section):
    """Defaults of a query."""

    method: Method = "shapley"
    top: PositiveInt = 10
    max_new_tokens: PositiveInt = 48


class ValuesConfig(Section):
    """Data values of the training examples over a validation set: what `llmattrib values` computes.

    `data` is a file or data set (then its `split`) with the fields, templates and label words of the data section;
    `limit` takes its first examples. `method` is one of reduce's, from stored representers; `permutation`, `subset`,
    `one_sample`, `msr_banzhaf` and `ame_lasso` sample the kernel game of reduce's settings; `knn_shapley` and
    `freeshap` play games of their own (docs/methods.md section 7).
    `game` is the kernel game, or `retraining`: `ame_lasso` and `msr_banzhaf` then read the sub-models of `llmattrib
    retrain`, whose utility is the mean log-odds of the right answers, and need no features.
    `utility`, a mean over prompts, is the kernel game's `prediction` for the right answer (`auto`), or with label words
    `log_likelihood` (`auto` of freeshap) or `accuracy`; values from representers and `subset` are of predictions.
    `num_samples` are random subsets: draws that certify the signs of a semivalue (0 for none), and rows of the table.
    `tolerance` stops a permutation at that part of the utility's range (`auto`: freeshap 0.05, permutation never).
    `confidence` is of each interval; `ame_lasso` selects by knockoffs at `false_discovery_rate`.
    """

    data: Place | None = None
    split: str = "validation"
    limit: PositiveInt | None = None
    method: ValuesMethod = "shapley"
    game: Literal["kernel", "retraining"] = "kernel"
    utility: Literal["auto", "prediction", "log_likelihood", "accuracy"] = "auto"
    num_samples: int = Field(256, ge=0)
    num_permutations: int = Field(200, gt=0, multiple_of=2)
    tolerance: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] | None = "auto"
    confidence: float = Field(0.95, gt=0, lt=1)
    ame_design: Literal["attribution", "shapley"] = "attribution"
    false_discovery_rate: float = Field(0.1, gt=0, lt=1)
    knn_neighbors: PositiveInt = 5
    knn_label: Literal["hard", "soft"] = "soft"
    freeshap_kernels: Literal["single", "per_class"] = "single"
    freeshap_ridge: float = Field(1e-6, ge=1e-12)


class RetrainingConfig(Section):
    """Sub-models, each a fine-tune on a random subset of the examples: what `llmattrib retrain` makes.

    Each answers the prompts of `values.data`. `design` is how subsets are drawn: `banzhaf` keeps an example with
    probability 1/2, `attribution` and `shapley` are those of AME, `leave_out` leaves one example out at a time. Each
    subset is trained with seeds `seed`, `seed` + 1, ...: `num_seeds` of them.
    `warm_start` begins every fine-tune at the adapter of the run instead of a fresh one. `shard_size` subsets are
    saved together: what a killed job loses.
    """

    design: Literal["banzhaf", "attribution", "shapley", "leave_out"] = "banzhaf"
    num_subsets: PositiveInt = 200
    num_seeds: PositiveInt = 1
    warm_start: bool = False
    shard_size: PositiveInt = 4


class EvaluateConfig(Section):
    """What `llmattrib evaluate` measures, and with how much work (docs/methods.md section 10).

    `curves` are retrained with the examples ranked highest or lowest removed, or kept alone, at `fractions` of the
    data; `num_seeds` fine-tunes each, beside `num_random` random rankings. The ranking is by the mean over prompts;
    each of the first `curve_prompts` prompts also gets the curves of a ranking of its own.
    `source` is a column of `values.data` that names the id of the example which taught an answer (null: none did);
    recall is counted at `recall_at`. `mislabeled` is a file with the ids of wrongly labelled examples, one a line;
    `mislabeled_column` instead a column of `data.train` that is true for them.
    `sign_resamples` random halves of the examples are reduced again. `tail_patch_top` examples of each prompt and
    method take one gradient step of `tail_patch_rate`. Intervals are by `num_resamples` bootstrap samples.
    """

    curves: tuple[CurveKind, ...] = ("remove_highest", "remove_lowest", "keep_highest")
    fractions: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (
        0.01,
        0.02,
        0.05,
        0.1,
        0.2,
        0.4,
    )
    curve_prompts: int = Field(0, ge=0)
    num_seeds: PositiveInt = 1
    num_random: PositiveInt = 2
    source: str | None = None
    recall_at: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 5, 10)
    mislabeled: Place | None = None
    mislabeled_column: str | None = None
    sign_resamples: PositiveInt = 10
    tail_patch_top: PositiveInt = 5
    tail_patch_rate: float = Field(0.1, gt=0)
    num_resamples: PositiveInt = 1000

    @model_validator(mode="after")
    def _one_list_of_mislabeled(self) -> "EvaluateConfig":
        if self.mislabeled is not None and self.mislabeled_column is not None:
            raise ValueError("mislabeled and mislabeled_column both say which labels are wrong; give one")
        return self


class GoldConfig(Section):
    """Further training of the final model, by which `llmattrib evaluate gold` judges methods.

    After each number of `steps`, T, the prompts of `values.data` are asked. `sgd` has no momentum; `weight_decay` of it
    is a ridge, which leaving out does not touch. A step takes `batch_size` examples, all of them when null, in an order
    of the seeds `seed`, `seed` + 1, ...: `num_seeds` of them. `num_examples` are left out one after another, in random
    order, all when null. `shard_size` of them are trained at once and saved together.
    Differences lie near the floor of float32: `dtype` float64 widens the whole model where it fits.
    """

    steps: tuple[PositiveInt, ...] = (1, 4, 16, 64)
    learning_rate: float = Field(0.01, gt=0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = Field(0.0, ge=0)
    batch_size: PositiveInt | None = 8
    num_examples: PositiveInt | None = None
    num_seeds: PositiveInt = 10
    shard_size: PositiveInt = 8
    dtype: Literal["float32", "float64"] = "float64"

    @field_validator("steps")
    @classmethod
    def _steps_rise(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if not steps or list(steps) != sorted(set(steps)):
            raise ValueError("steps are not rising numbers")
        return steps


class PlanConfig(Section):
    """What `llmattrib plan` assumes where it cannot look.

    `architecture` is a config.json that stands for a model which is not here. `num_examples`, `tokens_per_example`
    (prompt and completion, mean) and `completion_tokens` (a quarter of them when null) stand for data that is not
    here. `efficiency` is the assumed share of a device's peak FLOP/s.
    """

    architecture: Place | None = None
    num_examples: PositiveInt | None = None
    tokens_per_example: PositiveInt | None = None
    completion_tokens: PositiveInt | None = None
    num_gpus: PositiveInt = 8
    efficiency: float = Field(0.35, gt=0, le=1)


class SlurmConfig(Section):
    """How `llmattrib submit` asks Slurm for the jobs of a run; its options replace these.

    `gpus_per_node` is one process each; 0 is for nodes without GPUs, one process a node with `cpus_per_task` threads.
    With `array` above 1, build is so many jobs of `nodes` nodes each, which share the shards and start when they can.
    `launch` is the file of launch/ that build has on GPUs. `reduce` has `reduce_nodes` nodes, one process each.
    `time`, as sbatch takes it, has quotes in YAML ("4:00:00" would be a number without). `sbatch` are more options of
    sbatch for every job; `setup` are shell commands that each job begins with, to load modules or an environment.
    """

    nodes: PositiveInt = 1
    array: PositiveInt = 1
    gpus_per_node: int = Field(1, ge=0)
    launch: Literal["multi_gpu", "zero3", "fsdp2"] = "multi_gpu"
    reduce_nodes: PositiveInt = 1
    cpus_per_task: PositiveInt | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    sbatch: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
