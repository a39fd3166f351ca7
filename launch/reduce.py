"""Representers of a run, under `accelerate launch`; the same as `llmattrib reduce`. Processes share gradient methods.

accelerate launch --config_file launch/cpu.yaml --num_processes 2 launch/reduce.py CONFIG [section.key=value ...]
"""

import sys

from llmattrib.cli import app

if __name__ == "__main__":
    app(["reduce", *sys.argv[1:]], prog_name="launch/reduce.py")
