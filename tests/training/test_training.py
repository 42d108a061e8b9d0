"""Rows, losses, policies and the trainer."""

import importlib.util
import json
import math
import os
import signal
import socket
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from edgepatch.errors import InputError, MissingExtraError, TrainingError
from edgepatch.files.tensor_trees import read_tree
from edgepatch.patch.file import read_patch, write_patch
from edgepatch.progress import silent
from edgepatch.runtimes import load_runtime
from edgepatch.training import losses, parallel, runs
from edgepatch.training.config import TrainConfig
from edgepatch.training.frozen.forward import FrozenModels
from edgepatch.training.frozen.rows import Example, batch_plan, make_batch
from edgepatch.training.pairs.preferences import Pair, write_pairs
from edgepatch.training.patching import PatchTraining, train_patch
from edgepatch.training.policies import KVPolicy, SoftPromptPolicy
from edgepatch.training.runs import CHECKPOINT_FILE
from edgepatch.training.trainer import Trainer
from kit.forks import Fork
from kit.trainings import BENIGN, make_pairs, make_trainer, small


@pytest.fixture(scope="module")
def trained(tiny_folder):
    """A patch of the smallest training."""
    return train_patch(tiny_folder, make_pairs(12), BENIGN, small(), "tiny")[0]


@pytest.fixture(scope="module")
def tiny_q8_0(tiny_ggufs):
    return tiny_ggufs["Q8_0"]


# Losses.


def test_answer_log_probabilities_sum_over_each_answer():
    torch.manual_seed(0)
    logits, targets, owners = torch.randn(5, 7), torch.randint(0, 7, (5,)), torch.tensor([0, 0, 2, 0, 2])
    each = logits.log_softmax(-1)[torch.arange(5), targets]
    got = losses.answer_log_probabilities(logits, targets, owners, 3)
    assert torch.allclose(got, torch.stack([each[[0, 1, 3]].sum(), torch.tensor(0.0), each[[2, 4]].sum()]), atol=1e-6)


def test_dpo_loss_by_hand():
    one = torch.tensor([-3.0]), torch.tensor([-5.0]), torch.tensor([-4.0]), torch.tensor([-4.5])
    margin = 0.1 * ((-3 + 5) - (-4 + 4.5))
    assert losses.dpo_losses(*one, beta=0.1).item() == pytest.approx(-math.log(1 / (1 + math.exp(-margin))), abs=1e-6)
    assert losses.dpo_losses(one[0], one[1], one[0], one[1], beta=0.1).item() == pytest.approx(math.log(2), abs=1e-6)


def test_kl_is_zero_for_the_same_model_and_positive_else():
    logits = torch.randn(4, 9)
    assert losses.kl_to_base(logits, logits).item() == pytest.approx(0, abs=1e-5)
    assert losses.kl_to_base(logits, torch.randn(4, 9)).item() > 0.4


# Rows.


def test_a_packed_row_predicts_each_answer_from_the_prompt_and_itself():
    batch = make_batch([Example((5, 6), ((7, 8), (9,))), Example((1,), ((2,), (3, 4)))], "cpu")
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 4, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2], [0, 1, 1, 2, 0]]
    predictions = {
        (r, s, t, o)
        for r, s, t, o in zip(
            *(x.tolist() for x in (batch.rows, batch.sources, batch.targets, batch.owners)), strict=True
        )
    }
    assert predictions == {(0, 1, 7, 0), (0, 2, 8, 0), (0, 1, 9, 1), (1, 0, 2, 2), (1, 0, 3, 3), (1, 2, 4, 3)}


def test_a_long_example_loses_the_start_of_its_prompt_then_the_end_of_its_answers():
    cut = Example(tuple(range(100)), ((1,) * 10, (2,) * 4)).cut(30)
    assert cut.prompt == (0, *range(81, 100)) and len(cut.answers[0]) == 10 and len(cut.answers[1]) == 4
    cut = Example((0, 1), ((1,) * 100, (2,))).cut(30)
    assert cut.prompt == (0, 1) and len(cut.answers[0]) == 28


