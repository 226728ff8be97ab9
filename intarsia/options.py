"""The value objects of options: the flags of the command line are their fields.

They hold the user's choices, checked as far as that is possible without the model. `Runtime` and `Output` never decide
a result, so no run folder pins them.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from intarsia.errors import Rule, at_least, check
from intarsia.flags import byte_count, flag, token_count
from intarsia.model_name import check_model

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """Model: the one that is read, as `ModelRef(model="Qwen/Qwen3-0.6B", revision="main")`."""

    # A local folder, a GGUF file, a hub id, or `demo`.
    model: str = flag(metavar="MODEL", positional=True)
    # Branch, tag or commit of a hub model.
    revision: str | None = None
    # The GGUF file to read, where a folder or hub model has several.
    gguf_file: str | None = flag(None, metavar="NAME")
    # Read 8-bit weights (FP8 with scales) as ordinary ones; other quantised models are refused.
    dequantize: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", str(self.model))
        check((bool(self.model), "The model has no name.", "Give a folder, a GGUF file, a hub id, or demo."))
        check_model(self.model)

    @classmethod
    def of(cls, model: ModelRef | str | Path) -> ModelRef:
        """The reference itself, or a reference to the model of that name."""
        return model if isinstance(model, ModelRef) else cls(model=str(model))


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """Text: one draw of tokens, in three disjoint parts for calibration, selection and test."""

    # Calibration text: a .txt, .jsonl, .json or .parquet file (also compressed), a folder of such files,
    # hub:DATASET[/CONFIG]:SPLIT[:COLUMN], or `self`: the model writes it. Rows of messages, or of a question
    # and its answer, are conversations, written with the model's chat template; `#column=NAME` takes another column.
    # `file.txt#0:0.9` is the first nine tenths of a file. Several take equal parts.
    sources: tuple[str, ...] = flag(("self",), "--calibration", metavar="SPEC")
    # Tokens of text: 65536, 500k, 2M (default: 65536).
    tokens: int | None = flag(None, metavar="N", parse=token_count)
    # Tokens in a sequence.
    seq_len: int = flag(512, metavar="N")
    # Random seed.
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", words(self.sources))
        check(
            (bool(self.sources), "--calibration names no text.", "Give a file, hub:DATASET:SPLIT:COLUMN, or self."),
            *at_least(2, "Give a larger one, such as 512.", seq_len=self.seq_len),
            (
                self.length >= max(self.seq_len, 2),
                f"--tokens is {self.tokens}, less than one sequence of --seq-len {self.seq_len}.",
                "Give more --tokens, or a smaller --seq-len.",
            ),
            *at_least(0, "Give a whole number from 0 on.", seed=self.seed),
        )

    @property
    def length(self) -> int:
        """How many tokens."""
        return 65_536 if self.tokens is None else self.tokens

    @property
    def writes(self) -> bool:
        """Whether the model writes some of it."""
        return "self" in (name.strip() for name in ",".join(self.sources).split(","))


@dataclass(frozen=True, kw_only=True)
class Target:
    """Target: how small the model becomes, as a depth or a share of its parameters, and how much work that may take."""

    # Layers to keep.
    layers: int | None = flag(None, metavar="N")
    # Share of all parameters to remove, between 0 and 1, rounded up to whole layers.
    sparsity: float | None = flag(None, metavar="X")
    # How much work to do: chooses the method and how to heal where these are not given, and with `thorough` 262144
    # tokens of text (default: standard).
    effort: Literal["quick", "standard", "thorough"] | None = None

    def __post_init__(self) -> None:
        both = self.layers is not None and self.sparsity is not None
        check(
            (not both, "--layers and --sparsity are both given.", "Give one of them."),
            (
                self.layers is None or self.layers >= 1,
                f"--layers is {self.layers}; a model keeps at least 1 layer.",
                "Give how many layers to keep.",
            ),
            (
                self.sparsity is None or 0.0 < self.sparsity < 1.0,
                f"--sparsity is {self.sparsity}; it is a share between 0 and 1.",
                "Give it like 0.3 for 30 % of the parameters.",
            ),
        )

    def require(self) -> Target:
        """The target of a job that cannot do without one.

        Raises:
            UserError: neither a depth nor a share is given.
        """
        given = self.layers is not None or self.sparsity is not None
        check((given, "Neither --layers nor --sparsity is given.", "Give one, such as --sparsity 0.3."))
        return self


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Runtime: where and how a job runs. It never decides a result, and a resumed job may use another."""

    # Device: cpu, cuda, cuda:1 ... (default: the best available).
    device: str | None = None
    # Devices to place the layers on, such as cuda:0,cuda:1; embedding and head are on the first.
    devices: tuple[str, ...] = flag((), metavar="NAMES")
    # Data type of the weights (default: the checkpoint's own; float32 on a CPU that multiplies 16-bit numbers slowly).
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    # Keep one layer in memory at a time, read from disk when it is needed: same result, less memory.
    stream: bool = False
    # Memory budget of hidden states, such as 8GB; the rest is kept on disk (default: two fifths of free memory).
    memory: str | None = flag(None, metavar="SIZE")
    # Tokens per batch (default: by memory).
    batch_tokens: int | None = flag(None, metavar="N", parse=token_count)

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", words(self.devices))
        alone = not (self.devices and (self.device or self.stream))
        check(
            (alone, "--devices is given with --device or --stream.", "Give one of the three."),
            *at_least(1, "Leave it out to fit the memory.", batch_tokens=self.batch_tokens),
            _size("--memory", self.memory),
        )

    @property
    def memory_bytes(self) -> int | None:
        """`memory` as a number."""
        return None if self.memory is None else byte_count(str(self.memory))


