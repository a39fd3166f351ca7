"""Features of a run, on every process that `accelerate launch` starts; the same as `llmattrib build`.

accelerate launch --config_file launch/cpu.yaml --num_processes 2 launch/build.py CONFIG [section.key=value ...]
"""

import signal
import sys

from llmattrib.cli import app

if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # ignored by the launcher (slurm/build.sbatch), and so inherited
    app(["build", *sys.argv[1:]], prog_name="launch/build.py")
