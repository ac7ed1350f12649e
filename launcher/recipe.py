"""What was asked: the recipe, read from YAML, frozen, every field documented, unknown keys refused by name."""

import json
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationInfo,
    field_validator,
    model_validator,
)

TaskName = Literal[
    "text-classification",
    "token-classification",
    "question-answering",
    "translation",
    "causal-lm",
]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
ScheduleName = Literal["linear", "cosine", "constant"]
Batching = Literal["auto", "random", "bucketed", "packed"]
Operator = Literal["==", "!=", "<", "<=", ">", ">=", "in", "not in"]
# A number of samples, or a number of tokens: `16384 tokens`.
Tokens = Annotated[str, Field(pattern=r"^[1-9][0-9_]* tokens$")]
StageName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class Section(BaseModel):
    """A part of the recipe: frozen, closed, documented field by field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Model(Section):
    """Which weights to start from, and how to hold them."""

    path: str | None = None
    """A hub id, or a local directory with config.json and weights."""
    config: str | dict[str, Any] | None = None
    """Instead of `path`: a config (a file, a directory with config.json, or the keys themselves) to
    initialise at random from."""
    tokenizer: str | None = None
    """A hub id or a local directory. Default: the same as `path`."""
    revision: str | None = None
    """The hub revision of `path` (a branch, a tag or a commit)."""
    dtype: Dtype = "auto"
    """Precision of the weights in training. `auto`: bf16 on GPUs, fp16 on those older than Ampere, fp32 on CPUs."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """The attention implementation. `auto`: what transformers picks for the model."""
    compile: bool = False
    """Compile the trunk by torch.compile, under ZeRO-0 to 2: a step takes less time, the first one a minute or
    more (what was compiled is kept in torch's cache of the machine). Evaluation runs as it is."""
    trust_remote_code: str | None = None
    """Run the Python code that comes with a model: name the model here, exactly as in `path`, to
    allow it. Anything else is refused."""
    init_seed: int = 0
    """Seed of the random initialisation: of the weights for `config`, of the rows of `add_tokens`."""
    add_tokens: list[str] = []
    """Words to add to the tokenizer, each one token from then on; the embeddings grow by as many rows."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Model":
        if (self.path is None) == (self.config is None):
            raise ValueError("give either path (pretrained) or config (random initialisation)")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("config needs tokenizer, since there is no path to take it from")
        if self.trust_remote_code not in (None, self.path):
            raise ValueError(
                f'trust_remote_code is "{self.trust_remote_code}", but path is "{self.path}":'
                " to run a model's own code, name that model"
            )
        return self


class DataSet(Section):
    """One data set: files, and which of their rows."""

    path: str | list[str]
    """Files, directories or globs: Parquet, Arrow IPC, JSON lines, CSV, TSV (the text formats also .gz or
    .zst), or what `datasets` saved with `save_to_disk`; local or s3://, gs://, abfs://, hf://.
    `hub:NAME` loads a hub data set through `datasets`."""
    split: str | None = None
    """The split, where the data set has several by name."""
    config: str | None = None
    """The configuration of a hub data set."""
    columns: dict[str, str] | None = None
    """Instead of the `columns` of `data`."""
    filters: list[tuple[str, Operator, Any]] = []
    """Keep the rows for which all of these hold: `[column, operator, value]` each."""
    part: tuple[float, float] | None = None
    """Keep this part of the rows, chosen at random but always the same: `[0, 0.9]` and `[0.9, 1]`
    share no row."""
    weight: float = Field(default=1.0, gt=0)
    """Of several data sets: this one's share of the samples, relative to the others and whatever its
    size. At least a thousandth of all."""

    @model_validator(mode="after")
    def _part_is_an_interval(self) -> "DataSet":
        if self.part is not None and not 0 <= self.part[0] < self.part[1] <= 1:
            raise ValueError(f"part is {list(self.part)}: it must be [from, to] with 0 <= from < to <= 1")
        return self


class Data(Section):
    """Where the rows of a stage come from, and which columns mean what."""

    train: tuple[DataSet, ...] = Field(min_length=1, max_length=127)
    """What to train on: a path, a list of paths, one data set (`path`, `split`, `filters`, …), or a list
    of data sets, which are mixed by their weights."""
    eval: tuple[DataSet, ...] | None = Field(default=None, min_length=1, max_length=127)
    """What to evaluate on, written like `train`. Default: no evaluation."""
    eval_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Instead of `eval`: the part of train's rows to keep for evaluation."""
    columns: dict[str, str] = {}
    """The task's column: the files' column, e.g. `text: sentence`. Default: the same names."""
    labels: list[str] | None = None
    """text-classification, token-classification: the label names in order. Needed only when the files
    hold integers that should get names, or to fix an order. Default: the sorted labels of the train split."""
    label_type: Literal["single", "multiple", "number"] = "single"
    """text-classification: what the label column holds: one label, a list of labels (any number of them),
    or a number to be predicted (regression)."""
    prefix: str = ""
    """translation: put before every source text, e.g. `translate English to German: `."""
    format: Literal["auto", "messages", "instruction", "text"] = "auto"
    """causal-lm: what a row is. `auto`: decided by the columns that the files have."""
    chat_template: str | None = None
    """causal-lm: a named template (chatml, plain) or a Jinja file. Default: the tokenizer's own, or
    chatml if it has none."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """causal-lm: which tokens bear loss in chat and instruction data. Plain text: always all."""
    split_long: bool = False
    """causal-lm: cut what exceeds `max_length` into further samples, instead of leaving it out. Plain
    text is always cut so."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do about a row that cannot be read or used: stop with its place, or leave it out, list it
    in the token store's bad_rows.jsonl, and go on."""
    bad_row_limit: int = Field(default=1000, ge=0)
    """With `skip`: bad rows of one data set at which to stop all the same."""

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _as_data_sets(cls, value: Any) -> Any:
        if isinstance(value, str | dict):
            return [{"path": value} if isinstance(value, str) else value]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return [{"path": value}] if value else []
        if isinstance(value, list):
            return [{"path": item} if isinstance(item, str) else item for item in value]
        return value

    @model_validator(mode="after")
    def _one_evaluation(self) -> "Data":
        if self.eval is not None and self.eval_fraction is not None:
            raise ValueError("give either eval or eval_fraction")
        if self.eval_fraction is not None and any(data_set.part for data_set in self.train):
            raise ValueError("eval_fraction and a part of train do not go together: give eval a part too")
        return self

    @model_validator(mode="after")
    def _weights_can_be_kept(self) -> "Data":
        total = sum(data_set.weight for data_set in self.train)
        for data_set in self.train:
            if data_set.weight < total / 1000:
                raise ValueError(
                    f"a weight of {data_set.weight:g} among {total:g} is less than a thousandth:"
                    " give it more, or leave the data set out"
                )
        return self

    def data_sets(self, split: Literal["train", "eval"]) -> tuple[DataSet, ...]:
        """Return the data sets of a split; none where there is no evaluation."""
        if self.eval_fraction is None:
            return self.train if split == "train" else self.eval or ()
        part = (self.eval_fraction, 1.0) if split == "train" else (0.0, self.eval_fraction)
        return tuple(data_set.model_copy(update={"part": part}) for data_set in self.train)


class Head(Section):
    """What sits on the trunk, and what it starts from."""

    kind: Literal["linear", "crf"] = "linear"
    """token-classification: a linear layer, or one with a linear-chain CRF on top."""
    start: Literal["auto", "new", "keep", "match"] = "auto"
    """`new`: drawn at random. `keep`: the head that the stage starts with; its labels must be the same.
    `match`: new, but the rows of labels that the earlier head knows by name are taken over. `auto`: `keep`
    after a stage with the same task and labels, else `new`."""
    constrained: bool = False
    """crf: allow only the transitions that are valid in the tags' scheme (IOB2 or IOBES)."""
    learning_rate: float | None = Field(default=None, gt=0)
    """The head's own highest learning rate. Default: the stage's."""


class Lora(Section):
    """Low-rank adapters in place of the trunk's weights."""

    rank: int = Field(default=8, gt=0)
    """Rank of the update of each matrix."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapter."""
    modules: list[str] | None = None
    """Names of the modules to adapt, e.g. `q_proj`. Default: what peft adapts for the model's type."""
    export: Literal["merged", "adapter"] = "merged"
    """`merged`: one plain model. `adapter`: besides, the adapter alone, for peft, as `adapter/`."""


class Trainable(Section):
    """Which parameters move, and how fast."""

    last_layers: int | None = Field(default=None, ge=0)
    """Train only the last so many layers of the trunk, and the head; 0: the head only."""
    freeze: list[str] = []
    """Regular expressions: parameters whose name holds one do not move, e.g. `embeddings`."""
    unfreeze_every: int | None = Field(default=None, gt=0)
    """Gradual unfreezing: begin with the head, and let one more layer move, from the last to the first,
    every so many steps; the embeddings at the end."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Each layer's learning rate is this times that of the layer after it."""
    lora: Lora | None = None
    """Train low-rank adapters and the head; the trunk does not move."""

    @model_validator(mode="after")
    def _go_together(self) -> "Trainable":
        if self.lora is not None and (self.last_layers is not None or self.unfreeze_every is not None):
            raise ValueError("lora trains adapters only: leave last_layers and unfreeze_every out")
        return self


class Selection(Section):
    """Which evaluation's model to keep, and when to stop."""

    metric: str = "auto"
    """The metric that judges, e.g. `accuracy`. `auto`: the task's."""
    patience: int | None = Field(default=None, gt=0)
    """Stop after so many evaluations without a better one. Default: train to the end."""


class Generation(Section):
    """How answers are generated in evaluation and prediction."""

    max_new_tokens: int = Field(default=128, gt=0)
    """Tokens of an answer, at most."""
    beams: int = Field(default=1, gt=0)
    """Width of the beam search; 1: greedy."""
    rouge: bool = False
    """translation: also ROUGE-1, ROUGE-2 and ROUGE-L."""
    exact_match: bool = False
    """causal-lm: in evaluation generate the last answer of every conversation, and compare."""


class Answers(Section):
    """question-answering: how contexts are cut and answers chosen."""

    unanswerable: bool = False
    """Questions may have no answer in their context, as in SQuAD 2."""
    stride: int = Field(default=128, gt=0)
    """Tokens that a window of a long context shares with the one before."""
    longest: int = Field(default=30, gt=0)
    """Tokens of an answer, at most."""


class Stage(Section):
    """One fine-tuning pass: its task, data, schedule."""

    name: StageName
    """Unique in the recipe; names the stage's folder, e.g. `source`, `target`."""
    task: TaskName
    """How a row becomes features, a loss, a prediction and a metric."""
    data: Data
    """The stage's data sets."""
    weight: float = Field(default=1.0, gt=0)
    """Of this stage's loss in the sum, where the stages are trained jointly."""
    epochs: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Passes over the train split; may be a fraction. Ignored when `steps` is given. `auto`: 1, or with
    few samples as many as make 200 steps, at most 20 (of causal-lm and translation 3)."""
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps, instead of `epochs`."""
    global_batch: int | Tokens = 32
    """Samples behind one optimizer step, whatever the number of workers; packs of up to `max_length`
    tokens when `batching` is `packed`. Or tokens: `16384 tokens`."""
    micro_batch: int | Tokens | Literal["auto"] = "auto"
    """Samples (or packs) that one worker runs at a time, or tokens: `4096 tokens`. `auto`: as many
    tokens as 8 samples of `max_length` have."""
    batching: Batching = "auto"
    """Which samples make a batch. `random`: any. `bucketed`: samples of like length, sorted within 16
    steps. `packed` (causal-lm): several samples in one sequence, without attention between them.
    `auto`: `bucketed`; `random` when an epoch has fewer than 64 steps; `packed` on GPUs for causal-lm
    when `global_batch` is in tokens."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """The highest learning rate of the schedule."""
    schedule: ScheduleName = "linear"
    """How the learning rate falls after the warm-up: to 0 by the last step, or not at all."""
    warmup: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Steps over which the learning rate rises from 0: below 1 a fraction of all steps, else a number.
    `auto`: a tenth where `epochs: auto` makes several passes over few samples, else none."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on matrices only: biases and norms are left out."""
    activation_checkpointing: bool | Literal["auto", "selective"] = "auto"
    """Keep only each layer's input, and compute its activations again in the backward: a third more work
    for a fraction of the memory. `selective`: keep what matrix products and attention gave too, and compute only
    the cheap rest again. `auto`: only where `--ds auto` needs it to fit."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest norm of the whole gradient; 0 turns clipping off."""
    seed: int = 0
    """Of the order of samples, the new head and dropout."""
    max_length: int | Literal["auto"] = "auto"
    """Tokens per sample; longer ones are cut. `auto`: the model's limit, at most 512."""
    eval_every: int | None = Field(default=None, gt=0)
    """Steps between evaluations. Default: at the end of the stage only."""
    head: Head = Head()
    """The head: its settings, or one word for its kind (`crf`) or for what it starts from (`match`)."""
    trainable: Trainable = Trainable()
    """Which parameters move: settings, or `head` for the head only."""
    select: Selection | None = None
    """Keep the model of the best evaluation, not the last one; settings, or the name of a metric."""
    generation: Generation = Generation()
    """How answers are generated."""
    answers: Answers = Answers()
    """question-answering: how contexts are cut and answers chosen."""

    @field_validator("head", "trainable", "select", mode="before")
    @classmethod
    def _one_word(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        if info.field_name == "head":
            return {"kind" if value in ("linear", "crf") else "start": value}
        if info.field_name == "select":
            return {"metric": value}
        if value != "head":
            raise ValueError('write settings, or "head" for the head only')
        return {"last_layers": 0}

    @field_validator("global_batch", "micro_batch", mode="before")
    @classmethod
    def _samples_or_tokens(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "auto" and in_tokens(value) is None:
            raise ValueError('write a number of samples, or of tokens: "16384 tokens"')
        return value

    @model_validator(mode="after")
    def _micro_batch_positive(self) -> "Stage":
        for key in ("global_batch", "micro_batch", "max_length"):
            value = getattr(self, key)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{key} is {value}: it must be at least 1")
        if self.batching == "packed" and self.task != "causal-lm":
            raise ValueError(f"batching: packed is for causal-lm; {self.task} can be bucketed")
        if self.head.kind == "crf" and self.task != "token-classification":
            raise ValueError(f"head: crf is for token-classification, not {self.task}")
        if self.head.constrained and self.head.kind != "crf":
            raise ValueError("head.constrained needs head.kind: crf")
        if self.select and not (self.data.eval or self.data.eval_fraction):
            raise ValueError("select needs data.eval or data.eval_fraction, to judge by")
        return self

    def seen_by(self, data_set: DataSet) -> "Stage":
        """Return the stage with a data set's own columns, if it has some."""
        if data_set.columns is None:
            return self
        data = self.data.model_copy(update={"columns": data_set.columns})
        return self.model_copy(update={"data": data})


class Checkpoint(Section):
    """When to save what is needed to continue."""

    every_steps: int | None = Field(default=None, gt=0)
    """Steps between checkpoints."""
    every_minutes: float | None = Field(default=None, gt=0)
    """Minutes between checkpoints. Default: 15, if `every_steps` is not given either."""
    keep: int = Field(default=2, ge=2)
    """Checkpoints to keep of the stage in progress; never fewer than the last two."""


class Tracker(Section):
    """Where a run's record goes besides its own files. Passwords and tokens: only by the environment variables
    that the tracker's own library reads."""

    tags: dict[str, str] = {}
    """Words of your own to find the run by, e.g. `{team: search}`."""
    every_steps: int = Field(default=1, gt=0)
    """Send one step in so many. Evaluations, checkpoints and failures are always sent."""


class TensorBoard(Tracker):
    """Event files for TensorBoard, in the run directory or elsewhere."""

    kind: Literal["tensorboard"]
    """Names the tracker."""
    folder: str | None = None
    """A directory: the run gets one of its name in it. Default: `tensorboard` in the run directory."""


class MLflow(Tracker):
    """A run in MLflow."""

    kind: Literal["mlflow"]
    """Names the tracker."""
    uri: str | None = None
    """The tracking server (`https://…`), or a database (`sqlite:////shared/mlflow.db`). Default:
    MLFLOW_TRACKING_URI of the environment."""
    experiment: str = Field(default="launcher", min_length=1)
    """The experiment's name; it is made where there is none."""

    @field_validator("uri")
    @classmethod
    def _is_an_address(cls, uri: str | None) -> str | None:
        if uri is not None and "://" not in uri and uri != "databricks":
            raise ValueError("write a server (https://…) or a database (sqlite:////shared/mlflow.db)")
        if uri is not None and "@" in uri.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "leave name and password out: export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD,"
                " or for a database MLFLOW_TRACKING_URI"
            )
        return uri


class WandB(Tracker):
    """A run in Weights & Biases."""

    kind: Literal["wandb"]
    """Names the tracker."""
    project: str = Field(default="launcher", min_length=1)
    """The project's name."""
    entity: str | None = None
    """The team or user that it belongs to. Default: the one that WANDB_API_KEY belongs to."""
    group: str | None = None
    """Groups several runs in the page."""
    mode: Literal["online", "offline"] = "online"
    """`offline`: write into the run directory only, for `wandb sync` later."""


class Recipe(Section):
    """The description of a run."""

    model: Model
    """The model to start from."""
    stages: list[Stage] = Field(min_length=1)
    """The fine-tuning passes, in order: each starts with the weights that the one before ended with."""
    transfer: Literal["sequential", "joint"] = "sequential"
    """`sequential`: one stage after another. `joint`: all at once, in the steps of the last one: each step
    takes every stage's global batch, and minimises the sum of their losses by `weight`."""
    baseline: bool = False
    """Also train the last stage straight from the model, to tell what the stages before it gave."""
    checkpoint: Checkpoint = Checkpoint()
    """When to save."""
    max_failures: int = Field(default=3, ge=0)
    """Worker failures to survive before giving up; and as many hangs without a new step in between."""
    hang_minutes: Literal["auto"] | PositiveFloat = "auto"
    """Minutes without a step after which workers are taken to hang. `auto`: 20 usual steps, at least 2 minutes and
    at most 60; the first steps, loading, evaluating and saving have longer limits of their own."""
    spares: bool = True
    """Keep a process ready beside each worker, half a minute after the workers began: a restart then does not wait
    for imports. It takes about half a GB of the host's memory, and is left out where that is scarce."""
    on_oom: Literal["stop", "shrink"] = "stop"
    """When a worker runs out of memory: `stop`, or `shrink`: go on from the last checkpoint with half the
    micro-batch and the same global batch, again and again down to one sample."""
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """When a loss or a gradient is no finite number, or a loss is a `spike`: `stop` before the update; `skip`
    the update, and go on with the next batch; or `rollback`: go on from the last checkpoint, and past the
    batch. The samples are listed in bad_batches.jsonl of the run."""
    spike: Annotated[float, Field(gt=0)] | None = None
    """A loss so many deviations above the mean of the last 100 steps is treated like one that is no number.
    Default: none is; 6 to 10 is a good choice."""
    log_samples: bool = False
    """Write the ids of every step's samples into the run directory (an audit trail)."""
    trackers: tuple[Annotated[TensorBoard | MLflow | WandB, Field(discriminator="kind")], ...] = ()
    """Where the record goes besides the run directory: a list of `tensorboard`, `mlflow`, `wandb`, each by its name
    or with settings, e.g. `[tensorboard, {kind: mlflow, uri: https://mlflow.example.com}]`."""

    @field_validator("trackers", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        each = [value] if isinstance(value, str | dict) else value
        return (
            [{"kind": one} if isinstance(one, str) else one for one in each]
            if isinstance(each, list)
            else each
        )

    @model_validator(mode="after")
    def _stage_names_differ(self) -> "Recipe":
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have the same name: {', '.join(names)}")
        if self.baseline and len(self.stages) < 2:
            raise ValueError("baseline needs a stage before the last one to compare with")
        if self.transfer == "joint" and len(self.stages) < 2:
            raise ValueError("transfer: joint needs at least two stages")
        return self


_OF_THE_WAY = {
    "checkpoint",
    "max_failures",
    "hang_minutes",
    "spares",
    "on_oom",
    "on_nan",
    "spike",
    "log_samples",
    "trackers",
}
"""Keys that say how a run goes on, not to what end: they may change from one try to the next."""


def in_tokens(batch: int | str) -> int | None:
    """Return the tokens of `16384 tokens`; None where a batch is a number of samples, or auto."""
    number = batch.removesuffix(" tokens").replace("_", "") if isinstance(batch, str) else ""
    return int(number) if number.isdecimal() else None


def parse(tree: Any) -> Recipe:
    """Build a recipe from plain data that an earlier `dump` wrote."""
    return Recipe.model_validate(tree)


def dump(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain data: only what the user wrote, so that a default can still be told
    from a wish after `parse`."""
    return recipe.model_dump(mode="json", exclude_unset=True)


def reseeded(recipe: Recipe, number: int) -> Recipe:
    """Return the recipe for one of several runs that differ in nothing but chance."""
    stages = [stage.model_copy(update={"seed": stage.seed + number}) for stage in recipe.stages]
    model = recipe.model.model_copy(update={"init_seed": recipe.model.init_seed + number})
    return recipe.model_copy(update={"stages": stages, "model": model if number else recipe.model})


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML text."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def identity(recipe: Recipe) -> str:
    """Return as YAML text what makes a run another run: all but when it saves and how it meets failures."""
    tree = recipe.model_dump(mode="json", exclude=_OF_THE_WAY)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def schema() -> str:
    """Return the recipe's JSON schema as text."""
    return json.dumps(Recipe.model_json_schema(), indent=2)


def dump_stage(stage: Stage) -> dict[str, Any]:
    """Return one stage as plain data, like `dump`."""
    return stage.model_dump(mode="json", exclude_unset=True)
