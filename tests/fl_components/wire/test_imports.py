"""What reading a frame needs."""

from __future__ import annotations

import subprocess
import sys


def test_frames_need_neither_torch_nor_a_store() -> None:
    script = (
        "import sys; import fedrounds.fl_components.wire; "
        "print(sorted({'torch', 'sqlalchemy', 'prefect', 'mlflow', 'pandas'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