def test_every_example_comes_once_in_an_epoch_in_batches_of_similar_length():
    lengths = [int(x) for x in np.random.default_rng(0).integers(5, 100, 64)]
    batches = [batch_plan(lengths, 8, step, "a") for step in range(8)]
    assert sorted(i for batch in batches for i in batch) == list(range(64))
    spread = np.mean([np.ptp([lengths[i] for i in batch]) for batch in batches])
    assert spread < np.ptp(lengths) / 4
    assert batch_plan(lengths, 8, 3, "a") == batches[3] != batch_plan(lengths, 8, 3, "b")
    assert batch_plan(lengths, 8, 11, "a") != batches[3]
    assert len(batch_plan([1] * 10, 4, 2, "a")) == 4


def test_packed_and_shared_gives_the_same_log_probabilities_as_one_row_an_answer(tiny_folder):
    """The plain form is the one that PEFT evaluates: virtual tokens, then text, one answer a row."""
    models = FrozenModels([tiny_folder], small())
    policy = make_trainer(models)[1]
    examples = [
        models.pair_example(Pair("The quick " * n, " fox jumps", " dog sleeps in the sun", 0, 1)) for n in (1, 3)
    ]
    packed = models.log_probabilities(models.base, examples, policy.memory(models.base))
    packed.sum().backward()
    gradient = policy.parameters()[0].grad.clone()
    policy.parameters()[0].grad = None
    models.packs = False
    plain = models.log_probabilities(models.base, examples, [], policy.embeddings())
    plain.sum().backward()
    assert torch.allclose(packed, plain, atol=1e-4)
    assert torch.allclose(gradient, policy.parameters()[0].grad, atol=1e-4)
    assert not torch.allclose(
        packed, models.log_probabilities(models.base, examples, []), atol=1e-2
    )  # the prefix matters


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_gives_the_same_loss(tiny_folder):
    peft = pytest.importorskip("peft")
    models = FrozenModels([tiny_folder], small())
    policy = make_trainer(models)[1]
    example = models.pair_example(make_pairs(1)[0])
    ours = models.log_probabilities(models.base, [example], policy.memory(models.base))[0, 0].item()
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(models.base, settings).eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(policy.parameters()[0])
        ids = torch.tensor([example.prompt + example.answers[0]])
        labels = ids.clone()
        labels[:, : len(example.prompt)] = -100
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.item()
    assert -ours / len(example.answers[0]) == pytest.approx(loss, abs=1e-5)


# The trainer.


def test_training_lowers_the_loss_prefers_the_chosen_answer(tiny_folder):
    config = small(sft_steps=30, dpo_steps=30, kl_weight=0.1)
    _, history = train_patch(tiny_folder, make_pairs(24), BENIGN, config, "tiny")
    assert np.mean(history.sft_loss[-5:]) < np.mean(history.sft_loss[:5]) - 0.5
    assert history.dpo_loss[-1] < math.log(2)
    assert history.preference_accuracy[-1] == 1.0


def test_the_same_numbers_give_the_same_patch(tiny_folder, trained):
    again, _ = train_patch(tiny_folder, make_pairs(12), BENIGN, small(), "tiny")
    assert np.array_equal(again.soft_prompt.embeddings, trained.soft_prompt.embeddings)
    other, _ = train_patch(tiny_folder, make_pairs(12), BENIGN, small(rng_seed=2), "tiny")
    assert not np.array_equal(other.soft_prompt.embeddings, trained.soft_prompt.embeddings)
    assert again.training["data"] == trained.training["data"] == other.training["data"]


def test_a_patch_names_its_data_its_base_and_proves_itself(tiny_folder, trained):
    patch = trained
    more, _ = train_patch(tiny_folder, make_pairs(13), BENIGN, small(), "tiny")
    assert patch.training["data"]["pairs_sha256"] != more.training["data"]["pairs_sha256"]
    assert patch.training["data"]["benign_texts_sha256"] == more.training["data"]["benign_texts_sha256"]
    assert (
        patch.kv_seed is not None
        and patch.canary is not None
        and patch.weight_sketch is not None
        and patch.chat_template
    )


def test_the_trained_soft_prompt_gives_the_logits_it_was_trained_with(tiny_folder):
    training = PatchTraining(tiny_folder, small())
    patch = training.soft_prompt(make_pairs(12), BENIGN, "tiny")
    models = training.models
    example = models.benign_example(BENIGN[0])
    policy = SoftPromptPolicy(patch.soft_prompt, "cpu")
    with torch.no_grad():
        expected = models.logits_of([example], models.base, policy.memory(models.base), None).numpy()
    with load_runtime(tiny_folder, patch) as runtime:
        logits = runtime.logits([*example.prompt, *example.answers[0]])[:-1]
    assert np.abs(logits - expected).max() <= 5e-5


