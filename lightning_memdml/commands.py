"""The table of commands, and answers that need no training library: help, version, and unknown commands.

A new command is one entry here and the module it names.
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import import_module
from typing import NamedTuple

import lightning_memdml
from lightning_memdml.help_pages import help_page


class Command(NamedTuple):
    """A command of `memdml`.

    Attributes:
        help: One line that describes it.
        function: `module:function`. The function takes the arguments after the name of the command.
        example: Arguments for the help of all commands.
        other_names: Names that other programs give such a command; they are not accepted, but lead to this one.
        after_interrupt: What to do after Ctrl-C.
        options: `module:function` whose arguments are the options, or the module with its parser; empty for that of
            `function`.
    """

    help: str
    function: str
    example: str = ""
    other_names: tuple[str, ...] = ()
    after_interrupt: str = ""
    options: str = ""


TRAINER = "lightning_memdml.lightning_cli:run_trainer"
LAST = "runs/latest/checkpoints/last.ckpt"
SWITCHES = ("--flip", "--whiten", "--rerank")
COMMANDS: dict[str, Command] = {
    "fit": Command(
        "Train a network.",
        TRAINER,
        "--model.backbone SmallConvNet --model.loss ContrastiveLoss --trainer.max_epochs 5",
        ("train", "run", "start", "resume", "continue"),
    ),
    "validate": Command("Score a checkpoint on the validation classes.", TRAINER, other_names=("val", "validation")),
    "test": Command(
        "Score a checkpoint on the test classes.", TRAINER, f"--ckpt_path {LAST}", ("eval", "evaluate", "benchmark")
    ),
    "predict": Command(
        "Write the embeddings of the test images.", TRAINER, other_names=("embed", "encode", "extract", "infer")
    ),
    "configs": Command(
        "List the configurations that come with the package.",
        "lightning_memdml.packaged_configs:configs",
        other_names=("config", "recipes", "presets", "list"),
    ),
    "data": Command(
        "Check a data set (`data check`): counts, damaged images, a contact sheet.",
        "lightning_memdml.data_check:data_command",
        "check --data CUB200 --data.root DIR",
        ("check", "dataset", "datasets", "inspect"),
        options="lightning_memdml.data_check:check_data",
    ),
    "demo": Command(
        "Train on characters, without and with a memory: a table and a picture.",
        "lightning_memdml.demo:demo",
        other_names=("example", "tour"),
    ),
    "freeze": Command(
        "Write the features of all images once, so that a head trains on them in seconds.",
        "lightning_memdml.deploy.freeze:freeze",
        "my/images features.npz --weights DEFAULT",
        ("features",),
        options="lightning_memdml.deploy.freeze:freeze_images",
    ),
    "weight-curves": Command(
        "Draw the weight that a loss gives a pair of each similarity.",
        "lightning_memdml.study.commands:weight_curves",
        "--loss ContrastiveLoss",
        ("curves", "weights", "plot"),
        options="lightning_memdml.study.commands:draw_weight_curves",
    ),
    "study": Command(
        "Compare settings over seeds and data sets, with verdicts and a report.",
        "lightning_memdml.lightning_cli:run_study",
        "STUDY.yaml",
        ("compare", "sweep", "experiment"),
        "Finished runs are kept. To go on, run the same command again.",
        "lightning_memdml.study.study_command",
    ),
    "index": Command(
        "Make images searchable with a checkpoint.",
        "lightning_memdml.deploy.index_command:index",
        f"--ckpt_path {LAST}",
        ("build-index", "add"),
        "To go on with the images that are left, run the same command again.",
        options="lightning_memdml.deploy.index_command:index_images",
    ),
    "search": Command(
        "Find the indexed images nearest to image files.",
        "lightning_memdml.deploy.search_command:search",
        "bird.jpg",
        ("query", "find", "retrieve"),
        options="lightning_memdml.deploy.search_command:search_images",
    ),
    "score": Command(
        "Score embeddings in files, or the test images of a checkpoint.",
        "lightning_memdml.deploy.score:score",
        "--embeddings runs/memdml/version_1/embeddings.parquet",
        ("metrics", "recall"),
        options="lightning_memdml.deploy.score:score_files",
    ),
    "export": Command(
        "Write the network as ONNX and as a torch.export program.",
        "lightning_memdml.deploy.export_command:export",
        f"--ckpt_path {LAST}",
        ("onnx", "save", "convert"),
        options="lightning_memdml.deploy.export_command:export_model",
    ),
    "export-index": Command(
        "Write an index as a table (Parquet) for a vector database.",
        "lightning_memdml.deploy.export_index_command:export_index",
        "runs/index index.parquet",
        ("export_index", "parquet", "lancedb", "qdrant", "milvus"),
        options="lightning_memdml.deploy.export_index_command:write_index_table",
    ),
}


def run(name: str, arguments: list[str]) -> None:
    """Run a command.

    Args:
        name: Its name, or `--help`, `--version`, or whatever else the user typed there.
        arguments: What follows the name.

    Raises:
        SystemExit: With 0 after help or version, with 2 if there is no such command.
    """
    if name in ("-h", "--help", "help"):
        print(help_text())
        sys.exit(0)
    if name in ("--version", "version"):
        print(f"memdml {lightning_memdml.__version__}")
        sys.exit(0)
    is_own = name in COMMANDS and COMMANDS[name].function.startswith(f"{__package__}.")  # whose source can be read
    if is_own and {"-h", "--help"} & set(arguments):
        command = COMMANDS[name]
        print(help_page(name, command.help, command.function, command.options))
        sys.exit(0)
    if "--help_all" in arguments:
        sys.argv[1:] = ["--help" if argument == "--help_all" else argument for argument in sys.argv[1:]]
        arguments = ["--help" if argument == "--help_all" else argument for argument in arguments]
    if name not in COMMANDS:
        later = next((argument for argument in arguments if argument in COMMANDS), "fit")
        wrong_order = f"Expected a command before the option {name}. Write `memdml {later} {name} ...`."
        print(f"error: {wrong_order if name.startswith('-') else unknown_command(name)}", file=sys.stderr)
        sys.exit(2)
    function = COMMANDS[name].function
    module, _, attribute = function.partition(":")
    # A switch: jsonargparse needs a value.
    arguments = ["--trust=true" if argument == "--trust" else argument for argument in arguments]
    sys.argv[1:], arguments = switched_on(sys.argv[1:]), switched_on(arguments)
    getattr(import_module(module), attribute)(arguments)


def switched_on(arguments: list[str]) -> list[str]:
    """Return arguments in which a switch without a value has the value true.

    Example:
        >>> switched_on(["--rerank", "bird.jpg", "--flip", "false"])
        ['--rerank=true', 'bird.jpg', '--flip', 'false']
    """
    following = [*arguments, ""][1:]
    return [
        f"{argument}=true" if argument in SWITCHES and value.lower() not in ("true", "false") else argument
        for argument, value in zip(arguments, following, strict=True)
    ]


def help_text() -> str:
    """Return the help of all commands.

    Example:
        >>> help_text().splitlines()[0]
        'usage: memdml COMMAND [OPTIONS]'
    """
    width = max(map(len, COMMANDS))
    lines = [
        "usage: memdml COMMAND [OPTIONS]",
        "",
        "Train an embedding with a memory, and measure how well it retrieves.",
        "",
        *(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()),
        "",
        "Examples:",
        "  memdml fit --config glyphs_memory",
        *(f"  memdml {name} {command.example}" for name, command in COMMANDS.items() if command.example),
        "",
        "`memdml COMMAND --help` lists the common options, `--help_all` all of them.",
        "To choose a class, give its name, then its options: `--data FolderDataModule --data.root DIR`.",
        "`--data.help FolderDataModule` after a command explains the options of one class.",
    ]
    return "\n".join(lines)


def unknown_command(name: str) -> str:
    """Return a sentence for a command that does not exist, with the nearest one that does.

    Example:
        >>> unknown_command("train").partition(" There are ")[0]
        "There is no command 'train'. Did you mean 'fit'?"
    """
    names = ", ".join(COMMANDS)
    if not name:
        return f"Expected a command: {names}. `memdml --help` describes them."
    meant = {other: command for command, entry in COMMANDS.items() for other in (command, *entry.other_names)}
    close = get_close_matches(name, meant, n=1)
    hint = f" Did you mean {meant[close[0]]!r}?" if close else ""
    return f"There is no command {name!r}.{hint} There are {names}."