@dataclass(frozen=True, kw_only=True)
class AnswerSpec:
    """Agreement: prompts that the original and the new model answer, to compare them token by token."""

    # Prompts that both models answer (0: none): next tokens that agree, and answers that loop.
    answers: int = flag(32, metavar="N")
    # Prompts: a .txt file with one a line, or rows of conversations or questions (default: the original writes them).
    # With --stream models write nothing: the rows need answers, and agreement is measured along those.
    prompts: str | None = flag(None, metavar="FILE")
    # Most tokens of an answer.
    answer_tokens: int = flag(64, metavar="N")

    def __post_init__(self) -> None:
        check(*self.rules())

    def rules(self) -> list[Rule]:
        """What must hold."""
        needed = self.answers > 0 or self.prompts is None
        return [
            *at_least(0, "Give 0 to leave agreement out.", answers=self.answers),
            *at_least(2, "Give a larger one, such as 64.", answer_tokens=self.answer_tokens),
            (needed, "--prompts is given with --answers 0.", "Leave one of them out."),
        ]


@dataclass(frozen=True, kw_only=True)
class PerplexityTexts(AnswerSpec):
    """Evaluation: perplexity on texts, and agreement."""

    # Evaluation text for perplexity, as FILE or NAME=FILE; `file.txt#0.9:1` is the last tenth of a file.
    text: tuple[str, ...] = flag((), "--eval-text", "--text", metavar="FILE")
    # Sequences to use of each evaluation text, 0 for all: one number, or one for each text.
    windows: tuple[int, ...] = flag((64,), "--eval-windows", "--windows", metavar="N")

    def __post_init__(self) -> None:
        given: Any = self.windows
        windows: tuple[int, ...] = (given,) if isinstance(given, int) else tuple(given)
        object.__setattr__(self, "text", words(self.text))
        object.__setattr__(self, "windows", windows)
        super().__post_init__()

    def rules(self) -> list[Rule]:
        """What must hold."""
        names = [named(text)[0] for text in self.text]
        twice = next((name for name in names if names.count(name) > 1), None)
        counts = f"--eval-windows has {len(self.windows)} numbers, and --eval-text {len(names)}."
        return [
            *super().rules(),
            *at_least(0, "Give 0 for the whole text.", eval_windows=min(self.windows, default=0)),
            (len(self.windows) in (1, len(names)), counts, "Give one number, or one for each --eval-text, in order."),
            (twice is None, f"Two --eval-text are called {twice!r}.", "Give names: --eval-text NAME=FILE."),
        ]

    @property
    def sources(self) -> dict[str, str]:
        """The sources of the evaluation texts by name (default: the file's)."""
        return dict(map(named, self.text))


