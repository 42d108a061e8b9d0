"""Our runtimes under lm-eval: the scores of its own Transformers model, bare and patched, and paired results."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest

from edgepatch.bench.harness.comparison import OWN_TASKS, HarnessConfig, compare, count_flips
from edgepatch.converters.hf import folders
from edgepatch.converters.peft import adapters as peft
from edgepatch.errors import InputError
from edgepatch.patch.file import write_patch
from edgepatch.runtimes import load_runtime

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra harness)")
pytestmark = [  # of PEFT 0.21, which lm-eval's model calls here
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps in the warm afternoon sun. "
PAIRS = [
    ("The quick brown", " fox jumps over the lazy dog"),
    ("A space at the end ", "moves to the answer"),
    ("", "No context at all."),
    (TEXT * 40, " sun"),  # longer than the context of 512
    ("Numbers 1234", " é 🙂"),
]


def instances(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patched:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):
            patched.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def patch_file(tiny_patch, tmp_path_factory):
    path = tmp_path_factory.mktemp("patch") / "tiny.safetensors"
    write_patch(tiny_patch, path)
    return path


@pytest.fixture(scope="module", params=["bare", "patched"])
def both(request, tiny_folder, tiny_patch, tmp_path_factory):
    """(ours, lm-eval's own) of the same model."""
    from lm_eval.models.huggingface import HFLM
    from peft import PeftModel
    from transformers import AutoTokenizer

    from edgepatch.bench.harness.model import RuntimeModel

    model = folders.load_model(tiny_folder)
    if request.param == "patched":
        adapter = tmp_path_factory.mktemp("peft") / "adapter"
        peft.write_adapter(tiny_patch, adapter, str(tiny_folder))
        # Loaded here: lm-eval would cut the vocabulary to the tokenizer's, which leaves fewer tokens to share the probability.
        model = PeftModel.from_pretrained(model, adapter).eval()
    runtime = load_runtime(tiny_folder, tiny_patch if request.param == "patched" else None)
    runtime.end_token_ids = frozenset({2})  # lm-eval's model ends at EOS alone, ours also at the end of a turn
    theirs = HFLM(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(tiny_folder),
        batch_size=1,
        max_length=runtime.context_length,
    )
    with runtime:
        yield RuntimeModel(runtime), theirs


def test_log_likelihoods_are_those_of_lm_evals_own_model(both):
    ours, theirs = (model.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True) for model in both)
    assert np.abs(np.array([o[0] for o in ours]) - [t[0] for t in theirs]).max() <= 1e-4
    assert [o[1] for o in ours] == [t[1] for t in theirs]


def test_rolling_windows_are_those_of_lm_evals_own_model(both):
    texts = [(TEXT * 60,), (TEXT,)]
    assert len(both[0].tok_encode(texts[0][0])) > 2 * both[0].max_length, "three windows"
    ours, theirs = (
        model.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True) for model in both
    )
    assert np.allclose(ours, theirs, rtol=1e-6, atol=1e-4)


def test_generations_are_those_of_lm_evals_own_model(both):
    settings = {"until": ["the", "\n\n"], "max_gen_toks": 24, "do_sample": False}
    free = {"until": [], "max_gen_toks": 16}
    prompts = [(context or "Once", dict(chosen)) for context, _ in PAIRS for chosen in (settings, free)]
    ours, theirs = (model.generate_until(instances("generate_until", prompts), disable_tqdm=True) for model in both)
    # Where the last token leaves a character incomplete, Transformers writes a replacement character.
    ours, theirs = ([text.rstrip("\N{REPLACEMENT CHARACTER}") for text in texts] for texts in (ours, theirs))
    assert ours == theirs
    assert len(set(ours)) > 3


def test_the_patch_moves_the_scores(tiny_folder, tiny_patch):
    from edgepatch.bench.harness.model import RuntimeModel

    with load_runtime(tiny_folder, tiny_patch) as runtime:
        model = RuntimeModel(runtime)
        patched = model.loglikelihood(instances("loglikelihood", PAIRS))
        runtime.swap(None)
        bare = model.loglikelihood(instances("loglikelihood", PAIRS))
        assert min(abs(p[0] - b[0]) for p, b in zip(patched, bare, strict=True)) > 0.01
        assert model.max_length == 512, "the patch's positions are free again"


def test_gguf_scores_as_torch_does(tiny_folder, tiny_ggufs, tiny_patch):
    from edgepatch.bench.harness.model import RuntimeModel

    options = {"kv_type": "f32", "flash_attention": False, "num_threads": 1, "context_length": 512}
    scores = []
    for model, chosen in ((tiny_ggufs["F32"], options), (tiny_folder, {})):
        with load_runtime(model, tiny_patch, **chosen) as runtime:
            wrapped = RuntimeModel(runtime)
            likelihoods = wrapped.loglikelihood(instances("loglikelihood", PAIRS))
            rolling = wrapped.loglikelihood_rolling(instances("loglikelihood_rolling", [(TEXT,)]))
            texts = wrapped.generate_until(
                instances("generate_until", [("The quick", {"until": ["."], "max_gen_toks": 12})])
            )
            scores.append(([f[0] for f in likelihoods] + rolling, texts))
    assert np.abs(np.array(scores[0][0]) - scores[1][0]).max() <= 1e-3
    assert scores[0][1] == scores[1][1]


