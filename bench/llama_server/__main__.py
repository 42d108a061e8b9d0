"""``python -m edgepatch.bench.llama_server``."""

from edgepatch.bench.llama_server.run import main

main()
