"""Sending to the hub: what is sent, and what is said when it cannot be. The hub here is a stand-in on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from intarsia.building.materialize import materialize
from intarsia.checkpoint.reader import Checkpoint
from intarsia.commands.push import push
from intarsia.errors import UserError
from tests.command import invoke
from tests.conftest import Folder
from tests.recipes_by_hand import recipe_of, select


class Hub:
    """What the hub was asked, and what it answers."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.refusals: dict[str, Exception] = {}

    def answer(self, call: str, **options: Any) -> None:
        self.calls.append((call, options))
        if call in self.refusals:
            raise self.refusals[call]

    def whoami(self) -> dict[str, str]:
        self.answer("whoami")
        return {"name": "ada"}

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.answer("create_repo", repo_id=repo_id, **options)
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        self.answer("upload_folder", **options)

    def upload_file(self, **options: Any) -> None:
        self.answer("upload_file", **options)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stand_in)
    return stand_in


@pytest.fixture
def recipe_file(model_folder: Folder, tmp_path: Path) -> Path:
    from intarsia.recipe import schema

    source = model_folder("llama")
    schema.save(recipe_of(str(source), [select(0), select(3)]), tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


@pytest.fixture
def built(model_folder: Folder, tmp_path: Path) -> Path:
    source = model_folder("llama")
    recipe = recipe_of(str(source), [select(0), select(3)])
    materialize(recipe, {"base": Checkpoint.open(source, model=str(source))}, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("the card")
    (tmp_path / "out" / ".hidden").write_text("not sent")
    return tmp_path / "out"


def test_dry_run_says_what_would_be_sent(hub: Hub, built: Path, model_folder: Folder) -> None:
    result = push(built, "small", private=True, dry_run=True)
    assert [call for call, _ in hub.calls] == ["whoami"]
    assert (result.address, result.repository, result.private) == (None, "ada/small", True)
    found = {file["file"]: file["bytes"] for file in result.files}
    assert {"README.md", "config.json", "model.safetensors", "recipe/recipe.yaml", "SHA256SUMS"} <= set(found)
    assert ".hidden" not in found
    assert found["model.safetensors"] == (built / "model.safetensors").stat().st_size
    assert result.mentions == (str(model_folder("llama")),)
    assert result.to_dict()["bytes"] == sum(found.values())


def test_a_folder_is_sent_in_one_commit(hub: Hub, built: Path) -> None:
    result = push(built, "team/small")
    assert result.address == "https://hub.example/team/small"
    (_, created), (_, sent) = hub.calls[1:]
    assert created == {"repo_id": "team/small", "private": False, "exist_ok": True}
    assert (sent["folder_path"], sent["repo_id"]) == (built, "team/small")
    assert "README.md" in sent["allow_patterns"] and ".hidden" not in sent["allow_patterns"]


def test_build_pushes_when_it_is_done(hub: Hub, recipe_file: Path, tmp_path: Path) -> None:
    command = ["build", str(recipe_file), "-o", str(tmp_path / "out"), "--push-to-hub", "small", "--private", "--json"]
    done = invoke(*command)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["layers"] == 2
    assert result["push"]["address"] == "https://hub.example/ada/small"
    assert [call for call, _ in hub.calls] == ["whoami", "whoami", "create_repo", "upload_folder"]
    assert hub.calls[2][1]["private"] is True


def test_export_pushes_the_file(hub: Hub, model_folder: Folder, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    out = tmp_path / "m.gguf"
    command = ["export", str(model_folder("llama")), "-o", str(out), "--push-to-hub", "small", "--json"]
    done = invoke(*command)
    assert done.exit_code == 0, done.output
    sent = dict(hub.calls)["upload_file"]
    assert (sent["path_or_fileobj"], sent["path_in_repo"], sent["repo_id"]) == (out, "m.gguf", "ada/small")


def test_nobody_logged_in_is_an_error_before_the_work(hub: Hub, recipe_file: Path, tmp_path: Path) -> None:
    hub.refusals["whoami"] = errors.LocalTokenNotFoundError("no token")
    command = ["build", str(recipe_file), "-o", str(tmp_path / "out"), "--push-to-hub", "small"]
    done = invoke(*command)
    assert done.exit_code == 2
    assert "you are not logged in" in done.stderr and "hf auth login" in done.stderr
    assert not (tmp_path / "out").exists()


def test_compress_dry_run_says_where_it_would_go(
    hub: Hub, model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    command = [
        "compress",
        str(model_folder("llama")),
        "-o",
        str(tmp_path / "out"),
        "--layers",
        "4",
        "--dry-run",
        "--json",
    ]
    command += ["--calibration", str(text_file), "--tokens", "512", "--seq-len", "64", "--push-to-hub", "small"]
    done = invoke(*command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["push"] == {
        "repository": "small",
        "private": False,
        "account": "ada",
        "sent": False,
    }
    assert [call for call, _ in hub.calls] == ["whoami"]


def http(status: int) -> Exception:
    # Their constructors want a response of an HTTP library that differs between versions.
    error = errors.HfHubHTTPError.__new__(errors.HfHubHTTPError)
    error.args = (f"{status} Client Error\nRequest ID: x",)
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    ("call", "refusal", "match"),
    [
        ("whoami", http(401), "you are not logged in. Run `hf auth login`.*Nothing was uploaded"),
        (
            "create_repo",
            http(403),
            "this account may not write there.*is complete; try again with `intarsia push",
        ),
        ("upload_folder", ConnectionError("no route\nmore"), "ConnectionError: no route. Check the network"),
        ("whoami", errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE is set"),
    ],
)
def test_refusals(hub: Hub, built: Path, call: str, refusal: Exception, match: str) -> None:
    hub.refusals[call] = refusal
    with pytest.raises(UserError, match=match):
        push(built, "team/small")
    assert (built / "config.json").exists()


def test_names_and_folders_that_cannot_be_sent(hub: Hub, built: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a repository name"):
        push(built, "a b")
    with pytest.raises(UserError, match=r"is a folder without a config\.json"):
        push(tmp_path, "small")
    assert hub.calls == []
