#!/usr/bin/env python3
"""Label images with a fine-tuned model: CSV on standard output.

    python scripts/predict.py --resume out/birds/best_checkpoint.pth photos/ > labels.csv
"""
import argparse
import csv
import os
import signal
import sys
from typing import Any, Iterator, List, Tuple

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from deit_plugin import deit, errors  # noqa: E402


def main() -> None:
    """Label the images; exit with 1 if some could not be read, which standard error names."""
    args = parse()
    if hasattr(signal, "SIGPIPE"):  # not on Windows: `| head` ends the work that nobody reads
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    deit.silence_known_warnings()
    import torch

    from deit_plugin import evaluation, weights

    paths = find_images(args.paths)
    finished = weights.finished(args.resume, args.trust)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, top = finished.model.to(device), min(args.top, len(finished.classes))
    rows, failed, done = csv.writer(sys.stdout, lineterminator="\n"), 0, 0
    rows.writerow(["image", "predicted", "probability"])
    for good, images, errors_of_others in batches(paths, finished, args):
        if good:
            probabilities = evaluation.forward(model, images.to(device)).softmax(dim=1)
            for path, *best in zip(good, *probabilities.topk(top, dim=1)):
                for probability, label in zip(*map(torch.Tensor.tolist, best)):
                    rows.writerow([path, finished.classes[label], f"{probability:.6f}"])
            sys.stdout.flush()
        for error in errors_of_others:
            print(f"error: {error}", file=sys.stderr)
        failed += len(errors_of_others)
        done += len(good) + len(errors_of_others)
        if sys.stderr.isatty() and not sys.stdout.isatty():  # or both would share lines
            end = "\r" if done < len(paths) else "\n"
            print(f"{done} of {len(paths)} images", end=end, file=sys.stderr, flush=True)
    sys.exit(1 if failed else 0)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Label images with a fine-tuned model: CSV on standard output.")
    parser.add_argument("--resume", required=True, type=os.path.expanduser, metavar="CHECKPOINT",
                        help="best_checkpoint.pth of a run, or its checkpoint.pth")
    parser.add_argument("paths", nargs="+", metavar="PATH",
                        help="an image, or a folder with images at any depth")
    parser.add_argument("--top", type=int, default=1, metavar="N",
                        help="rows per image, for the N most probable classes (default: 1)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--num_workers", type=int, default=4, metavar="N")
    parser.add_argument("--trust", action="store_true",
                        help="load a checkpoint that contains more than tensors and plain values; "
                             "this runs the code in it")
    args = parser.parse_args()
    for name, least in (("top", 1), ("batch_size", 1), ("num_workers", 0)):
        if getattr(args, name) < least:
            flag = name if name == "num_workers" else name.replace("_", "-")
            parser.error(f"--{flag} {getattr(args, name)}: must be {least} or more")
    return args


def find_images(paths: List[str]) -> List[str]:
    """The paths of all images below the folders, and of the files. Raises UserError."""
    from datasets import can_open, is_heic, left_out_in_words, list_images

    found = []
    for path in paths:
        if not os.path.exists(path):
            raise errors.UserError(f"{path}: no such file or folder")
        if os.path.isdir(path):
            # A photo that cannot be opened is named, rather than counted.
            images, left_out = list_images(path, lambda file: can_open(file) or is_heic(file))
            if left_out:
                print(f"warning: {path}: {left_out_in_words(left_out)}", file=sys.stderr)
            found += images
        elif not os.path.isfile(path):
            raise errors.UserError(f"{path} is a pipe or a device: pass an image or a folder")
        else:
            found.append(path)
    if not found:
        raise errors.UserError(f"no images in {', '.join(paths)}: pass a folder with images")
    return found


def batches(paths: List[str], finished: Any, args: argparse.Namespace
            ) -> Iterator[Tuple[List[str], Any, List[str]]]:
    """For each batch: paths and images (B, 3, H, W), and an error message for each other image.

    finished: a weights.Finished.
    """
    import torch
    from torch.utils.data import DataLoader

    from deit_plugin import loaders

    def read(path):
        try:
            return finished.transform(finished.loader(path))
        except OSError as error:
            return errors.one_line(error)

    def collate(items):
        good = [(path, image) for path, image in items if not isinstance(image, str)]
        wrong = [text for _, text in items if isinstance(text, str)]
        images = torch.stack([image for _, image in good]) if good else None
        return [path for path, _ in good], images, wrong

    class Photos(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, index):
            return paths[index], read(paths[index])

    yield from DataLoader(Photos(), args.batch_size, collate_fn=collate,
                          **loaders.in_workers(min(args.num_workers, len(paths))))


if __name__ == "__main__":
    errors.guard(main)
