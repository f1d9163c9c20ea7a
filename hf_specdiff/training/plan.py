"""The settings of a training run, each told once: its default, what it means, what it may be, and how the command calls it.

The docstring, the options of `hf-specdiff train` and the refusals of both are made of that.
"""

from dataclasses import Field
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields

from hf_specdiff.core.configuration_specdiff import SIZES
from hf_specdiff.training.heads import HEADS
from hf_specdiff.training.losses import DISTILLATION
from hf_specdiff.training.losses import LOSSES
from hf_specdiff.training.settings import about
from hf_specdiff.training.settings import at_least
from hf_specdiff.training.settings import between
from hf_specdiff.training.settings import check_setting
from hf_specdiff.training.settings import docstring_line
from hf_specdiff.training.settings import one_of
from hf_specdiff.training.settings import positive
from hf_specdiff.training.settings import weights_of

MOST_SEED = 2**32 - 1  # numpy's
DRAFTER, TEXT, LEARNING, EVALUATION = "The drafter", "The text", "Learning", "Evaluation and checkpoints"


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Everything that decides what a training run ends in."""

    target_layer_ids: list[int] | None = field(
        metadata=about(
            "layers of the target to read, 0-based; `None` for a drafter that reads the text alone",
            DRAFTER,
            without_option="--conditioning and --num-target-layers tell it, as far as the target has layers",
        )
    )
    num_layers: int = field(
        default=3, metadata=about("layers of the drafter", DRAFTER, at_least(1), otherwise="{default}, or those of --init")
    )
    block_size: int = field(
        default=16,
        metadata=about(
            "slots of a window: the last token and masks", DRAFTER, at_least(2), otherwise="{default}, or those of --init"
        ),
    )
    max_length: int = field(default=512, metadata=about("tokens of a training sequence", TEXT, at_least(4)))
    num_epochs: float = field(default=4, metadata=about("passes over the sequences", LEARNING, positive()))
    batch_size: int = field(default=16, metadata=about("sequences of a step", LEARNING, at_least(1)))
    num_anchors: int = field(default=8, metadata=about("windows of a sequence and step", LEARNING, at_least(1)))
    learning_rate: float = field(default=1e-3, metadata=about("peak of the cosine schedule", LEARNING, positive()))
    loss_weights: dict[str, float] = field(
        default_factory=lambda: {"decayed_ce": 1.0},
        metadata=about("objectives and their weights", LEARNING, weights_of(*LOSSES), option="--loss"),
    )
    loss_decay: float = field(
        default=7.0,
        metadata=about(
            "positions after which a position's weight in `decayed_ce` and `focal` has fallen by e", LEARNING, positive()
        ),
    )
    context_weight: float = field(
        default=0.0,
        metadata=about(
            "for drafters that read the text alone: weight of next-token prediction on the context; what a window reads before "
            "it is then learnt from every token",
            LEARNING,
            at_least(0),
        ),
    )
    seed: int = field(default=0, metadata=about("of weights, order and windows", LEARNING, between(0, MOST_SEED)))
    bf16: bool = field(
        default=True,
        metadata=about("compute in bfloat16; weights stay in float32", LEARNING, option="--bf16/--float32"),
    )
    save_steps: int = field(
        default=250, metadata=about("steps between checkpoints, and between evaluations", EVALUATION, at_least(1))
    )
    num_eval_prompts: int = field(
        default=16,
        metadata=about(
            "prompts kept out of training, a tenth of all at most, and decoded with the real loop at every evaluation; the "
            "drafter with the most tokens per round is kept. 0: none, and the last one is kept",
            EVALUATION,
            at_least(0),
            option="--eval-prompts",
        ),
    )
    eval_tokens: int = field(default=64, metadata=about("tokens to write after each of these prompts", EVALUATION, at_least(2)))
    patience: int = field(
        default=0,
        metadata=about(
            "evaluations without a better one after which training stops; 0: it never does", EVALUATION, at_least(0)
        ),
    )
    temperature: float = field(
        default=0.0,
        metadata=about(
            "temperature at which the target continues the prompts; 0: greedily", TEXT, at_least(0), option="--regenerate-at"
        ),
    )
    as_is: bool = field(
        default=False, metadata=about("learn from the texts as they stand; the target continues none", TEXT, option="--as-is")
    )
    warmup: float = field(
        default=0.05, metadata=about("share of the steps until the peak of the learning rate", LEARNING, between(0, 0.99))
    )
    has_mask_embedding: bool = field(
        default=False,
        metadata=about(
            "for features: the mask is a vector of its own, as targets whose embedding is their head need it. Without it the "
            "drafter can be exported to other engines",
            DRAFTER,
            option="--mask-embedding/--no-mask-embedding",
            otherwise="what --init has, or where the target's embedding is its head",
        ),
    )
    draft_vocab_size: int | None = field(
        default=None,
        metadata=about(
            "for features: draft this many of the commonest tokens alone (what ends the target's text and special tokens "
            "that stand in it are among them), and read the head's rows of these alone",
            DRAFTER,
            at_least(2),
            option="--draft-vocab",
            otherwise="all, or those of --init",
        ),
    )
    head: str | None = field(
        default=None,
        metadata=about(
            "for features: a head that makes each position's law one that is given the token before it",
            DRAFTER,
            one_of(*HEADS),
            otherwise="none, or that of --init",
        ),
    )
    head_rank: int = field(
        default=64,
        metadata=about("rank of such a head", DRAFTER, between(1, SIZES["markov_rank"][1]), advice="Take 64, or 256."),
    )
    predicts_from_anchor: bool = field(
        default=False,
        metadata=about(
            "for features: the last token's slot predicts too, so that a block drafts one more; DeepSpec's layout asks for it",
            DRAFTER,
            option="--predicts-from-anchor/--predicts-from-masks",
            otherwise="from masks, or as --init does",
        ),
    )
    trained: str = field(
        default="all",
        metadata=about(
            "which weights learn; head: those of the drafter to go on from stay, but for its head's",
            LEARNING,
            one_of("all", "head"),
            option="--train",
        ),
    )
    from_target: bool = field(
        default=False,
        metadata=about("for features: begin with the target's last layers; saves steps", DRAFTER, option="--from-target"),
    )
    lora_rank: int | None = field(
        default=None,
        metadata=about(
            "of a diffusion language model: train an adapter of this rank, the weights stay; needs peft",
            LEARNING,
            at_least(1),
            advice="Take 32, or leave it out for all weights.",
            option="--lora",
            otherwise="all weights learn",
        ),
    )
    lora_layers: list[str] | None = field(
        default=None,
        metadata=about("linear layers that get one, q_proj for one", LEARNING, otherwise="all but the head"),
    )

    def __post_init__(self) -> None:
        """Check every setting by itself; what must go together is checked where it meets."""
        for each in fields(self):
            check_setting(each, getattr(self, each.name))

    @property
    def needs_law(self) -> bool:
        """Whether an objective reads the target's probabilities."""
        return not DISTILLATION.keys().isdisjoint(self.loss_weights)


FIELDS: dict[str, Field] = {each.name: each for each in fields(TrainingPlan)}
TrainingPlan.__doc__ = "\n".join(
    [
        f"{TrainingPlan.__doc__}\n\n    Attributes:",
        *map(docstring_line, FIELDS.values()),
        "\n    Raises:\n        TypeError: if a setting is nothing of its kind.",
        "        ValueError: if it is not what it must be.\n",
    ]
)
