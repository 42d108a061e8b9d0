"""``bench server-load``: what the server does when many ask at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgepatch.cli.bench.door import RESULTS, OutOption, ThreadsOption, bench_app, end_with
from edgepatch.cli.console import LogOption, ModelArgument, PatchOption, print_table, progress_bars
from edgepatch.progress import published_command


@bench_app.command()
def server_load(
    model: ModelArgument,
    patch: PatchOption = None,
    clients: Annotated[int, typer.Option("--clients", min=1, max=64, help="At once.")] = 8,
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="Of load.")] = 10.0,
    llama_server: Annotated[
        Path | None, typer.Option(metavar="FILE", help="llama-server's binary, to compare the throughput with.")
    ] = None,
    threads: ThreadsOption = 1,
    work: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the servers' logs.")] = Path("out/server-load"),
    out: OutOption = RESULTS / "server.json",
    log: LogOption = None,
) -> None:
    """Ask a server from many sides, with cancelled, malformed and over-long requests among them: bench/results/server.json.

    Example: `edgepatch bench server-load SmolLM2-135M-Instruct.Q4_1.gguf --patch patches/smollm2-detox-0.3.0.safetensors`
    """
    from edgepatch.bench.server_load.run import LoadConfig, run

    config = LoadConfig(clients, 60 * minutes, num_threads=threads, llama_server=llama_server)
    with progress_bars(log or work / "load.log", lambda: "the same command begins anew") as progress:
        document = run(model, patch or (), out, work, published_command(), config, progress)
    _print(document)
    end_with([goal for goal, is_reached in document["goals"].items() if not is_reached])


def _print(document: dict[str, Any]) -> None:
    outcomes = ("done", "cancelled", "busy", "lost", "wrong")
    rows = [[kind, *(counts.get(name, 0) for name in outcomes)] for kind, counts in document["requests"].items()]
    print_table(["requests", *outcomes], rows)
    memory, first = document["memory_mb"], document["first_token_s"]
    asked = document["canaries"]["asked"]
    print_table(
        ["figure", "value"],
        [
            ["canaries, patched of asked", f"{asked - len(document['canaries']['unpatched'])} of {asked}"],
            ["memory, MB", f"{memory['begin']:.1f} to {memory['end']:.1f} ({memory['growth']:+.1%})"],
            *(
                [f"first token, {name}, s", f"p50 {values['p50']:.2f}, p99 {values['p99']:.2f}"]
                for name, values in first.items()
            ),
        ],
    )
    servers = list(document["throughput"][0]["tokens_per_s"])
    compared = list(document["throughput"][0].get("shares", ()))
    rows = [
        [
            row["streams"],
            *(f"{row['tokens_per_s'][name]['median']:.1f}" for name in servers),
            *(f"{row['shares'][name]:.2f}" for name in compared),
        ]
        for row in document["throughput"]
    ]
    print_table(["streams", *(f"{name}, tokens/s" for name in servers), *(f"{name}, share" for name in compared)], rows)
