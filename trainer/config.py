"""The configuration tree of a training run. One source for each number: DeepSpeed JSON keeps "auto" for
everything named here."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from data_shards import settings as s

# tracking.also → the packages of which one has to be there
ALSO = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}

Positive = Annotated[int, Gt(0), Lt(1 << 31)]  # sizes and counts; larger ones overflow in torch
NonNegative = Annotated[int, Ge(0), Lt(1 << 31)]
Seed = Annotated[int, Ge(0), Lt(1 << 63)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Share = Annotated[float, Ge(0), Le(1)]


@s.settings
class DataConfig:
    dir: str = ""
    """prepared folder (made by gensr prepare), or where one lies: http(s)://…, s3://…, or pipe:COMMAND with
    {} for a file's name (data_shards/README.md)"""
    cache_dir: str = ""
    """folder of each node where files of data.dir are kept: fetched once, checked, shared by processes and
    jobs. Empty: a URL's shards are streamed"""
    history_max: Positive = 20
    """history items fed to the model, newest kept; at most what the folder holds"""
    history_tokens: Positive = 10
    """text tokens of a history item"""
    item_tokens: Positive = 32
    """text tokens of a candidate; a folder that stores fewer of them gives those"""
    num_negatives: Positive = 4
    """sampled negatives for each training event"""
    negatives: Literal["uniform", "popularity", "impressions", "mixture"] = "uniform"
    """where training negatives come from; impressions (shown, not clicked) falls back to uniform where an
    event has too few; mixture: see below"""
    popularity_alpha: NonNegativeFloat = 0.75
    """exponent of the click count when negatives=popularity, or in a mixture"""
    mixture_popularity: Share = 0.25
    """share drawn by popularity when negatives=mixture; what the two shares leave is uniform"""
    mixture_impressions: Share = 0.25
    """share of unclicked impressions when negatives=mixture, as far as an event has them"""
    search_share: Fraction = 0.0
    """share of search events in every batch, such as 0.5; 0 keeps the log's own mixture. The task that falls
    short begins again before the epoch ends"""
    weight_rec: NonNegativeFloat = 1.0
    """weight of recommendation events in the loss"""
    weight_src: NonNegativeFloat = 1.0
    """weight of search events in the loss"""
    num_workers: NonNegative = 0
    """loader processes of each rank; 0 reads in a thread, which is enough for one GPU"""
    on_bad_shard: Literal["error", "skip"] = "error"
    """what a truncated or corrupt shard does"""


@s.settings
class ModelSettings:
    """Settings that every model has; each model's own class follows its file (trainer/models/zoo.py)."""

    name: str = "gensr"
    """which model to train (`gensr config keys NAME` lists its settings)"""

    def describe(self) -> str:
        """What banners and model cards say."""
        return self.name


@s.settings
class CfSettings(ModelSettings):
    """Settings of a model that reads CF vectors while it is trained."""

    cf_holdout: Literal["auto", "none", "last", "crossfit"] = "auto"
    """which table of cf/ training events read; auto takes what `gensr cf` made"""


@s.settings
class OptimConfig:
    lr: PositiveFloat = 1e-3
    """peak learning rate"""
    weight_decay: NonNegativeFloat = 1e-3
    """on matrices only"""
    beta2: Annotated[float, Gt(0), Lt(1)] = 0.999
    """AdamW's second-moment decay"""
    warmup_steps: NonNegative = 200
    """steps of linear warm-up, then linear decay to zero at the last step"""
    grad_clip: PositiveFloat = 1.0
    """maximum gradient norm"""
    sparse_rows: NonNegative = 0
    """item and user tables of at least so many rows: a step sends and updates only the rows that it has read
    (lazy Adam, docs/clusters.md); 0 = none. Not for a loss that scores every item"""
    global_batch_size: Positive = 64
    """events of one optimizer step over all ranks; each brings 1 + num_negatives candidates. A loss that
    compares events (GenSR's Eq. 10) sees those of one micro-batch, or of one on each rank"""
    micro_batch_size: Positive = 32
    """events of one forward pass on one rank; accumulation steps are derived and printed. A preset's value is
    the largest that is used: it is lowered where it does not divide a rank's share of the global batch"""
    preset_micro_batch_size: NonNegative = 0
    """written by the trainer: the preset's micro_batch_size, where it was lowered; 0 = it was not"""


