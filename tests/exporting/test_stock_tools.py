"""Tools that take stock checkpoints take what is built: transformers' pipeline, PEFT, mergekit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from intarsia.building.materialize import materialize
from intarsia.checkpoint.reader import Checkpoint
from intarsia.commands.verify import verify
from tests import families
from tests.conftest import Folder
from tests.recipes_by_hand import recipe_of, select, shared

IDS = torch.randint(2, families.VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def built(model_folder: Folder, tmp_path: Path) -> Path:
    source = model_folder("llama")
    checkpoint = Checkpoint.open(source, model=str(source))
    recipe = recipe_of(str(source), [select(0), shared(checkpoint.architecture, (1, 2)), select(4)])
    materialize(recipe, {"base": checkpoint}, tmp_path / "out")
    return tmp_path / "out"


def test_transformers_pipeline(built: Path) -> None:
    from transformers import pipeline

    tokenizer = AutoTokenizer.from_pretrained(built)
    prompt = families.sample_text(12).strip()
    writer: Any = pipeline("text-generation", model=str(built), tokenizer=tokenizer)
    (found,) = writer(prompt, max_new_tokens=8, do_sample=False)
    model: Any = AutoModelForCausalLM.from_pretrained(built)
    ids = tokenizer(prompt, return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=8, do_sample=False)[0]
    assert found["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert len(expected) > ids["input_ids"].shape[1]


def test_peft_adapter_trains_and_merges(built: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(built)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        losses.append(adapted(IDS, labels=IDS).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    adapted.eval()
    with torch.no_grad():
        expected = adapted(IDS).logits
        merged = adapted.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        AutoTokenizer.from_pretrained(built).save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    assert verify(tmp_path / "merged").kept


@pytest.mark.exhaustive
def test_mergekit_merges(built: Path, tmp_path: Path) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed: `pip install mergekit`")
    other = Path(shutil.copytree(built, tmp_path / "other"))
    original = load_file(built / "model.safetensors")
    save_file({name: -tensor for name, tensor in original.items()}, other / "model.safetensors", {"format": "pt"})
    (tmp_path / "merge.yaml").write_text(
        f"merge_method: linear\ndtype: float32\nmodels:\n"
        f"  - model: {built}\n    parameters: {{weight: 0.25}}\n"
        f"  - model: {other}\n    parameters: {{weight: 0.75}}\n"
    )
    code = "import sys; from mergekit.scripts.run_yaml import main; sys.exit(main())"
    command = [sys.executable, "-c", code, str(tmp_path / "merge.yaml"), str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        torch.testing.assert_close(found[name], -0.5 * tensor, rtol=1e-6, atol=1e-7)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.num_hidden_layers == 3
