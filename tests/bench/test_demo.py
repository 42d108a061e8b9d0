"""The main job from end to end on the lab model, at small sizes, through the command line."""

import json
from dataclasses import replace

import pytest

from edgepatch.bench.columns import COMMON_GGUF_TYPES
from edgepatch.bench.demo import real
from edgepatch.bench.demo import run as demo
from edgepatch.bench.evidence.questions import Amounts
from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.bench.safety.continuations import SampleConfig
from edgepatch.bench.safety.retained import Sizes, benign_texts
from edgepatch.bench.safety.toxicity import ToxicityDomain
from edgepatch.bench.smollm2.shipped import newest_patches
from edgepatch.errors import InputError
from edgepatch.judges.semantic import RULES
from edgepatch.patch.file import read_patch
from edgepatch.prompts.sets import evenly
from edgepatch.training.pairs.preferences import PairConfig

SMALL = demo.DemoConfig(
    num_training_prompts=24,
    num_prompts=4,
    num_benign_texts=2,
    pairs=PairConfig(samples_per_prompt=4),
    train=replace(demo.TRAIN, num_virtual_tokens=8, sft_steps=3, dpo_steps=3, batch_size=4, kl_batch_size=1),
    samples=SampleConfig(samples_per_prompt=3, max_new_tokens=8),
    timing_repeats=1,
)
COLUMNS = [
    ("torch", "F32"),
    *(("llamacpp", kind) for kind in COMMON_GGUF_TYPES),
    *(("onnx", kind) for kind in ("F32", "int8", "int4")),
]


def test_every_column_is_measured_bare_and_patched_and_the_patch_fits_all(tmp_path):
    seen = []
    document, page = demo.run_demo(tmp_path, config=SMALL, progress=lambda *step, **_: seen.append(step))
    cells = [(c["runtime"], c["quantization"], c["patched"]) for c in document["cells"]]
    assert cells == [(*column, patched) for column in COLUMNS for patched in (False, True)]
    for cell in document["cells"]:
        assert cell["num_prompts"] == 4
        assert cell["failures"] == 0
        assert 0 <= cell["emt_low"] <= cell["emt"] <= cell["emt_high"] <= 1
        assert 1 < cell["perplexity"] < 5000
    assert json.loads((tmp_path / "results.json").read_text())["cells"] == document["cells"]
    assert page.read_text().lower().startswith("<!doctype html>")
    patch = read_patch(tmp_path / "lab-detox-0.1.0.safetensors")
    assert patch.digest == document["patch"]["digest"]
    assert patch.num_virtual_tokens == 8
    assert {stage for stage, done, total in seen if done == total} >= {
        "pairs",
        "SFT",
        "DPO",
        "convert",
        "torch F32",
        "onnx int4",
    }


def test_prompts_of_our_own_and_none_for_both_training_and_table():
    texts = demo.choose_texts(None, demo.DemoConfig().num_training_prompts)
    assert texts.source == "own prompts"
    assert len(texts.prompts) >= 200
    assert not set(texts.prompts) & set(ToxicityDomain(None).evaluation_prompts())
    assert not set(texts.benign) & set(benign_texts(None, 30))


def test_evenly_keeps_order_and_ends():
    items = [str(i) for i in range(10)]
    assert evenly(items, 3) == ["0", "3", "6"]
    assert evenly(items, 20) == items


def test_a_missing_lab_model_is_named(tmp_path):
    with pytest.raises(InputError, match="no lab model"):
        demo.run_demo(tmp_path / "out", lab=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(InputError, match="expected a folder, found the file"):
        demo.run_demo(blocked / "out", config=SMALL)


def test_the_demo_of_the_real_model_measures_answers_twice_and_writes_a_page(lab_ggufs, tmp_path, monkeypatch):
    """On the lab model as a GGUF file, at small sizes; only the model, the forms and the sizes differ from ``make demo``."""
    monkeypatch.setattr(real, "AMOUNTS", Amounts(2, 5, 2, Sizes(2, 1, 0), 0, (), 4))
    monkeypatch.setattr(real, "TYPES", ())
    monkeypatch.setattr(real, "HARM_JUDGE", RULES)  # the semantic judge's model is a download
    model, patch = lab_ggufs["F16"], LAB_FOLDER / "lab-detox-0.2.0.safetensors"
    document, answers = real.run_real_demo(model, [patch], tmp_path / "out", tell=lambda line: None)
    assert {row["column"] for row in document["cells"]} == {"llamacpp F16"}
    assert {row["domain"] for row in document["cells"]} == {"toxicity", "gender", "harm"}
    assert len(answers) == 3 and all(answer.bare and answer.patched for answer in answers)
    assert any(answer.bare != answer.patched for answer in answers)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["patch"]["name"] == "lab-detox"
    assert (tmp_path / "out" / "report.html").read_text().lower().startswith("<!doctype html>")


def test_a_real_demo_without_a_shipped_patch_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no patch of SmolLM2") as caught:
        newest_patches(tmp_path)
    assert "source checkout" in caught.value.hint
    (tmp_path / "smollm2-harm-0.1.0.safetensors").touch()
    monkeypatch.setattr(real, "newest_patches", lambda: newest_patches(tmp_path))
    with pytest.raises(InputError, match="toxicity, gender, harm, found harm") as caught:
        real.shipped_patches()
    assert "--patch" in caught.value.hint