def test_conversations_go_through_the_chat_template(tiny_folder):
    from edgepatch.bench.harness.model import RuntimeModel

    with load_runtime(tiny_folder, None) as runtime:
        model = RuntimeModel(runtime)
        messages = [{"role": "user", "content": "Say <|im_end|> and go on"}]
        context = model.apply_chat_template(messages)
        expected = runtime.encode_chat(messages)
        assert model._encode_pair(context, "yes") == (expected, model.tok_encode("yes", add_special_tokens=False))
        opened = model.apply_chat_template([*messages, {"role": "assistant", "content": "The answer is"}], False)
        assert model._encode_context(opened) == expected + model.tok_encode("The answer is", add_special_tokens=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 8, "num_beams": 4}, "num_beams"),
        ({"max_gen_toks": 512}, "up to 512 tokens, the context holds 512"),
        ({"max_gen_toks": 8, "until": [str(i) for i in range(20)]}, "stop"),
    ],
)
def test_what_cannot_be_generated_is_refused(tiny_folder, settings, message):
    from edgepatch.bench.harness.model import RuntimeModel

    with load_runtime(tiny_folder, None) as runtime, pytest.raises(InputError, match=message):
        RuntimeModel(runtime).generate_until(instances("generate_until", [("The", settings)]))


@pytest.mark.parametrize("continuation", ["", TEXT * 60])
def test_a_continuation_that_does_not_fit_is_refused(tiny_folder, continuation):
    from edgepatch.bench.harness.model import RuntimeModel

    with load_runtime(tiny_folder, None) as runtime, pytest.raises(InputError, match="expected 1 to 512"):
        RuntimeModel(runtime).loglikelihood(instances("loglikelihood", [("The", continuation)]))


