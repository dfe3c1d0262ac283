"""What README.md tells the reader to write, written as it says and run."""
import re
import shutil

import pytest

import generate
from conftest import ROOT, train

README = (ROOT / "README.md").read_text()
SECTION = README[README.index("## A fifth data set"):README.index("## Licence")]
NAMES = [path.name for path in ROOT.glob("*.py")]


@pytest.fixture
def bundle(tmp_path):
    """A copy of the bundle to which the fifth data set was added."""
    for name in NAMES:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    module, row = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    (tmp_path / "birds_dataset.py").write_text(module)
    datasets = (tmp_path / "datasets.py").read_text()
    import_line = re.search(r"`(from birds_dataset .*?)`", SECTION).group(1)
    datasets = datasets.replace("from oxford_pets", import_line + "\nfrom oxford_pets", 1)
    (tmp_path / "datasets.py").write_text(
        re.sub(r"(DATA_SETS = \{\n)", lambda match: match.group(1) + row, datasets))
    return tmp_path


def test_a_fifth_data_set(bundle, checkpoint):
    birds = bundle / "birds"
    generate.pets(birds, classes=4, train_per_class=5, test_per_class=2)
    for name, split in (("train", "trainval"), ("test", "test")):
        lines = (birds / "annotations" / f"{split}.txt").read_text().splitlines()
        rows = [line.split() for line in lines]
        (birds / f"{name}.txt").write_text("".join(f"{image}.jpg {int(label) - 1}\n"
                                                   for image, label, *_ in rows))
    done = train("pets", "--data-set", "birds", "--data-path", birds, "--resume", checkpoint,
                 "--epochs", "1", scripts=bundle / "scripts")
    assert "on birds: 20 training and 8 test images, 200 classes" in done.stdout
    assert "the official set has 5994" in done.stderr
