import subprocess
import sys

import pytest
from helpers import ROOT

# Scripts have a main; the modules next to them are imported by these.
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "train_net.py", *ROOT.glob("projects/*/*.py")]
    if "__main__" in path.read_text()
)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_starts_in_a_process_of_its_own(script, tmp_path):
    """Within the tests, pisa_d2 has readied Detectron2 before any script is imported."""
    result = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage:")
