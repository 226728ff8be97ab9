"""The objects that parts of a command share: an open checkpoint and, once needed, its model in memory and its text.

job = Job("demo", TextSpec(), Runtime(device="cpu"))
job.checkpoint, job.tokenizer, job.sha256
job.resident                                    # the model, loaded once
job.text.calibration, job.text.selection, job.text.test
"""

from __future__ import annotations

import gc
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from intarsia import __version__
from intarsia.activations.hidden_store import MemoryBudget
from intarsia.architecture.spec import Architecture
from intarsia.building.loaded_model import LoadedModel, check_config, default_device, default_dtype
from intarsia.checkpoint.hashing import acting_config, scan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.data.conversations import learn_turns, rows_of_messages
from intarsia.data.corpus import Corpus, limited
from intarsia.data.text import TextParts, draw
from intarsia.disk import write_whole
from intarsia.errors import Problems, UserError, check
from intarsia.inspection.own_code import trusts
from intarsia.model_name import lasting
from intarsia.options import ModelRef, Runtime, Target, TextSpec
from intarsia.run_dir import RunDir

WRITTEN = "self.jsonl"
"""The self-written text in the run folder."""

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Devices and memory of a model and its hidden states: a `Runtime`, resolved on this machine."""

    # The first holds embedding and head; the layers are placed on all of them.
    devices: tuple[torch.device, ...]
    runtime: Runtime

    @classmethod
    def of(cls, runtime: Runtime) -> Placement:
        """Look up the devices.

        Raises:
            UserError: there is no such device.
        """
        problems, found = Problems(), list[torch.device]()
        for name in runtime.devices or (runtime.device,):
            try:
                found.append(default_device() if name is None else torch.device(name))
                torch.empty(0, device=found[-1])
            except (RuntimeError, AssertionError) as error:
                said = str(error).partition("\n")[0].rstrip(".")
                problems.add(f"There is no device {name!r} here: {said}.", "Give one such as cpu or cuda:0.")
        problems.raise_any()
        return cls(devices=tuple(found), runtime=runtime)

    @property
    def device(self) -> torch.device:
        """The device for data."""
        return self.devices[0]

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of models; None for `default_dtype`."""
        return None if self.runtime.dtype is None else _DTYPES[self.runtime.dtype]

    def resident(self, checkpoint: Checkpoint, others: Mapping[str, Checkpoint] | None = None) -> LoadedModel:
        """Load a model; recipes may also use layers of `others`, by the variants' names."""
        how: dict[str, Any] = {"others": others, "stream": self.runtime.stream, "devices": self.devices}
        return LoadedModel(checkpoint, device=self.device, dtype=self.dtype, **how)

    def memory_budget(self, folder: Path | None = None) -> MemoryBudget:
        """Memory for hidden states; what does not fit goes to files in a folder (default: of the system)."""
        return MemoryBudget(self.runtime.memory_bytes, folder)