@dataclass(frozen=True, kw_only=True)
class TextsAndTasks(PerplexityTexts):
    """Evaluation: measures of a model."""

    # Tasks of lm-eval (arc_easy, gsm8k, ...), and .jsonl files of query, choices and gold, or of query and answer.
    tasks: tuple[str, ...] = flag((), metavar="NAMES")
    # Use only the first N items of each task.
    limit: int | None = flag(None, metavar="N")
    # Write the prompts of tasks as conversations, with the model's chat template.
    chat_template: bool = False
    # Folder with lm-eval task definitions of your own.
    include_path: Path | None = flag(None, metavar="DIR")

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", words(self.tasks))
        super().__post_init__()

    def rules(self) -> list[Rule]:
        """What must hold."""
        return [*super().rules(), *at_least(1, "Leave it out for all items.", limit=self.limit)]


@dataclass(frozen=True, kw_only=True)
class EvalSpec(TextsAndTasks):
    """Evaluation: measures before and after."""

    # Measure tokens per second too.
    speed: bool = True


@dataclass(frozen=True, kw_only=True)
class NewModel:
    """Output: the folder of a new model, which appears whole or not at all."""

    # Folder of the new model.
    path: Path = flag(MISSING, "--out", "-o", metavar="DIR")
    # Replace the output if it exists.
    overwrite: bool = False
    # Largest size of a weight file.
    shard_size: str = flag("5GB", "--max-shard-size", metavar="SIZE")
    # Upload the finished model to the HuggingFace hub, as `name` or `owner/name`.
    push_to: str | None = flag(None, "--push-to-hub", metavar="NAME")
    # Make a new hub repository private.
    private: bool = False

    def __post_init__(self) -> None:
        named = str(self.path) not in ("", ".")
        object.__setattr__(self, "path", Path(self.path))
        private = not self.private or self.push_to is not None
        check(
            (named, "There is no output folder.", "Give one with -o."),
            (private, "--private is given without --push-to-hub.", "Leave it out, or give --push-to-hub NAME."),
            _size("--max-shard-size", self.shard_size),
        )

    @classmethod
    def of(cls, path: Self | str | Path) -> Self:
        """The output itself, or one to that path."""
        return path if isinstance(path, cls) else cls(path=Path(str(path)))

    @property
    def shard_bytes(self) -> int:
        """`shard_size` as a number."""
        return byte_count(str(self.shard_size))


@dataclass(frozen=True, kw_only=True)
class JobOutput(NewModel):
    """Output: the folder of a long job's model, and the job's run folder."""

    # Run folder, with state and log (default: beside the output).
    run: Path | None = flag(None, metavar="DIR")

    suffix: ClassVar[str] = ".run"
    """Of the run folder beside the output."""

    @property
    def run_path(self) -> Path:
        """The run folder: as given, or beside the output."""
        return self.path.with_name(f"{self.path.name}{self.suffix}") if self.run is None else Path(self.run)


@dataclass(frozen=True, kw_only=True)
class Output(JobOutput):
    """Output: the folder of a long job's model, and the job's run folder; or only an estimate of the cost."""

    # Print the plan and an estimate of its cost; write nothing.
    dry_run: bool = False


def named(text: str) -> tuple[str, str]:
    """Name and source of an evaluation text or a model that is given as NAME=SOURCE or SOURCE."""
    name, equals, source = text.partition("=")
    if equals and name and not any(mark in name for mark in "/\\#:") and not Path(text.partition("#")[0]).exists():
        return name, source
    file, _, part = text.partition("#")
    stem = text.split(":")[1] if text.startswith("hub:") and text.count(":") else Path(file).stem
    return (f"{stem} {part}" if part else stem), text


def words(given: Any) -> tuple[str, ...]:
    """One text, or several."""
    return (given,) if isinstance(given, str) else tuple(str(word) for word in given)


def _size(name: str, text: str | int | None) -> tuple[bool, str, str]:
    """A rule: a size that can be read."""
    try:
        holds = text is None or byte_count(str(text)) > 0
    except ValueError:
        holds = False
    return holds, f"{name} is {text!r}, which is no size.", "Give a size such as 5GB, 500MB or 1.5GiB."
