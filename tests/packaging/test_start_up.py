import subprocess
import sys

import pytest

HEAVY = ("torch", "lightning", "triton", "datasets", "wandb", "matplotlib", "transformers")
CHECK = """
import sys
try:
    {code}
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = sorted(set({heavy}) & set(sys.modules))
assert not loaded, loaded
"""


@pytest.mark.parametrize(
    "code",
    [
        "import sparsetrain",
        "import sparsetrain.callbacks",
        "from sparsetrain.recipes.cli.main import main; main(['--help'])",
        "from sparsetrain.recipes.cli.main import main; main(['--version'])",
        "from sparsetrain.recipes.cli.main import main; main(['recipes'])",
        "from sparsetrain.recipes.cli.main import main; main(['doctor', '--help'])",
        "from sparsetrain.recipes.cli.main import main; assert main(['doctor']) == 0",
        "from sparsetrain.recipes.cli.main import main; assert main(['doctor', '--json', '--shape', '64x48']) == 0",
    ],
)
def test_starting_up_imports_nothing_heavy(code: str) -> None:
    check = CHECK.format(code=code, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