def test_the_base_model_stays_as_it_is(tiny_folder):
    models = FrozenModels([tiny_folder], small())
    before = {n: p.clone() for n, p in models.base.named_parameters()}
    trainer, policy = make_trainer(models)
    start = policy.soft_prompt().embeddings
    trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in models.base.named_parameters())
    assert not np.array_equal(policy.soft_prompt().embeddings, start)


def test_micro_batches_give_the_gradient_of_the_batch(tiny_folder):
    gradients = []
    for size in (0, 1, 3):
        trainer, policy = make_trainer(FrozenModels([tiny_folder], small(micro_batch_size=size)))
        trainer._reference = trainer._reference_table(silent)
        for stage in ("SFT", "DPO"):
            trainer._step(stage, 1, policy.parameters())
            gradients.append(policy.parameters()[0].grad.clone())
    for other in (1, 2):
        assert torch.allclose(gradients[0], gradients[2 * other], atol=1e-6) and torch.allclose(
            gradients[1], gradients[2 * other + 1], atol=1e-6
        )


def test_gradient_checkpointing_gives_the_same_gradient(tiny_folder):
    gradients = []
    for on in (False, True):
        trainer, policy = make_trainer(FrozenModels([tiny_folder], small(gradient_checkpointing=on)))
        trainer._step("SFT", 0, policy.parameters())
        gradients.append(policy.parameters()[0].grad.clone())
    assert torch.allclose(*gradients, atol=1e-5)


def test_bfloat16_trains_a_float32_patch(tiny_folder):
    patch, history = train_patch(tiny_folder, make_pairs(12), BENIGN, small(dtype="bfloat16", sft_steps=20), "tiny")
    assert patch.soft_prompt.embeddings.dtype == np.float32
    assert np.mean(history.sft_loss[-5:]) < np.mean(history.sft_loss[:5])


def test_four_bits_train_where_bitsandbytes_is_installed_and_say_so_where_not(tiny_folder):
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(MissingExtraError, match="bitsandbytes"):
            FrozenModels([tiny_folder], small(dtype="4bit"))
        return
    patch, history = train_patch(tiny_folder, make_pairs(12), BENIGN, small(dtype="4bit", sft_steps=20), "tiny")
    assert patch.soft_prompt.embeddings.dtype == np.float32
    assert np.mean(history.sft_loss[-5:]) < np.mean(history.sft_loss[:5])


def test_references_of_dpo_differ_and_the_safer_model_needs_a_name(tiny_folder):
    start = {}
    for reference in ("base", "sft", "model"):
        models = FrozenModels([tiny_folder], small(dpo_reference=reference))
        policy = make_trainer(FrozenModels([tiny_folder], small()))[1]
        other = tiny_folder if reference == "model" else None
        trainer = Trainer(models, policy, [make_pairs(12)], BENIGN, reference=other)
        start[reference] = trainer._reference_table(silent)[0]
    assert torch.equal(start["base"], start["model"])  # here the safer model is the base itself
    assert not torch.allclose(start["base"], start["sft"], atol=1e-2)
    with pytest.raises(InputError, match="missing"):
        Trainer(FrozenModels([tiny_folder], small(dpo_reference="model")), policy, [make_pairs(12)], BENIGN)


def test_early_stopping_keeps_the_best_check(tiny_folder):
    trainer, policy = make_trainer(
        FrozenModels([tiny_folder], small(dpo_steps=60, patience=2, kl_weight=0.0, dpo_learning_rate=0.5))
    )
    states, checks = [], []
    original = trainer._held_out_kl
    trainer._held_out_kl = lambda: (states.append(policy.state()["0"].clone()), original())[1]
    trainer.train()
    checks = [a - k for a, k in zip(trainer.history.preference_accuracy, trainer.history.held_out_kl, strict=True)]
    assert len(trainer.history.dpo_loss) < 60 and len(checks) == int(np.argmax(checks)) + 3
    assert torch.equal(policy.parameters()[0], states[int(np.argmax(checks))])


def test_a_loss_that_is_not_finite_stops_training_and_names_the_batch(tiny_folder, tmp_path):
    training = PatchTraining(tiny_folder, small(kl_weight=math.nan), run=tmp_path / "run")
    with pytest.raises(TrainingError, match=r"SFT, step \d+.*The fox"):
        training.soft_prompt(make_pairs(12), BENIGN, "tiny")


