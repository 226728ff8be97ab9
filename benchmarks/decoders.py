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

from intarsia.checkpoint.reader import architecture_of
from intarsia.commands.anatomy import check_rows
from intarsia.errors import UserError

KNOWN, REMOVAL, REFUSED = "known", "removal", "refused"
_HEAD = """# Which models

Every decoder of transformers {version}, as `python -m benchmarks decoders -o docs/FAMILIES.md` found it on small
random models: {counts}. A multimodal model is what its text model is; the rest goes along byte for byte.

- **known**: a family file describes the layers, which can be removed, merged and joined from pieces.
- **removal**: layers can be removed (`shortgpt`, `angular`, `sleb`, `reverse`, `taylor`, `magnitude`,
  `come-p[removals=true]`), and what stays can be healed. A model without layers is exactly the one in which they are
  skipped.
- **refused**: neither, for the reason that is given.

| model type | tier | kinds of layers, or why |
|---|---|---|
"""


_MIXTURE = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [3, 7, 11, 15, 19, 23, 27, 31]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {**_MIXTURE, "first_k_dense_replace": 1, "moe_intermediate_size": 64},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "granitemoehybrid": {"layer_types": [*["linear_attention"] * 3, "full_attention"] * 8},
    "hunyuan_v1_moe": {"head_dim": 128},
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
    try:
        made = config_of(kind)
        if made.get_text_config() is not made:
            return Decoder(kind=kind, tier="", note=f"around a text model: {made.get_text_config().model_type}")
        architecture = architecture_of(made.to_dict(), where=kind)
        with tempfile.TemporaryDirectory() as folder:
            failed = [row for row in check_rows(architecture, Path(folder)) if row.result == "failed"]
    except UserError as error:
        problem = error.problems[0]
        return Decoder(kind=kind, tier=REFUSED, note=problem.message.removeprefix(f"{kind}: ").rstrip("."))
    except Exception as error:  # one of a hundred classes of others
        return Decoder(kind=kind, tier=REFUSED, note=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    if failed:
        return Decoder(kind=kind, tier=REFUSED, note=f"{failed[0].check}: {failed[0].note.replace(folder, '')}")
    found = ", ".join(dict.fromkeys(architecture.layer_types or ("one",)))
    return Decoder(kind=kind, tier=REMOVAL if architecture.removal_only else KNOWN, note=found)


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
