"""What the program decides and makes, pinned: methods, heal stages, engines and merge operators on tiny models.

Everything goes through the command line (`run_cli` alone knows where it is) and is read from what it prints as JSON
and from the files it writes. Models are of exact numbers, so that they are the same on every machine. What is compared
exactly: which layers and pieces a recipe names, and weights that are copies. Everything computed in floating point is
compared within a tolerance, and where a choice follows from a fit only the result's quality is.

`python tests/test_golden.py --write [NAME]` records today's values anew: all, or those whose name contains NAME.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

from tests import families

GOLDEN = Path(__file__).with_name("golden")
Record = dict[str, Any]

# Flags of every method. Names of cases are those of the recorded values; flags may change, values may not.
COME = ["--method", "come"]
PAPER = ["--preset", "paper"]
PLANS: dict[str, list[str]] = {
    "come": COME,
    "come-sleb": [*COME, "--span-choice", "sleb"],
    "come-merge-3": [*COME, "--merge", "3"],
    "come-sharpness": [*COME, "--sharpness", "2"],
    "come-dominance": [*COME, "--dominance", "0.5"],
    "come-no-repeat": [*COME, "--no-repeat"],
    "come-average": [*COME, "--norm", "average"],
    "come-l2": [*COME, "--sensitivity", "l2"],
    "come-last-token": [*COME, "--distance", "last-token"],
    "come-weight-sum": [*COME, "--combine", "weight-sum"],
    "come-fuse": [*COME, "--combine", "fuse"],
    "come-paper": [*COME, *PAPER],
    "come-p": ["--method", "come-p"],
    "come-p-grid": ["--method", "come-p", "--granularity", "4", "--spans", "2"],
    "come-p-removals": ["--method", "come-p", "--removals"],
    "come-p-no-racing": ["--method", "come-p", "--no-racing", "--granularity", "5"],
    "come-p-paper": ["--method", "come-p", *PAPER],
    "sleb": ["--method", "sleb", "--criterion", "loss"],
    "sleb-no-racing": ["--method", "sleb", "--criterion", "loss", "--no-racing"],
    "shortgpt": ["--method", "shortgpt"],
    "angular": ["--method", "angular"],
    "laco": ["--method", "laco"],
    "laco-merge-2": ["--method", "laco", "--laco-merge", "2", "--laco-interval", "1", "--laco-lowest", "0"],
    "laco-paper": ["--method", "laco", "--laco-merge", "2", *PAPER],
    "mka": ["--method", "mka"],
    "taylor": ["--method", "taylor"],
    "magnitude": ["--method", "magnitude"],
    "reverse": ["--method", "reverse"],
}
DEEP = {"taylor+": ["--method", "taylor+"], "magnitude+": ["--method", "magnitude+"]}  # these protect six layers
OTHER_FAMILIES = {
    "qwen3": ["come", "come-p-grid", "sleb", "mka", "angular", "come-fuse", "laco-paper"],
    "gemma3": ["come", "come-p-grid", "come-average", "shortgpt", "taylor", "come-weight-sum"],
    "opt": ["come", "come-p-removals", "laco-merge-2", "magnitude", "come-paper", "come-merge-3"],
    "mixtral": ["come", "come-p-grid", "mka", "come-l2", "reverse", "come-fuse"],
}
IN_LOOP: dict[str, list[str]] = {
    "come": COME,
    "come-p": ["--method", "come-p", "--granularity", "4"],
    "sleb": ["--method", "sleb", "--criterion", "loss"],
    "laco": ["--method", "laco", "--laco-merge", "2"],
}
LAYERS = ["--layer-batch-tokens", "256", "--evaluations", "4"]
WHOLE = ["--step-tokens", "256", "--evaluations", "4", "--patience", "3"]
ALL = ["--lora", "none"]
TEACHER = ["--top-k", "none"]
# As published, with steps of the size that the values were recorded with.
PUBLISHED = ["--layer-inputs", "teacher", "--layer-kl", "1", "--layer-lr", "3e-4", *LAYERS, "--patience", "3"]
STUDENT = ["--layer-inputs", "student", "--layer-lr", "3e-4", *LAYERS, "--patience", "3"]
HEALS: dict[str, tuple[str, list[str]]] = {
    "closed-form": ("llama", ["--stages", "closed-form"]),
    "layerwise": ("llama", ["--stages", "layerwise", *PUBLISHED]),
    "layerwise-student": ("llama", ["--stages", "layerwise", *STUDENT]),
    "end-to-end": ("llama", ["--stages", "end-to-end", "--hidden", "1", *ALL, *TEACHER, *WHOLE]),
    "end-to-end-top-k": ("llama", ["--stages", "end-to-end", "--top-k", "16", "--cross-entropy", "0.5", *ALL, *WHOLE]),
    "lora": ("llama", ["--stages", "end-to-end", "--lora", "4", *TEACHER, *WHOLE]),
    "all": ("llama", ["--stages", "closed-form,layerwise,end-to-end", *PUBLISHED, *ALL, *TEACHER, *WHOLE[:2]]),
    "closed-form-opt": ("opt", ["--stages", "closed-form"]),
    "closed-form-mixtral": ("mixtral", ["--stages", "closed-form"]),
    "closed-form-gemma3": ("gemma3", ["--stages", "closed-form,layerwise", *PUBLISHED]),
    "layerwise-defaults": ("llama", ["--stages", "layerwise", *LAYERS]),
}
COMPRESSES = {"none": ["--heal", "none"], "closed-form": ["--heal", "closed-form"]}

# Layers in the notation of recipe files, one for every merge operator and every way to combine two models.
MERGES: dict[str, str] = {
    "linear": "merge: {from: [1, math:1], weights: [0.25, 0.75]}",
    "slerp": "merge: {method: slerp, from: [1, 2], weights: [0.25, 0.75]}",
    "task_arithmetic": "merge: {method: task_arithmetic, from: [math:1, code:1], weights: [0.75, 0.5]}",
    "ties": "merge: {method: ties, from: [math:1, code:1], weights: [1, 1], params: {density: 0.5, lambda: 0.75}}",
    "dare_linear": "merge: {method: dare_linear, from: [math:1, code:1], weights: [0.5, 1], params: {density: 0.5}}",
    "dare_ties": "merge: {method: dare_ties, from: [math:1, code:1], weights: [1, 1], params: {density: 0.5, seed: 3}}",
    "breadcrumbs": "merge: {method: breadcrumbs, from: [math:1, code:1], weights: [1, 1], "
    "params: {bottom: 0.5, top: 0.05}}",
    "model_stock": "merge: {method: model_stock, from: [math:1, code:1], weights: [1, 1]}",
    "parts": "merge: {from: [1, math:1], weights: [1, 0], scale: 0.5, mlp: {method: slerp, weights: [0.5, 0.5]}}",
    "concat": "concat: {cuts: [{from: 1, kv_groups: '0-1', channels: '0-29'}, "
    "{from: math:2, kv_groups: '1, 3', channels: '5-14'}]}",
    "half-layer": "concat: {cuts: [{from: 1, kv_groups: '0-3', channels: ''}, "
    "{from: 2, kv_groups: '', channels: '0-39'}]}",
}
OPERATORS = "task_arithmetic, linear, slerp, ties, dare_linear, dare_ties, breadcrumbs, model_stock"
FAMILY = """
base: {models}/llama
variants: {{math: {models}/math, code: {models}/code}}
target: {{layers: {target}}}
operations: [{operations}]
{settings}
objectives:
  - {{name: prose, loss: {text}, split: "0:0.3"}}
  - {{name: quiz, task: {quiz}, split: "0:0.5"}}
