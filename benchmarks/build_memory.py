"""Peak memory of building a checkpoint, on a generated model of 2.6 GB, at two depths.

Each build runs in a process of its own. Reported is its peak resident memory above what the process holds before it
opens the model, in MB and in layers once the embedding is taken off: the aim is under 3, whatever the depth.

    python -m benchmarks build_memory -o out/bench/build_memory
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def generate(folder: Path, depth: int) -> None:
    """Write a model of random weights, tensor by tensor."""
    from intarsia.architecture.detect import detect
    from intarsia.checkpoint.writer import TensorPlan, checkpoint_writer

    config = {**CONFIG, "num_hidden_layers": depth}
    architecture = detect(config)
    shapes = {
        "model.embed_tokens.weight": (architecture.vocabulary, architecture.width),
        "model.norm.weight": (architecture.width,),
    }
    for layer in range(depth):
        shapes |= {
            architecture.tensor_name(layer, local): shape for local, shape in architecture.layer_shapes().items()
        }
    plans = [TensorPlan(name=name, dtype=torch.bfloat16, shape=shape) for name, shape in shapes.items()]
    chance = torch.Generator().manual_seed(0)
    with checkpoint_writer(folder, plans, overwrite=True, max_shard_bytes=10**9) as writer:
        for plan in plans:
            writer.write(plan.name, torch.randn(plan.shape, generator=chance).mul_(0.02).to(torch.bfloat16))
        (writer.folder / "config.json").write_text(json.dumps(config))


def build(folder: Path, out: Path, depth: int) -> None:
    """In a process of its own: merge every pair of layers, half of each, and print the peak above the start."""
    import psutil

    from intarsia.architecture.detect import detect
    from intarsia.architecture.spec import Part
    from intarsia.commands.build import build_recipe
    from intarsia.evaluation.speed import peak_memory_bytes
    from intarsia.recipe.algebra import concat_of
    from intarsia.recipe.recipe import Variant, identity

    architecture = detect({**CONFIG, "num_hidden_layers": depth})
    whole = identity(Variant(name="base", model=str(folder)), depth)
    groups, channels = architecture.n_kv_heads // 2, architecture.n_channels // 2
    kept: dict[Part, Sequence[int]] = {"attention": range(groups), "mlp": range(channels)}
    halves: dict[Part, float] = {"attention": 0.5, "mlp": 0.5}
    layers = [
        concat_of(
            whole.layers[index : index + 2], [kept] * 2, weights=[halves] * 2, norm="fold", architecture=architecture
        )
        for index in range(0, depth, 2)
    ]
    before = psutil.Process().memory_info().rss
    build_recipe(whole.with_layers(layers), out, overwrite=True)
    print(peak_memory_bytes() - before)


def main() -> None:
    """Generate, build, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/bench/build_memory"))
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        build(Path(given.child[0]), Path(given.child[1]), int(given.child[2]))
        return
    from intarsia.architecture.detect import detect

    architecture = detect({**CONFIG, "num_hidden_layers": 2})
    layer = architecture.layer_parameters * 2
    embedding = architecture.vocabulary * architecture.width * 2
    print(f"a layer {layer / 1e6:.0f} MB, the embedding {embedding / 1e6:.0f} MB\n")
    print("| depth | checkpoint | peak above start | less the embedding, in layers |")
    print("|---:|---:|---:|---:|")
    for depth in given.depths:
        source = given.out / f"source-{depth}"
        generate(source, depth)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        command = [sys.executable, "-m", "benchmarks.build_memory", "--child"]
        done = subprocess.run(
            [*command, str(source), str(given.out / "built"), str(depth)], check=True, capture_output=True, text=True
        )
        peak = int(done.stdout.strip().splitlines()[-1])
        print(f"| {depth} | {size / 1e9:.2f} GB | {peak / 1e6:.0f} MB | {(peak - embedding) / layer:.2f} |", flush=True)


if __name__ == "__main__":
    main()
