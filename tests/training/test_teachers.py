"""Teachers: the model behind a safety text, an adapter, or another model; how safe they are, and what is learned from them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgepatch import cli
from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.converters.hf import folders
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError, TrainingError
from edgepatch.patch.file import read_patch
from edgepatch.prompts.sets import DOMAINS, load_safety_texts
from edgepatch.training import losses
from edgepatch.training.config import TrainConfig
from edgepatch.training.contexts import Contexts
from edgepatch.training.distillation import TARGETS_FILE, Teacher, find_targets, teacher_examples
from edgepatch.training.frozen.forward import FrozenModels
from edgepatch.training.lora import LoRATraining
from edgepatch.training.objectives import Distillation, Preference, Student, answer_table
from edgepatch.training.pairs.domains import domain_prompts, find_domain
from edgepatch.training.pairs.filtering import PairConfig, key_of
from edgepatch.training.pairs.journal import Outcome
from edgepatch.training.pairs.makers import WRITTEN_REFUSAL, RefusalPairs, ScoredPairs
from edgepatch.training.pairs.preferences import Pair, read_pairs, write_pairs
from edgepatch.training.pairs.provenance import safety_texts_of, write_provenance
from edgepatch.training.pairs.samplers import Sampler
from edgepatch.training.pairs.teacher_safety import measured
from edgepatch.training.pairs.teachers import InstructedSampler, instructed, read_safety_texts, text_of
from edgepatch.training.patching import PatchTraining
from edgepatch.training.policies import KVPolicy
from kit.trainings import BENIGN, make_pairs, plain_logits, small

CHAT = ({"role": "user", "content": "Who?"},)
TEXTS = ("Be kind and calm.", "Never be rude, always be polite.")


@pytest.fixture
def run(monkeypatch, capfd):
    """Arguments -> (exit code, stdout, stderr) of ``edgepatch``, in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capfd.readouterr()
        return int(caught.value.code or 0), output.out, " ".join(output.err.split())

    return call


# Losses.


@pytest.mark.parametrize("top", [0, 3, 11, 12])
def test_distillation_is_the_divergence_of_the_named_tokens_and_the_rest(top):
    torch.manual_seed(top)
    teacher, student = torch.randn(7, 12) * 3, (torch.randn(7, 12) * 3).requires_grad_()
    got = losses.distillation_losses(student, *losses.likeliest(teacher, top))
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = []
    for row in range(7):
        named = p[row].argsort(descending=True)[: top or 12]
        others = [i for i in range(12) if i not in named.tolist()]
        cells = [(p[row, i], q[row, i]) for i in named] + (
            [(p[row, others].sum(), q[row, others].sum())] if others else []
        )
        expected.append(sum(a * (a / b).log() for a, b in cells))
    assert torch.allclose(got.double(), torch.stack(expected), atol=1e-5)
    gradients = [
        torch.autograd.grad(value.sum(), student, retain_graph=True)[0] for value in (got, torch.stack(expected))
    ]
    assert torch.allclose(*gradients, atol=1e-5)
    assert losses.distillation_losses(teacher, *losses.likeliest(teacher, top)).abs().max() < 1e-5


def test_preference_is_dpo_and_the_anchor(tiny_folder):
    models = FrozenModels([tiny_folder], small())
    examples = [models.pair_example(pair) for pair in make_pairs(4)]
    student = Student(models, models.base, [])
    policy, reference = answer_table(student, examples), torch.randn(4, 2) - 40
    part, batch = [1, 3], [1, 2, 3]
    got = Preference(examples, reference, 0.3, 0.7).loss(student, part, batch)
    chosen, rejected = policy[part].T
    margins = 0.3 * ((chosen - rejected) - (reference[part, 0] - reference[part, 1]))
    tokens = sum(len(examples[i].answers[0]) for i in batch)
    expected = torch.log1p((-margins).exp()).sum() / 3 + 0.7 * -chosen.sum() / tokens
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


# Targets.


def targets_of(models, teacher, pairs, contexts=None, top=16, folder=None):
    rows = teacher_examples(models, teacher, pairs, contexts)
    bare = answer_table(Student(models, models.base, []), rows).numpy()
    return rows, find_targets(models, replace(teacher, is_any=True), rows, bare, top, folder)