search: {{engine: {engine}, trials: {trials}, min_budget: 4, max_budget: 12, seed: 0, warm_start: [{starts}]}}
"""
SEARCHES: dict[str, dict[str, str]] = {
    "evolve": {
        "engine": "evolve",
        "operations": "remove, select, merge, concat",
        "settings": f"merge: {{methods: [{OPERATORS}]}}\noutput_scale: [0.5, 1.5]",
        "starts": "random-middle, shortgpt",
    },
    "evolve-heal": {
        "engine": "evolve",
        "operations": "remove, select, merge",
        "settings": "merge: {methods: [task_arithmetic]}\nheal: finalists",
        "starts": "random-middle",
    },
    "random": {
        "engine": "random",
        "operations": "remove, select, merge, concat",
        "settings": f"merge: {{methods: [{OPERATORS}], parts: separate}}",
        "starts": "",
    },
    "random-stack": {
        "engine": "random",
        "operations": "remove, select, stack",
        "settings": "",
        "starts": "",
        "target": "8",
    },
    "evolve-groups": {
        "engine": "evolve",
        "operations": "select, merge",
        "settings": "merge: {methods: [task_arithmetic, linear]}\nfusion: {groups: 3}",
        "starts": "",
        "target": "6",
    },
    "smac": {
        "engine": "smac",
        "operations": "remove, select, merge",
        "settings": "merge: {methods: [task_arithmetic, ties]}",
        "starts": "random-middle",
    },
}
TRIALS = (0, 2, 4, 6, 8, 13, 16, 18, 19)  # of these the recipes are looked at
TOLERANCES = {"merges": 1e-5, "plans": 1e-4}
FITTED = 1e-3  # where a system is solved or a layer is trained


# The program: all that a test knows of it.


def run_cli(argv: list[str | Path]) -> str:
    """Run the command line within this process and return what it prints; SystemExit if it fails."""
    from intarsia.cli.main import run

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            run([str(word) for word in argv])
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
    return out.getvalue()


def run_json(*argv: str | Path) -> Record:
    found: Record = json.loads(run_cli([*argv, "--json"]))
    return found


def perplexity(folder: Path, text: str) -> float:
    found = run_json("eval", "perplexity", folder, "--text", text, "--seq-len", "64", "--windows", "16")
    return float(found["value"])


def built(source: Path, out: Path, *flags: str) -> Record:
    """What the model is that is built from a run folder or a recipe: its recipe and its weights."""
    run_cli(["build", source, "-o", out, *flags, "--overwrite", "--json"])
    return {**recipe_in(out / "recipe" / "recipe.yaml"), "weights": weights_in(out / "model.safetensors")}


# What is written, in a form that does not depend on how it is laid out.


def recipe_in(path: Path) -> Record:
    """A recipe's decisions: a line a layer, a hash over all pieces, and the numbers, which are compared loosely."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    numbers: list[float] = []
    layers = [_plain(layer, "", path, numbers) for layer in data["layers"]]
    fitted = {str(layer): sorted(names) for layer, names in data.get("fitted", {}).items()}
    decided = [data["depth"], layers, data["spans"], fitted]
    return {
        "layers": [_summary(layer) for layer in layers],
        "spans": " ".join(f"{first}-{last}" for first, last in data["spans"]),
        "fitted": fitted,
        "sha256": hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest(),
        "numbers": numbers,
    }


