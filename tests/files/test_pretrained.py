"""Foreign model folders: none of their code runs, no pickle of theirs is read, and there is one call that sees to it."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

import edgepatch
from edgepatch.converters.hf import folders
from edgepatch.errors import InputError
from edgepatch.files.tensor_trees import read_tree, write_tree
from edgepatch.training.runs import Run
from kit.tiny_folders import copy_folder

ROOT = Path(edgepatch.__file__).parent.parent
THE_ONE = ROOT / "edgepatch" / "files" / "pretrained.py"
SOURCES = sorted(path for unit in ("edgepatch", "bench", "converters") for path in (ROOT / unit).rglob("*.py"))
BARE = {"from_pretrained", "from_hub", "load_state_dict_from_url", "unsafe_load"}
MODULES = {"torch": {"load", "save"}, "pickle": {"load", "loads"}, "joblib": {"load"}, "dill": {"load", "loads"}}


def bare_calls(source: str) -> list[str]:
    """Calls that read what somebody else made and may run it, also in programs that stand in a text."""
    calls = []
    for node in ast.walk(ast.parse(source)):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        is_javascript = text.startswith("import {")  # an example for people: no Python reads it
        if "from_pretrained(" in text and not is_javascript:
            calls.append("a program in a text")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if node.func.attr in BARE or node.func.attr in MODULES.get(owner, ()):
                calls.append(f"line {node.lineno}: {owner}.{node.func.attr}")
            pickles = [key for key in node.keywords if key.arg in ("allow_pickle", "trust_remote_code")]
            calls += [
                f"line {node.lineno}: {key.arg}" for key in pickles if getattr(key.value, "value", None) is not False
            ]
    return calls


def test_there_is_one_loader():
    assert len(SOURCES) > 200
    assert {str(path): calls for path in SOURCES if path != THE_ONE and (calls := bare_calls(path.read_text()))} == {}


def test_the_search_finds_bare_calls():
    for source in (
        "AutoModel.from_pretrained(folder)",
        "x = torch.load(path, weights_only=True)",
        "P = 'm = AutoModel.from_pretrained(folder)'",
        "np.load(path, allow_pickle=True)",
        "main_export(folder).run(trust_remote_code=flag)",
    ):
        assert bare_calls(source), source


@pytest.mark.parametrize("model_type", ["llama", "unheard_of"])
def test_code_of_a_folder_does_not_run(tiny_folder, tmp_path, model_type):
    """As if somebody answered "y": whether or not Transformers knows the kind itself."""
    folder, trace = copy_folder(tiny_folder, tmp_path / "hostile"), tmp_path / "it-ran"
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": names}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = {**settings, "auto_map": {"AutoTokenizer": ["hostile.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "hostile.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    if model_type == "llama":
        folders.load_model(folder)
    else:
        with pytest.raises(InputError):
            folders.load_model(folder)
        with pytest.raises(InputError):
            folders.read_transformers_config(folder)
    assert not trace.exists()


class Trace:
    """Touches a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "pytorch_model-00001-of-00002.bin"]
)
def test_pickled_weights_are_refused_by_name(tiny_folder, tmp_path, name):
    folder = copy_folder(tiny_folder, tmp_path / "hostile")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save(Trace(str(tmp_path / "it-ran")), folder / name)
    with pytest.raises(InputError, match="(expected safetensors, found|found the pickle) " + name):
        folders.load_model(folder)
    assert not (tmp_path / "it-ran").exists()


def test_an_adapter_beside_weights_is_refused(tiny_folder, tmp_path):
    folder = copy_folder(tiny_folder, tmp_path / "hostile")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}')
    with pytest.raises(InputError, match=r"adapter_config\.json (lies )?beside"):
        folders.load_model(folder)


def test_trees_of_tensors(tmp_path):
    shared = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    tree = {
        "policy": {"a": shared, "b": shared[0]},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "groups": [{"betas": (0.9, 0.95), "fused": None}]},
        "best": float("inf"),
        "stage": "DPO",
    }
    write_tree(tmp_path / "t.safetensors", tree)
    back = read_tree(tmp_path / "t.safetensors")
    assert back["optimizer"]["groups"] == tree["optimizer"]["groups"] and back["best"] == tree["best"]
    assert back["optimizer"]["state"][0]["step"].item() == 3 and back["stage"] == "DPO"
    assert torch.equal(back["policy"]["a"], shared) and torch.equal(back["policy"]["b"], shared[0])
    for bad in (b"", b"x" * 100, (tmp_path / "t.safetensors").read_bytes()[:-1]):
        (tmp_path / "bad.safetensors").write_bytes(bad)
        with pytest.raises(InputError, match="expected a tree of tensors"):
            read_tree(tmp_path / "bad.safetensors")


def test_a_pickled_checkpoint_of_old_is_not_read(tmp_path):
    run = Run(tmp_path / "run", {})
    torch.save(Trace(str(tmp_path / "it-ran")), tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(InputError, match=r"checkpoint\.pt of an older release"):
        run.load("cpu")
    assert not (tmp_path / "it-ran").exists()
