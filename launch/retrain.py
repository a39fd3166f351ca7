"""Sub-models on random subsets, under `accelerate launch`; the same as `llmattrib retrain`.

accelerate launch --config_file launch/cpu.yaml --num_processes 2 launch/retrain.py CONFIG [section.key=value ...]
"""

import sys

from llmattrib.cli import app

if __name__ == "__main__":
    app(["retrain", *sys.argv[1:]], prog_name="launch/retrain.py")