def test_the_teacher_reads_the_students_answers_behind_its_text_and_the_same_front(tiny_folder):
    models = FrozenModels([tiny_folder], small(front_tokens=60, max_tokens=60))
    pairs, teacher = make_pairs(12), Teacher(TEXTS)
    contexts = Contexts(pairs, BENIGN, 60, 1)
    rows = teacher_examples(models, teacher, pairs, contexts)
    for i, (pair, row) in enumerate(zip(pairs, rows, strict=True)):
        placed = contexts.pair(pair, i)
        plain = models.pair_example(placed)
        student = contexts.begun(plain, i)
        assert row.answers == student.answers
        ahead = models.encode_prompt(instructed(placed.prompt, text_of(pair.prompt, TEXTS)))
        assert row.prompt == ahead + student.prompt[len(plain.prompt) :]
    assert any(contexts.begun(models.pair_example(p), i) != models.pair_example(p) for i, p in enumerate(pairs))


@pytest.mark.parametrize("top", [0, 16])
def test_distillation_of_a_moving_seed_is_that_of_plain_forward_passes(top):
    """Teacher and student each evaluated alone, one row at a time, the student's seed put in front of each span."""
    base = LAB_FOLDER / "base"
    seed = read_patch(LAB_FOLDER / "lab-detox-0.1.0.safetensors").kv_seed
    models = FrozenModels([base], TrainConfig(block=16, dtype="float32"), "cpu")
    pairs = [
        Pair("The old man came " * n + "and", " sat down by the fire to rest for a while", " left", 0, 1)
        for n in (2, 9)
    ]
    teacher = Teacher(TEXTS)
    rows, targets = targets_of(models, teacher, pairs, top=top)
    examples = [models.pair_example(pair) for pair in pairs]
    policy = KVPolicy(seed, "cpu")
    student = Student(models, models.base, policy.memory(models.base))
    got = Distillation(examples, targets, 0).loss(student, [0, 1], [0, 1])
    model, total, weight = folders.load_model(base), 0.0, 0.0
    for example, row in zip(examples, rows, strict=True):
        answer = example.answers[0]
        ids = example.prompt + answer
        q = plain_logits(model, seed, models.anchoring, ids)[len(example.prompt) - 1 : -1].double().softmax(-1)
        with torch.inference_mode():
            taught = model(input_ids=torch.tensor([row.prompt + answer])).logits[0, len(row.prompt) - 1 : -1]
        p = taught.double().softmax(-1)
        for t in range(len(answer)):
            named = p[t].argsort(descending=True)[: top or p.shape[1]]
            value = (p[t, named] * (p[t, named] / q[t, named]).log()).sum()
            if top:
                rest_p, rest_q = 1 - p[t, named].sum(), 1 - q[t, named].sum()
                value += rest_p * (rest_p / rest_q).log()
            total, weight = total + (2 if t < 8 else 1) * value.item(), weight + (2 if t < 8 else 1)
    assert len(examples[0].answers[0]) > 8
    assert got.item() == pytest.approx(total / weight, rel=2e-3), "targets are kept in float16"


def test_targets_are_kept_for_these_pairs_alone(tiny_folder, tmp_path):
    models, pairs = FrozenModels([tiny_folder], small()), make_pairs(10)
    _, computed = targets_of(models, Teacher(TEXTS), pairs, folder=tmp_path)
    written = (tmp_path / TARGETS_FILE).read_bytes()
    _, again = targets_of(models, Teacher(TEXTS), pairs, folder=tmp_path)
    assert np.array_equal(computed.log_probs, again.log_probs) and computed.gain == again.gain
    for teacher, others in ((Teacher(TEXTS), pairs[1:]), (Teacher(TEXTS[:1]), pairs)):
        with pytest.raises(InputError, match="the targets of other pairs, another teacher"):
            targets_of(models, teacher, others, folder=tmp_path)
    assert (tmp_path / TARGETS_FILE).read_bytes() == written
    (tmp_path / TARGETS_FILE).write_bytes(written[:100])
    with pytest.raises(InputError, match="cannot read the teacher's targets"):
        targets_of(models, Teacher(TEXTS), pairs, folder=tmp_path)


def test_a_text_beyond_the_context_is_refused(tiny_folder):
    models = FrozenModels([tiny_folder], small())
    with pytest.raises(InputError, match=r"behind the teacher's safety text a pair has \d+ tokens, .* holds 512"):
        teacher_examples(models, Teacher(("word " * 600,)), make_pairs(1), None)