class Job:
    """A model to work on. Everything heavy is read when it is first needed, and once.

    Attributes:
        model: its name in recipes; `revision` of a hub id.
        checkpoint: its files.
        runtime: the given options; `placement` is their resolution on this machine.
        others: further checkpoints for recipes, by the variants' names.
    """

    def __init__(
        self,
        model: ModelRef | str | Path | Checkpoint,
        text: TextSpec | None = None,
        runtime: Runtime | None = None,
        *,
        others: Mapping[str, Checkpoint] | None = None,
    ) -> None:
        """Open the checkpoint.

        Args:
            text: None for a job without calibration text.

        Raises:
            UserError: there is no such model or device, or its positions are too few for the sequences.
        """
        self.runtime = runtime or Runtime()
        self.placement = Placement.of(self.runtime)
        self.others = dict(others or {})
        self.checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(ModelRef.of(model))
        self.model, self.revision = self.checkpoint.model, self.checkpoint.revision
        check_config(self.checkpoint)
        self._text = text
        if text is not None:
            check_seq_len(self.checkpoint, text.seq_len)

    @property
    def device(self) -> torch.device:
        """The device for data."""
        return self.placement.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model."""
        chosen = self.placement.dtype
        return chosen or default_dtype(self.checkpoint, self.device, stream=self.runtime.stream)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        return load_tokenizer(self.checkpoint)

    @cached_property
    def sha256(self) -> str:
        """The hash of its weights, which are checked to be finite."""
        return scan(self.checkpoint)

    @cached_property
    def resident(self) -> LoadedModel:
        """The model in memory; a streamed one without its layers."""
        return self.placement.resident(self.checkpoint, self.others or None)

    @property
    def in_memory(self) -> bool:
        """Whether the model is loaded."""
        return "resident" in self.__dict__

    def release(self) -> None:
        """Free the model; the next use loads it again."""
        if self.__dict__.pop("resident", None) is not None:
            gc.collect()  # streamed layers and the model refer to one another

    @property
    def spec(self) -> TextSpec:
        """The requested text."""
        assert self._text is not None, "this job has no text"
        return self._text

    @cached_property
    def text(self) -> TextParts:
        """The calibration text, with its selection and test parts.

        Raises:
            UserError: there are more sources than sequences, or a streamed model is to write it.
        """
        key = self.sha256 if check_streamed_text(self.spec, self.runtime, option="--calibration") else None
        return draw(self.spec, self.tokenizer, writer=lambda: self.resident.model, writer_key=key)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The model's own tokenizer.

    Raises:
        UserError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=trusts())
        tokenizer("a")  # some bad settings only fail at the first use
    except Exception as error:  # damaged files fail in many ways
        said = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{checkpoint.folder} has no tokenizer that transformers can read: {said}.",
            "Put tokenizer.json and tokenizer_config.json beside the weights; code of a tokenizer is not run.",
        ) from error
    return limited(tokenizer, checkpoint.architecture.vocabulary)


def check_same_tokenizer(first: Job, other: Job) -> None:
    """Refuse two models with different tokens.

    Raises:
        UserError: their tokenizers differ.
    """
    sample = "Tokens, 1234 of them:\n\tthe same ones?"
    one, two = first.tokenizer, other.tokenizer
    if one.get_vocab() != two.get_vocab() or one(sample)["input_ids"] != two(sample)["input_ids"]:
        raise UserError(
            f"{other.model} has another tokenizer than {first.model}.",
            "Give two models with the same tokenizer, such as a model and its pruned version.",
        )


def check_seq_len(checkpoint: Checkpoint, seq_len: int) -> None:
    """Refuse sequences longer than the model's positions.

    Raises:
        UserError: they are longer.
    """
    most = checkpoint.architecture.config.get("max_position_embeddings")
    fits = not isinstance(most, int) or seq_len <= most
    check((fits, f"--seq-len is {seq_len}; the model has {most} positions.", "Use shorter sequences."))


def check_streamed_text(text: TextSpec, runtime: Runtime, *, option: str) -> bool:
    """Whether the model itself is to write some of the text.

    Raises:
        UserError: it is, and it is streamed.
    """
    if text.writes and runtime.stream:
        raise UserError(
            f"{option} self lets the model write text, and --stream would read all layers for every token.",
            "Give a file or data set, or run once without --stream, which keeps the text.",
        )
    return text.writes


def target_depth(target: Target, architecture: Architecture, parameters: int) -> int:
    """The number of layers to keep; for a sparsity, the greatest depth that removes at least that share.

    Raises:
        UserError: removing layers cannot reach it.
    """
    depth, layers = architecture.n_layers, target.require().layers
    if layers is not None:
        check((layers < depth, f"--layers is {layers}; the model has {depth} layers.", "Keep fewer layers."))
        return layers
    assert target.sparsity is not None
    share = architecture.layer_parameters / parameters
    removed = math.ceil(target.sparsity / share - 1e-9)
    if removed >= depth:
        most = math.floor((depth - 1) * share * 10_000) / 10_000
        raise UserError(
            f"--sparsity is {target.sparsity}; all layers but one hold {most:.2%} of the parameters.",
            f"Give at most {most}; embeddings are not pruned.",
        )
    return depth - removed


def settings_of(run: RunDir, job: Job) -> dict[str, Any]:
    """The settings of model and text that decide a result, unlike `Runtime`.

    Raises:
        UserError: the model or the calibration text cannot be used.
    """
    _ = job.tokenizer  # fails before the weights are hashed
    return {
        # An absolute path, so that spelling and working directory do not matter.
        "model": lasting(job.model),
        "revision": job.revision,
        "sha256": job.sha256,
        "config": acting_config(job.checkpoint.config),
        "calibration": calibration_of(run, job),
        "tokens": job.spec.length,
        "seq_len": job.spec.seq_len,
        "seed": job.spec.seed,
    }


def calibration_of(run: RunDir, job: Job) -> str:
    """The text's name in the settings of a run: the recorded one, if it is the same text by another name.

    Only text with another name is read here. Self-written text has no other name.

    Raises:
        UserError: the text cannot be read.
    """
    given = ",".join(job.spec.sources)
    started = str(run.pinned()["calibration"]) if (run.path / "calibration.json").is_file() else given
    if started == given or job.spec.writes or "self" in started.split(","):
        return given
    return started if job.text.calibration.sha256 == run.pinned("calibration")["sha256"] else given


def pin_text(run: RunDir, job: Job) -> None:
    """Record the text of a run; a resumed run must have the same tokens.

    Raises:
        UserError: they differ.
    """
    corpus = job.text.calibration
    run.pin("calibration", {"sha256": corpus.sha256, "tokens": corpus.tokens})
    keep_written(run, job.text.written, job.tokenizer)


def keep_written(run: RunDir, corpus: Corpus | None, tokenizer: Any) -> None:
    """Keep self-written text in the run folder, as JSON lines of messages, which can be given as text again."""
    path = run.path / WRITTEN
    if corpus is not None and not path.is_file():
        rows = rows_of_messages(corpus.input_ids, tokenizer, learn_turns(tokenizer))
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def versions() -> dict[str, str]:
    """The versions of the software that made a result."""
    found = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"intarsia": __version__, **found, "python": platform.python_version()}
