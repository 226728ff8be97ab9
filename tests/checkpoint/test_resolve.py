"""What a user may call a model. The hub is never asked here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from intarsia.checkpoint import resolve as module
from intarsia.checkpoint.resolve import open_checkpoint, resolve
from intarsia.errors import UserError
from intarsia.options import ModelRef

Make = Callable[..., Path]
Hub = Callable[[Any], list[dict[str, Any]]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Sets what the hub answers: a folder, or an exception. Returns the list of what it is asked."""

    def answer(outcome: Any) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def download(model: str, **options: Any) -> str:
            asked.append({"model": model, **options})
            if isinstance(outcome, BaseException):
                raise outcome
            return str(outcome)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return asked

    return answer


def http_error(kind: type[Exception]) -> Exception:
    # Their constructors want a response of an HTTP library that differs between versions.
    error = kind.__new__(kind)
    error.args = ("404 Client Error\nRequest ID: x",)
    return error


def test_local_folder(saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    asked = hub(AssertionError())
    assert resolve(str(saved["single"])) == saved["single"]
    monkeypatch.chdir(saved["single"].parent)
    assert resolve("single") == Path("single")
    monkeypatch.setenv("HOME", str(saved["single"].parent))
    assert resolve("~/single") == saved["single"]
    opened = open_checkpoint("single")
    assert (opened.model, opened.revision, opened.architecture.n_layers) == ("single", None, 3)
    assert not asked


@pytest.mark.parametrize(
    "model",
    ["", "/no/such/folder", "./absent", "../absent", "~/absent", "~nobody/x", "a/b/c", "dir/m.gguf", "a b", "x/"],
)
def test_paths_that_do_not_exist(model: str, hub: Hub) -> None:
    asked = hub(AssertionError())
    with pytest.raises(UserError, match=r"There is no model .* nor a hub id, nor `demo`"):
        resolve(model)
    assert not asked


def test_file_instead_of_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("x")
    with pytest.raises(UserError, match="a file, but not GGUF"):
        resolve(str(tmp_path / "model"))


def test_hub_model(model: Make, hub: Hub) -> None:
    folder = model()
    asked = hub(folder)
    opened = open_checkpoint(ModelRef(model="owner/name-1.5B", revision="main"))
    assert (opened.folder, opened.model, opened.revision) == (folder, "owner/name-1.5B", "main")
    assert asked[0]["model"] == "owner/name-1.5B"
    assert asked[0]["revision"] == "main"


def test_what_is_fetched(hub: Hub, model: Make) -> None:
    asked = hub(model())
    resolve("gpt2")
    names = ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.model", "merges.txt"]
    names += ["chat_template.jinja", "LICENSE.txt", "vocab.txt", "additional_chat_templates/tool.jinja"]
    others = ["pytorch_model.bin", "consolidated.safetensors", "original/a.safetensors", "README.md", "code.py"]
    utils: Any = huggingface_hub.utils
    kept = [list(utils.filter_repo_objects([*names, *others], **patterns(call))) for call in asked]
    assert kept == [["additional_chat_templates/tool.jinja"], names[:-1]]


def patterns(call: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in call.items() if key.endswith("patterns")}


def test_hub_model_without_safetensors(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "config.json").write_text("{}")
    hub(tmp_path)
    with pytest.raises(UserError, match=r"no weights in safetensors files.*save_pretrained"):
        resolve("owner/name")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            errors.LocalEntryNotFoundError("x"),
            "cannot be reached.*local model folder or `demo`.*hf download owner/name",
        ),
        (errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE.*local model folder or `demo`"),
        (http_error(errors.RepositoryNotFoundError), "not on the hub, or private.*hf auth login"),
        (http_error(errors.GatedRepoError), "gated.*hf auth login"),
        (http_error(errors.RevisionNotFoundError), "at v9.*no such revision"),
        (http_error(errors.HfHubHTTPError), "404 Client Error. Try again"),
        (errors.HFValidationError("x"), "not a hub id"),
        (ConnectionError("reset by peer"), "ConnectionError: reset by peer.*local model folder or `demo`"),
        (TimeoutError(), "TimeoutError: no message"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_hub_that_does_not_deliver(hub: Hub, error: Exception, said: str) -> None:
    hub(error)
    with pytest.raises(UserError, match=said) as caught:
        resolve("owner/name", revision="v9")
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)


def test_interrupt_passes(hub: Hub) -> None:
    hub(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        resolve("owner/name")


def test_offline_with_the_real_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*local model folder"):
        resolve("owner/name")


def test_demo(saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(saved["tied"], tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "demo_folder", lambda: saved["single"])
    assert resolve("demo") == saved["single"]
    assert open_checkpoint("demo").model == "demo"
    assert resolve("./demo") == Path("demo")


@pytest.mark.parametrize("kind", ["demo", "folder"])
def test_revision_belongs_to_the_hub(saved: dict[str, Path], kind: str) -> None:
    with pytest.raises(UserError, match="--revision is given"):
        resolve("demo" if kind == "demo" else str(saved["single"]), revision="main")
