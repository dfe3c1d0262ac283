"""Like DeiT's own, this module knows none of our data sets: ours has to take its place."""


def build_dataset(is_train, args):
    raise RuntimeError(f"the miniature DeiT has no data set {args.data_set!r} of its own")