@s.settings
class RunConfig:
    dir: str = ""
    """run folder; created, never overwritten"""
    seed: Seed = 0
    """seeds weights, dropout, data order and negatives"""
    init_from: str = ""
    """run folder whose weights a new run begins with, where name and shape are equal: the second stage of a
    method, or another data set; of one that goes on from the run's, tables take the rows that they had"""
    max_epochs: NonNegativeFloat = 1.0
    """passes over the training events; 0 (and max_steps=0) trains nothing: the model as it begins, measured
    and saved, with init_from another run's on this folder"""
    max_steps: NonNegative = 0
    """optimizer steps; 0 derives them from max_epochs"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """compute precision; scores, losses and softmaxes over candidates stay fp32"""
    log_every_steps: Positive = 20
    """losses leave the device this often"""
    validate_every_steps: NonNegative = 0
    """0 = five times over the run"""
    valid_events: NonNegative = 2000
    """validation events used during training (a fixed hashed sample); 0 = all"""
    eval_batch_size: Positive = 16
    """events scored at once in evaluation, each with all its candidates"""
    checkpoint_every_steps: NonNegative = 0
    """0 = at every validation"""
    keep_checkpoints: Positive = 2
    """newest checkpoints kept beside the best"""
    early_stop_patience: NonNegative = 5
    """validations without gain before stopping, counted from the first gain over chance; 0 = never stop early
    """
    select_metric: str = "mean/ndcg@10"
    """validation metric that picks the best checkpoint: rec/…, src/… or mean/… with recall@K, ndcg@K or mrr
    """
    timeout_s: Positive = 1800
    """a collective, or a step of several processes, that takes longer ends the job"""
    on_nan: Literal["stop", "skip"] = "stop"
    """a loss that is not finite: stop and name its events, or leave its micro-batch out on all ranks (steps
    then wait for every loss)"""
    accept_changes: str = ""
    """with --resume auto: comma-separated settings that may differ from the checkpoint's; data and cf stand
    for the prepared folder and its CF table"""
    max_skipped_batches: Positive = 10
    """left out in a row by on_nan=skip; one more ends the run"""
    threads: NonNegative = 0
    """CPU threads of each process; 0 shares the cores out"""


@s.settings
class TrackingConfig:
    enabled: bool = True
    """write runs to MLflow"""
    also: str = ""
    """where else: tensorboard (RUN/tensorboard), wandb, or both with a comma between; each is a package of
    its own"""
    uri: str = ""
    """MLflow tracking URI; empty = sqlite file mlflow.db beside the run folders"""
    experiment: str = "gensr"
    """MLflow experiment"""
    run_name: str = ""
    """empty = the run folder's name"""
    machine_every_s: NonNegative = 10
    """seconds between two measurements of processors, memory, disk, network and GPUs on every node; 0 = none
    """


@s.settings
class ServingConfig:
    retriever: str = ""
    """run folder of another model, trained on the same prepared folder, whose best items of the catalogue
    are ranked beside those of the model's own indexes; empty: its own only (docs/retrieval.md)"""


@s.settings
class Config:
    data: DataConfig = DataConfig()
    model: ModelSettings = ModelSettings()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
    tracking: TrackingConfig = TrackingConfig()
    serving: ServingConfig = ServingConfig()


@s.settings
class CfConfig:
    dim: Positive = 64
    """d_c, width of the table"""
    layers: Positive = 2
    """propagation layers"""
    lr: PositiveFloat = 5e-3
    """Adam's learning rate"""
    reg: NonNegativeFloat = 1e-2
    """L2 weight on the layer-0 vectors of a batch"""
    batch_size: NonNegative = 0
    """clicks of one step; 0 = a choice by graph size"""
    max_epochs: Positive = 200
    """passes over the clicks"""
    patience: Positive = 5
    """evaluations on validation without gain before stopping"""
    holdout: Literal["none", "last", "crossfit"] = "crossfit"
    """training clicks kept out of the table that training reads: none, each user's last, or cross-fitting by
    folds"""
    num_folds: Annotated[int, Ge(2), Le(16)] = 4
    """folds when holdout=crossfit"""
    shared_epochs: Fraction = 0.0
    """share of the epochs that the tables of two folds train as one, without the clicks of either; 0 = each
    from scratch"""
    seed: Seed = 0
    """seeds initial vectors, sampling and folds"""
    onto: str = ""
    """prepared folder that this one goes on from (gensr prepare --append): the table is rotated into the
    space of the table there, so that a model trained there can read it. No score changes"""


@s.settings
class CfRoot:
    cf: CfConfig = CfConfig()
    overwrite: bool = False
    """replace an existing table of other settings or of another split"""
    save_every_s: NonNegativeFloat = 300.0
    """seconds between two saved states of a table in training, from which an interrupted `gensr cf` resumes
    """