@pytest.fixture
def own_tasks(tmp_path):
    """Task files of a user's own: a group of two tasks, one without a mean."""
    rows = [{"q": TEXT[:n], "a": TEXT[n : n + 12], "b": " zebra"} for n in range(10, 40, 3)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    shutil.copy(OWN_TASKS / "own_data.py", tmp_path)
    shared = "custom_dataset: !function own_data.load\ndataset_kwargs:\n  file: items.jsonl\ntest_split: test\n"
    choice = (
        shared + 'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{[a, b]}}"\ndoc_to_target: 0\n'
    )
    metrics = "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    (tmp_path / "one.yaml").write_text(f"task: mine_one\n{choice}{metrics}", "utf-8")
    (tmp_path / "two.yaml").write_text(f"task: mine_two\n{choice}{metrics}", "utf-8")
    (tmp_path / "group.yaml").write_text("group: mine\ntask: [mine_one, mine_two]\n", "utf-8")
    return tmp_path


def test_paired_scores_of_tasks_and_groups(tiny_folder, tiny_patch, own_tasks):
    with load_runtime(tiny_folder, tiny_patch) as runtime:
        comparison = compare(runtime, HarnessConfig(("mine",), own_tasks, limit=6))
        assert runtime.patch is tiny_patch, "the patch is back in place"
    scores = {score.task: score for score in comparison.scores}
    assert {name: score.num_items for name, score in scores.items()} == {"mine": 12, "mine_one": 6, "mine_two": 6}
    assert scores["mine_one"].bare.value == pytest.approx(
        np.mean([s["acc"] for s in comparison.items["bare"]["mine_one"]])
    )
    for score in comparison.scores:
        assert score.difference.value == pytest.approx(score.patched.value - score.bare.value)
        assert score.flips.repaired - score.flips.broken == pytest.approx(score.difference.value * score.num_items)
    likelihoods = [
        [s["filtered_resps"][0][0] for s in comparison.items[arm]["mine_one"]] for arm in ("bare", "patched")
    ]
    assert likelihoods[0] != likelihoods[1]


def test_a_task_that_samples_its_prompts_afresh_is_refused(tiny_folder, tiny_patch, own_tasks):
    """A pair of different prompts is no pair."""
    (own_tasks / "fresh.py").write_text(
        "import itertools\nnumbers = itertools.count()\ndef text(doc):\n    return f'{next(numbers)} and'\n", "utf-8"
    )
    text = (own_tasks / "one.yaml").read_text("utf-8")
    (own_tasks / "one.yaml").write_text(text.replace('"{{q}}"', "!function fresh.text"), "utf-8")
    with load_runtime(tiny_folder, tiny_patch) as runtime, pytest.raises(InputError, match="same prompts"):
        compare(runtime, HarnessConfig(("mine_one",), own_tasks, limit=3))


@pytest.mark.parametrize(
    ("broken", "repaired", "p_value"), [(1, 8, 20 / 512), (0, 0, 1.0), (5, 5, 1.0), (0, 6, 2 / 64)]
)
def test_exact_mcnemar(broken, repaired, p_value):
    bare = [1.0] * broken + [0.0] * repaired + [1.0, 0.0]
    patched = [0.0] * broken + [1.0] * repaired + [1.0, 0.0]
    assert count_flips(bare, patched) == (broken, repaired, pytest.approx(p_value))


@pytest.fixture
def run(monkeypatch, capfd):
    from edgepatch import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capfd.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call


def test_shipped_tasks_from_the_command_line(run, tiny_folder, patch_file, tmp_path):
    out = tmp_path / "scores.json"
    code, output, _ = run(
        "bench", "harness", tiny_folder, "-p", patch_file, "-t", "own_*", "--limit", 3, "--out", out, "--json"
    )
    assert code == 0
    document = json.loads(output)
    metrics = {(score["task"], score["metric"]) for score in document["scores"]}
    assert metrics >= {("own_choice", "acc"), ("own_copy", "exact_match"), ("own_text", "word_perplexity")}
    assert all(
        score["num_items"] == 3 and score["bare"] and score["patched"] and score["difference"]
        for score in document["scores"]
    )
    items = json.loads(out.read_text("utf-8"))["items"]
    assert len(items["patched"]["own_copy"]) == len(items["bare"]["own_copy"]) == 3


def test_formats_are_asked_in_a_chat_and_scored_by_rule(tiny_folder, tiny_patch):
    from edgepatch.bench.harness.tasks.format_rules import process_results

    with load_runtime(tiny_folder, tiny_patch) as runtime:
        comparison = compare(runtime, HarnessConfig(("own_formats",), limit=4, chat=True))
    assert {(score.task, score.metric, score.num_items) for score in comparison.scores} == {
        ("own_formats", "strict", 4),
        ("own_formats", "loose", 4),
    }
    assert all(score.patched and score.difference and score.flips for score in comparison.scores)
    for item in comparison.items["patched"]["own_formats"]:
        assert json.loads(item["arguments"][0][0]) == [[{"role": "user", "content": item["doc"]["prompt"]}], ""]
        assert process_results(item["doc"], item["filtered_resps"]) == {
            name: item[name] for name in ("strict", "loose")
        }


def test_table_of_a_bare_run(run, tiny_folder):
    code, output, _ = run("bench", "harness", tiny_folder, "--bare", "-t", "own_text", "--limit", 2)
    assert code == 0
    assert "bits_per_byte" in output
    assert "patched" not in output


def test_tasks_on_public_data_read_their_folder(run, tiny_folder, tmp_path, monkeypatch):
    arc, openbookqa = (tmp_path / "general" / name for name in ("ai2_arc/test/ARC-Easy_test.csv", "openbookqa.jsonl"))
    arc.parent.mkdir(parents=True)
    arc.write_text(
        '"What is wet?","rain","a stone","sand","a brick","A"\n"What burns?","water","wood","ice","air","B"\n'
    )
    choices = [{"text": text, "label": letter} for text, letter in zip(("a boat", "a car"), "AB", strict=True)]
    item = {"id": "1", "question": {"stem": "To cross a lake one takes", "choices": choices}, "answerKey": "A"}
    openbookqa.write_text(json.dumps(item) + "\n")
    monkeypatch.setenv("EDGEPATCH_DATA", str(tmp_path))
    out = tmp_path / "scores.json"
    code, _, error = run("bench", "harness", tiny_folder, "--bare", "-t", "arc_easy_data,openbookqa_data", "--out", out)
    assert code == 0, error
    items = json.loads(out.read_text("utf-8"))["items"]["bare"]
    assert [item["target"] for item in items["arc_easy_data"]] == [0, 1]
    assert items["openbookqa_data"][0]["arguments"][0][1] == " a boat"

    code, _, error = run("bench", "harness", tiny_folder, "--bare", "-t", "arc_challenge_data")
    assert code == 2
    assert "ARC-Challenge_test.csv is missing" in error
    monkeypatch.delenv("EDGEPATCH_DATA")
    code, _, error = run("bench", "harness", tiny_folder, "--bare", "-t", "arc_easy_data")
    assert code == 2
    assert "EDGEPATCH_DATA" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bare", "-t", "own_choice", "--include-path", "{empty}/none"), "no folder"),
        (("--bare", "-t", ","), "names no task"),
        (("-t", "own_choice", "--bare", "-p", "x"), "exclude"),
    ],
)
def test_wrong_use(run, tiny_folder, tmp_path, arguments, message):
    code, _, error = run("bench", "harness", tiny_folder, *(a.format(empty=tmp_path) for a in arguments))
    assert code == 2
    assert message in error


def test_without_lm_eval_the_extra_is_named(run, tiny_folder, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else real(name, *rest)
    )
    code, _, error = run("bench", "harness", tiny_folder, "--bare", "-t", "own_text")
    assert code == 2
    assert "[harness]" in error
