"""`python -m benchmarks decoders [-o docs/FAMILIES.md] [KIND ...]`: what can be done with each decoder of transformers.

For each model type that has a class of a causal language model: its class's own config is made small, and a random
model of it goes through the checks of `intarsia anatomy check`. A minute or two for each ten of them.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from intarsia.activations.architecture_checks import check_rows
from intarsia.checkpoint.reader import architecture_of
from intarsia.errors import UserError

KNOWN, REMOVAL, REFUSED = "known", "removal", "refused"
_HEAD = """# Which models

Every decoder of transformers {version}, checked by `python -m benchmarks decoders -o docs/FAMILIES.md` on small
random models: {counts}. A multimodal model counts as its text model; its other parts are copied byte for byte.
The text models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL are read as Qwen2 and Qwen3. A model with code of its own is
refused, or has the tier removal with `--trust-remote-code` (in Python: `with intarsia.trust_remote_code():`); the
output then contains the same code.

- **known**: a family file describes the layers, which can be removed, merged and joined from pieces.
- **removal**: layers can be removed (`shortgpt`, `angular`, `sleb`, `reverse`, `taylor`, `magnitude`, `evolve`,
  `come-p[removals=true]`, and `tailor` with the operations remove and select), and the result can be healed. Removing
  layers equals skipping them.
- **refused**: neither, for the given reason.

Popular models without a family file, because it cannot describe them: `apertus` (its activation has two learned numbers
per layer, which channels of several layers would have to share), `glm4_moe` and `deepseek_v3` (their first layers are
dense, the others mixtures whose router has a correction for each expert), `gpt_oss` (expert matrices stored transposed,
gate and up rows interleaved, and a sink for each head), `qwen3_5` (three of four layers are linear attention, the
fourth has a gate).

| model type | tier | kinds of layers, or the reason |
|---|---|---|
"""


_MIXTURE = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [3, 7, 11, 15, 19, 23, 27, 31]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {**_MIXTURE, "first_k_dense_replace": 1, "moe_intermediate_size": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000.0}},
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "granitemoehybrid": {"layer_types": [*["linear_attention"] * 3, "full_attention"] * 8},
    "hunyuan_v1_moe": {"head_dim": 128},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "xmod": {"default_language": "en_XX"},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 6},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
}
"""What the config of a class lacks to be that of a model as people have them."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """One model type."""

    kind: str
    tier: str
    note: str


def kinds() -> list[str]:
    """Every model type that has a class of a causal language model."""
    return sorted(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in CONFIG_MAPPING)


def config_of(kind: str) -> PreTrainedConfig:
    """The config of a model type."""
    return CONFIG_MAPPING[kind](**_OWN.get(kind, {}))


def decoder(kind: str) -> Decoder:
    """What can be done with a model type, tried on a small model with its class's own config."""
    made: Any = None
    text: Any = None
    try:
        made = text = config_of(kind)
        if not made.is_encoder_decoder:
            text = made.get_text_config()
        architecture = architecture_of(text.to_dict(), where=kind)
        with tempfile.TemporaryDirectory() as folder:
            failed = [row for row in check_rows(architecture, Path(folder)) if row.result == "failed"]
            words = [row.why.replace(folder, "") for row in failed]
    except UserError as error:
        tier, note = REFUSED, error.problems[0].message.removeprefix(f"{kind}: ").rstrip(".")
    except Exception as error:  # one of a hundred classes of others
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        tier, note = REFUSED, f"its class cannot be run on tokens alone ({what})"
    else:
        kinds_of_layers = ", ".join(dict.fromkeys(architecture.layer_types or ("one",)))
        tier = REFUSED if failed else REMOVAL if architecture.removal_only else KNOWN
        note = words[0] if words else kinds_of_layers
    if text is not made:
        note = f"its text model {text.model_type}: {note}"
    return Decoder(kind=kind, tier=tier, note=note)


def page(decoders: list[Decoder]) -> str:
    """The table as Markdown."""
    counts = Counter(each.tier for each in decoders)
    words = ", ".join(f"{counts[tier]} {tier}" for tier in (KNOWN, REMOVAL, REFUSED))
    rows = "".join(f"| {each.kind} | {each.tier} | {each.note.replace('|', '/')} |\n" for each in decoders)
    return _HEAD.format(version=version("transformers"), counts=words) + rows


def main() -> None:
    """Check them all, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("kinds", nargs="*")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    found = []
    for kind in given.kinds or kinds():
        found.append(decoder(kind))
        print(f"{kind:28} {found[-1].tier:8} {found[-1].note[:230]}", flush=True)
    if given.out is not None:
        given.out.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