@pytest.mark.parametrize(
    ("pairs", "benign", "changes", "message"),
    [
        (3, BENIGN, {}, "at least 10 pairs"),
        (12, [], {}, "benign text"),
        (12, BENIGN, {"dpo_reference": "x"}, "dpo_reference"),
        (12, BENIGN, {"dtype": "int3"}, "dtype"),
        (12, BENIGN, {"held_out": 1.0}, "held_out"),
        (12, BENIGN, {"init_text": ""}, "init_text"),
        (12, BENIGN, {"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_settings_are_refused(tiny_folder, pairs, benign, changes, message):
    with pytest.raises(InputError, match=message):
        train_patch(tiny_folder, make_pairs(pairs), benign, small(**changes), "tiny")


def test_a_prompt_that_fills_the_context_is_refused(tiny_folder):
    long = Pair("The quick fox " * 2000, " a", " b", 0, 1)
    with pytest.raises(InputError, match=r"a prompt has \d+ tokens"):
        train_patch(tiny_folder, [*make_pairs(12), long], BENIGN, small(), "tiny")


def test_conversations_train(tiny_folder):
    """Pairs and benign texts in the model's chat template."""
    ask = lambda i: ({"role": "user", "content": f"Is fox {i} quick?"},)  # noqa: E731
    pairs = [Pair(ask(i), "It sleeps.", "It jumps over the dog.", 0, 1) for i in range(12)]
    benign = [(*ask(99), {"role": "assistant", "content": "The quick brown fox."})]
    training = PatchTraining(tiny_folder, small(sft_steps=20))
    training.soft_prompt(pairs, [*benign, *BENIGN], "tiny")
    assert np.mean(training.history.sft_loss[-5:]) < np.mean(training.history.sft_loss[:5])
    example = training.models.pair_example(pairs[0])
    assert list(example.prompt) == training.models.tokenizer.encode_chat(list(ask(0)))


# Other kinds.


def test_a_kv_prefix_starts_where_the_seed_is_and_learns(tiny_folder):
    start, _ = train_patch(tiny_folder, make_pairs(12), BENIGN, small(), "tiny")
    config = small(sft_steps=0, dpo_steps=12, dpo_learning_rate=0.05)
    training = PatchTraining(tiny_folder, config)
    patch = training.kv_prefix(start, make_pairs(12), BENIGN, "kv")
    assert patch.soft_prompt is None and patch.kv_seed is not None and patch.canary is not None
    assert patch.training["start"] == start.digest
    moved = [
        np.abs(a.astype(np.float32) - b.astype(np.float32)).max()
        for a, b in zip(patch.kv_seed.keys, start.kv_seed.keys, strict=True)
    ]
    assert min(moved) > 0.01
    assert training.history.dpo_loss[-1] < training.history.dpo_loss[0]
    policy = KVPolicy(patch.kv_seed, "cpu")
    example = training.models.benign_example(BENIGN[0])
    with torch.no_grad():
        expected = training.models.logits_of(
            [example], training.models.base, policy.memory(training.models.base), None
        ).numpy()
    with load_runtime(tiny_folder, patch) as runtime:
        assert np.abs(runtime.logits([*example.prompt, *example.answers[0]])[:-1] - expected).max() <= 5e-5
    with pytest.raises(InputError, match="starts from a patch with a seed"):
        training.kv_prefix(replace(start, kv_seed=None), make_pairs(12), BENIGN, "kv")


def test_training_on_quantized_weights_is_not_training_on_the_base(tiny_folder, tiny_q8_0, trained):
    aware = PatchTraining(tiny_folder, small(), [tiny_q8_0]).soft_prompt(make_pairs(12), BENIGN, "tiny")
    both = PatchTraining(tiny_folder, small(), [tiny_folder, tiny_q8_0]).soft_prompt(make_pairs(12), BENIGN, "tiny")
    prompts = [p.soft_prompt.embeddings for p in (trained, aware, both)]
    assert aware.base == trained.base and aware.training["weights"] == [tiny_q8_0.name]
    assert all(not np.array_equal(prompts[a], prompts[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    with load_runtime(tiny_folder, aware) as runtime:  # its canary is that of the base
        assert runtime.patch is aware


# Runs.


def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(tiny_folder, trained, tmp_path, monkeypatch):
    for stop in (("SFT", 4), ("DPO", 4)):
        folder = tmp_path / f"{stop[0]}{stop[1]}"

        def interrupt(stage, step, total, *, stop=stop, **figures):
            if (stage, step) == stop:
                raise RuntimeError("killed")

        monkeypatch.setattr(runs, "STEPS_BETWEEN_CHECKPOINTS", 2)
        with pytest.raises(RuntimeError, match="killed"):
            PatchTraining(tiny_folder, small(), run=folder).soft_prompt(
                make_pairs(12), BENIGN, "tiny", progress=interrupt
            )
        assert (folder / CHECKPOINT_FILE).is_file()
        again = PatchTraining(tiny_folder, small(), run=folder)
        patch = again.soft_prompt(make_pairs(12), BENIGN, "tiny")
        assert np.array_equal(patch.soft_prompt.embeddings, trained.soft_prompt.embeddings)
        assert len(again.history.dpo_loss) == len(again.history.sft_loss) == 6
    assert json.loads((folder / "curves.json").read_text())["run"]["num_pairs"] == 12


def test_a_run_that_is_interrupted_at_any_stage_goes_on_to_the_same_bits(tiny_folder, tmp_path):
    """Nothing is trained twice, and the curves have one value a step and one a check."""
    seen, config = [], small(check_every=2)
    whole = PatchTraining(tiny_folder, config)
    patch = whole.soft_prompt(make_pairs(12), BENIGN, "tiny", progress=lambda *place, **_: seen.append(place[:2]))
    stages = list(dict.fromkeys(stage for stage, _ in seen))
    assert stages == ["tokenize", "SFT", "reference", "DPO", "sketch", "seed and canary"]
    for stage in stages:
        of_stage = [place for place in seen if place[0] == stage]
        stop, places = of_stage[len(of_stage) // 2], []

        def interrupt(*now, stop=stop, **_):
            if now[:2] == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            PatchTraining(tiny_folder, config, run=tmp_path / stage).soft_prompt(
                make_pairs(12), BENIGN, "tiny", progress=interrupt
            )
        again = PatchTraining(tiny_folder, config, run=tmp_path / stage)
        resumed = again.soft_prompt(
            make_pairs(12), BENIGN, "tiny", progress=lambda *now, places=places, **_: places.append(now[:2])
        )
        assert np.array_equal(resumed.soft_prompt.embeddings, patch.soft_prompt.embeddings)
        assert asdict(again.history) == asdict(whole.history)
        if stage in ("SFT", "DPO"):
            assert next(place for place in places if place[0] == stage) == stop, "it goes on where it was"


def test_a_run_folder_goes_on_with_its_own_settings_alone(tiny_folder, tmp_path):
    PatchTraining(tiny_folder, small(), run=tmp_path / "run").soft_prompt(make_pairs(12), BENIGN, "tiny")
    with pytest.raises(InputError, match="other settings: config"):
        PatchTraining(tiny_folder, small(beta=0.2), run=tmp_path / "run").soft_prompt(make_pairs(12), BENIGN, "tiny")
    with pytest.raises(InputError, match="other settings: data"):
        PatchTraining(tiny_folder, small(), run=tmp_path / "run").soft_prompt(make_pairs(13), BENIGN, "tiny")
    (tmp_path / "run" / CHECKPOINT_FILE).write_bytes(b"half")
    with pytest.raises(InputError, match="damaged"):
        PatchTraining(tiny_folder, small(), run=tmp_path / "run").soft_prompt(make_pairs(12), BENIGN, "tiny")


def test_a_run_folder_that_cannot_be_written_is_refused_before_training(tiny_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        PatchTraining(tiny_folder, small(), run=tmp_path / "file" / "run").soft_prompt(make_pairs(12), BENIGN, "tiny")


def test_ctrl_c_keeps_the_run_and_exits_130(tiny_folder, tmp_path):
    write_pairs(make_pairs(12), tmp_path / "pairs.jsonl")
    (tmp_path / "benign.txt").write_text("\n".join(BENIGN))
    files = ["--pairs", tmp_path / "pairs.jsonl", "--benign", tmp_path / "benign.txt", "-o", tmp_path / "p.safetensors"]
    sizes = ["--num-virtual-tokens", 4, "--batch-size", 4, "--sft-steps", 100_000, "--pinned"]
    with Fork("train", tiny_folder, *files, *sizes, "--run", tmp_path / "run") as process:
        while not (tmp_path / "run" / CHECKPOINT_FILE).is_file() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        try:
            errors = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 130 and "Traceback" not in errors
    assert read_tree(tmp_path / "run" / CHECKPOINT_FILE)["step"] >= 50
    assert not (tmp_path / "p.safetensors").exists()


def test_two_processes_train_what_one_does(tiny_folder, tmp_path):
    """In the environment that `torchrun` gives them; the device is the CPU, and the first process chooses the type of the weights."""
    settings = {"num_virtual_tokens": 4, "sft_steps": 3, "dpo_steps": 3, "batch_size": 4, "kl_batch_size": 2}
    settings |= {"check_every": 3, "dtype": "auto", "block": 0, "turns": False}
    job = (
        "import sys\nfrom pathlib import Path\nimport numpy as np\n"
        "from edgepatch.training.config import TrainConfig\nfrom edgepatch.training.patching import PatchTraining\n"
        "from edgepatch.training.pairs.preferences import Pair\nfrom edgepatch.training import parallel\n"
        f"pairs = [Pair(**pair) for pair in {[asdict(pair) for pair in make_pairs(12)]!r}]\n"
        f"patch = PatchTraining(Path({str(tiny_folder)!r}), TrainConfig(**{settings!r}), device='cpu').soft_prompt(pairs, {BENIGN * 3!r}, 'tiny')\n"
        "rank, size = parallel.world()\nassert size == 2\n"
        "np.save(f'{sys.argv[1]}-{rank}.npy', patch.soft_prompt.embeddings)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [Fork(tmp_path / "two", program=job, env={**os.environ, **place, **rank}) for rank in ranks]
    for process in processes:
        with process:
            _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
    first, second = (np.load(tmp_path / f"two-{rank}.npy") for rank in range(2))
    training = PatchTraining(tiny_folder, TrainConfig(**settings), device="cpu")
    one = training.soft_prompt(make_pairs(12), BENIGN * 3, "tiny").soft_prompt.embeddings
    assert np.array_equal(first, second)
    assert np.abs(one - first).max() < 1e-4


def test_more_processes_than_pairs_in_a_batch_are_refused(tiny_folder, monkeypatch):
    """Each would wait for a gradient that the idle one never sends."""
    monkeypatch.setattr(parallel, "world", lambda: (0, 5))
    with pytest.raises(InputError, match="5 processes share batches of 4 pairs"):
        make_trainer(FrozenModels([tiny_folder], small()))


def test_the_command_trains_a_patch_and_a_kv_prefix_from_it(tiny_folder, tmp_path):
    from typer.testing import CliRunner

    from edgepatch.cli import app

    write_pairs(make_pairs(12), tmp_path / "pairs.jsonl")
    (tmp_path / "benign.txt").write_text("\n".join(BENIGN))
    common = [
        "--pairs",
        str(tmp_path / "pairs.jsonl"),
        "--benign",
        str(tmp_path / "benign.txt"),
        "--sft-steps",
        "2",
        "--dpo-steps",
        "2",
    ]
    common += ["--num-virtual-tokens", "4"]
    first = ["-o", str(tmp_path / "p.safetensors"), "--run", str(tmp_path / "run")]
    done = CliRunner().invoke(app, ["train", str(tiny_folder), *first, *common], catch_exceptions=False)
    assert done.exit_code == 0 and "4 virtual tokens" in done.output
    assert "the seed moves: at each turn and every 128 tokens" in done.output
    page = (tmp_path / "run" / "curves.html").read_text()
    assert page.count("<svg") == 5 and "SFT loss" in page and "://" not in page
    start = ["--kind", "kv", "--start", str(tmp_path / "p.safetensors"), "--run", str(tmp_path / "kv")]
    start += ["--block", "16", "--turns", "--front-tokens", "100"]
    done = CliRunner().invoke(
        app,
        ["train", str(tiny_folder), "-o", str(tmp_path / "kv.safetensors"), *common, *start],
        catch_exceptions=False,
    )
    moving = read_patch(tmp_path / "kv.safetensors")
    assert done.exit_code == 0 and moving.soft_prompt is None
    assert moving.anchoring is not None and moving.anchoring.block == 16 and len(moving.anchoring.turn_tokens) == 1
    assert moving.training["config"]["front_tokens"] == 100
    patch = read_patch(tmp_path / "p.safetensors")
    assert patch.anchoring is not None and patch.anchoring.block == 128 and patch.training["config"]["front_tokens"] > 0
    assert write_patch(patch, tmp_path / "again.safetensors") == patch.digest
