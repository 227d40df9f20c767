"""Several runs one after the other in the processes of one launch: imports, which take longest, happen once.

accelerate launch ... many_runs.py RUN FOLDER '{"NAME": ["setting=value", ...], ...}'
"""

import gc
import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState

from mmfuse.train.run import load_run
from mmfuse.train.trainer import train


def main() -> None:
    """Each run's folder is FOLDER/NAME. A process group cannot be made twice of one launch, so it outlives the runs."""
    PartialState.destroy_process_group = lambda self, group=None: None
    run, folder, variants = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    for name, settings in variants.items():
        train(load_run(run, overrides=[f"output_dir={folder / name}", *settings]))
        AcceleratorState._reset_state()
        gc.collect()


if __name__ == "__main__":
    main()
