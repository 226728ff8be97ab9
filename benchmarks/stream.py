"""Peak memory of planning, healing and building a model that is streamed, on generated weights of real shapes.

The job runs in a process of its own: CoMe, the closed form, the build, and the perplexity before and after. Reported
is the largest resident memory of that process, mapped pages included, less what Python and its libraries take before
the model is opened; against two and a half layers, plus embeddings, plus the budget for hidden states (--memory).
On Linux the kernel's counter is reset between the parts of the job, so that each has a peak of its own.

    python -m benchmarks stream --shape llama-3.2-1b -o out/bench/stream
    python -m benchmarks stream --tokens 65536 --seq-len 512 --memory 256    # moments: hours on a core
    python -m benchmarks stream --tokens 16384 --depth 3 --layers 2          # the same memory, sooner

The folder needs room for the model twice; what is generated is deleted afterwards.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from intarsia.progress import Progress, Task, reporting_to

_WORDS = 4096
_SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
}


def generate(folder: Path, config: dict[str, Any]) -> None:
    """Write a model of random bfloat16 weights, tensor by tensor, and a tokenizer of made-up words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from intarsia.architecture.detect import detect
    from intarsia.checkpoint.writer import TensorPlan, checkpoint_writer

    config = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", **config}
    architecture = detect(config)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (architecture.vocabulary, architecture.width)}
    for layer in range(architecture.n_layers):
        shapes |= {
            architecture.tensor_name(layer, local): shape for local, shape in architecture.layer_shapes().items()
        }
    shapes["model.norm.weight"] = (architecture.width,)
    if not architecture.tied:
        shapes["lm_head.weight"] = (architecture.vocabulary, architecture.width)
    plans = [TensorPlan(name=name, dtype=torch.bfloat16, shape=shape) for name, shape in shapes.items()]
    chance = torch.Generator().manual_seed(0)
    with checkpoint_writer(folder, plans, overwrite=True, max_shard_bytes=2 * 10**9) as writer:
        for plan in plans:
            writer.write(plan.name, _random(plan.shape, chance))
        (writer.folder / "config.json").write_text(json.dumps(config))
    words = {f"w{number}": number for number in range(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(folder)


def _random(shape: tuple[int, ...], chance: torch.Generator) -> torch.Tensor:
    """Norm weights of one; others small, filled in parts so that no float32 copy of a whole tensor is made."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    found = torch.empty(shape, dtype=torch.bfloat16)
    for rows in found.split(1024):
        rows.copy_(torch.empty(rows.shape).uniform_(-0.035, 0.035, generator=chance))
    return found


def write_text(path: Path, tokens: int) -> None:
    """Words in an order that is not all chance."""
    rng = random.Random(0)
    found, last = [], 0
    for _ in range(tokens + tokens // 2):
        last = (last * 7 + rng.choice([1, 2, 3])) % _WORDS
        found.append(f"w{last}")
    path.write_text("\n".join(" ".join(found[start : start + 512]) for start in range(0, len(found), 512)))


def peak_since_reset() -> int:
    """The largest resident memory since the last call, in bytes; on Linux alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    Path("/proc/self/clear_refs").write_text("5")
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


class Peaks(Progress, Task):
    """Progress that notes the largest resident memory of every part of the job, by the title of its task."""

    def __init__(self) -> None:
        self.parts: dict[str, int] = {}
        self._under_way = ["hashes, recipes, build"]

    def note(self, text: str = "") -> None:
        """Note the peak of the part that just ended, under the current task's name; the loss apart from the layers."""
        from intarsia.evaluation.speed import peak_memory_bytes

        name = self._under_way[-1]
        resets = sys.platform == "linux"
        self.parts[name] = max(self.parts.get(name, 0), peak_since_reset() if resets else peak_memory_bytes())
        if text == "loss":
            self._under_way[-1] = "losses, from logits"

    def say(self, text: str) -> None:
        """For whoever watches, with the time."""
        print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)

    @contextmanager
    def task(self, title: str, total: float, *, units: float | None = None) -> Iterator[Peaks]:
        """A part that has a name."""
        self.note()
        self._under_way.append(re.sub(r"[0-9]+ (to [0-9]+ )?", "", title))
        self.say(f"{title} ...")
        try:
            yield self
        finally:
            self.note()
            self._under_way.pop()


def work(given: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: the whole job, and what memory it took."""
    import psutil

    from intarsia.commands.compress import compress
    from intarsia.options import EvalSpec, Output, Runtime, Target, TextSpec

    # What the job imports on its way counts as the base.
    for name in ("accelerate", "tokenizers", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    base, peaks = psutil.Process().memory_info().rss, Peaks()
    words = (str(given.out / "words.txt"),)
    with reporting_to(peaks):
        result = compress(
            str(given.out / "source"),
            Output(path=given.out / "small", overwrite=True),
            Target(layers=given.layers),
            method=given.method,
            text=TextSpec(sources=words, tokens=given.tokens, seq_len=given.seq_len),
            evaluation=EvalSpec(text=words, windows=(2,)),
            runtime=Runtime(
                stream=not given.in_memory, memory=str(int(given.memory * 1e6)), batch_tokens=given.batch_tokens
            ),
        )
    peaks.note()
    return {
        "base": base,
        "parts": peaks.parts,
        "peak": max(peaks.parts.values()),
        "layer_forwards": result.layer_forwards,
        "healed": result.healed,
        "before": result.before and result.before.perplexity and result.before.perplexity.value,
        "after": result.after and result.after.perplexity and result.after.perplexity.value,
    }


def main() -> None:
    """Generate, run, report, delete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/bench/stream"))
    parser.add_argument("--shape", choices=_SHAPES, default="llama-3.2-1b")
    parser.add_argument("--depth", type=int, help="layers of the generated model (default: the shape's)")
    parser.add_argument("--layers", type=int, help="layers to keep (default: three quarters)")
    parser.add_argument("--method", default="come")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--memory", type=float, default=100.0, help="budget for hidden states in MB")
    parser.add_argument("--in-memory", action="store_true", help="the same without --stream, to compare with")
    parser.add_argument("--keep", action="store_true", help="keep the generated model, and use one that is there")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(work(given)))
        return
    config = {"model_type": "llama", **_SHAPES[given.shape]}
    config["num_hidden_layers"] = given.depth or config["num_hidden_layers"]
    given.layers = given.layers or config["num_hidden_layers"] * 3 // 4
    given.out.mkdir(parents=True, exist_ok=True)
    if not (given.keep and (given.out / "source" / "config.json").exists()):
        generate(given.out / "source", config)
    write_text(given.out / "words.txt", given.tokens)
    from intarsia.architecture.detect import detect

    architecture = detect(config)
    options = ["--layers", "--method", "--tokens", "--seq-len", "--batch-tokens", "--memory"]
    values = [given.layers, given.method, given.tokens, given.seq_len, given.batch_tokens, given.memory]
    command = [sys.executable, "-m", "benchmarks.stream", "--child", "-o", str(given.out)]
    command += [text for option, value in zip(options, values, strict=True) for text in (option, str(value))]
    command += ["--in-memory"] * given.in_memory
    started = time.perf_counter()
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        for name in ("small", "small.run") if given.keep else ("source", "small", "small.run"):
            shutil.rmtree(given.out / name, ignore_errors=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    report(given, architecture, found, time.perf_counter() - started)


def report(given: argparse.Namespace, architecture: Any, found: dict[str, Any], seconds: float) -> None:
    """One table row, and its numbers."""
    layer = 2 * architecture.layer_parameters
    outside = 2 * (architecture.vocabulary * architecture.width * (1 if architecture.tied else 2) + architecture.width)
    bound = 2.5 * layer + outside + given.memory * 1e6
    own = found["peak"] - found["base"]
    print(f"{given.shape}, {architecture.n_layers} to {given.layers} layers, {given.tokens} tokens, {given.method}")
    print("| weights | a layer | embeddings | hidden budget | bound | peak above the base |")
    print("|---:|---:|---:|---:|---:|---:|")
    cells = (outside + architecture.n_layers * layer, layer, outside, given.memory * 1e6, bound, own)
    print("| " + " | ".join(f"{cell / 1e6:,.0f} MB" for cell in cells) + " |\n")
    print(f"base {found['base'] / 1e6:.0f} MB, peak with it {found['peak'] / 1e6:.0f} MB, {seconds:.0f} s")
    print(f"perplexity {found['before']:.1f} -> {found['after']:.1f}, {found['layer_forwards']:.1f} layer-forwards")
    print(f"healed: {found['healed']}\n\n| part | peak above the base |\n|---|---:|")
    for part, peak in found["parts"].items():
        print(f"| {part} | {(peak - found['base']) / 1e6:,.0f} MB |")
    print("under the bound" if own <= bound else "OVER the bound")


if __name__ == "__main__":
    main()