def _plain(value: Any, key: str, recipe: Path, numbers: list[float]) -> Any:
    if key in ("weights", "params", "scale") and isinstance(value, int | float):
        numbers.append(float(value))
        return None
    if isinstance(value, dict) and list(value) == ["tensor"]:
        with safe_open(recipe.with_suffix(".safetensors"), "numpy") as side:
            return side.get_tensor(value["tensor"]).tolist()
    if isinstance(value, dict):
        inner = key if key in ("weights", "params") else None
        found = {name: _plain(value[name], inner or name, recipe, numbers) for name in sorted(value)}
        return {"norm": "fold", "fuse": False, **found} if key == "concat" else found
    if isinstance(value, list) and key not in ("kv_groups", "channels"):
        return [_plain(entry, key, recipe, numbers) for entry in value]
    if key in ("kv_groups", "channels"):
        return value if isinstance(value, list) else _indices(str(value))
    return str(value).removeprefix("base:") if key in ("from", "select", "base") else value


def _indices(text: str) -> list[int]:
    runs = (re.split(r"\s*-\s*", run.strip()) for run in text.split(",") if run.strip())
    return [index for run in runs for index in range(int(run[0]), int(run[-1]) + 1)]


def _summary(layer: Any) -> str:
    ((kind, op),) = layer.items()
    if kind == "select":
        return f"select {op}"
    if kind == "merge":
        return f"{op.get('method', 'linear')} {' '.join(op['from'])}"
    cuts = (f"{cut['from']}({len(cut.get('kv_groups', []))}, {len(cut.get('channels', []))})" for cut in op["cuts"])
    return f"{op['norm']}{' fuse' if op['fuse'] else ''} {' '.join(cuts)}"


