"""Other packages, driven on what llmattrib is measured on. Installed in the environment of `make bench` only."""
