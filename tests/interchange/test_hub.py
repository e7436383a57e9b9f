"""Pushing to a stand-in of the hub on this machine, and fetching from it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, snapshot_download
from safetensors.torch import save_file

from lightning_peft import LoRA, PEFTError, inject
from lightning_peft.interchange.hub import push, uploaded_files
from tests.interchange.hub_stand_in import TOKEN, Hub, hub
from tests.methods.models import MODELS, inputs_of

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")
KEPT = ["README.md", "adapter_config.json", "adapter_model.safetensors", "sub/words.txt"]


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """huggingface_hub reads these once, when it is imported; without xet it uploads by the requests that the stand-in
    knows."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with the files of an adapter, and others that are not for others' eyes."""
    folder = tmp_path / "adapter"
    (folder / "sub").mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a": torch.randn(3, 4)}, folder / "adapter_model.safetensors")
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# It\n")
    (folder / "sub" / "words.txt").write_text("words\n")
    for name in ("last.ckpt", "sub/best.ckpt", ".env", "sub/.secret", "optimizer.pt", "optimizer_0/shard.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not this")
    return folder


def fetched(server: Hub, repo: str, folder: Path, revision: str | None = None) -> dict[str, bytes]:
    path = Path(
        snapshot_download(repo, revision=revision, endpoint=server.endpoint, cache_dir=folder / "cache", token=TOKEN)
    )
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_what_is_pushed_is_fetched_to_the_byte_and_nothing_else(server: Hub, adapter: Path, tmp_path: Path) -> None:
    assert push(adapter, "me/adapter") == f"{server.endpoint}/me/adapter"
    expected = {name: (adapter / name).read_bytes() for name in KEPT}
    assert fetched(server, "me/adapter", tmp_path) == expected
    assert [path.relative_to(adapter).as_posix() for path in uploaded_files(adapter)] == KEPT
    assert server.messages == ["Upload by lightning-peft"]
    assert not server.repositories["me/adapter"].private
    [large] = server.large.values()
    assert large == expected["adapter_model.safetensors"]


def test_a_second_push_adds_a_commit_to_the_same_repository(server: Hub, adapter: Path, tmp_path: Path) -> None:
    push(adapter, "me/adapter", private=True)
    (adapter / "README.md").write_text("# Changed\n")
    push(adapter, "me/adapter", private=True, message="The second")
    assert fetched(server, "me/adapter", tmp_path)["README.md"] == b"# Changed\n"
    assert server.messages == ["Upload by lightning-peft", "The second"]
    assert len(server.repositories["me/adapter"].commits) == 1 + 2
    assert server.repositories["me/adapter"].private


def test_a_branch_is_made_and_named_in_the_address(server: Hub, adapter: Path, tmp_path: Path) -> None:
    address = push(adapter, "me/adapter", revision="epoch-3")
    assert address == f"{server.endpoint}/me/adapter/tree/epoch-3"
    assert set(fetched(server, "me/adapter", tmp_path, "epoch-3")) == set(KEPT)
    assert fetched(server, "me/adapter", tmp_path) == {}


def test_a_name_alone_goes_to_the_owner_of_the_token(server: Hub, adapter: Path) -> None:
    assert push(adapter, "adapter") == f"{server.endpoint}/me/adapter"


def test_a_merged_model_can_be_pushed(server: Hub, tmp_path: Path) -> None:
    MODELS["bert"]().save_pretrained(tmp_path / "model")
    push(tmp_path / "model", "me/model")
    assert set(server.repositories["me/model"].branches["main"][1]) == {"config.json", "model.safetensors"}


def test_a_wrong_token_is_told_and_not_shown(server: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrongwrongwrong")
    with pytest.raises(PEFTError) as error:
        push(adapter, "me/adapter")
    assert str(error.value) == (
        f"push: {server.endpoint} does not accept the token (401); set HF_TOKEN to a token with permission to write, "
        "or run `hf auth login`"
    )
    assert server.repositories == {}


def test_another_organization_is_told(server: Hub, adapter: Path) -> None:
    with pytest.raises(PEFTError) as error:
        push(adapter, "others/adapter")
    assert str(error.value) == (
        "push: the token may not write to 'others/adapter' (403: You don't have the rights to create a model under "
        "others); use a token with permission to write of a member of 'others'"
    )


def test_all_faults_are_told_before_any_request(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PEFTError) as error:
        push(tmp_path / "empty", "me/a/b")
    folder, name, token = str(error.value).splitlines()
    assert folder == (
        f"push: {tmp_path / 'empty'} holds no adapter (adapter_config.json and adapter_model.*) and no model "
        "(config.json and model*.safetensors); write one first by `lightning-peft export` or `lightning-peft merge`"
    )
    assert name.startswith("push: 'me/a/b' can't be a repository: ")
    assert token.startswith("push: there is no token; run `hf auth login`, or set HF_TOKEN to ")
    with pytest.raises(PEFTError, match=r"there is no folder '.*emty'; did you mean '.*empty'\?"):
        push(tmp_path / "emty", "me/adapter")
    assert server.requests == []


def test_a_hub_that_is_not_there_is_told(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub() as stopped:
        endpoint = stopped.endpoint
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(PEFTError, match=rf"^push: {endpoint} can't be reached \(.*\); check the network"):
        push(adapter, "me/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PEFTError, match=r"can't be reached: HF_HUB_OFFLINE is set"):
        push(adapter, "me/adapter")


def test_the_token_is_in_no_message(server: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError(f"strange: {TOKEN}")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", refuse)
    with pytest.raises(PEFTError) as error:
        push(adapter, "me/adapter")
    assert str(error.value) == f"push: {server.endpoint} refuses it: strange: …"
    assert error.value.__cause__ is None


@pytest.mark.slow
def test_an_adapter_is_imported_by_its_name_on_the_hub(server: Hub, tmp_path: Path) -> None:
    hf_peft = pytest.importorskip("lightning_peft.interchange.hf_peft")
    base = MODELS["bert"]().eval()
    base.save_pretrained(tmp_path / "base")
    model = inject(base, LoRA(target_modules=["query"]), modules_to_save=["classifier"]).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    hf_peft.export_adapter(model, tmp_path / "adapter")
    push(tmp_path / "adapter", "me/adapter")
    inputs = inputs_of("bert")
    with torch.no_grad():
        torch.save((inputs, model(**inputs).logits), tmp_path / "expected.pt")
    code = """
import sys, torch, transformers
from lightning_peft.interchange.hf_peft import import_adapter
inputs, expected = torch.load(sys.argv[1] + "/expected.pt")
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1] + "/base")
import_adapter(model, "me/adapter")
torch.testing.assert_close(model.eval()(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
