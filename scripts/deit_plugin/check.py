"""``--check``: all that a launch needs, and every image, without training."""
from multiprocessing.pool import ThreadPool

from . import options
from .errors import REFUSED, UserError, one_line
from .output import RunFolder
from .run import Run


def report(main, args):
    """Check everything, but for what a problem entails; returns the exit status.

    main: DeiT's module; args: options.parse's.
    """
    folder, problems = RunFolder(args), []

    def ask(what, check, *arguments):
        try:
            found = check(*arguments)
            print(f"ok       {what}: {getattr(found, 'path', found)}", flush=True)
            return found
        except UserError as error:
            problems.append(what)
            print(f"PROBLEM  {what}: {error}", flush=True)
            return None

    ask("GPUs", options.check_gpus, args)
    if args.output_dir and not args.eval:
        ask("output", folder.check)
    start = ask("start", folder.find_start, args)
    run = Run(main, args, folder, start)
    if ask("data", _build_datasets, run):
        if start and ask("model", _model, run) and not args.eval:
            print(run.plan())
        ask("images", decode, run.datasets, args.num_workers)
    print(f"not ready: {options.count(len(problems), 'problem')}" if problems else "ready")
    return REFUSED if problems else 0


def _build_datasets(run):
    train, test = (run.build_dataset(is_train, run.args)[0] for is_train in (True, False))
    train.transform = test.transform = None  # to look at images takes no more than to decode them
    return f"{len(train)} train and {len(test)} test images"


def _model(run):
    args, classes = run.args, run.datasets[0].classes
    model = run.create_model(args.model, num_classes=len(classes), drop_rate=args.drop,
                             drop_path_rate=args.drop_path)
    run.create_optimizer(args, model)
    return f"{args.model} takes the weights"


def decode(datasets, num_workers):
    """Decode every image, in threads; the broken ones are listed."""
    images = [(dataset, index) for dataset in datasets for index in range(len(dataset))]
    print(f"decoding {len(images)} images ...", flush=True)
    with ThreadPool(max(1, num_workers)) as pool:
        broken = list(filter(None, pool.map(_why_broken, images)))
    if broken:
        heading = f"{len(broken)} of {len(images)} cannot be decoded; 20 at most are named:"
        raise UserError("\n           ".join([heading, *broken[:20]]))
    return f"all {len(images)} can be decoded"


def _why_broken(image):
    """'', or one line that names the file."""
    dataset, index = image
    try:
        dataset[index]
    except Exception as error:  # whatever it is, the image cannot be trained on
        return one_line(error)
    return ""
