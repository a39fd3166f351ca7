"""Further training for `evaluate gold`, under `accelerate launch`; the same as `llmattrib evaluate gold`.

accelerate launch --config_file launch/cpu.yaml --num_processes 2 launch/gold.py CONFIG [section.key=value ...]
"""

import sys

from llmattrib.cli import app

if __name__ == "__main__":
    app(["evaluate", "gold", *sys.argv[1:]], prog_name="launch/gold.py")
