"""LinearPatch as the benchmark `peers` measures it, against the paper's formula on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers import hadamard, patched
from intarsia.healing.pipeline import HealContext
from intarsia.run_dir import RunDir
from tests.conftest import InMemory, Opened
from tests.pruning.by_hand import residual_stream
from tests.pruning.conftest import corpus_of
from tests.recipes_by_hand import recipe_of, select


@pytest.mark.parametrize("size", [1, 2, 8, 12, 20, 28, 36, 576, 896])
def test_hadamard(size: int) -> None:
    found = hadamard(size)
    assert found.shape == (size, size) and bool((found.abs() == 1).all())
    assert torch.equal(found @ found.T, size * torch.eye(size, dtype=torch.float64))


def test_no_hadamard_matrix() -> None:
    with pytest.raises(ValueError, match="size 6 "):
        hadamard(6)


def test_a_patch_is_between_the_layers_around_a_dropped_run(
    checkpoint_of: Opened, resident_of: InMemory, tmp_path: Path
) -> None:
    checkpoint, resident, corpus = checkpoint_of("llama"), resident_of("llama"), corpus_of()
    recipe = recipe_of(str(checkpoint.folder), [select(layer) for layer in (0, 1, 4, 5)])
    run = RunDir(tmp_path / "run")
    with run.opened({}):
        context = HealContext(
            run=run,
            variants={"base": checkpoint},
            load=lambda: resident,
            device=torch.device("cpu"),
            calibration=corpus,
            selection=corpus,
        )
        model = patched(context, recipe)
    states = residual_stream(resident, corpus)
    rotation = hadamard(32) / 32**0.5
    after, before = ((states[depth] @ rotation).abs().mean(dim=1) for depth in (4, 2))
    scales = (after / before).mean(dim=0)
    by_hand = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
    kept = [by_hand.model.layers[layer] for layer in (0, 1, 4, 5)]
    by_hand.model.layers = torch.nn.ModuleList(kept)
    patch = (rotation @ torch.diag(scales) @ rotation.T).float()
    kept[1].register_forward_hook(
        lambda _, args, out: (out[0] @ patch, *out[1:]) if isinstance(out, tuple) else out @ patch
    )
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    with torch.no_grad():
        wanted, found = (each(input_ids=corpus.input_ids, use_cache=False).logits for each in (by_hand, model))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert context.facts["forwards"] == 4 + 1
