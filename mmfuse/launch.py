"""What passes between a run and the script that launched it: torchrun makes 1 of every exit code."""

import os
from pathlib import Path

LAUNCH_FOLDER = "MMFUSE_LAUNCH_DIR"
"""The variable with the folder of `launch/train.sh`; it writes `STOP_ASKED` there, and reads `outcome`."""
STOP_ASKED = "stop"


def launch_folder() -> Path | None:
    """None where the script did not start this process."""
    folder = os.environ.get(LAUNCH_FOLDER)
    return Path(folder) if folder else None


def stop_is_asked() -> bool:
    """Whether the script was told to stop."""
    folder = launch_folder()
    return folder is not None and (folder / STOP_ASKED).exists()


def forget_outcome() -> None:
    """A process of this node begins again: how an earlier attempt ended is no longer true."""
    folder = launch_folder()
    if folder and os.environ.get("LOCAL_RANK", "0") == "0":
        (folder / "outcome").unlink(missing_ok=True)


def tell_launcher(exit_code: int) -> bool:
    """Leaves the exit code for the script; says whether there is one to read it."""
    folder = launch_folder()
    if folder:
        (folder / "outcome").write_text(str(exit_code))
    return folder is not None
