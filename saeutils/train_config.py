"""What is trained and how: one frozen dataclass, checked when it is made."""

from dataclasses import dataclass

from saeutils.objectives import Penalty
from saeutils.sae import ARCHITECTURES

_OPTIONS = {
    "architecture": ARCHITECTURES,
    "input_scale": ("sqrt_d", "none"),
    "b_dec_init": ("mean", "median", "zero"),
    "decoder_init": ("random", "data"),
    "decoder_norm": ("folded", "unit", "free"),
    "encoder_init": ("tied", "random"),
    "revival": ("auxk", "ghost", "resample"),
    "encoder_dtype": ("float32", "bfloat16"),
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what is trained; saved beside the result.

    Raises: ValueError for values that contradict each other.
    """

    architecture: str = "topk"
    """topk, batchtopk, matryoshka, l1, jumprelu or gated; see `saeutils.objectives`."""
    d_sae: int = 4096
    """Number of latents."""
    k: int | float = 32
    """Latents a row (TopK), or on average (BatchTopK, Matryoshka)."""
    l1_coefficient: int | float = 0.0
    """λ of L1 and Gated, for rows of norm √d_in."""
    l0_coefficient: int | float = 0.0
    """λ of JumpReLU."""
    widths: tuple[int, ...] = ()
    """Matryoshka: nested widths, rising, the last one d_sae."""
    bandwidth: int | float = 0.5
    """JumpReLU: width of the rectangle that stands for the step's gradient."""
    threshold: int | float = 0.5
    """JumpReLU: start value."""

    steps: int = 3000
    batch_size: int = 1024
    """Rows a step, over all processes."""
    lr: int | float = 1e-3
    lr_warm_up_steps: int | None = None
    """Linear rise from 0; None: steps // 20."""
    lr_decay_steps: int | None = None
    """Linear fall to 0 at the end; None: steps // 5."""
    sparsity_warm_up_steps: int | None = None
    """Linear rise of l1/l0_coefficient; None: steps // 10."""
    betas: tuple[int | float, int | float] = (0.9, 0.999)
    """Adam's."""
    grad_clip: int | float | None = 1.0
    """Largest norm of the whole gradient, None for any. Early gradients are large,
    and Adam would remember them for 1/(1 − β₂) steps."""

    seed: int = 0
    """Of the start values."""
    data_seed: int = 0
    """Of the batch order."""
    input_scale: str = "sqrt_d"
    """sqrt_d or none. sqrt_d: one factor for all rows, so that their mean norm is
    √d_in."""
    b_dec_init: str = "mean"
    """mean, median or zero: mean or geometric median of up to 16,384 rows (the number
    is in `info`)."""
    decoder_init: str = "random"
    """random or data: Gaussian directions, or those of centred rows."""
    encoder_init: str = "tied"
    """tied or random: W_enc starts as W_decᵀ, or with Gaussian directions of its
    own."""
    encoder_scale: int | float = 1.0
    """Length of W_enc's start vectors."""
    pre_encoder_bias: bool = True
    """The encoder sees x − b_dec."""
    decoder_norm: str = "folded"
    """Length of W_dec's rows. unit: 1 after every step. free: whatever it becomes.
    folded: free, but latents are chosen and used as if the row had length 1 and its
    encoder were that much longer (sae_lens: rescale_acts_by_decoder_norm), which
    lets Adam turn short rows fast and long ones slowly."""
    decoder_init_norm: int | float | None = None
    """Length of W_dec's rows at the start; None: 0.3 for folded, else 1."""
    remove_parallel_grad: bool = True
    """With decoder_norm="unit": drop the part of W_dec's gradient that would only
    change a row's length."""

    revival: tuple[str, ...] = ("auxk",)
    """What is done about dead latents: auxk, ghost, resample (see
    `saeutils.revival`), or () for nothing."""
    dead_after: int | None = None
    """Rows without firing after which a latent is dead; None: 1/20 of the run."""
    aux_coefficient: int | float = 1.0
    """AuxK's α."""
    k_aux: int | None = None
    """AuxK's number of latents; None: d_in // 2."""
    resample_steps: tuple[int, ...] = ()
    resample_length: int | float = 0.2
    """Of a resampled latent's encoder, in mean lengths of the living ones'."""

    encoder_dtype: str = "float32"
    """float32 or bfloat16: of the encoder's product while training."""
    device: str = "cpu"
    log_every: int | None = None
    """Steps between two rows of `history`; None: 200 rows a run."""

    def __post_init__(self) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(f"TrainConfig: {message}")

        name = self.architecture
        for option, allowed in _OPTIONS.items():
            given = getattr(self, option)
            for value in given if isinstance(given, tuple) else (given,):
                need(value in allowed, f"{option} {value!r} is none of {[*allowed]}")
        for field_name in ("d_sae", "steps", "batch_size"):
            value = getattr(self, field_name)
            need(value >= 1, f"{field_name} must be at least 1, got {value}")
        need(self.lr > 0, f"lr must be positive, got {self.lr}")
        if name in ("topk", "batchtopk", "matryoshka"):
            need(
                0 < self.k <= self.d_sae,
                f"k must lie in 1 … d_sae={self.d_sae}, got {self.k}",
            )
            need(
                self.l1_coefficient == self.l0_coefficient == 0,
                f"{name} sets its sparsity by k; leave l1/l0_coefficient at 0",
            )
        if name == "topk":
            need(self.k == int(self.k), f"TopK needs a whole k, got {self.k}")
        if name in ("l1", "gated"):
            need(self.l1_coefficient > 0, f"{name} needs l1_coefficient > 0")
        if name == "jumprelu":
            need(self.l0_coefficient > 0, "jumprelu needs l0_coefficient > 0")
            need(
                self.bandwidth > 0 and self.threshold >= 0,
                "jumprelu needs bandwidth > 0 and threshold ≥ 0",
            )
        if name == "matryoshka":
            rising = all(
                a < b for a, b in zip(self.widths, self.widths[1:], strict=False)
            )
            need(
                bool(self.widths)
                and rising
                and self.widths[0] > 0
                and self.widths[-1] == self.d_sae,
                f"widths must rise from above 0 to d_sae={self.d_sae}, "
                f"got {self.widths}",
            )
        else:
            need(not self.widths, f"widths belong to matryoshka, not {name}")
        need(
            ("resample" in self.revival) == bool(self.resample_steps),
            "resample_steps and 'resample' in revival go together",
        )
        need(
            self.resample_length > 0,
            f"resample_length must be positive, got {self.resample_length}",
        )
        need(self.init_norm > 0, "decoder_init_norm must be positive")
        need(
            self.decoder_norm != "unit" or self.init_norm == 1,
            'decoder_norm="unit" starts at decoder_init_norm 1',
        )
        need(
            self.warm_up + self.decay <= self.steps,
            f"lr warm-up {self.warm_up} + decay {self.decay} exceed steps {self.steps}",
        )

    @property
    def init_norm(self) -> int | float:
        """Length of W_dec's rows at the start."""
        if self.decoder_init_norm is None:
            return 0.3 if self.decoder_norm == "folded" else 1
        return self.decoder_init_norm

    @property
    def warm_up(self) -> int:
        """Steps of learning-rate warm-up."""
        return (
            self.steps // 20 if self.lr_warm_up_steps is None else self.lr_warm_up_steps
        )

    @property
    def decay(self) -> int:
        """Steps of learning-rate decay."""
        return self.steps // 5 if self.lr_decay_steps is None else self.lr_decay_steps

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0 … steps − 1."""
        rise = (step + 1) / self.warm_up if self.warm_up else 1.0
        fall = (self.steps - step) / self.decay if self.decay else 1.0
        return self.lr * min(1.0, rise, fall)

    def penalty_at(self, step: int) -> Penalty:
        """The loss of step 0 … steps − 1."""
        rise = (
            self.steps // 10
            if self.sparsity_warm_up_steps is None
            else self.sparsity_warm_up_steps
        )
        coefficient = max(self.l1_coefficient, self.l0_coefficient)
        return Penalty(
            self.architecture,
            self.k,
            coefficient * (min(1.0, (step + 1) / rise) if rise else 1.0),
            self.widths,
            self.bandwidth,
            self.pre_encoder_bias,
            self.encoder_dtype == "bfloat16",
        )
