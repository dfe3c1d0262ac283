"""The run in a few lines, printed by the first process before it trains."""

PUBLISHED_STEP = 1024  # images; MoCo v3's: 8 GPUs x 128


def show(run, steps, say):
    """Say what is trained on what, from where, and how.

    run: a plan.Plan; steps: of an epoch; say: a print function.
    """
    args = run.args
    images_a_step = run.processes * args.batch_size
    training, classes = run.datasets[True]
    test, _ = run.datasets[False]
    say(f"Fine-tuning {args.model} on {args.data_set}: {len(training)} training and {len(test)} "
        f"test images, {classes} classes")
    say(f"  start: {_start(run)}")
    say(f"  step: {_count(run.processes, 'process')} x {args.batch_size} images = {images_a_step} "
        f"images; {_count(steps, 'step')} an epoch, {args.epochs} epochs")
    if images_a_step != PUBLISHED_STEP:
        say(f"  published: {PUBLISHED_STEP} images a step{_keeping(run)}")
    say(f"  learning rate: {_rate(run, images_a_step)}, weight decay {args.weight_decay:g}")
    say(f"  evaluation: {_evaluations(args)}, each image once over all processes")
    say(f"  data workers: {args.num_workers} a process, for training and for evaluation")
    say(f"  output: {_output(args)}")


def _keeping(run):
    batch, rest = divmod(PUBLISHED_STEP, run.processes)
    return "" if rest else f"; --batch-size {batch} keeps them"


def _start(run):
    if run.start is None:
        return "random weights (no --resume)"
    if run.continues:
        return f"continued from {run.start_path}, epoch {run.args.start_epoch} comes next"
    return run.start_path + (" (the classifier head is new)" if run.headless else "")


def _rate(run, images_a_step):
    if getattr(run.args, "unscale_lr", False):
        return f"{run.args.lr:g}"
    given = run.recipe["lr"]
    return f"{given:g} x {images_a_step} / 512 = {given * images_a_step / 512:g}"


def _evaluations(args):
    if args.eval_freq == 1:
        return "after every epoch"
    return f"every {args.eval_freq} epochs and after the last"


def _output(args):
    if not args.output_dir:
        return "none (no --output_dir: nothing is saved)"
    saves = "every epoch" if args.save_freq == 1 else f"every {args.save_freq} epochs"
    return f"{args.output_dir}, checkpoint.pth {saves}"


def _count(number, what):
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"
