import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECK = """
import runpy, sys
from pathlib import Path
target, site = sys.argv[1:]
# an editable installation must not lend what the build forgot
sys.path[:] = [target, *[p for p in sys.path if p and "site-packages" not in p and "__editable__" not in p], site]
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
import sparsetrain
import sparsetrain.kernels.mask_search.reference, sparsetrain.callbacks, sparsetrain.methods, sparsetrain.recipes
from sparsetrain.recipes.cli.main import main
from sparsetrain.recipes.cli.recipe_files import recipe_files
for name, module in list(sys.modules.items()):
    if name.split(".")[0] == "sparsetrain":
        places = getattr(module, "__path__", [module.__file__])
        assert all(Path(place).is_relative_to(target) for place in places), (name, list(places))
assert len(recipe_files()) >= 3
package = Path(sparsetrain.__file__).parent
assert (package / "py.typed").exists()
assert (package / "kernels" / "mask_search" / "README.md").exists()
assert main(["recipes"]) == 0
sys.argv = ["sparsetrain", "--help"]
runpy.run_path(f"{target}/bin/sparsetrain", run_name="__main__")
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("sources") / "sparsetrain"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


def test_a_wheel_built_from_the_sdist_installed_elsewhere_imports(sources: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(sources)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,), (_sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, capture_output=True)
    command = [sys.executable, "-c", CHECK, str(target), sysconfig.get_path("purelib")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gpt_from_scratch.yaml" in done.stdout
    assert "usage: sparsetrain" in done.stdout