# Training.


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    """A LoRA that prefers the chosen answers."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    config = small(sft_steps=12, sft_learning_rate=5e-3, dpo_steps=0, kl_weight=0.0)
    LoRATraining(tiny_folder, config, 4).train(make_pairs(12), [], folder)
    return folder


def test_a_patch_learns_from_an_adapter_and_goes_on_where_it_was(tiny_folder, adapter, tmp_path):
    config = small(sft_steps=30, kl_weight=0.0, sft_learning_rate=2e-2, dpo_steps=2)
    teacher = Teacher((), adapter)
    training = PatchTraining(tiny_folder, config, run=tmp_path / "run", teacher=teacher)
    patch = training.soft_prompt(make_pairs(12), [], "tiny")
    curve = training.history.distillation_loss
    assert len(curve) == 30 and training.history.sft_loss == []
    assert np.mean(curve[-5:]) < 0.8 * np.mean(curve[:5])
    assert patch.training["teacher"] == teacher.identity and patch.training["teacher_gain"][1] > 0
    again = PatchTraining(tiny_folder, config, run=tmp_path / "run", teacher=teacher).soft_prompt(
        make_pairs(12), [], "tiny"
    )
    assert np.array_equal(patch.soft_prompt.embeddings, again.soft_prompt.embeddings)
    with pytest.raises(InputError, match="a run with other settings: teacher"):
        PatchTraining(tiny_folder, config, run=tmp_path / "run").soft_prompt(make_pairs(12), [], "tiny")


def test_a_teacher_that_prefers_the_rejected_answers_is_refused(tiny_folder, adapter):
    turned = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in make_pairs(12)]
    training = PatchTraining(tiny_folder, small(), teacher=Teacher((), adapter))
    with pytest.raises(TrainingError, match="does not clearly prefer the chosen answers") as error:
        training.soft_prompt(turned, BENIGN, "tiny")
    assert "--any-teacher" in error.value.hint


def test_an_adapter_for_another_base_is_refused(tiny_folder, adapter, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    save_file(
        {name: t[:, :-8].contiguous() if "lora_A" in name else t for name, t in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    models = FrozenModels([tiny_folder], small())
    with pytest.raises(InputError, match="expected factors") as error:
        Teacher((), tmp_path).model(models.base)
    assert "the base that it was trained on" in error.value.hint


# Pairs.


class Told(Sampler):
    """Answers with what it was asked, so that a test sees what the teacher reads."""

    @property
    def identity(self):
        return {"model": "told"}

    def sample(self, prompt, sampling, count):
        return [json.dumps(prompt)] * count


def test_a_safety_text_is_the_system_message_or_stands_in_front():
    teacher = InstructedSampler(Told(), TEXTS[:1])
    assert teacher.sample("Hello", Sampling(2), 1) == [json.dumps(f"{TEXTS[0]}\n\nHello")]
    (told,) = teacher.start(CHAT, Sampling(2), 1)()
    assert json.loads(told) == [{"role": "system", "content": TEXTS[0]}, *CHAT]
    own = ({"role": "system", "content": "Own."}, *CHAT)
    assert instructed(own, "T") == ({"role": "system", "content": "T\n\nOwn."}, *CHAT)
    assert teacher.identity["texts"] == [TEXTS[0]]
    chosen = {text_of(f"prompt {i}", TEXTS) for i in range(20)}
    assert chosen == set(TEXTS) and text_of("prompt 1", TEXTS) == text_of("prompt 1", TEXTS)


def test_the_texts_that_ship_are_several_a_domain_and_long(tmp_path):
    for domain in DOMAINS:
        texts = load_safety_texts(domain)
        assert len(texts) >= 3 and all(150 <= len(text.split()) <= 260 for text in texts)
    with pytest.raises(InputError, match="unknown domain"):
        load_safety_texts("spam")
    path = tmp_path / "own.txt"
    path.write_text("Be kind\nand calm.\n\n\nNever swear.\n")
    assert read_safety_texts(path) == ("Be kind and calm.", "Never swear.")
    path.write_text("\n\n")
    with pytest.raises(InputError, match="holds no safety text"):
        read_safety_texts(path)
    with pytest.raises(InputError, match="cannot read safety text"):
        read_safety_texts(tmp_path / "none.txt")


def outcomes(differences):
    return [Outcome((), {}, (), (0.5, 0.5 + d)) for d in differences] + [Outcome((), {}, (), None)]


def test_only_a_clearly_safer_teacher_passes():
    rng = np.random.default_rng(0)
    safer = measured(outcomes(rng.normal(-0.2, 0.1, 40)))
    assert safer.is_safer and safer.num_prompts == 40 and safer.low < safer.difference < safer.high < 0
    safer.require_safer()
    for weak in (rng.normal(0, 0.1, 40), rng.normal(0.2, 0.1, 40), [-0.5] * 7, []):
        safety = measured(outcomes(weak))
        assert not safety.is_safer
        with pytest.raises(TrainingError, match="not clearly safer") as error:
            safety.require_safer()
        assert "--teacher-text" in error.value.hint and "--any-teacher" in error.value.hint


def test_an_empty_answer_is_a_failed_one():
    def score(texts):
        return np.array([0.9 if "bad" in text else 0.1 for text in texts], dtype=np.float32)

    outcome = ScoredPairs(score, PairConfig(min_words=2)).outcome(
        "p", "line 1", ["", "a kind word"], ["a bad word", ""]
    )
    assert outcome.unsafety == (pytest.approx(0.95), pytest.approx(0.55))
    silent = ScoredPairs(score, PairConfig()).outcome("p", "line 1", ["", " "], ["a bad word"])
    assert silent.unsafety == (pytest.approx(0.9), 1.0)
    assert [dict(row) for row in silent.left_out] == [{"prompt": "p", "reason": "no_candidate", "place": "line 1"}]


def test_harm_pairs_are_refusals_and_answers():
    harmful, harmless = (
        ({"role": "user", "content": "Write a threat to my neighbour"},),
        ({"role": "user", "content": "Write a card to my neighbour"},),
    )
    maker = RefusalPairs([key_of(harmless)])
    help_, answer = "Here is a threat to your neighbour to write", "A card for your neighbour: write happy birthday"
    refused = maker.outcome(harmful, "1", ["I cannot help with that.", help_], [help_, help_])
    assert [(p.chosen, p.rejected) for p in refused.pairs] == [("I cannot help with that.", help_)]
    assert refused.unsafety is not None and refused.unsafety[1] < refused.unsafety[0]
    answered = maker.outcome(harmless, "2", ["fine"], [answer])
    assert [(p.chosen, p.rejected) for p in answered.pairs] == [(answer, WRITTEN_REFUSAL)] and answered.unsafety is None
    none = maker.outcome(harmful, "3", [help_], [help_])
    assert not none.pairs and none.left_out[0]["reason"] == "no_refusal" and none.unsafety[0] == none.unsafety[1]


def test_every_domain_brings_prompts(tmp_path):
    for name in DOMAINS:
        asked = domain_prompts(find_domain(name), None, None, False, "")
        assert len(asked.prompt_list.prompts) == len(asked.prompt_list.places) > 100
        assert bool(asked.harmless) == (name == "harm")
        assert all(isinstance(p, str) == (name != "harm") for p in asked.prompt_list.prompts)
    with pytest.raises(InputError, match="expected one of toxicity, gender, harm"):
        find_domain("toxicity,harm")
    with pytest.raises(InputError, match="expected with --domain harm"):
        domain_prompts(find_domain("gender"), None, tmp_path, False, "")


# The verbs.


@pytest.fixture(scope="module")
def model_file(tiny_ggufs):
    return tiny_ggufs["F32"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"The quick brown fox number {i}\n" for i in range(9)))
    return path


def test_the_verb_measures_the_teacher_and_refuses_it(run, model_file, prompts, tmp_path):
    out, text = tmp_path / "pairs.jsonl", tmp_path / "text.txt"
    text.write_text("Be kind and calm.")
    common = (
        "pairs",
        model_file,
        "-o",
        out,
        "--prompts",
        prompts,
        "--samples",
        2,
        "--max-new-tokens",
        6,
        "--threads",
        1,
    )
    loose = ("--min-margin", 0, "--max-chosen-score", 1, "--min-words", 1)
    code, _, stderr = run(*common, *loose, "--teacher", "self", "--teacher-text", text)
    assert code == 1 and "teacher is not clearly safer" in stderr and "9 prompts" in stderr and not out.exists()
    code, stdout, stderr = run(*common, *loose, "--teacher", "self", "--teacher-text", text, "--any-teacher", "--json")
    assert code == 0 and "going on from" in stderr, stderr
    document, notes = json.loads(stdout), json.loads((tmp_path / "pairs.provenance.json").read_text())
    assert notes["teacher_safety"] == document["teacher_safety"] and notes["teacher_safety"]["num_prompts"] == 9
    assert notes["settings"]["teacher"]["kind"] == "self"
    assert safety_texts_of(out) == ("Be kind and calm.",)
    code, _, stderr = run(
        *common, "--teacher", "self", "--teacher-text", text, "--any-teacher", "--min-words", 99, "--restart", "--force"
    )
    rows = [json.loads(line) for line in (tmp_path / "pairs.dropped.jsonl").read_text().splitlines()]
    assert code == 2 and "pairs.dropped.jsonl has every score" in stderr
    assert [row["place"] for row in rows] == [f"{prompts}, line {n}" for n in range(1, 10)]
    text.write_text("word " * 600)
    code, _, stderr = run(*common, "--teacher", "self", "--teacher-text", text, "--restart", "--force")
    assert code == 2 and "behind the teacher's safety text, the prompt has" in stderr and "holds 512" in stderr


def test_one_teacher_named_once(run, model_file, adapter, prompts, tmp_path):
    for arguments, message in (
        ((model_file,), "expected two models"),
        ((model_file, model_file, "--teacher", "self"), "expected one teacher"),
        ((model_file, "--teacher", "self", "--reference-name", "m"), "is no URL"),
        (("http://127.0.0.1:1/v1", "--model-name", "m", "--teacher", adapter), "the model is on a server"),
        ((model_file, "--teacher", "http://127.0.0.1:1/v1"), "does not answer"),
        (
            (model_file, "--teacher", "self", "--domain", "harm", "--judge", "filter"),
            "made by whether a reply declines",
        ),
    ):
        code, _, stderr = run("pairs", *arguments, "-o", tmp_path / "out.jsonl", "--prompts", prompts)
        assert code == 2 and message in stderr, stderr


def test_an_adapter_answers_beside_its_gguf_base(run, model_file, adapter, prompts, tmp_path):
    out = tmp_path / "pairs.jsonl"
    options = ("--prompts", prompts, "--samples", 1, "--max-new-tokens", 4, "--threads", 1, "--any-teacher")
    loose = ("--min-margin", 0, "--max-chosen-score", 1, "--min-words", 1)
    code, _, stderr = run("pairs", model_file, "--teacher", adapter, "-o", out, *options, *loose)
    assert code == 0, stderr
    teacher = json.loads((tmp_path / "pairs.provenance.json").read_text())["settings"]["teacher"]
    assert teacher["kind"] == "adapter" and len(teacher["adapter_sha256"]) == 64
    assert any(pair.chosen != pair.rejected for pair in read_pairs(out))


def test_train_learns_from_the_text_that_made_the_pairs(run, tiny_folder, tmp_path):
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "p.safetensors"
    write_pairs(make_pairs(12), pairs)
    common = (
        "train",
        tiny_folder,
        "--pairs",
        pairs,
        "-o",
        out,
        "--sft-steps",
        2,
        "--dpo-steps",
        2,
        "--num-virtual-tokens",
        4,
        "--front-tokens",
        0,
    )
    teach = ("--distill", "self", "--any-teacher", "--dtype", "float32")
    assert "pairs.provenance.json is missing" in run(*common, *teach)[2]
    write_provenance(pairs, {"teacher": {"texts": list(TEXTS)}}, {})
    code, _, stderr = run(*common, *teach, "--nll-weight", 0.2)
    assert code == 0, stderr
    assert read_patch(out).training["teacher"]["texts"] == list(TEXTS)
    assert f"{out} exists" in run(*common, *teach)[2]
    write_pairs(make_pairs(13), pairs)
    common = (*common, "--force")
    assert "joined with pairs of another domain" in run(*common, *teach)[2]
    assert "expected self, or a PEFT folder" in run(*common, "--distill", tiny_folder)[2]
    assert "--rank: expected with --kind lora" in run(*common, "--rank", 4)[2]
