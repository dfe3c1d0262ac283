"""What README.md tells: to write, written as it says and run; and to see, compared."""
import re
import shutil
from types import SimpleNamespace

import pytest

import generate
import summary
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
        datasets.replace("DATA_SETS = {", "DATA_SETS = {" + row.strip() + " ", 1))
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


def sources():
    """All that the bundle can say: its sources, with strings over several lines as one."""
    files = [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.*")]
    return re.sub(r'"\s*f?"', "", "".join(path.read_text() for path in files))


def messages():
    """The first column of the table of what goes wrong."""
    table = README[README.index("## What goes wrong"):README.index("## How it works")]
    return [cell for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
            for cell in re.findall(r"`(.*?)`", row)]


@pytest.mark.parametrize("message", messages())
def test_messages_are_those_of_the_bundle(message):
    parts = [part.strip() for part in re.split(r"\.\.\.|\bN\b", message)]
    said = sources()
    assert all(part in said for part in parts)


def test_what_a_run_prints():
    args = SimpleNamespace(
        model="deit_tiny_patch16_224", data_set="pets", batch_size=8, epochs=3, weight_decay=0.1,
        eval_freq=2, save_freq=1, num_workers=1, output_dir="out/pets")
    run = SimpleNamespace(
        args=args, processes=2, datasets={True: (range(64), 37), False: (range(40), 37)},
        start={}, start_path="tiny.pth", continues=False, headless=True, recipe={"lr": 3e-4})
    lines = []
    summary.show(run, 4, lines.append)
    assert "\n".join(lines) + "\n" in README