def weights_in(path: Path) -> Record:
    """A weight file: names, types and shapes; a hash over all bytes; and two sizes for every layer and the rest.

    The second size is that of the tensor and a ramp added up, so that it depends on where every number stands.
    """
    whole, groups, layout = hashlib.sha256(), dict[str, list[float]](), []
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            layout.append([name, str(tensor.dtype), list(tensor.shape)])
            whole.update(tensor.contiguous().numpy().tobytes())
            layer = re.search(r"\.layers\.(\d+)\.", name)
            sums = groups.setdefault(layer[1] if layer else "rest", [0.0, 0.0])
            flat = tensor.double().flatten()
            sums[0] += float(flat.square().sum())
            sums[1] += float((flat + torch.linspace(-1, 1, flat.numel(), dtype=torch.float64)).square().sum())
    return {
        "layout": hashlib.sha256(json.dumps(layout).encode()).hexdigest(),
        "sha256": whole.hexdigest(),
        "sizes": {group: [size**0.5 for size in sums] for group, sums in groups.items()},
    }


def copies(found: Record) -> Record:
    """A record with the hash of its weights where all of them are copies, else with their sizes."""
    exact = all(line.startswith("select") for line in found["layers"]) and not found["fitted"]
    weights = {key: value for key, value in found["weights"].items() if key != ("sizes" if exact else "sha256")}
    return {**found, "weights": weights}


# Models and texts.


def exact(model: PreTrainedModel, seed: int, size: float = 0.1875) -> PreTrainedModel:
    """A model whose weights are random multiples of a power of two, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randint(0, 256, (4, *parameter.shape), generator=generator).sum(0).sub(510).float() / 128
            if ("norm" in name or ".ln_" in name) and name.endswith("weight"):
                parameter.copy_(1.0 + 0.25 * noise)
            else:
                parameter.copy_((0.5 if "embed" in name else size) * noise)
    return model


def taught() -> PreTrainedModel:
    """A Llama whose head was taught the text's next tokens, so that its layers matter for its perplexity."""
    model = exact(families.make_model("llama"), seed=0)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.from_numpy(np.load(GOLDEN / "head.npy")).float() / 64)
    return model


def changed(seed: int) -> PreTrainedModel:
    """A variant of it: every layer is a little different."""
    model = taught()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name:
                parameter.add_(torch.randint(-64, 65, parameter.shape, generator=generator).float() / 1024)
    return model


