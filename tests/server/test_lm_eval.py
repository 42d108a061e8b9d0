"""lm-eval's own clients of OpenAI's interface give the scores that our harness gives on the same tasks."""

import pytest

from edgepatch.bench.harness.comparison import OWN_TASKS, HarnessConfig, compare
from edgepatch.runtimes import load_runtime
from kit.serving import KEY, MODEL, running

for name in ("lm_eval", "tenacity"):
    pytest.importorskip(name, reason=f"{name} is not installed (extra dev)")
LIMIT = 4


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patched:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):
            patched.setenv(name, "1")
        patched.setenv("OPENAI_API_KEY", KEY)
        yield


@pytest.fixture(scope="module")
def server(tiny_folder, tiny_patch):
    with running(lambda: load_runtime(tiny_folder, tiny_patch, num_sequences=2)) as running_server:
        yield running_server


def samples_of(client, path, server, tasks, chat=False, **options):
    """(task, number of the item) -> its metrics and what the model gave, by one of lm-eval's clients."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    arguments = {"base_url": server.url + path, "model": MODEL, "num_concurrent": 1, "max_retries": 1, **options}
    results = simple_evaluate(
        client,
        model_args=arguments,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(OWN_TASKS), include_defaults=False),
        limit=LIMIT,
        apply_chat_template=chat,
        bootstrap_iters=0,
        log_samples=True,
    )
    return as_table(results["samples"])


def as_table(samples):
    return {
        (task, sample["doc_id"]): (sample["filtered_resps"], [sample[metric] for metric in sample["metrics"]])
        for task, entries in samples.items()
        for sample in entries
    }


def ours(folder, patch, tasks, chat=False):
    with load_runtime(folder, patch) as runtime:
        return as_table(compare(runtime, HarnessConfig(tuple(tasks), limit=LIMIT, chat=chat)).items["patched"])


def flat(value):
    return [part for entry in value for part in flat(entry)] if isinstance(value, (list, tuple)) else [value]


def require_equal(theirs, own):
    assert set(theirs) == set(own) and len(own) >= LIMIT
    for place, (said, metrics) in own.items():
        assert flat(theirs[place][1]) == pytest.approx(flat(metrics), rel=1e-4), place
        for one, other in zip(flat(theirs[place][0]), flat(said), strict=True):
            assert one == (other if isinstance(other, str) else pytest.approx(other, rel=1e-4)), place


def test_local_completions(server, tiny_folder, tiny_patch):
    tasks = ("own_choice", "own_text", "own_copy")
    options = {"tokenizer": str(tiny_folder), "tokenizer_backend": "huggingface", "add_bos_token": True}
    context = server.service.require_model().context_length
    theirs = samples_of("local-completions", "/v1/completions", server, tasks, max_length=context + 1, **options)
    require_equal(theirs, ours(tiny_folder, tiny_patch, tasks))


def test_local_chat_completions(server, tiny_folder, tiny_patch):
    theirs = samples_of("local-chat-completions", "/v1/chat/completions", server, ["own_copy"], chat=True)
    require_equal(theirs, ours(tiny_folder, tiny_patch, ["own_copy"], chat=True))
