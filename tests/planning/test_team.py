"""Workers that measure the calibration set together decide what one process decides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.building.resident import Resident
from intarsia.calibration.corpus import Corpus
from intarsia.calibration.stats import last_real
from intarsia.checkpoint.hashing import scan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError
from intarsia.healing.cluster import Cluster, own_workers
from intarsia.planning import share as share_module
from intarsia.planning.candidates import losses_with, normed_with
from intarsia.planning.intermediate import Intermediate
from intarsia.planning.ladder import climb, planner_of
from intarsia.planning.run_folder import RunFolder
from intarsia.planning.settings import ComeSettings
from intarsia.planning.share import Share
from intarsia.planning.team import Team
from intarsia.recipe.recipe import Recipe, Variant, identity
from intarsia.recipe.schema import content_hash
from tests import families
from tests.conftest import InMemory, Opened
from tests.planning.conftest import corpus_of
from tests.planning.dying import DyingShare
from tests.recipes_by_hand import select, shared

CPU = torch.device("cpu")
FAMILY = "qwen2"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three workers, as threads of this process."""
    distributed = pytest.importorskip("distributed")
    options = {"processes": False, "n_workers": 3, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as workers, distributed.Client(workers) as client:
        yield Cluster(client)


def whole() -> Recipe:
    return identity(Variant(name="base", model="tiny", sha256="0" * 64), families.DEPTH)


def share_of(checkpoint: Checkpoint, corpus: Corpus, **changes: Any) -> Share:
    """All of the calibration set."""
    given: dict[str, Any] = {
        "model": str(checkpoint.folder),
        "revision": None,
        "sha256": scan(checkpoint),
        "device": "cpu",
        "dtype": None,
        "stream": False,
        "memory_bytes": None,
        "folder": None,
        "batch_tokens": 2 * corpus.seq_len,
        "behind_final_norm": False,
        "number": 0,
        "ids_NT": corpus.input_ids,
        "mask_NT": corpus.mask,
    }
    return Share(**{**given, **changes})


def alone(resident: Resident, corpus: Corpus, **changes: Any) -> Intermediate:
    return Intermediate(resident, corpus, whole().layers, batch_tokens=2 * corpus.seq_len, **changes)


def together(checkpoint: Checkpoint, team: Team, corpus: Corpus, **changes: Any) -> Intermediate:
    """What decides: its layers stay in their files."""
    return alone(Resident(checkpoint, device=CPU, stream=True), corpus, team=team, **changes)


def team_on(cluster: Cluster, workers: int, share: Share) -> Team:
    return Team(cluster, share, workers=sorted(cluster.client.nthreads())[:workers])


def same(model: Intermediate, other: Intermediate) -> None:
    """The same statistics within what the order of float additions costs."""
    torch.testing.assert_close(other.losses_N, model.losses_N, rtol=1e-5, atol=1e-5)
    assert torch.equal(other.counts_N, model.counts_N)
    assert len(other.measures) == len(model.measures) == model.depth
    for found, wanted in zip(other.measures, model.measures, strict=True):
        assert found.tokens == wanted.tokens
        assert found.influence == pytest.approx(wanted.influence, rel=1e-4, abs=1e-6)
        for part, sums in wanted.channels.items():
            torch.testing.assert_close(found.channels[part].mean_absolute_C, sums.mean_absolute_C, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(
                found.channels[part].root_mean_square_C, sums.root_mean_square_C, rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_number_is_the_same(
    workers: int, padded: bool, cluster: Cluster, checkpoint_of: Opened, resident_of: InMemory
) -> None:
    """Before and behind a change: sums, losses of candidates on parts of the text, states of single tokens."""
    corpus, checkpoint = corpus_of(padded=padded, sequences=7), checkpoint_of(FAMILY)
    team = team_on(cluster, workers, share_of(checkpoint, corpus))
    model, other = alone(resident_of(FAMILY), corpus), together(checkpoint, team, corpus)
    for first in (True, False):
        if first:
            for each in (model, other):
                each.refresh()
        else:
            for each in (model, other):
                each.replace(2, 2, shared(model.anatomy, [2, 3]))
        same(model, other)
        assert other.layer_forwards == pytest.approx(model.layer_forwards), "prefixes are not run again"
        for tokens in ("all-tokens", "last-token"):
            assert other.span_distance(1, 2, tokens) == pytest.approx(model.span_distance(1, 2, tokens), rel=1e-4)
        keep_NT = last_real(corpus.input_ids, corpus.mask)
        torch.testing.assert_close(other.tokens_at(3, keep_NT), model.tokens_at(3, keep_NT), rtol=1e-4, atol=1e-5)
        ops = [shared(model.anatomy, [0, 1])]
        for part in (slice(None), slice(0, 1), slice(1, 5), slice(4, 7)):
            wanted, found = (losses_with(each, 0, 2, ops, sequences=part) for each in (model, other))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        states = [normed_with(each, 1, 1, [select(4)], sequences=slice(0, 4)) for each in (model, other)]
        torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)
        assert other.layer_forwards == pytest.approx(model.layer_forwards)
    team.close()
    assert not share_module._MODELS and not share_module._RESIDENTS, "workers let go of what they hold"
    assert team.peak_memory_bytes > 0


METHODS = {
    "come": ComeSettings(),
    "come-p": ComeSettings(granularity=3),
    "shortgpt": None,
    "sleb": None,
    "angular": None,
    "mka": None,
    "laco": None,
}


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_is_the_same(
    method: str, cluster: Cluster, tmp_path: Path, checkpoint_of: Opened, resident_of: InMemory
) -> None:
    corpus, checkpoint = corpus_of(padded=True), checkpoint_of(FAMILY)

    def ladder(model: Intermediate, name: str) -> list[str]:
        run = RunFolder.start(tmp_path / name, {})
        assert climb(planner_of(method, METHODS[method]), model, whole(), 3, run) is None
        return [content_hash(run.recipe(depth)) for depth in run.depths()]

    wanted = ladder(alone(resident_of(FAMILY), corpus), "alone")
    assert len(wanted) == 3 or method == "laco"
    for workers in (1, 2):
        team = team_on(cluster, workers, share_of(checkpoint, corpus, stream=workers == 2))
        assert ladder(together(checkpoint, team, corpus), f"with-{workers}") == wanted
        team.close()


def test_behind_the_final_norm(cluster: Cluster, checkpoint_of: Opened, resident_of: InMemory) -> None:
    """As `--reference` measures the last layer."""
    corpus, checkpoint = corpus_of(), checkpoint_of(FAMILY)
    team = team_on(cluster, 2, share_of(checkpoint, corpus, behind_final_norm=True))
    model = alone(resident_of(FAMILY), corpus, behind_final_norm=True)
    other = together(checkpoint, team, corpus, behind_final_norm=True)
    for each in (model, other):
        each.refresh()
        each.replace(families.DEPTH - 1, 1, None)
    same(model, other)
    team.close()


def test_fewer_sequences_than_workers(cluster: Cluster, checkpoint_of: Opened, resident_of: InMemory) -> None:
    corpus, checkpoint = corpus_of(sequences=2), checkpoint_of(FAMILY)
    team = team_on(cluster, 3, share_of(checkpoint, corpus))
    assert team.size == 2
    model, other = alone(resident_of(FAMILY), corpus), together(checkpoint, team, corpus)
    for each in (model, other):
        each.refresh()
    same(model, other)
    team.close()


def test_other_weights_on_a_worker(cluster: Cluster, checkpoint_of: Opened) -> None:
    corpus, checkpoint = corpus_of(), checkpoint_of(FAMILY)
    team = team_on(cluster, 2, share_of(checkpoint, corpus, sha256="f" * 64))
    with pytest.raises(UserError, match="--revision") as caught:
        together(checkpoint, team, corpus).refresh()
    assert "others" in caught.value.problems[0].found
    team.close()


def test_what_a_worker_meets_is_told(cluster: Cluster, tmp_path: Path) -> None:
    """Weights that overflow, named as without workers."""
    from safetensors.torch import load_file, save_file

    folder = families.save(families.make_model(FAMILY), tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"] *= 1e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint, corpus = Checkpoint.open(folder, model=str(folder)), corpus_of()
    team = team_on(cluster, 2, share_of(checkpoint, corpus))
    with pytest.raises(UserError, match="layer 3"):
        together(checkpoint, team, corpus).refresh()
    team.close()


@pytest.mark.slow
@pytest.mark.parametrize("always", [False, True])
def test_a_worker_that_dies(always: bool, tmp_path: Path, checkpoint_of: Opened, resident_of: InMemory) -> None:
    """Its share is measured by another one; where it kills every worker that is told."""
    pytest.importorskip("distributed")
    corpus, checkpoint = corpus_of(), checkpoint_of(FAMILY)
    share = DyingShare(**vars(share_of(checkpoint, corpus)), mark=tmp_path / "mark", always=always)
    with own_workers(2, deaths=2) as cluster:
        team = team_on(cluster, 2, share)
        other = together(checkpoint, team, corpus)
        if always:
            with pytest.raises(UserError, match="workers that stay") as caught:
                other.refresh()
            assert caught.value.problems[0].where == "share 2 of 2 of the calibration set"
            return
        model = alone(resident_of(FAMILY), corpus)
        for each in (model, other):
            each.refresh()
            each.replace(1, 1, None)
        same(model, other)
    assert (tmp_path / "mark").exists()
