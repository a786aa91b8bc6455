"""The sections of a configuration: every key with its meaning, range and default. The defaults are the demo job."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# TOML has no null: a nullable number is switched off with the word "none".
OrNone = BeforeValidator(lambda value: None if value == "none" else value)
# norm = 2 is meant as norm = "2".
AsText = BeforeValidator(lambda value: f"{value:g}" if isinstance(value, int | float) else value)

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    # strict: "12" is no number and true is no 1, as TOML itself has it.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @property
    def nothing_is_said(self) -> frozenset[str]:
        """Keys whose "none" must be written out, since leaving them out means something else."""
        return frozenset()


DEMO_LIMITS = {"max_train": 3200, "max_test": 400}  # so that the demo takes minutes on two cores


class Data(Section):
    """What is classified: a labelled data set and how it is cut into training and test samples."""

    source: Text = Field(
        default="demo",
        description='"demo", a file (jsonl, csv, tsv, parquet), a folder with train.* and test.*, "hub:NAME"',
    )
    text: Text = Field(default="text", description="column with the text; the usual names of benchmarks are found too")
    pair: Text | None = Field(default=None, description="column with a second text, for tasks on pairs of sentences")
    label: Text = Field(default="label", description="column with the class")
    key: Text | None = Field(
        default=None,
        description='column that says whose sample it is, for partition.scheme = "key"; the demo\'s: the film',
    )
    test: Text | None = Field(
        default=None, description="file or split to test on; unset: the source's, or a share of it"
    )
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(default=0.2, description="that share")
    max_train: Annotated[Count | None, OrNone] = Field(
        default=None, description="use at most so many training samples; unset: all (of the demo 3200)"
    )
    max_test: Annotated[Count | None, OrNone] = Field(
        default=None, description="use at most so many test samples; unset: all (of the demo 400)"
    )
    max_tokens: Annotated[int, Field(ge=2)] = Field(default=64, description="cut a sample after so many tokens")

    @model_validator(mode="before")
    @classmethod
    def _limit_the_demo(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("source", "demo") == "demo":
            return {**DEMO_LIMITS, **table}
        return table

    @property
    def nothing_is_said(self) -> frozenset[str]:
        return frozenset(DEMO_LIMITS) if self.source == "demo" else frozenset()


class Model(Section):
    """The frozen base model and the LoRA adapter on it."""

    source: Text = Field(default="demo", description='"demo", a folder, a .gguf file or "hub:NAME"')
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the base model; the adapter is float32"
    )
    rank: Count = Field(default=8, description="r of LoRA")
    alpha: Annotated[float, Field(gt=0.0, le=1e6)] = Field(
        default=16.0, description="LoRA is scaled by alpha / rank (alpha / √rank with rslora)"
    )
    dropout: BelowOne = Field(default=0.0, description="dropout on LoRA's input")
    rslora: bool = Field(default=False, description="rank-stabilised scaling")
    targets: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None, description="names of the linear modules that carry LoRA; unset: query and value of every block"
    )
    attn: Literal["eager", "sdpa"] | None = Field(
        default=None, description='attention, "eager" or "sdpa"; unset: what transformers chooses'
    )


class Partition(Section):
    """How the samples lie on the devices."""

    scheme: Literal["label", "iid", "key"] = Field(
        default="label",
        description="label: skewed classes, Dirichlet(alpha); iid: at random; key: by the column data.key",
    )
    devices: Count = Field(default=20, description="K, the number of simulated devices")
    alpha: Positive = Field(
        default=1.0, description="Dirichlet concentration of the classes: the smaller, the more skewed"
    )
    size_alpha: Annotated[Positive | None, OrNone] = Field(
        default=5.0, description='Dirichlet concentration of the devices\' sizes; "none": equal sizes'
    )
    min_size: Count = Field(default=8, description="no device has fewer training samples")


class Train(Section):
    """Rounds, and what a drawn device does in one."""

    rounds: Count = Field(default=14, description="T")
    per_round: Count = Field(default=5, description="S, devices drawn in a round")
    epochs: Count = Field(default=1, description="E, passes of a device over its share of the data")
    batch_size: Count = Field(default=8, description="samples in a batch")
    optimizer: Literal["adamw", "sgd"] = Field(
        default="adamw", description="local optimizer; masked rows stand still in both"
    )
    lr: Positive = Field(default=4e-3, description="learning rate, of round 1 where it decays")
    lr_decay: Literal["linear", "none"] = Field(
        default="linear", description="linear: lr·(T − t + 1)/T in round t, so that the last devices drawn sway less"
    )
    weight_decay: NotNegative = Field(default=0.0, description="decoupled for adamw, added to the gradient for sgd")
    betas: tuple[BelowOne, BelowOne] = Field(default=(0.9, 0.999), strict=False, description="of adamw")
    momentum: BelowOne = Field(default=0.0, description="of sgd")
    max_grad_norm: Annotated[Positive | None, OrNone] = Field(
        default=None, description="clip the updated rows' gradients to this norm"
    )
    loraplus_lr_ratio: Positive = Field(default=1.0, description="LoRA+: LoRA B matrices learn at lr times this")
    group_by_length: bool = Field(
        default=True, description="samples of like length share a batch: less padding (when shuffled)"
    )
    shuffle: bool = Field(
        default=True, description="shuffle inside the curriculum's share; false: keep the order of difficulty"
    )


class Curriculum(Section):
    """Which share of its samples a device trains on, and in which order they come in."""

    enabled: bool = Field(default=True, description="false: all data in every round, nothing is scored for order")
    order: Literal["easy_first", "hard_first", "random"] = Field(
        default="easy_first", description="by Fisher score of a sample"
    )
    stratified: bool = Field(
        default=True,
        description="order inside every class, so that the share keeps the label mix; false: the paper's",
    )
    pacing: Literal["linear", "sqrt", "root_p", "quadratic", "exponential", "log", "step", "geometric", "none"] = Field(
        default="linear", description="how the share grows with the rounds; the paper's is linear"
    )
    start: Share = Field(default=0.5, description="β, share of the data in round 1")
    end: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.6, description="α, share of the rounds after which all data is used"
    )
    p: Positive = Field(default=2.0, description='the root of pacing = "root_p"')
    steps: Count = Field(default=4, description='the number of steps of pacing = "step"')
    labels: Literal["data", "model"] = Field(
        default="data", description="score with the data's labels or labels drawn by the model"
    )
    lazy: bool = Field(
        default=True, description="score a device when it is first drawn; false: all devices before round 1"
    )
    live: bool = Field(
        default=False, description="refresh order and masks at every participation from the training gradients"
    )


class Gal(Section):
    """Global aggregation layers: the layers that travel."""

    count: Annotated[Count | None, OrNone] = Field(default=None, description="this many layers, instead of fraction")
    fraction: Annotated[Share | None, OrNone] = Field(
        default=0.5, description='this share of the layers; "none", and no count: the lossless rule decides'
    )
    spectrum: bool = Field(
        default=True, description="record what the lossless rule says also where count or fraction decides"
    )
    default_share: Share = Field(default=0.5, description="share taken where the lossless rule finds no gap")
    selection: Literal["sensitive", "all", "random", "first", "last"] = Field(
        default="sensitive",
        description="which layers: the most sensitive ones, every one, or a plain choice to compare with",
    )
    norm: Annotated[Literal["2", "inf"], AsText] = Field(
        default="2", description="p of the p-norm that bounds the noise on the embeddings"
    )
    gamma: Annotated[float, Field(gt=0.0, le=1e6)] = Field(
        default=0.01, description="γ, the bound of that noise on a whole sample, in units of the embeddings"
    )
    sensitivity_batch: Count = Field(default=16, description="samples of a device that its sensitivities are taken on")
    lanczos_steps: Count = Field(default=8, description="Lanczos steps for the Hessian's spectrum (thorough: 10)")
    lanczos_devices: Count = Field(default=2, description="devices asked for their spectrum (thorough: 5)")
    lanczos_batch: Count = Field(default=16, description="samples of each in that one batch (thorough: 32)")

    @model_validator(mode="before")
    @classmethod
    def _count_before_default(cls, table: Any) -> Any:
        """A count alone is meant instead of the default fraction; both given is refused below."""
        if isinstance(table, dict) and table.get("count") not in (None, "none") and "fraction" not in table:
            return {**table, "fraction": None}
        return table

    @model_validator(mode="after")
    def _one_number(self) -> Self:
        if self.count is not None and self.fraction is not None:
            raise ValueError(
                f"count = {self.count} and fraction = {self.fraction} exclude one another: give one of them"
            )
        return self


class Neurons(Section):
    """Rows of the local layers (those outside the GAL) that are updated."""

    share: Share = Field(default=0.5, description="ρ, share of a local layer's rows that is active")
    rule: Literal["share", "lossless"] = Field(
        default="share", description="that share, or the lossless rule in every layer"
    )
    momentum: BelowOne = Field(default=0.9, description="γ of the smoothed Fisher diagonal, F ← γ F + (1 − γ) F̃")
    selection: Literal["fisher", "random", "all", "none"] = Field(
        default="fisher", description="by Fisher information; random, all or none to compare with"
    )


class Wire(Section):
    """What travels between devices and server, and the modelled link."""

    dtype: Literal["float32", "bfloat16", "float16", "int8", "int4"] = Field(
        default="float32", description="of the values that devices send"
    )
    down_dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = Field(
        default=None, description="of those that the server sends; unset: the devices', float32 where theirs is int4"
    )
    delta: bool = Field(default=False, description="devices send differences to what they received")
    error_feedback: bool = Field(
        default=False, description="with delta: a device adds what its last message lost to its next one"
    )
    up_mbit: Positive = Field(default=20.0, description="modelled upload of a device, Mbit/s")
    down_mbit: Positive = Field(default=100.0, description="modelled download of a device, Mbit/s")
    latency_ms: NotNegative = Field(default=50.0, description="modelled latency of a message, ms")

    @property
    def down(self) -> Literal["float32", "bfloat16", "float16", "int8"]:
        """The dtype of what the server sends."""
        return self.down_dtype or ("float32" if self.dtype == "int4" else self.dtype)

    @model_validator(mode="after")
    def _feedback_is_for_differences(self) -> Self:
        if self.error_feedback and not self.delta:
            raise ValueError("error_feedback is for differences: set delta = true with it")
        return self


class Eval(Section):
    """When and what is tested."""

    every: Count = Field(default=1, description="test after every so many rounds, and after the last")
    personal: bool = Field(default=True, description="also test every device's own model on its own test split")
    batch_size: Count = Field(default=64, description="samples in a test batch")
