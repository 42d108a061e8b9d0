"""``python -m edgepatch.bench.first_contact``."""

from edgepatch.bench.first_contact.run import main

main()
