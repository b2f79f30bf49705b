"""What a checkpoint or an index may name: the closed list of classes, and a rule for each parameter that is no number.

Everything here is data. `lightning_memdml.trust` reads it. A parameter without a rule takes only a number, a truth
value, nothing, a list or mapping of these, or a word of its own `Literal` type. So a new loss, weight function or data
set needs no entry here, unless one of its parameters is a text, a path, a class or a function;
`tests/test_trust_table.py` fails on such a parameter until a rule decides about it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_memdml.hf_networks import MODEL_TYPES, WORD, WORDS


@dataclass(frozen=True)
class Plain:
    """Numbers, truth values, nothing, and lists and mappings of these; and the words of the parameter's `Literal`.

    Attributes:
        most: Largest magnitude of a number. It bounds what is allocated, far above normal use.
    """

    most: float = 1e7


@dataclass(frozen=True)
class Words:
    """One of these words, or what `Plain` takes."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """A text that matches a pattern as a whole, or what `Plain` takes."""

    pattern: str


@dataclass(frozen=True)
class Texts:
    """A list or mapping of texts that are only compared, such as names of columns."""


@dataclass(frozen=True)
class InputPath:
    """A path on this machine that is read and never written to; no URL."""


@dataclass(frozen=True)
class NetworkName:
    """The name of one of torchvision's classifiers, or what matches the pattern.

    Attributes:
        pattern: `timm:` and a plain name, with or without a tag: nothing that timm would look up elsewhere.
    """

    pattern: str = r"timm:[a-z0-9_]+(\.[a-z0-9_]+)?"


@dataclass(frozen=True)
class Fixed:
    """Always this value, whatever the file has: downloads, and everything that decides where something is written.

    Attributes:
        value: The value.
        notice: Whether to print that the file had another one.
    """

    value: Any = None
    notice: bool = True


@dataclass(frozen=True)
class OneOf:
    """A class of a group below, with its options.

    Attributes:
        group: The group.
        many: Whether a list of them is allowed as well.
        or_value: A rule for a value that is no class.
        otherwise: What stands for a class that is not of the group; without it the file is refused.
    """

    group: str
    many: bool = False
    or_value: Plain | NetworkName | None = None
    otherwise: Fixed | None = None


@dataclass(frozen=True)
class Options:
    """A mapping of the parameters of one class.

    Attributes:
        class_path: The class.
        rules: Rules for its parameters.
        others: The rule for a parameter without one.
    """

    class_path: str
    rules: dict[str, Any]
    others: Plain = Plain()


Rule = Plain | Words | Text | Texts | InputPath | NetworkName | Fixed | OneOf | Options


@dataclass(frozen=True)
class Classes:
    """Classes of one module that belong to a group.

    Attributes:
        module: From which they are imported. A file may also name a submodule of it: only the class's name counts.
        names: Their names; empty for all classes in the `__all__` of the module that derive from `kind`.
        kind: Path of the base class of those that are found in `__all__`.
        rules: Rules for their parameters, by the parameter's name.
        aliases: Other modules that a file may name them in.
    """

    module: str
    names: tuple[str, ...] = ()
    kind: str = ""
    rules: dict[str, Rule] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


# Sizes: the largest that a file may ask for. All of them are far above normal use, and fit into memory together.
SIDE = Plain(4096)  # pixels
METRIC = Text(r"[A-Za-z0-9_][A-Za-z0-9_/@.-]{0,99}")
SEED = Plain(2**64)
INTERPOLATION = Words(
    tuple(
        spelling
        for name in ("NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")
        for spelling in (name, name.lower(), name.lower().replace("_", "-"))
    )
)
DTYPE = Words(("float16", "float32", "torch.float16", "torch.float32", "torch.bfloat16", "torch.uint8"))
MIN_MAX = Words(("min", "max"))
TRANSFORMS: dict[str, Rule] = {
    "transforms": OneOf("transform", many=True),
    "interpolation": INTERPOLATION,
    "fill": Plain(),
    "padding_mode": Words(("constant", "edge", "reflect", "symmetric")),
    "dtype": DTYPE,
    "policy": Words(("IMAGENET", "CIFAR10", "SVHN", "imagenet", "cifar10", "svhn")),
    "value": Words(("random",)),
    **dict.fromkeys(("size", "max_size", "min_size", "padding", "target_size", "image_size"), SIDE),
    **dict.fromkeys(("num_output_channels", "kernel_size"), Plain(1024)),
}
NETWORK: dict[str, Rule] = {
    **dict.fromkeys(("weights", "weights_backbone", "norm_layer", "block"), Fixed(None)),
    **dict.fromkeys(("num_classes", "width_per_group", "groups"), Plain(16_384)),
}
DATA: dict[str, Rule] = {
    "root": InputPath(),
    "path": InputPath(),
    "columns": Texts(),
    **dict.fromkeys(("image_column", "label_column"), Text(r"[A-Za-z0-9_][A-Za-z0-9_ .-]{0,99}")),
    "download": Fixed(False),
    **dict.fromkeys(("cache_dir", "pixel_cache"), Fixed(None)),
    **dict.fromkeys(("train_transform", "test_transform"), OneOf("transform")),
    "image_size": SIDE,
    "seed": SEED,
    "num_workers": Plain(256),
    "num_classes": Plain(1_000_000),
    "images_per_character": Plain(1000),
}

# Group -> its classes. The groups are the ends of `OneOf`.
GROUPS: dict[str, tuple[Classes, ...]] = {
    "loss": (
        Classes(
            "lightning_memdml.losses",
            kind="lightning_memdml.losses.PairLoss",
            # A hybrid loss takes losses, the direct-weight loss takes weight functions.
            rules={"positive": OneOf("loss or weight"), "negative": OneOf("loss or weight")},
        ),
    ),
    "weight": (Classes("lightning_memdml.losses", kind="lightning_memdml.losses.WeightFunction"),),
    "memory": (
        Classes(
            "lightning_memdml.memory",
            ("EmbeddingMemory", "InstanceMemory", "MomentMatchedMemory", "RingMemory", "ShardedMemory"),
            rules={"dtype": DTYPE},
        ),
    ),
    "schedule": (Classes("lightning_memdml.schedules", ("LinearRamp",)),),
    "backbone": (
        Classes(
            "lightning_memdml.backbones",
            ("SmallConvNet",),
            rules={"in_channels": Plain(1024), "width": Plain(256), "pool": Plain(8)},
            aliases=("lightning_memdml",),
        ),
        Classes("torch.nn", ("Identity",)),  # for features of another network
        # The names are those of torchvision's own list of classifiers, see `lightning_memdml.trust`.
        Classes("torchvision.models", ("*",), rules=NETWORK),
        Classes(
            "lightning_memdml.hf_networks",
            ("HuggingFaceModel",),
            rules={
                "config": Options(
                    "lightning_memdml.hf_networks.HuggingFaceModel",
                    {
                        "model_type": Words(MODEL_TYPES),
                        **dict.fromkeys(WORDS, Text(WORD)),
                        **dict.fromkeys(("num_hidden_layers", "depths"), Plain(128)),
                        "intermediate_size": Plain(16_384),
                    },
                    Plain(4096),
                ),
                "preprocessing": Options(
                    "lightning_memdml.hf_networks.HuggingFaceModel", {"interpolation": INTERPOLATION}, SIDE
                ),
            },
        ),
        Classes(
            "timm",
            ("create_model",),
            rules={
                "model_name": Text(r"[a-z0-9_]+(\.[a-z0-9_]+)?"),
                "pretrained": Fixed(False),
                "global_pool": Words(("", "avg", "max", "avgmax", "catavgmax", "token", "map", "fast")),
                **dict.fromkeys(
                    ("pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"), Fixed(None)
                ),
                "num_classes": Plain(1_000_000),
            },
        ),
    ),
    "optimizer": (
        Classes(
            "torch.optim",
            (
                *("Adafactor", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "LBFGS", "Muon", "NAdam"),
                *("RAdam", "RMSprop", "Rprop", "SGD"),
            ),
            rules={
                "line_search_fn": Words(("strong_wolfe",)),
                "adjust_lr_fn": Words(("original", "match_rms_adamw")),
            },
        ),
    ),
    "scheduler": (
        Classes("lightning_memdml.schedules", ("WarmupCosine",)),
        Classes(
            "torch.optim.lr_scheduler",
            (
                *("ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "ExponentialLR"),
                *("LinearLR", "MultiStepLR", "OneCycleLR", "PolynomialLR", "ReduceLROnPlateau", "StepLR"),
            ),
            rules={"scale_fn": Fixed(None)},
        ),
        Classes(
            "lightning.pytorch.cli",
            ("ReduceLROnPlateau",),
            rules={"monitor": METRIC, "mode": MIN_MAX, "threshold_mode": Words(("rel", "abs"))},
        ),
    ),
    "transform": (
        Classes(
            "lightning_memdml.data.transforms",
            ("EvaluationTransform", "RandomAffine", "Shrink", "TrainingTransform"),
            rules={"image_size": SIDE},
            aliases=("lightning_memdml.data",),
        ),
        *(
            Classes(
                module,
                (
                    *("AugMix", "AutoAugment", "CenterCrop", "ColorJitter", "Compose", "ConvertImageDtype"),
                    *("ElasticTransform", "GaussianBlur", "Grayscale", "Normalize", "PILToTensor", "Pad"),
                    *("RandAugment", "RandomAdjustSharpness", "RandomAffine", "RandomApply", "RandomAutocontrast"),
                    *("RandomChoice", "RandomCrop", "RandomEqualize", "RandomErasing", "RandomGrayscale"),
                    *("RandomHorizontalFlip", "RandomInvert", "RandomOrder", "RandomPerspective", "RandomPosterize"),
                    *("RandomResizedCrop", "RandomRotation", "RandomSolarize", "RandomVerticalFlip", "Resize"),
                    *("ToTensor", "TrivialAugmentWide", *more),
                ),
                rules=TRANSFORMS,
            )
            for module, more in (
                (
                    "torchvision.transforms.v2",
                    (
                        *("GaussianNoise", "Identity", "JPEG", "RGB", "RandomChannelPermutation"),
                        *("RandomPhotometricDistort", "RandomResize", "RandomShortestSize", "RandomZoomOut"),
                        *("ScaleJitter", "ToDtype", "ToImage", "ToPureTensor"),
                    ),
                ),
                ("torchvision.transforms", ()),
            )
        ),
    ),
    "data": (Classes("lightning_memdml.data", kind="lightning_memdml.data.RetrievalDataModule", rules=DATA),),
    "callback": (
        Classes(
            "lightning_memdml.callbacks",
            kind="lightning.pytorch.callbacks.Callback",
            rules={
                "dirpath": Fixed(None),
                "loss": OneOf("loss"),
                "memory": OneOf("memory"),
                **dict.fromkeys(("encoder", "backbone"), Text(r"[A-Za-z]\w*(\.[A-Za-z0-9]\w*)*")),
                "encoder_factory": Fixed(None),
                "size": Plain(1e9),
            },
        ),
        Classes(
            "lightning.pytorch.callbacks",
            (
                *("DeviceStatsMonitor", "EarlyStopping", "GradientAccumulationScheduler", "LearningRateMonitor"),
                *("ModelCheckpoint", "ModelSummary", "RichModelSummary", "StochasticWeightAveraging"),
                "TQDMProgressBar",
            ),
            rules={
                "dirpath": Fixed(None),
                # Below the folder of the run: not absolute, and no way up. In braces the names of metrics: any other
                # format could read attributes of objects, or make a text of a gigabyte.
                "filename": Text(
                    r"(?![/. ])(?!.*\.\.)([A-Za-z0-9_=/@. -]|\{[A-Za-z][\w/@-]{0,99}(:0?\d?(\.\d)?[defg]?)?\}){1,200}"
                ),
                "monitor": METRIC,
                "mode": MIN_MAX,
                "train_time_interval": Text(r"[0-9 a-z:,.-]{1,40}"),
                "device": Words(("cpu", "cuda")),
                "avg_fn": Fixed(None),
            },
        ),
    ),
    # Only the name of the folder below `runs`, in which every run makes a new one.
    "logger": (
        Classes(
            "lightning.pytorch.loggers",
            ("CSVLogger",),
            rules={
                "save_dir": Fixed("runs"),
                "name": Text(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}"),
                "version": Fixed(None),
                "prefix": Text(r"[A-Za-z0-9_-]{0,40}"),
            },
        ),
    ),
}
GROUPS["loss or weight"] = (*GROUPS["loss"], *GROUPS["weight"])
DEFAULT_LOGGER = {
    "class_path": "lightning.pytorch.loggers.CSVLogger",
    "init_args": {"save_dir": "runs", "name": "memdml"},
}

MODEL = Options(
    "lightning_memdml.learner.MetricLearner",
    {
        "backbone": OneOf("backbone", or_value=NetworkName()),
        "loss": OneOf("loss"),
        "memory_loss": OneOf("loss"),
        "memory_weight": OneOf("schedule", or_value=Plain()),
        "weights": Fixed(None, notice=False),  # the checkpoint holds the trained ones
        "embedding_dim": Plain(16_384),
        "num_features": Plain(1_000_000),
        "optimizer": OneOf("optimizer"),
        "lr_scheduler": OneOf("scheduler"),
    },
)
TRAINER = Options(
    "lightning.pytorch.Trainer",
    {
        "accelerator": Words(("auto", "cpu", "gpu", "cuda", "mps", "tpu")),
        "strategy": Text(r"auto|ddp(_spawn|_fork|_notebook)?(_find_unused_parameters_(true|false))?|fsdp"),
        "devices": Text(r"auto|-?[0-9]{1,4}(,[0-9]{1,4})*"),
        "num_nodes": Plain(10_000),
        "precision": Text(r"(16|bf16|32|64|transformer-engine)(-true|-mixed|-float16)?"),
        "logger": OneOf("logger", otherwise=Fixed(DEFAULT_LOGGER)),
        "callbacks": OneOf("callback", many=True),
        **dict.fromkeys(("max_time", "val_check_interval"), Text(r"[0-9:]{1,20}")),
        "gradient_clip_algorithm": Words(("norm", "value")),
        "deterministic": Words(("warn",)),
        **dict.fromkeys(("profiler", "plugins", "default_root_dir", "model_registry"), Fixed(None)),
    },
    others=Plain(1e12),
)
# The keys of a configuration of `memdml fit`. Those of one command alone (`ckpt_path`, `weights_only`) are the user's.
CONFIG: dict[str, Rule] = {"seed_everything": SEED, "trainer": TRAINER, "model": MODEL, "data": OneOf("data")}
IGNORED = ("reference", "report", "ckpt_path", "weights_only", "verbose", "file_format", "return_predictions", "config")
