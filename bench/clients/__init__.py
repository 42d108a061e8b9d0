"""Programs of OpenAI's clients, each in its latest release from the package indexes, against a real server of ours."""
