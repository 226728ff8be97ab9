"""Report: one page about one run or several, with text by the models themselves if asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from intarsia.building.loaded_model import load_model
from intarsia.building.materialize import RECIPE_FILE
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.progress import Progress, Silent
from intarsia.recipe import schema
from intarsia.reporting.blocks import Written
from intarsia.reporting.model_report import is_model_folder, keep_measures
from intarsia.reporting.page import report_html, write_report
from intarsia.stages.build import open_variants
from intarsia.stages.setup import device_of, dtype_of, load_tokenizer

REPORT = "report.html"
PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a carpenter who finds an old box.",
    "List three things to check before buying a used bicycle.",
)


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """A written report. `written` is the number of prompts that models answered for it."""

    out: Path
    runs: tuple[str, ...]
    bytes: int
    written: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "out": str(self.out), "runs": list(self.runs)}


def report(
    *runs: str | Path,
    out: str | Path,
    generate: bool = False,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = 96,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ReportResult:
    """Write one HTML file about some runs.

    Args:
        runs: run folders of `plan`, comparisons, and models that `compress`, `build` or `heal` have made.
        out: the file.
        generate: let every such model and its original answer the prompts, side by side.
        prompts: what they answer; through the chat template where the model has one.
        new_tokens: the most that an answer takes.

    Raises:
        UserError: a run or the file cannot be used; nothing has been written then.
    """
    begun = time.perf_counter()
    progress = progress or Silent()
    out, paths = Path(out), [Path(run) for run in runs]
    _check_out(out, overwrite=overwrite)
    report_html(paths)  # everything that is wrong with the runs is found out before any model is loaded
    found: dict[Path, list[Written]] = {}
    if generate:
        where, kind = device_of(device), dtype_of(dtype)
        folders = [path for path in paths if is_model_folder(path)]
        _check_generation(folders, prompts, new_tokens)
        for folder in folders:
            found[folder] = _side_by_side(folder, prompts, new_tokens, where, kind, progress)
    write_report(paths, out, generations=found)
    return ReportResult(
        out=out,
        runs=tuple(map(str, paths)),
        bytes=out.stat().st_size,
        written=sum(map(len, found.values())),
        seconds=time.perf_counter() - begun,
    )


def report_compression(out: Path, facts: Mapping[str, Any], corpus: Corpus | None) -> Path:
    """Keep what a compression measured in the folder that it made, and write the report beside the model card.

    Args:
        facts: `CompressResult.to_dict()`.
        corpus: what perplexity was measured on.
    """
    told = ("model", "method", "before", "after", "healed", "layer_forwards", "seconds", "peak_memory_bytes")
    kept = {name: facts[name] for name in told} | {"run": Path(str(facts["run"])).name}
    evaluation: dict[str, Any] | None = None
    if corpus is not None:
        evaluation = {"text": corpus.description, "sha256": corpus.sha256}
        evaluation |= {"windows": len(corpus), "seq_len": corpus.seq_len}
    keep_measures(out, {**kept, "evaluation": evaluation})
    write_report([out], out / REPORT)
    return out / REPORT


def _side_by_side(
    folder: Path,
    prompts: Sequence[str],
    new_tokens: int,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: Progress,
) -> list[Written]:
    """The original's answers and the model's, one model in memory at a time."""
    recipe = schema.load(folder / RECIPE_FILE)
    dense = open_variants(recipe, progress)[recipe.base]
    small = open_checkpoint(str(folder), progress=progress)
    columns = []
    for name, checkpoint in (("original", dense), (f"{len(recipe.layers)} layers", small)):
        with progress.task(f"answers of {name}", len(prompts)) as task:
            model, answers = load_model(checkpoint, device=device, dtype=dtype), []
            for prompt in prompts:
                answers.append(_answer(model, checkpoint, prompt, new_tokens))
                task.advance()
            del model
        columns.append((name, answers))
    return [
        Written(prompt=prompt, answers=[(name, answers[index]) for name, answers in columns])
        for index, prompt in enumerate(prompts)
    ]


def _answer(model: PreTrainedModel, checkpoint: Checkpoint, prompt: str, new_tokens: int) -> str:
    """The likeliest continuation of a prompt, or answer to it where the model has a chat template."""
    tokenizer = load_tokenizer(checkpoint)
    text = prompt
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    given = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
    generator: Any = model  # generate() is typed for a class that this one is only at run time
    with torch.inference_mode():
        ids = generator.generate(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            do_sample=False,
            max_new_tokens=new_tokens,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    answer: str = tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip() or "(nothing)"


def _check_generation(folders: Sequence[Path], prompts: Sequence[str], new_tokens: int) -> None:
    if not folders:
        raise UserError.of(
            where="--generate",
            expected="at least one model folder that intarsia has built",
            found="none among the runs",
            remedy="Name the output folder of `compress`, `build` or `heal` too.",
        )
    if new_tokens < 1 or not all(prompt.strip() for prompt in prompts) or not prompts:
        raise UserError.of(
            where="--generate",
            expected="prompts that are not empty, and at least 1 new token",
            found=f"{len(prompts)} prompts, {new_tokens} new tokens",
            remedy="Give others.",
        )


def _check_out(out: Path, *, overwrite: bool) -> None:
    if out.is_dir() or (out.exists() and not overwrite) or not out.parent.is_dir():
        found = "a folder" if out.is_dir() else "a file that is there already" if out.exists() else "no such folder"
        raise UserError.of(
            where=str(out),
            expected="the name of a new file in a folder that exists",
            found=found,
            remedy="Name another, or pass --overwrite to replace a file.",
        )