def teach() -> None:
    """Make the head of `taught`, once: its numbers are a part of the test."""
    model = exact(families.make_model("llama"), seed=0)
    ids = families.make_tokenizer()(families.sample_text(5000, seed=1))["input_ids"][:12288]
    tokens = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state[:, :-1].flatten(0, 1)
    head = torch.zeros(families.VOCABULARY, families.WIDTH, requires_grad=True)
    optimizer = torch.optim.Adam([head], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(hidden @ head.T, tokens[:, 1:].flatten()) + 1e-3 * head.square().mean()
        loss.backward()
        optimizer.step()
    print("perplexity", loss.detach().exp().item(), "largest", head.detach().abs().max().item())
    np.save(GOLDEN / "head.npy", head.detach().mul(64).round().clamp(-127, 127).to(torch.int8).numpy())


class Shop:
    """A folder with models and texts, in which cases run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = cache(self._model)
        self.words = root / "words.txt"
        self.words.write_text(families.sample_text(5000, seed=1), encoding="utf-8")
        self.search_text, self.eval_text = f"{self.words}#0:0.9", f"{self.words}#0.9:1"
        self.calibration = ["--calibration", self.search_text, "--tokens", "2048", "--seq-len", "64"]
        self.training = ["--data", self.search_text, "--tokens", "4096", "--seq-len", "64"]
        self.judging = ["--eval-text", self.eval_text, "--eval-windows", "16"]

    def _model(self, name: str) -> Path:
        makers: dict[str, Callable[[], PreTrainedModel]] = {
            "llama": taught,
            "deep": lambda: exact(families.make_model("llama", num_hidden_layers=10), seed=0),
            "math": lambda: changed(5),
            "code": lambda: changed(6),
        }
        make = makers.get(name, lambda: exact(families.make_model(name), seed=0))
        (self.root / "models").mkdir(exist_ok=True)
        return families.save(make(), self.root / "models" / name)

    @cached_property
    def quiz(self) -> Path:
        """48 questions whose right answer is the continuation of the text."""
        rng, words = random.Random(0), families.sample_text(2000, seed=2).replace(".", "").split()
        lines = []
        for number in range(48):
            at = rng.randrange(len(words) - 8)
            right, wrong = words[at + 6], rng.choice(words)
            if wrong == right:  # rounding would choose
                wrong = next(word for word in words[at:] if word != right)
            choices = [f" {right}", f" {wrong}"]
            gold = number % 2
            lines.append({"query": " ".join(words[at : at + 6]), "choices": choices[:: 1 - 2 * gold], "gold": gold})
        path = self.root / "quiz.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return path

    def new(self, name: str) -> Path:
        """A folder that is not there yet."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.root)) / "new"


# Cases.


def planned(shop: Shop, run: Path, model: str, layers: int, flags: list[str]) -> Record:
    """A plan's ladder, its least recipe, and the model built from it."""
    found = run_json("plan", shop.model(model), "--run", run, "--layers", str(layers), *shop.calibration, *flags)
    ladder = {str(step["layers"]): step["calibration_loss"] for step in found["ladder"]}
    out = run.with_name("built")
    recipe = copies(built(run, out))
    text = shop.eval_text
    return {"stopped": found["stopped"] is not None, "ladder": ladder, **recipe, "perplexity": perplexity(out, text)}


def plan_case(shop: Shop, model: str, layers: int, flags: list[str]) -> Record:
    return planned(shop, shop.new("plan"), model, layers, flags)


def in_loop_case(shop: Shop, flags: list[str]) -> Record:
    """A plan that repairs as it goes: what it decides follows from fits, so only what comes of it is compared."""
    found = planned(shop, shop.new("plan"), "llama", 4, [*flags, "--heal-in-loop"])
    return {"depth": len(found["layers"]), **{key: found[key] for key in ("stopped", "ladder", "perplexity")}}


@cache
def cut_of(shop: Shop, model: str) -> Path:
    run = shop.new("cut")
    run_cli(["plan", shop.model(model), "--run", run, "--layers", "4", *COME, *shop.calibration, "--json"])
    return run


def healed(shop: Shop, out: Path, model: str, flags: list[str]) -> Record:
    """Every stage's perplexities, and that of the model that is written."""
    found = run_json("heal", cut_of(shop, model), "-o", out, *shop.training, *shop.judging, *flags, "--answers", "2")
    stages = {
        stage["stage"]: [stage["held_out_perplexity"], stage["hidden_error"], stage["taken"]]
        for stage in found["stages"]
    }
    recipe = recipe_in(out / "recipe" / "recipe.yaml")
    return {"stages": stages, "depth": len(recipe["layers"]), "perplexity": perplexity(out, shop.eval_text)}


def heal_case(shop: Shop, model: str, flags: list[str]) -> Record:
    return healed(shop, shop.new("healed"), model, flags)


def compress_case(shop: Shop, flags: list[str]) -> Record:
    out = shop.new("compressed")
    words = ["--sparsity", "0.3", *COME, *shop.calibration, *shop.judging, "--answers", "2", "--no-speed", *flags]
    run_cli(["compress", shop.model("llama"), "-o", out, *words])
    recipe = recipe_in(out / "recipe" / "recipe.yaml")
    return {"layers": recipe["layers"], "perplexity": perplexity(out, shop.eval_text)}


def tasks_case(shop: Shop) -> Record:
    found = run_json("eval", "tasks", shop.model("llama"), "--tasks", shop.quiz)
    (scores,) = found["scores"]
    return {"items": scores["n"], **{name: metric["value"] for name, metric in scores["metrics"].items()}}


def compared(shop: Shop, out: Path, methods: str = "come,sleb[criterion=loss]", layers: str = "5,4,3") -> Record:
    flags = ["--methods", methods, "--layers", layers, "--heal", "none,closed-form"]
    judging = ["--eval-text", f"words={shop.eval_text}", "--eval-windows", "16", "--answers", "2"]
    found = run_json("compare", shop.model("llama"), "-o", out, *flags, *shop.calibration, *judging)
    return {f"{row['method']} {row['layers']} {row['heal']}": row["words"]["value"] for row in found["rows"]}


def compare_case(shop: Shop) -> Record:
    return compared(shop, shop.new("compared"))


def merge_case(shop: Shop, layer: str) -> Record:
    """A model with one layer made in some way, described by hand."""
    paths = {name: shop.model(name) for name in ("llama", "math", "code")}
    lines = ["version: 1", "variants:", f"  base: {{model: {paths['llama']}}}"]
    lines += [f"  {name}: {{model: {paths[name]}}}" for name in ("math", "code") if f"{name}:" in layer]
    lines += ["base: base", "depth: 6", "layers:", "- select: 0", f"- {layer}", "- select: 3", "- select: 5"]
    folder = shop.new("recipe").parent
    (folder / "recipe.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = built(folder / "recipe.yaml", folder / "out")
    return {**copies(found), "perplexity": perplexity(folder / "out", shop.eval_text)}


def family_file(shop: Shop, name: str, trials: str = "20") -> Path:
    path = shop.new("family").with_name("family.yaml")
    models = {shop.model(model).parent for model in ("llama", "math", "code")}.pop()
    entries = {
        "target": "4",
        "trials": trials,
        "models": models,
        "text": shop.words,
        "quiz": shop.quiz,
        **SEARCHES[name],
    }
    path.write_text(FAMILY.format(**entries), encoding="utf-8")
    return path


def searched(family: Path, run: Path, name: str) -> Record:
    """A search: its front, what its incumbent is worth, and every trial's recipe."""
    found = run_json("tailor", family, "-o", run, "--tokens", "512", "--device", "cpu")
    record: Record = {key: found[key] for key in ("trials", "failed")}
    if name == "smac":  # what its forests propose depends on the last digits
        return {**record, "front": len(found["front"]) > 0}
    rows = found["evaluated"]["rows"]
    record |= {
        "knee": found["knee"],
        "front": {str(row["trial"]): [row["prose"], row["quiz"]] for row in found["front"]},
        "evaluated": {row["model"]: [row["prose"]["value"], row["quiz"]["value"]] for row in rows},
    }
    if name != "evolve-heal":
        recipes = [built(run, run.with_name("trial"), "--trial", str(trial)) for trial in TRIALS]
        record["recipes"] = {str(trial): copies(recipe) for trial, recipe in zip(TRIALS, recipes, strict=True)}
    return record


def search_case(shop: Shop, name: str) -> Record:
    return searched(family_file(shop, name), shop.new("search"), name)


CASES: dict[str, dict[str, Callable[[Shop], Record]]] = {
    "plans": {
        **{f"llama {name}": partial(plan_case, model="llama", layers=3, flags=flags) for name, flags in PLANS.items()},
        **{f"deep {name}": partial(plan_case, model="deep", layers=7, flags=flags) for name, flags in DEEP.items()},
        **{
            f"{family} {name}": partial(plan_case, model=family, layers=4, flags=PLANS[name])
            for family, names in OTHER_FAMILIES.items()
            for name in names
        },
    },
    "in-loop": {name: partial(in_loop_case, flags=flags) for name, flags in IN_LOOP.items()},
    "heals": {name: partial(heal_case, model=model, flags=flags) for name, (model, flags) in HEALS.items()},
    "merges": {name: partial(merge_case, layer=layer) for name, layer in MERGES.items()},
    "verbs": {
        **{f"compress {name}": partial(compress_case, flags=flags) for name, flags in COMPRESSES.items()},
        "compare": compare_case,
        "tasks": tasks_case,
    },
    "searches": {name: partial(search_case, name=name) for name in SEARCHES},
}


def agree(found: Any, wanted: Any, tolerance: float, where: str = "") -> Iterator[str]:
    """Every difference between what was found and what was recorded; floating-point numbers may differ a little."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        if found.keys() != wanted.keys():
            yield f"{where}: {sorted(found)}, recorded {sorted(wanted)}"
        for key in found.keys() & wanted.keys():
            yield from agree(found[key], wanted[key], tolerance, f"{where}/{key}")
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for index, pair in enumerate(zip(found, wanted, strict=True)):
            yield from agree(*pair, tolerance, f"{where}/{index}")
    elif isinstance(wanted, float) and isinstance(found, float | int):
        if found != pytest.approx(wanted, rel=tolerance, abs=tolerance / 100):
            yield f"{where}: {found}, recorded {wanted}"
    elif found != wanted:
        yield f"{where}: {found!r}, recorded {wanted!r}"


# Tests.


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    root = tmp_path_factory.mktemp("golden")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTARSIA_CACHE", str(root / "cache"))
        yield Shop(root)


# Of searches the healed one and that of a library stay quick; tests/commands/test_compare.py covers `compare` too.
SLOW = {("verbs", "compare"), *(("searches", name) for name in SEARCHES if name not in ("evolve-heal", "smac"))}


@pytest.mark.parametrize(
    ("group", "name"),
    [
        pytest.param(group, name, marks=[pytest.mark.exhaustive] if (group, name) in SLOW else [])
        for group, cases in CASES.items()
        for name in cases
    ],
    ids=lambda word: word,
)
def test_golden(group: str, name: str, shop: Shop) -> None:
    wanted = json.loads((GOLDEN / f"{group}.json").read_text(encoding="utf-8"))[name]
    found = json.loads(json.dumps(CASES[group][name](shop)))
    differences = list(agree(found, wanted, TOLERANCES.get(group, FITTED)))
    assert not differences, "\n".join(differences)


JOBS: dict[str, Callable[[Shop], Callable[[Path], Record]]] = {
    "plan": lambda shop: partial(planned, shop, model="llama", layers=3, flags=PLANS["come-p-grid"]),
    "heal": lambda shop: partial(healed, shop, model="llama", flags=HEALS["all"][1]),
    "compare": lambda shop: partial(compared, shop, methods="come", layers="5,3"),
    "tailor": lambda shop: partial(searched, family_file(shop, "evolve-heal", trials="8"), name="evolve-heal"),
}


@contextlib.contextmanager
def durable_writes(stop_at: int | None) -> Iterator[list[str]]:
    """Counts what is made durable in a block; with `stop_at`, Ctrl-C comes before the one of that number."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace"):

            def counted(real: Callable[..., Any], *args: Any, **flags: Any) -> Any:
                seen.append(str(args[0]))
                if len(seen) == stop_at:
                    raise KeyboardInterrupt
                return real(*args, **flags)

            patch.setattr(os, name, partial(counted, getattr(os, name)))
        yield seen


# Killed in the midst of a search: tests/commands/test_tailor.py.
@pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=[pytest.mark.exhaustive] if verb == "tailor" else []) for verb in JOBS]
)
def test_interrupted_and_given_again(verb: str, shop: Shop) -> None:
    job = JOBS[verb](shop)
    with durable_writes(None) as seen:
        wanted = job(shop.new(verb))
    for share in (0.25, 0.6):
        out = shop.new(verb)
        with pytest.raises(SystemExit), durable_writes(int(len(seen) * share)):
            job(out)
        differences = list(agree(job(out), wanted, 1e-7))
        assert not differences, "\n".join(differences)


def write(only: str) -> None:
    """Record today's values."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["INTARSIA_CACHE"] = str(Path(folder) / "cache")
        shop = Shop(Path(folder))
        for group, cases in CASES.items():
            path = GOLDEN / f"{group}.json"
            values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            fresh = {name: case(shop) for name, case in cases.items() if only in f"{group} {name}"}
            values = {name: fresh.get(name, values.get(name)) for name in cases}
            path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if "--teach" in sys.argv:
        teach()
    elif "--write" in sys.argv:
        write(sys.argv[-1] if sys.argv[-1] != "--write" else "")
    else:
        sys.exit(f"usage: {sys.argv[0]} --write [NAME]")
