"""llama.cpp runs what is exported as transformers runs the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.commands.export import export
from intarsia.errors import UserError
from tests import families

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip(
    "llama_cpp",
    reason="llama.cpp is not installed: `make test-rest` builds it where there is a C++ compiler",
)

IDS = torch.randint(2, families.VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(3))
PROMPTS = (
    "The capital of France is",
    "Once upon a time there were 1234 geese, and they",
    "def fibonacci(n):\n    if n < 2:\n",
)
TEXTS = (
    *PROMPTS,
    "  two  spaces\tand a tab\n\n\nthree lines",
    "naïve café, 漢字 and 🦢🦢",
    "don't I'll we've 12,345.678",
    "",
)


def opened(file: Path, *, positions: int = 128, **options: Any) -> Any:
    return llama_cpp.Llama(
        model_path=str(file), n_ctx=positions, n_threads=1, n_threads_batch=1, verbose=False, **options
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama-bias", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        (
            "llama",
            {
                "head_dim": 64,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 256,
                },
            },
        ),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 256,
                }
            },
        ),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"use_sliding_window": False, "layer_types": None}),
    ],
    ids=["llama", "biases", "tied", "linear", "llama3", "yarn", "mistral", "qwen2", "qwen3"],
)
def test_logits(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = families.make_model(family, **changes)
    export(str(families.save(model, tmp_path / "model")), tmp_path / "m.gguf", gguf="F32")
    # Its cache is in 16 bits unless asked otherwise.
    wide = llama_cpp.GGML_TYPE_F32
    runtime = opened(tmp_path / "m.gguf", logits_all=True, type_k=wide, type_v=wide)
    runtime.eval(IDS[0].tolist())
    found = np.array(runtime.scores[: IDS.shape[1]])
    np.testing.assert_allclose(found, model(IDS).logits[0].numpy(), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    try:
        return open_checkpoint("demo")
    except UserError as error:
        pytest.skip(f"the demo model cannot be had here: {error}")


@pytest.mark.exhaustive
@pytest.mark.registry
@torch.no_grad()
def test_demo_writes_the_same_tokens(demo: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "demo.gguf"
    assert export("demo", file, gguf="F16").bytes > 200e6
    tokenizer = AutoTokenizer.from_pretrained(demo.folder)
    model: Any = AutoModelForCausalLM.from_pretrained(demo.folder, dtype=torch.float16).eval()
    runtime = opened(file)
    for text in TEXTS:
        assert runtime.tokenize(text.encode(), add_bos=False, special=True) == tokenizer(text)["input_ids"]
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        found: list[int] = []
        for token in runtime.generate(ids["input_ids"][0].tolist(), temp=0.0, repeat_penalty=1.0):
            if token == tokenizer.eos_token_id or len(found) == len(expected):
                break
            found.append(token)
        assert found == [token for token in expected if token != tokenizer.eos_token_id]


def sentencepiece_like() -> Any:
    """BPE over characters with a space's mark and bytes for what is not known, as Llama 2 and Mistral have it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(families.sample_text(600).replace("\n", " ").split("."), trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    # Tokens of bytes are ordinary ones to a model, and no text spells them.
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = [entry for entry in values["added_tokens"] if entry["id"] < len(special)]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(values)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_sentencepiece_like_tokens(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like()
    model = families.make_model("llama", vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = export(str(tmp_path / "model"), tmp_path / "m.gguf", gguf="F32")
    assert result.tokenizer == "llama, default"
    runtime = opened(tmp_path / "m.gguf")
    words = families.sample_text(60).replace("\n", " ")
    for text in (words, "  two  spaces", "naïve 漢字", "UPPER and 123", "a"):
        expected = tokenizer(text)["input_ids"]
        assert runtime.tokenize(text.encode(), add_bos=True, special=False) == expected
    assert expected[0] == 1
    assert runtime.detokenize(tokenizer(words)["input_ids"][1:]).decode().strip() == words.strip()
    assert len(tokenizer(words)["input_ids"]) < 0.6 * len(words), "merges took place"
